"""jfzhang95/pytorch-deeplab-xception: ``ASPP`` (modeling.aspp), ``Decoder`` (modeling.decoder),
``SeparableConv2d`` (modeling.backbone.xception).

``BatchNorm`` is the norm's class, as published; any but ``nn.BatchNorm2d`` runs as a module.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import NormClass, norm_maker
from segkernels.nn.aspp import pyramid
from segkernels.nn.chain import run
from segkernels.nn.pair import Pad, Stage


class SeparableConv2d(nn.Module):
    """Depthwise ``conv1`` (padded by hand for its kernel and rate), ``bn``, ``pointwise``; no
    activation.
    """

    backend: str | None

    def __init__(
        self,
        inplanes: int,
        planes: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = False,
        BatchNorm: NormClass = nn.BatchNorm2d,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        BatchNorm = norm_maker("BatchNorm", BatchNorm)
        self.conv1 = nn.Conv2d(
            inplanes, inplanes, kernel_size, stride, 0, dilation, groups=inplanes, bias=bias
        )
        self.bn = BatchNorm(inplanes)
        self.pointwise = nn.Conv2d(inplanes, planes, 1, bias=bias)

    def layers_in_order(self) -> list[Stage]:
        reach = self.conv1.dilation[0] * (self.conv1.kernel_size[0] - 1)
        before, after = reach // 2, reach - reach // 2  # an even kernel has one more pixel behind
        pad = Pad(before, before) if before == after else nn.ZeroPad2d((before, after) * 2)
        return [pad, self.conv1, self.bn, self.pointwise]

    def forward(self, x: Tensor) -> Tensor:
        return run(x, self.layers_in_order(), backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class _ASPPModule(nn.Module):
    def __init__(
        self, inplanes: int, planes: int, kernel_size: int, dilation: int, BatchNorm: NormClass
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.atrous_conv = nn.Conv2d(
            inplanes, planes, kernel_size, padding=padding, dilation=dilation, bias=False
        )
        self.bn = BatchNorm(planes)
        self.relu = nn.ReLU()
        _initialise(self)  # and again by the ASPP: a seed gives the published weights

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.atrous_conv(x)))


class ASPP(nn.Module):
    """[B, 2048 | 512 (drn) | 320 (mobilenet), H, W] to [B, 256, H, W]."""

    RATES: ClassVar = {16: (1, 6, 12, 18), 8: (1, 12, 24, 36)}
    backend: str | None

    def __init__(
        self,
        backbone: str,
        output_stride: int,
        BatchNorm: NormClass,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if output_stride not in self.RATES:
            raise NotImplementedError(
                f"jfzhang.ASPP: output_stride is 8 or 16\n  output_stride: {output_stride}"
            )
        self.backend = backend
        BatchNorm = norm_maker("BatchNorm", BatchNorm)
        channels = {"drn": 512, "mobilenet": 320}.get(backbone, 2048)
        for i, rate in enumerate(self.RATES[output_stride], 1):
            self.add_module(
                f"aspp{i}", _ASPPModule(channels, 256, 1 if i == 1 else 3, rate, BatchNorm)
            )
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d((1, 1)),
            nn.Conv2d(channels, 256, 1, bias=False),
            BatchNorm(256),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(5 * 256, 256, 1, bias=False)
        self.bn1 = BatchNorm(256)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.5)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        branches = [[getattr(self, f"aspp{i}")] for i in range(1, 5)]
        x = pyramid(x, branches, [self.global_avg_pool], backend=self.backend)
        return self.dropout(self.relu(self.bn1(self.conv1(x))))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class Decoder(nn.Module):
    """``forward(x, low_level_feat)``: [B, 256, H, W], [B, C₁, H₁, W₁] to logits [B, num_classes,
    H₁, W₁]; align_corners is True.
    """

    LOW_LEVEL_CHANNELS: ClassVar = {"resnet": 256, "drn": 256, "xception": 128, "mobilenet": 24}
    backend: str | None

    def __init__(
        self,
        num_classes: int,
        backbone: str,
        BatchNorm: NormClass,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if backbone not in self.LOW_LEVEL_CHANNELS:
            raise NotImplementedError(
                f"jfzhang.Decoder: backbone is one of {sorted(self.LOW_LEVEL_CHANNELS)}"
                f"\n  backbone: {backbone!r}"
            )
        self.backend = backend
        BatchNorm = norm_maker("BatchNorm", BatchNorm)
        self.conv1 = nn.Conv2d(self.LOW_LEVEL_CHANNELS[backbone], 48, 1, bias=False)
        self.bn1 = BatchNorm(48)
        self.relu = nn.ReLU()

        def refinement(channels: int, dropout: float) -> list[nn.Module]:
            conv = nn.Conv2d(channels, 256, 3, padding=1, bias=False)
            return [conv, BatchNorm(256), nn.ReLU(), nn.Dropout(dropout)]

        self.last_conv = nn.Sequential(
            *refinement(256 + 48, 0.5), *refinement(256, 0.1), nn.Conv2d(256, num_classes, 1)
        )
        _initialise(self)

    def forward(self, x: Tensor, low_level_feat: Tensor) -> Tensor:
        low_level = self.relu(self.bn1(self.conv1(low_level_feat)))
        x = F.interpolate(x, low_level.shape[-2:], mode="bilinear", align_corners=True)
        return run(torch.cat([x, low_level], 1), [self.last_conv], backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
