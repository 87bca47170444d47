"""PyTorch-Encoding: encoding.models.sseg.deeplab's ``ASPP_Module``, ``DeepLabV3Head``;
encoding.nn's ``Encoding``; encoding.models.sseg.encnet's ``EncModule``.

Source: Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017; Zhang et
al., "Context Encoding for Semantic Segmentation", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import NormClass, norm_maker, several
from segkernels.nn.aspp import pyramid
from segkernels.nn.enc_module import emphasised
from segkernels.nn.encoding import Encoding as _Encoding
from segkernels.ops.encode import encode


def ASPPConv(
    in_channels: int, out_channels: int, atrous_rate: int, norm_layer: NormClass
) -> nn.Sequential:
    conv = nn.Conv2d(
        in_channels, out_channels, 3, padding=atrous_rate, dilation=atrous_rate, bias=False
    )
    return nn.Sequential(conv, norm_layer(out_channels), nn.ReLU(True))


class AsppPooling(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_layer: NormClass,
        up_kwargs: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        self._up_kwargs = up_kwargs or {"mode": "bilinear", "align_corners": True}
        self.gap = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            norm_layer(out_channels),
            nn.ReLU(True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.gap(x), x.shape[-2:], **self._up_kwargs)


class ASPP_Module(nn.Module):
    """[B, C, H, W] to [B, C/8, H, W]; ``b0`` 1x1, ``b1``-``b3`` atrous, ``b4`` image pooling."""

    backend: str | None

    def __init__(
        self,
        in_channels: int,
        atrous_rates: Sequence[int],
        norm_layer: NormClass = nn.BatchNorm2d,
        up_kwargs: dict[str, Any] | None = None,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        width = in_channels // 8
        rate1, rate2, rate3 = several("encoding.ASPP_Module", 3, atrous_rates=atrous_rates)
        norm_layer = norm_maker("norm_layer", norm_layer)
        self.b0 = nn.Sequential(
            nn.Conv2d(in_channels, width, 1, bias=False), norm_layer(width), nn.ReLU(True)
        )
        self.b1 = ASPPConv(in_channels, width, rate1, norm_layer)
        self.b2 = ASPPConv(in_channels, width, rate2, norm_layer)
        self.b3 = ASPPConv(in_channels, width, rate3, norm_layer)
        self.b4 = AsppPooling(in_channels, width, norm_layer, up_kwargs)
        self.project = nn.Sequential(
            nn.Conv2d(5 * width, width, 1, bias=False),
            norm_layer(width),
            nn.ReLU(True),
            nn.Dropout2d(0.5),
        )

    def forward(self, x: Tensor) -> Tensor:
        branches = [[self.b0], [self.b1], [self.b2], [self.b3]]
        return self.project(pyramid(x, branches, [self.b4], backend=self.backend))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class DeepLabV3Head(nn.Module):
    """[B, C, H, W] to logits [B, out_channels, H, W]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_layer: NormClass = nn.BatchNorm2d,
        up_kwargs: dict[str, Any] | None = None,
        atrous_rates: Sequence[int] = (12, 24, 36),
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        width = in_channels // 8
        norm_layer = norm_maker("norm_layer", norm_layer)
        self.aspp = ASPP_Module(in_channels, atrous_rates, norm_layer, up_kwargs, backend=backend)
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            norm_layer(width),
            nn.ReLU(True),
            nn.Dropout(0.1),
            nn.Conv2d(width, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.aspp(x))


class Encoding(_Encoding):
    """[B, D, H, W] or [B, D, N] to [B, K, D]. Keys: ``codewords``, ``scale``."""

    def __init__(self, D: int, K: int, *, backend: str | None = None) -> None:
        super().__init__(D, K, backend=backend)
        self.D, self.K = D, K

    def forward(self, X: Tensor) -> Tensor:
        maps = X[..., None] if X.dim() == 3 else X
        return encode(maps, self.codewords, self.scale, backend=self.backend)


class Mean(nn.Module):
    def __init__(self, dim: int, keep_dim: bool = False) -> None:
        super().__init__()
        self.dim, self.keep_dim = dim, keep_dim

    def forward(self, input: Tensor) -> Tensor:
        return input.mean(self.dim, self.keep_dim)


class EncModule(nn.Module):
    """[B, C, H, W] to a tuple: the map with its channels weighted and, with ``se_loss``, the logits
    [B, nclass] of the classes' presence.

    norm_layer: sees the encoding as a map [B, K, C, 1].
    """

    def __init__(
        self,
        in_channels: int,
        nclass: int,
        ncodes: int = 32,
        se_loss: bool = True,
        norm_layer: NormClass = nn.BatchNorm2d,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_maker("norm_layer", norm_layer)
        self.se_loss = se_loss
        self.encoding = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 1, bias=False),
            norm_layer(in_channels),
            nn.ReLU(inplace=True),
            Encoding(in_channels, ncodes, backend=backend),
            norm_layer(ncodes),
            nn.ReLU(inplace=True),
            Mean(1),
        )
        self.fc = nn.Sequential(nn.Linear(in_channels, in_channels), nn.Sigmoid())
        if se_loss:
            self.selayer = nn.Linear(in_channels, nclass)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        conv, norm, relu, encoding, code_norm, code_relu, mean = self.encoding
        e = encoding(relu(norm(conv(x))))  # [B, K, C]
        v = mean(code_relu(code_norm(e[..., None])[..., 0]))  # [B, C]
        y = emphasised(x, self.fc(v))
        return (y, self.selayer(v)) if self.se_loss else (y,)
