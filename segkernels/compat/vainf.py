"""VainF/DeepLabV3Plus-Pytorch, network._deeplab: ``ASPP``, ``AtrousSeparableConvolution``,
``DeepLabHead``, ``DeepLabHeadV3Plus``, ``convert_to_separable_conv``.

Between depthwise and pointwise there is nothing here; the decoder concatenates [low-level, ASPP].

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.compat import torchvision
from segkernels.compat.torchvision import ASPPConv
from segkernels.nn.arguments import several
from segkernels.nn.chain import run

Size = int | tuple[int, int]


class AtrousSeparableConvolution(nn.Module):
    """Keys ``body.0`` (depthwise) and ``body.1`` (pointwise); ``bias`` applies to both."""

    backend: str | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.body = nn.Sequential(
            nn.Conv2d(
                in_channels, in_channels, kernel_size, stride, padding, dilation, in_channels, bias
            ),
            nn.Conv2d(in_channels, out_channels, 1, bias=bias),
        )
        _initialise(self)

    def layers_in_order(self) -> list[nn.Module]:
        return [self.body]

    def forward(self, x: Tensor) -> Tensor:
        return run(x, [self.body], backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class ASPP(torchvision.ASPP):
    """256 channels, three rates."""

    def __init__(
        self, in_channels: int, atrous_rates: Sequence[int], *, backend: str | None = None
    ) -> None:
        nn.Module.__init__(self)
        rates = several("vainf.ASPP", 3, atrous_rates=atrous_rates)
        self._build(
            in_channels,
            256,
            (ASPPConv(in_channels, 256, rate) for rate in rates),
            0.1,
            backend,
        )
        for part in self.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = True


class DeepLabHead(nn.Module):
    """``forward({"out": [B, in_channels, H, W]})`` to logits [B, num_classes, H, W]."""

    backend: str | None

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        aspp_dilate: Sequence[int] = (12, 24, 36),
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.classifier = nn.Sequential(
            ASPP(in_channels, aspp_dilate, backend=backend), *_classifier(256, num_classes)
        )
        _initialise(self)

    def forward(self, feature: Mapping[str, Tensor]) -> Tensor:
        return run(feature["out"], [self.classifier], backend=self.backend)


class DeepLabHeadV3Plus(nn.Module):
    """``forward({"low_level": [B, C₁, H₁, W₁], "out": [B, C, H, W]})`` to logits [B, num_classes,
    H₁, W₁].
    """

    backend: str | None

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        num_classes: int,
        aspp_dilate: Sequence[int] = (12, 24, 36),
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.project = nn.Sequential(
            nn.Conv2d(low_level_channels, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU(True)
        )
        self.aspp = ASPP(in_channels, aspp_dilate, backend=backend)
        self.classifier = nn.Sequential(*_classifier(48 + 256, num_classes))
        _initialise(self)

    def forward(self, feature: Mapping[str, Tensor]) -> Tensor:
        low_level = self.project(feature["low_level"])
        context = F.interpolate(
            self.aspp(feature["out"]), low_level.shape[-2:], mode="bilinear", align_corners=False
        )
        return run(torch.cat([low_level, context], 1), [self.classifier], backend=self.backend)


def convert_to_separable_conv(module: nn.Module, *, backend: str | None = None) -> nn.Module:
    """Every convolution with a kernel larger than 1 below ``module`` becomes a new
    ``AtrousSeparableConvolution``, in place.
    """
    if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
        conv = module
        return AtrousSeparableConvolution(
            conv.in_channels,
            conv.out_channels,
            (conv.kernel_size[0], conv.kernel_size[1]),
            (conv.stride[0], conv.stride[1]),
            conv.padding,  # type: ignore[arg-type]
            (conv.dilation[0], conv.dilation[1]),
            conv.bias is not None,
            backend=backend,
        )
    for name, child in module.named_children():
        module.add_module(name, convert_to_separable_conv(child, backend=backend))
    return module


def _classifier(channels: int, num_classes: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, 256, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(256), nn.ReLU(True), nn.Conv2d(256, num_classes, 1)]


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
