"""Atrous separable convolution as a layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from segkernels.nn.arguments import (
    Activation,
    NormClass,
    check_positive,
    make_activation,
    make_norm,
)
from segkernels.nn.chain import run
from segkernels.nn.depthwise_conv2d import DepthwiseConv2d

Size = int | tuple[int, int]
Norm = NormClass | None


class SeparableConv2d(nn.Module):
    """y = φ₂(N₂(v · φ₁(N₁(w ⊛ x)))): depthwise, norm, activation, pointwise, norm, activation, as
    one operator.

    in_channels, out_channels: C, D. kernel_size: odd. stride, dilation: int or (rows, columns).
    padding: "same", an int or a pair. inner_norm, outer_norm: called with the number of channels,
    or None. inner_activation, outer_activation: "relu", "relu6", a callable that makes a module, or
    None. bias: of both convolutions; None: only of one without a norm behind it. backend: "native",
    "triton", "reference" or None.

    Input [B, C, H, W], output [B, D, H', W'] in the input's memory format. Children: ``depthwise``,
    ``inner_norm``, ``inner_activation``, ``pointwise``, ``outer_norm``, ``outer_activation``. The
    norms are modules of their own and are read at every call: BatchNorm2d is fused (in training
    with the batch's moments, its running statistics move as they do without us), any other norm or
    activation runs as a module between the operators. See :mod:`segkernels.nn.chain` for hooks.

    The defaults are DeepLabv3+'s (norm and ReLU after both convolutions).

    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section
    3.1; Chollet, "Xception", CVPR 2017.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Literal["same"] | Size = "same",
        dilation: Size = 1,
        *,
        inner_norm: Norm = nn.BatchNorm2d,
        inner_activation: Activation = "relu",
        outer_norm: Norm = nn.BatchNorm2d,
        outer_activation: Activation = "relu",
        bias: bool | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("SeparableConv2d", in_channels=in_channels, out_channels=out_channels)
        self.backend = backend
        inner_bias, outer_bias = (
            norm is None if bias is None else bias for norm in (inner_norm, outer_norm)
        )
        self.depthwise = DepthwiseConv2d(
            in_channels, kernel_size, stride, padding, dilation, inner_bias, backend=backend
        )
        self.inner_norm = make_norm("inner_norm", inner_norm, in_channels)
        self.inner_activation = make_activation("inner_activation", inner_activation)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=outer_bias)
        self.outer_norm = make_norm("outer_norm", outer_norm, out_channels)
        self.outer_activation = make_activation("outer_activation", outer_activation)

    def layers_in_order(self) -> list[nn.Module | None]:
        return [
            self.depthwise,
            self.inner_norm,
            self.inner_activation,
            self.pointwise,
            self.outer_norm,
            self.outer_activation,
        ]

    def forward(self, x: Tensor) -> Tensor:
        return run(x, self.layers_in_order(), backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
