"""Xception-65 with atrous separable convolutions throughout.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.3 and
figure 4; Chollet, "Xception", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from segkernels.networks.features import Features
from segkernels.nn import SeparableConv2d
from segkernels.nn.arguments import NormClass, check_positive, norm_maker, unit_rates


def batch_norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Three separable convolutions (the last with the stride) beside a shortcut.

    widths: of the three. rates: likewise. shortcut: "conv" (1x1 with the stride), "sum" or "none".
    inner_activation: ReLU behind both halves of every convolution; else one ReLU before each, and
    norms alone inside. ``forward`` also returns the second convolution's output.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        *,
        stride: int = 1,
        rates: Sequence[int] = (1, 1, 1),
        shortcut: str,
        inner_activation: bool = False,
        norm: NormClass,
        backend: str | None,
    ) -> None:
        super().__init__()
        activation = "relu" if inner_activation else None
        self.relu = None if inner_activation else nn.ReLU()
        self.convs = nn.ModuleList(
            SeparableConv2d(
                channels,
                width,
                stride=stride if i == 2 else 1,
                dilation=rates[i],
                inner_norm=norm,
                inner_activation=activation,
                outer_norm=norm,
                outer_activation=activation,
                backend=backend,
            )
            for i, (channels, width) in enumerate(zip([in_channels, *widths], widths, strict=False))
        )
        self.shortcut: nn.Module | None = None
        if shortcut == "conv":
            conv = nn.Conv2d(in_channels, widths[-1], 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, norm(widths[-1]))
        elif shortcut == "sum":
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, maps = x, []
        for conv in self.convs:
            y = conv(y if self.relu is None else self.relu(y))
            maps.append(y)
        return (y if self.shortcut is None else y + self.shortcut(x)), maps[1]


class Xception65(nn.Module):
    """[B, in_channels, H, W] to the outputs of the second convolution of entry block 2 (stride 4),
    of this block (stride 8), of the middle flow and of the last block.

    output_stride: 8, 16 or 32; past it strides become rates. multigrid: unit rates of the last
    block's convolutions. norm: eps 1e-3 by default, as published. ``channels``: of the four
    outputs. Images in [-1, 1].

    With the published weights the features are the published ones. What training begins with is
    torch's: initial weights (published: truncated normal, deviation 0.09) and momentum (0.1;
    published: 0.0003).
    """

    channels = (256, 256, 728, 2048)

    def __init__(
        self,
        output_stride: int = 16,
        *,
        in_channels: int = 3,
        multigrid: Sequence[int] | None = None,
        norm: NormClass = nn.BatchNorm2d,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        norm = norm_maker("norm", batch_norm if norm is nn.BatchNorm2d else norm)
        grid = unit_rates("xception65", 3, (1, 1, 1) if multigrid is None else multigrid)
        check_positive("xception65", in_channels=in_channels)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, 2, 1, bias=False),
            norm(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, 1, 1, bias=False),
            norm(64),
            nn.ReLU(),
        )
        at, rate = 2, 1

        def down(channels: int, *widths: int) -> Block:
            """A block of stride 2, or, past the output stride, of stride 1 and rates behind it."""
            nonlocal at, rate
            stride = 2 if at < output_stride else 1
            rates = (rate,) * 3
            at, rate = at * stride, rate * 2 // stride
            return Block(
                channels,
                widths,
                stride=stride,
                rates=rates,
                shortcut="conv",
                norm=norm,
                backend=backend,
            )

        self.entry = nn.ModuleList(
            [down(64, 128, 128, 128), down(128, 256, 256, 256), down(256, 728, 728, 728)]
        )
        middle = (rate,) * 3
        self.middle = nn.ModuleList(
            Block(728, (728,) * 3, rates=middle, shortcut="sum", norm=norm, backend=backend)
            for _ in range(16)
        )
        self.exit = nn.ModuleList(
            [
                down(728, 728, 1024, 1024),
                Block(
                    1024,
                    (1536, 1536, 2048),
                    rates=tuple(rate * unit for unit in grid),
                    shortcut="none",
                    inner_activation=True,
                    norm=norm,
                    backend=backend,
                ),
            ]
        )

    def forward(self, x: Tensor) -> Features:
        x = self.stem(x)
        x, _ = self.entry[0](x)
        second, low_level = self.entry[1](x)
        third = self._through(second, self.entry[2], *self.middle)
        return Features(low_level, second, third, self._through(third, *self.exit))

    def _through(self, x: Tensor, *blocks: nn.Module) -> Tensor:
        for block in blocks:
            x, _ = block(x)
        return x
