r"""Atrous separable convolution: depthwise, affine, activation, pointwise, affine, activation, at
one or several rates.

.. math::
    d = w \circledast x \qquad h = \varphi_1(\gamma_1 N_1(d) + \beta_1) \qquad
    o = v h \qquad y = \varphi_2(\gamma_2 N_2(o) + \beta_2)

N is the identity, or, where an eps is given, standardisation by the batch's own moments, as
BatchNorm does in training: N(d) = (d - mean) / sqrt(var + eps), mean and biased var per channel
over B, H', W'. R rates read one x; the output channels are rate-major, so the branches of an ASPP
come out concatenated.

No map of the size of d or h outlives the forward: in inference they never exist, in training d is
recomputed by the backward from x (k_h k_w products an element). Saved are x and o (training), or x
and y.

============= ================================ ========================================
symbol        argument                         shape
============= ================================ ========================================
x             ``x``                            [B, C, H, W]
w             ``depthwise_weight``             [C, 1, k_h, k_w], or [R, C, 1, k_h, k_w]
v             ``pointwise_weight``             [D, C, 1, 1], or [R, D, C, 1, 1]
gamma1, beta1 ``inner_scale, inner_shift``     [R*C]
gamma2, beta2 ``outer_scale, outer_shift``     [R*D]
phi           ``*_activation``                 None, "relu", "relu6"
eps1, eps2    ``inner_eps, outer_eps``         None or a number
y             result                           [B, R*D, H', W']
============= ================================ ========================================

Source: Chollet, "Xception", CVPR 2017; Chen et al., "Encoder-Decoder with Atrous Separable
Convolution", ECCV 2018, section 3.1; Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm
1 for N.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from segkernels import fused
from segkernels.fused import UnsupportedInputError
from segkernels.ops.arguments import check_tensors
from segkernels.ops.geometry import (
    Padding,
    Rates,
    Size,
    Window,
    beyond_the_kernels,
    check_map,
    one_per_channel,
    unflatten,
    window,
)
from segkernels.overrides import overridable

__all__ = ["Moments", "separable_conv2d"]

Activation = Literal["relu", "relu6"] | None


class Moments(NamedTuple):
    """Batch moments of d ([R*C]) and o ([R*D]); var is biased. Empty where no eps was given."""

    inner_mean: Tensor
    inner_var: Tensor
    outer_mean: Tensor
    outer_var: Tensor


@overridable
def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: Size = 1,
    padding: Padding = "same",
    dilation: Rates = 1,
    *,
    inner_scale: Tensor | None = None,
    inner_shift: Tensor | None = None,
    inner_activation: Activation = None,
    outer_scale: Tensor | None = None,
    outer_shift: Tensor | None = None,
    outer_activation: Activation = None,
    inner_eps: float | None = None,
    outer_eps: float | None = None,
    return_moments: bool = False,
    backend: str | None = None,
) -> Any:
    """Depthwise, affine, activation, pointwise, affine, activation, as one operator.

    x: [B, C, H, W], any strides. depthwise_weight: [C, 1, k_h, k_w], or [R, C, 1, k_h, k_w] for R
    rates over one x (``dilation`` is then a list of R ints or pairs). pointwise_weight: [D, C, 1,
    1] or [R, D, C, 1, 1]. Biases: [C], [D], or [R, C], [R, D]. Scales and shifts: [R*C] inner,
    [R*D] outer, any floating type; missing ones are 1 and 0. inner_eps, outer_eps: standardise by
    the batch's moments first (training BatchNorm; scale and shift are then its weight and bias);
    that needs more than one value a channel.
    stride, padding, dilation, backend: as :func:`segkernels.depthwise_conv2d`.

    Returns y [B, D, H', W'] (or [B, R*D, H', W'], rate by rate) in x's memory format; with
    ``return_moments`` also :class:`Moments`, for running statistics (not differentiable by
    themselves; y's gradient goes through them). Raises UnsupportedInputError for arguments that
    describe no computation and BackendUnavailableError when the backend asked for cannot run.
    """
    op = "separable_conv2d"
    wide = {
        "inner_scale": inner_scale,
        "inner_shift": inner_shift,
        "outer_scale": outer_scale,
        "outer_shift": outer_shift,
        "depthwise_bias": depthwise_bias,
        "pointwise_bias": pointwise_bias,
    }
    check_tensors(
        op,
        {name: t for name, t in wide.items() if t is not None},
        x=x,
        depthwise_weight=depthwise_weight,
        pointwise_weight=pointwise_weight,
    )
    shape = window(op, depthwise_weight, stride, padding, dilation)
    check_map(op, x, depthwise_weight, shape)
    rates, channels = len(shape.dilation), x.shape[1]
    outputs = pointwise_weight.shape[-4] if pointwise_weight.dim() >= 4 else 0
    if pointwise_weight.shape != (*depthwise_weight.shape[:-4], outputs, channels, 1, 1):
        raise UnsupportedInputError(
            f"{op}: the pointwise weight must be 1x1 over the channels of x, one a rate"
            f"\n  depthwise_weight: {list(depthwise_weight.shape)}"
            f"\n  pointwise_weight: {list(pointwise_weight.shape)}"
        )
    if inner_eps is not None or outer_eps is not None:
        _check_moments(op, x, shape)
    inner = _affine("inner", rates, channels, inner_scale, inner_shift, depthwise_bias, inner_eps)
    outer = _affine("outer", rates, outputs, outer_scale, outer_shift, pointwise_bias, outer_eps)
    y, _, *moments = _OPERATOR(
        x,
        depthwise_weight.reshape(rates, channels, *shape.kernel).contiguous(),
        pointwise_weight.reshape(rates, outputs, channels).contiguous(),
        *inner,
        *outer,
        _activation(op, inner_activation),
        _activation(op, outer_activation),
        inner_eps,
        outer_eps,
        *shape.flat(),
        backend=backend,
    )
    return (y, Moments(*moments)) if return_moments else y


def _check_moments(op: str, x: Tensor, shape: Window) -> None:
    """One value has no variance, and none has no mean."""
    rows, columns = shape.output_size(x.shape[2], x.shape[3])[0]
    if x.shape[0] * rows * columns <= 1:
        raise UnsupportedInputError(
            f"{op}: standardisation (eps) needs more than 1 value per channel"
            f"\n  x: {list(x.shape)}\n  normalised map: [{x.shape[0]}, ..., {rows}, {columns}]"
        )


def _affine(
    stage: str,
    rates: int,
    channels: int,
    scale: Tensor | None,
    shift: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(gamma, beta) of one stage. A convolution's bias folds into the shift: gamma(d + b) + beta =
    gamma d + (gamma b + beta).

    Under standardisation the bias moves the mean alone and cancels; it is then refused, so that the
    moments stay those of d.
    """
    for name, value in (("scale", scale), ("shift", shift), ("bias", bias)):
        if value is not None and not one_per_channel(value, rates, channels):
            raise UnsupportedInputError(
                f"separable_conv2d: the {stage} {name} must have {rates * channels} values"
                f"\n  {name}: {list(value.shape)}"
                f"\n  expected [{rates * channels}] or [{rates}, {channels}]"
            )
    if eps is not None and not (isinstance(eps, int | float) and eps > 0):
        raise UnsupportedInputError(
            f"separable_conv2d: {stage}_eps must be None or a positive number\n  eps: {eps!r}"
        )
    if bias is not None:
        if eps is not None:
            raise UnsupportedInputError(
                f"separable_conv2d: a bias before the standardised {stage} stage has no effect"
                "\n  leave the bias out, or leave the eps out"
            )
        bias = bias.reshape(-1).to(fused.accumulation_dtype(bias.dtype))
        bias = bias if scale is None else bias * scale.reshape(-1)
        shift = bias if shift is None else bias + shift.reshape(-1)
    return (
        None if scale is None else scale.reshape(-1).contiguous(),
        None if shift is None else shift.reshape(-1).contiguous(),
    )


def _activation(op: str, name: Activation) -> str:
    if name not in (None, "relu", "relu6"):
        raise UnsupportedInputError(
            f"{op}: activation must be None, 'relu' or 'relu6'\n  activation: {name!r}"
        )
    return name or "none"


def _shapes(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    act1: str,
    act2: str,
    eps1: float | None,
    eps2: float | None,
    *where: list[int],
) -> tuple[Tensor, ...]:
    outputs = v.shape[0] * v.shape[1]
    y = unflatten(w, *where).output_map(x, outputs)
    o = torch.empty_like(y) if eps2 is not None else x.new_empty([0])
    wide = fused.accumulation_dtype(x.dtype)
    inner = [
        x.new_empty([w.shape[0] * w.shape[1] if eps1 is not None else 0], dtype=wide)
        for _ in range(2)
    ]
    outer = [x.new_empty([outputs if eps2 is not None else 0], dtype=wide) for _ in range(2)]
    return y, o, *inner, *outer


def _unsaved(act2: str, eps2: float | None) -> tuple[str, ...]:
    """The mask of the outer activation comes from o where it exists, else from y."""
    if eps2 is not None:
        return ("y",)
    return ("o", "y") if act2 == "none" else ("o",)


_OPERATOR = fused.declare(
    __name__,
    forward="(Tensor x, Tensor w, Tensor v, Tensor? gamma1, Tensor? beta1, Tensor? gamma2,"
    " Tensor? beta2, str act1, str act2, float? eps1, float? eps2, int[] stride, int[] padding,"
    " int[] dilation)"
    " -> (Tensor y, Tensor o, Tensor mean1, Tensor var1, Tensor mean2, Tensor var2)",
    backward="(Tensor dy, Tensor x, Tensor? y, Tensor? o, Tensor w, Tensor v, Tensor? gamma1,"
    " Tensor? beta1, Tensor? gamma2, Tensor? beta2, Tensor mean1, Tensor var1, Tensor mean2,"
    " Tensor var2, str act1, str act2, float? eps1, float? eps2, int[] stride, int[] padding,"
    " int[] dilation, int[] need) -> (Tensor dx, Tensor dw, Tensor dv, Tensor dgamma1,"
    " Tensor dbeta1, Tensor dgamma2, Tensor dbeta2)",
    shapes=_shapes,
    wide=("gamma1", "beta1", "gamma2", "beta2"),
    unsaved=_unsaved,
    limits=beyond_the_kernels,
)
