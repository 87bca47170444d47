"""segmentation_models_pytorch.decoders.deeplabv3.decoder: ``SeparableConv2d``, ``ASPP``,
``DeepLabV3Decoder``, ``DeepLabV3PlusDecoder``.

Between depthwise and pointwise there is nothing here; the norm and ReLU behind a
``SeparableConv2d`` are its parent's, which fuses them.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segkernels.compat import torchvision
from segkernels.compat.torchvision import ASPPConv
from segkernels.nn.arguments import several
from segkernels.nn.chain import run


class SeparableConv2d(nn.Sequential):
    """Keys ``0`` (depthwise, never a bias) and ``1`` (pointwise; ``bias`` is its own)."""

    backend: str | None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels,
                in_channels,
                kernel_size,
                stride,
                padding,
                dilation,
                groups=in_channels,
                bias=False,
            ),
            nn.Conv2d(in_channels, out_channels, 1, bias=bias),
        )
        self.backend = backend

    def layers_in_order(self) -> list[nn.Module]:
        return list(self)

    def forward(self, x: Tensor) -> Tensor:
        return run(x, list(self), backend=self.backend)


class ASPPSeparableConv(nn.Sequential):
    backend: str | None = None

    def __init__(
        self, in_channels: int, out_channels: int, dilation: int, *, backend: str | None = None
    ) -> None:
        super().__init__(
            SeparableConv2d(
                in_channels,
                out_channels,
                3,
                padding=dilation,
                dilation=dilation,
                bias=False,
                backend=backend,
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )
        self.backend = backend

    def layers_in_order(self) -> list[nn.Module]:
        return list(self)

    def forward(self, x: Tensor) -> Tensor:
        return run(x, list(self), backend=self.backend)


class ASPP(torchvision.ASPP):
    """Three rates. separable: the 3x3 branches are depthwise + pointwise, in one call over x."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        atrous_rates: Iterable[int],
        separable: bool = False,
        dropout: float = 0.5,
        *,
        backend: str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        rates = several("smp.ASPP", 3, atrous_rates=atrous_rates)

        def atrous(rate: int) -> nn.Module:
            if separable:
                return ASPPSeparableConv(in_channels, out_channels, rate, backend=backend)
            return ASPPConv(in_channels, out_channels, rate)

        self._build(in_channels, out_channels, map(atrous, rates), dropout, backend)


class DeepLabV3Decoder(nn.Module):
    """ASPP, 3x3 convolution, norm, ReLU on the last feature map. Older checkpoints (keys ``0``,
    ``1``, ``2``) load as well.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        atrous_rates: Iterable[int],
        aspp_separable: bool,
        aspp_dropout: float,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.aspp = ASPP(
            in_channels, out_channels, atrous_rates, aspp_separable, aspp_dropout, backend=backend
        )
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.relu(self.bn(self.conv(self.aspp(features[-1]))))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = {"0": "aspp", "1": "conv", "2": "bn"}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            first, _, rest = key.removeprefix(prefix).partition(".")
            if first in names:
                state_dict[f"{prefix}{names[first]}.{rest}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DeepLabV3PlusDecoder(nn.Module):
    """``forward(features)``: the encoder's maps, fine to coarse; reads the third and the last."""

    backend: str | None

    def __init__(
        self,
        encoder_channels: Sequence[int],
        encoder_depth: int,
        out_channels: int,
        atrous_rates: Iterable[int],
        output_stride: int,
        aspp_separable: bool,
        aspp_dropout: float,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if encoder_depth < 3:
            raise ValueError(
                "DeepLabV3PlusDecoder needs an encoder of depth 3 or more"
                f"\n  encoder_depth: {encoder_depth}"
            )
        self.backend = backend
        deep, low_level, width = encoder_channels[-1], encoder_channels[2], 48

        def separable(channels: int) -> list[nn.Module]:
            conv = SeparableConv2d(
                channels, out_channels, 3, padding=1, bias=False, backend=backend
            )
            return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]

        aspp = ASPP(deep, out_channels, atrous_rates, aspp_separable, aspp_dropout, backend=backend)
        self.aspp = nn.Sequential(aspp, *separable(out_channels))
        scale = 4 if output_stride == 16 and encoder_depth > 3 else 2
        self.up = nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=True)
        self.block1 = nn.Sequential(
            nn.Conv2d(low_level, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block2 = nn.Sequential(*separable(width + out_channels))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        context = self.up(run(features[-1], [self.aspp], backend=self.backend))
        both = torch.cat([context, self.block1(features[2])], 1)
        return run(both, [self.block2], backend=self.backend)
