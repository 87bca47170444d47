"""Atrous spatial pyramid pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segkernels.nn.arguments import (
    Activation,
    check_positive,
    make_activation,
    make_norm,
    several,
)
from segkernels.nn.chain import run, side_by_side
from segkernels.nn.pair import Stage
from segkernels.nn.separable_conv2d import Norm, SeparableConv2d, Size
from segkernels.ops.geometry import pair
from segkernels.overrides import overridable


@overridable
def pyramid(
    x: Tensor,
    branches: Sequence[Sequence[Stage | None]],
    pool: Sequence[Stage | None] | None,
    *,
    pool_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The branches of an ASPP over x: [B, C, H, W], concatenated: [B, ΣD, H, W].

    The separable branches share one call. pool: the image-level branch, which must end at 1x1 or
    at H x W; one pixel is spread over the map (its bilinear interpolation is constant, whatever
    ``align_corners`` says).
    """
    maps = side_by_side(x, branches, backend=backend)
    if pool is not None:
        image = run(x, pool, backend=backend)  # [B, D, 1, 1] or [B, D, H, W]
        spread = image.expand(-1, -1, *x.shape[-2:])
        maps = [spread, *maps] if pool_first else [*maps, spread]
    return torch.cat(maps, 1)


def conv_norm_activation(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    dilation: Size = 1,
    *,
    norm: Norm,
    activation: Activation,
) -> nn.Sequential:
    """Full convolution with "same" padding (biased if no norm follows), norm, activation."""
    rate = (dilation, dilation) if isinstance(dilation, int) else dilation
    padding = (rate[0] * (kernel_size // 2), rate[1] * (kernel_size // 2))
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=padding, dilation=rate, bias=norm is None
    )
    return nn.Sequential(
        *filter(
            None,
            (
                conv,
                make_norm("norm", norm, out_channels),
                make_activation("activation", activation),
            ),
        )
    )


class ASPP(nn.Module):
    """1x1 convolution, 3x3 convolutions at several rates, and image-level pooling side by side;
    concatenation; 1x1 projection.

    in_channels, out_channels: C, D (every branch and the result). rates: of the 3x3 branches, ints
    or (rows, columns). separable: 3x3 branches as :class:`SeparableConv2d`, which share one call
    over x; else full convolutions. image_pooling, dropout (after the projection): as the paper's.
    norm, activation: as :class:`SeparableConv2d`. backend: "native", "triton", "reference" or None.

    Input [B, C, H, W], output [B, D, H, W]. Training with BatchNorm needs B > 1 (image pooling
    leaves one value a channel and image). Children: ``branches``, ``pool``, ``project``.

    Source: Chen et al., "Rethinking Atrous Convolution", 2017, section 3.3; separable:
    "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        rates: Sequence[Size] = (6, 12, 18),
        *,
        separable: bool = True,
        image_pooling: bool = True,
        dropout: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
        activation: Activation = "relu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("ASPP", in_channels=in_channels, out_channels=out_channels)
        pairs = [pair("ASPP", "rates", rate, 1) for rate in several("ASPP", rates=rates)]
        self.backend = backend

        def full(channels: int, kernel_size: int, rate: Size = 1) -> nn.Sequential:
            return conv_norm_activation(
                channels, out_channels, kernel_size, rate, norm=norm, activation=activation
            )

        def atrous(rate: Size) -> nn.Module:
            if not separable:
                return full(in_channels, 3, rate)
            return SeparableConv2d(
                in_channels,
                out_channels,
                dilation=rate,
                inner_norm=norm,
                inner_activation=activation,
                outer_norm=norm,
                outer_activation=activation,
                backend=backend,
            )

        self.branches = nn.ModuleList([full(in_channels, 1), *map(atrous, pairs)])
        self.pool = (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), *full(in_channels, 1)) if image_pooling else None
        )
        width = out_channels * (len(self.branches) + image_pooling)
        self.project = nn.Sequential(*full(width, 1), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        pool = None if self.pool is None else [self.pool]
        return self.project(
            pyramid(x, [[branch] for branch in self.branches], pool, backend=self.backend)
        )

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
