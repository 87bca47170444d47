"""libs.models.deeplabv3: ``_ASPP``.

Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, section
3.3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import several
from segkernels.nn.aspp import pyramid


class _ConvBnReLU(nn.Sequential):
    def __init__(
        self, in_ch: int, out_ch: int, kernel_size: int, padding: int, dilation: int
    ) -> None:
        conv = nn.Conv2d(in_ch, out_ch, kernel_size, padding=padding, dilation=dilation, bias=False)
        norm = nn.BatchNorm2d(out_ch, momentum=1 - 0.999)
        super().__init__(OrderedDict(conv=conv, bn=norm, relu=nn.ReLU()))


class _ImagePool(nn.Module):
    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv = _ConvBnReLU(in_ch, out_ch, 1, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = self.conv(self.pool(x))
        return F.interpolate(image, x.shape[-2:], mode="bilinear", align_corners=False)


class _ASPP(nn.Module):
    """Concatenation only: [B, in_ch, H, W] to [B, (rates + 2)·out_ch, H, W]. Keys ``stages.c{i}``,
    ``stages.imagepool``.
    """

    def __init__(
        self, in_ch: int, out_ch: int, rates: Sequence[int], *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.backend = backend
        self.stages = nn.Module()
        self.stages.add_module("c0", _ConvBnReLU(in_ch, out_ch, 1, 0, 1))
        for i, rate in enumerate(several("deeplabv3._ASPP", rates=rates), 1):
            self.stages.add_module(f"c{i}", _ConvBnReLU(in_ch, out_ch, 3, rate, rate))
        self.stages.add_module("imagepool", _ImagePool(in_ch, out_ch))

    def forward(self, x: Tensor) -> Tensor:
        *branches, pool = self.stages.children()
        return pyramid(x, [[branch] for branch in branches], [pool], backend=self.backend)
