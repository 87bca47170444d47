"""Tiny classes that stand for the published ones under their names, for :mod:`segkernels.patch`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMP = "segmentation_models_pytorch.decoders.deeplabv3.decoder"
MMCV = "mmcv.cnn.bricks"
EMA = "mmseg.models.decode_heads.ema_head"


class SeparableConv2d(nn.Sequential):
    def __init__(self, channels: int, out: int, rate: int) -> None:
        conv = nn.Conv2d(channels, channels, 3, 1, rate, rate, channels, bias=False)
        super().__init__(conv, nn.Conv2d(channels, out, 1, bias=False))


class ASPPPooling(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        conv = nn.Conv2d(channels, out, 1, bias=False)
        super().__init__(nn.AdaptiveAvgPool2d(1), conv, nn.BatchNorm2d(out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(super().forward(x), x.shape[-2:], mode="bilinear")


class ASPP(nn.Module):
    def __init__(self, channels: int, out: int, separable: bool = True) -> None:
        super().__init__()

        def branch(conv: nn.Module) -> nn.Module:
            return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU())

        def atrous(rate: int) -> nn.Module:
            full = nn.Conv2d(channels, out, 3, 1, rate, rate, bias=False)
            return SeparableConv2d(channels, out, rate) if separable else full

        convs = [nn.Conv2d(channels, out, 1, bias=False), *(atrous(rate) for rate in (1, 2, 3))]
        self.convs = nn.ModuleList([*map(branch, convs), ASPPPooling(channels, out)])
        self.project = branch(nn.Conv2d(5 * out, out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([conv(x) for conv in self.convs], 1))


class ConvModule(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.order = ("conv", "norm", "act")
        self.with_norm = self.with_activation = True
        self.with_explicit_padding = False
        self.conv, self.bn, self.activate = conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()

    @property
    def norm(self) -> nn.Module:
        return self.bn

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        return self.activate(self.bn(self.conv(x)))


class DepthwiseSeparableConvModule(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(nn.Conv2d(channels, channels, 3, 1, 1, 1, channels))
        self.pointwise_conv = ConvModule(nn.Conv2d(channels, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class Encoding(nn.Module):
    """The equations, with their tensor of pixels, codewords and channels."""

    def __init__(self, channels: int, num_codes: int) -> None:
        super().__init__()
        self.codewords = nn.Parameter(torch.randn(num_codes, channels))
        self.scale = nn.Parameter(-torch.rand(num_codes))

    def forward(self, x: Tensor) -> Tensor:
        residuals = x.flatten(2).mT[:, :, None] - self.codewords  # [B, N, K, C]
        q = (self.scale * residuals.square().sum(3)).softmax(2)
        return (q[..., None] * residuals).sum(1)


class GraphNet(nn.Module):
    """The equations, with the published way of reading [B, K, C] as [B, C, K]."""

    def __init__(self, node_num: int, dim: int) -> None:
        super().__init__()
        self.normalize_input = True
        self.anchor = nn.Parameter(torch.rand(node_num, dim))
        self.sigma = nn.Parameter(torch.rand(node_num, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.normalize(x, dim=1)
        residuals = (x.flatten(2).mT[:, :, None] - self.anchor) / self.sigma.sigmoid()
        q = (-residuals.square().sum(3) / 2).softmax(2)  # [B, N, K]
        nodes = F.normalize((q[..., None] * residuals).sum(1) / q.sum(1)[..., None], dim=2)
        nodes = F.normalize(nodes.flatten(1), dim=1)
        return nodes.reshape(len(x), x.shape[1], -1), q.mT


def fitted(
    x: Tensor, mu: Tensor, iterations: int, normalise: Callable[[Tensor, int, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """EM without gradients: the reconstruction of x and the bases [B, C, K]."""
    t = x.flatten(2)
    with torch.no_grad():
        mu = mu.expand(len(x), -1, -1)
        for _ in range(iterations):
            z = (t.mT @ mu).softmax(2)  # [B, N, K]
            mu = normalise(t @ normalise(z, 1, 1), 2, 1)
        return (mu @ z.mT).view_as(x), mu


def additive(x: Tensor, order: int, dim: int) -> Tensor:
    return x / (1e-6 + x.norm(order, dim, keepdim=True))


class EMAU(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.stage_num = 3
        self.register_buffer("mu", F.normalize(torch.randn(1, c, k), dim=1))
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, mu = fitted(self.conv1(x), self.mu, self.stage_num, additive)
        return (self.conv2(y.relu()) + x).relu(), mu


class EMAModule(nn.Module):
    def __init__(self, channels: int, num_bases: int) -> None:
        super().__init__()
        self.num_stages, self.momentum = 2, 0.1
        self.register_buffer("bases", F.normalize(torch.randn(1, channels, num_bases), dim=1))

    def forward(self, feats: Tensor) -> Tensor:
        y, bases = fitted(feats, self.bases, self.num_stages, F.normalize)
        if self.training:
            mean = F.normalize(bases.mean(0, keepdim=True), dim=1)
            self.bases = (1 - self.momentum) * self.bases + self.momentum * mean
        return y


class EMAHead(nn.Module):
    def __init__(self, channels: int, num_bases: int) -> None:
        super().__init__()
        self.in_index, self.input_transform, self.dropout, self.backend = -1, None, None, None
        self.concat_input = False
        self.ema_module = EMAModule(channels, num_bases)
        for name in ("ema_in_conv", "ema_mid_conv", "ema_out_conv", "bottleneck"):
            setattr(self, name, ConvModule(nn.Conv2d(channels, channels, 1)))
        self.ema_mid_conv.requires_grad_(False).order = ("conv",)
        self.conv_seg = nn.Conv2d(channels, 2, 1)

    def _transform_inputs(self, inputs: list[Tensor]) -> Tensor:
        return inputs[self.in_index]

    def cls_seg(self, feat: Tensor) -> Tensor:
        return self.conv_seg(feat)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        feats = self.ema_in_conv(self._transform_inputs(inputs))
        y = self.ema_out_conv(self.ema_module(self.ema_mid_conv.conv(feats)).relu())
        return self.cls_seg(self.bottleneck((y + feats).relu()))


PLACES = {
    "network": (EMAU,),
    EMA: (EMAModule, EMAHead),
    "mmseg.models.utils.encoding": (Encoding,),
    "model.basicnet": (GraphNet,),
    SMP: (SeparableConv2d, ASPPPooling, ASPP),
    f"{MMCV}.conv_module": (ConvModule,),
    f"{MMCV}.depthwise_separable_conv_module": (DepthwiseSeparableConvModule,),
}
