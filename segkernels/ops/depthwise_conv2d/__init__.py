r"""Atrous depthwise convolution: every channel has its own window, at one or several rates.

.. math::
    y_{r,c}(i, j) = b_{r,c} + \sum_{a,e} w_{r,c}(a, e) \, x_c(s_h i + d_h^r a - p_h^r, \; s_w j +
    d_w^r e - p_w^r)

    dx_c(m, n) = \sum_{r,a,e} w_{r,c}(a, e) \, dy_{r,c}(\cdot) \qquad
    dw_{r,c}(a, e) = \sum_{i,j} dy_{r,c}(i, j) \, x_c(\cdot) \qquad db_{r,c} = \sum_{i,j}
    dy_{r,c}(i, j)

(x is zero outside the map.) dx and dw read the same cotangents, so the backward is one pass over
memory.

========  =====================  ===========================================================
symbol    argument               shape
========  =====================  ===========================================================
x         ``x``                  [B, C, H, W]
w         ``weight``             [C, 1, k_h, k_w], or [R, C, 1, k_h, k_w] for R rates over one x
b         ``bias``               [C], or [R, C]
s, p, d   stride, padding, dilation   rows and columns; p and d one pair a rate
y         result                 [B, R*C, H', W']
========  =====================  ===========================================================

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.1.
"""

from __future__ import annotations

from torch import Tensor

from segkernels import fused
from segkernels.fused import UnsupportedInputError
from segkernels.ops.arguments import check_tensors
from segkernels.ops.geometry import (
    Padding,
    Rates,
    Size,
    beyond_the_kernels,
    check_map,
    one_per_channel,
    unflatten,
    window,
)
from segkernels.overrides import overridable

__all__ = ["depthwise_conv2d"]


@overridable
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Rates = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Depthwise convolution with any rates, anisotropic or larger than the map.

    x: [B, C, H, W], any strides. weight: [C, 1, k_h, k_w] with odd k_h, k_w, or [R, C, 1, k_h,
    k_w]: R rates that share x, read once; ``dilation`` is then a list of R ints or pairs. bias: [C]
    or [R, C]. stride: int or pair. padding: "same" (d(k-1)/2), an int or a pair of pixels (a list
    of R of them for R rates). dilation: int or pair (rows, columns). backend: "native", "triton",
    "reference" or None (automatic).

    Returns [B, C, H', W'] in x's memory format, or [B, R*C, H', W'], rate by rate. Raises
    UnsupportedInputError for arguments that describe no convolution and BackendUnavailableError
    when the backend asked for cannot run.
    """
    biases = {} if bias is None else {"bias": bias}
    check_tensors("depthwise_conv2d", x=x, weight=weight, **biases)
    shape = window("depthwise_conv2d", weight, stride, padding, dilation)
    check_map("depthwise_conv2d", x, weight, shape)
    w = weight.reshape(
        len(shape.dilation), x.shape[1], *shape.kernel
    ).contiguous()  # [R, C, k_h, k_w]
    b = bias
    if b is not None:
        if not one_per_channel(b, w.shape[0], w.shape[1]):
            raise UnsupportedInputError(
                "depthwise_conv2d: bias must have one value a channel (and rate)"
                f"\n  bias: {list(b.shape)}\n  weight: {list(weight.shape)}"
            )
        b = b.reshape(w.shape[:2]).contiguous()
    return _OPERATOR(x, w, b, *shape.flat(), backend=backend)


def _shapes(x: Tensor, w: Tensor, b: Tensor | None, *where: list[int]) -> Tensor:
    return unflatten(w, *where).output_map(x, w.shape[0] * w.shape[1])


_OPERATOR = fused.declare(
    __name__,
    forward="(Tensor x, Tensor w, Tensor? b, int[] stride, int[] padding, int[] dilation)"
    " -> Tensor y",
    backward="(Tensor dy, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation,"
    " int[] need) -> (Tensor dx, Tensor dw, Tensor db)",
    shapes=_shapes,
    sizes={"db": lambda w: w.shape[:2]},
    limits=beyond_the_kernels,
)
