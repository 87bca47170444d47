"""torchvision.models.segmentation.deeplabv3: ``ASPP``, ``DeepLabHead``.

Keys: ``convs.{i}`` (1x1, atrous..., image pooling), ``project``.

Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, section
3.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import several
from segkernels.nn.aspp import pyramid


class ASPPConv(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class ASPPPooling(nn.Sequential):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        image: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return F.interpolate(image, x.shape[-2:], mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    """[B, in_channels, H, W] to [B, out_channels, H, W]; any number of rates."""

    backend: str | None

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        out_channels: int = 256,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._build(
            in_channels,
            out_channels,
            (
                ASPPConv(in_channels, out_channels, rate)
                for rate in several("torchvision.ASPP", atrous_rates=atrous_rates)
            ),
            0.5,
            backend,
        )

    def _build(
        self,
        in_channels: int,
        out_channels: int,
        atrous: Iterable[nn.Module],
        dropout: float,
        backend: str | None,
    ) -> None:
        self.backend = backend
        pointwise = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )
        self.convs = nn.ModuleList([pointwise, *atrous, ASPPPooling(in_channels, out_channels)])
        self.project = nn.Sequential(
            nn.Conv2d(len(self.convs) * out_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        *branches, pool = self.convs
        return self.project(
            pyramid(x, [[branch] for branch in branches], [pool], backend=self.backend)
        )

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class DeepLabHead(nn.Sequential):
    """[B, in_channels, H, W] to logits [B, num_classes, H, W]."""

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        atrous_rates: Sequence[int] = (12, 24, 36),
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            ASPP(in_channels, atrous_rates, backend=backend),
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.Conv2d(256, num_classes, 1),
        )
