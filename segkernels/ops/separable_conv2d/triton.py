"""The Triton backend of separable_conv2d: y = φ₂(γ₂·N₂(v·φ₁(γ₁·N₁(w ⊛ x) + β₁)) + β₂).

Without N₁ one kernel goes from x to o; with it, d and its moments are made first. The backward
makes d again from x: neither d nor h is ever saved.
"""

from __future__ import annotations

import torch

from segkernels import fused
from segkernels.fused import accumulation_dtype
from segkernels.ops import layouts
from segkernels.ops.geometry import unflatten
from segkernels.ops.separable_conv2d.triton_backward import (
    normalise_backward,
    pointwise_backward,
    weight_backward,
)
from segkernels.ops.separable_conv2d.triton_forward import (
    activate,
    depthwise,
    merge_moments,
    pointwise,
)

DEPTHWISE = fused.OPERATORS["depthwise_conv2d"]


def separable_conv2d(
    x: torch.Tensor,  # [B, C, H, W]
    w: torch.Tensor,  # [R, C, KH, KW]
    v: torch.Tensor,  # [R, D, C]
    gamma1: torch.Tensor | None,  # [R·C]
    beta1: torch.Tensor | None,
    gamma2: torch.Tensor | None,  # [R·D]
    beta2: torch.Tensor | None,
    act1: str,
    act2: str,
    eps1: float | None,
    eps2: float | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[torch.Tensor, ...]:  # y, o [B, R·D, H', W'], mean1, var1 [R·C], mean2, var2 [R·D]
    wide = accumulation_dtype(x.dtype)
    mean1, var1, mean2, var2 = (x.new_empty(0, dtype=wide) for _ in range(4))
    size = unflatten(w, stride, padding, dilation).output_size(x.size(2), x.size(3))[0]
    source = x
    if eps1 is not None:
        source, mean1, var1 = depthwise(x, w, size, stride, padding, dilation)
    inner = layouts.normaliser(gamma1, beta1, mean1, var1, eps1)
    outer = (gamma2, beta2) if eps2 is None else (None, None)
    out, parts, tile = pointwise(
        source, w, v, inner, outer, act1, act2, eps1, eps2, size, stride, padding, dilation
    )
    if eps2 is None:
        return out, x.new_empty(0), mean1, var1, mean2, var2
    mean2, var2 = merge_moments(parts, x.size(0), size[0] * size[1], tile)
    y = activate(out, layouts.normaliser(gamma2, beta2, mean2, var2, eps2), act2)
    return y, out, mean1, var1, mean2, var2


def separable_conv2d_backward(
    dy: torch.Tensor,  # [B, R·D, H', W']
    x: torch.Tensor,  # [B, C, H, W]
    y: torch.Tensor | None,  # [B, R·D, H', W'], as o
    o: torch.Tensor | None,
    w: torch.Tensor,  # [R, C, KH, KW]
    v: torch.Tensor,  # [R, D, C]
    gamma1: torch.Tensor | None,  # [R·C], as beta1, mean1, var1
    beta1: torch.Tensor | None,
    gamma2: torch.Tensor | None,  # [R·D], as beta2, mean2, var2
    beta2: torch.Tensor | None,
    mean1: torch.Tensor,
    var1: torch.Tensor,
    mean2: torch.Tensor,
    var2: torch.Tensor,
    act1: str,
    act2: str,
    eps1: float | None,
    eps2: float | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need: list[int],
) -> tuple[torch.Tensor, ...]:  # dx, dw, dv, dgamma1, dbeta1, dgamma2, dbeta2
    R, D, _ = v.shape
    wide = accumulation_dtype(x.dtype)
    window = (stride, padding, dilation)
    dv = dgamma1 = dbeta1 = None
    g, dgamma2, dbeta2 = outer_backward(
        dy, x, y, o, R * D, (gamma2, beta2, mean2, var2, eps2), act2, need[6]
    )
    folded = None if gamma2 is None or eps2 is not None else gamma2.view(R, D, 1)
    inner = layouts.normaliser(gamma1, beta1, mean1, var1, eps1)
    need_m = need[2] or (need[5] and eps2 is None)
    d = DEPTHWISE.raw("triton")(x, w, None, *window) if need_m or any(need[:5]) else None
    if d is not None and need_m:
        m = weight_backward(g, d, inner, act1, R)  # d(loss)/dv = γ₂·gᵀ·h, dγ₂ = Σ v·gᵀ·h
        dv = m if folded is None else m * folded
        if eps2 is None:
            dgamma2 = (v.to(wide) * m).sum(2).flatten()
    dd = None
    if d is not None and (need[0] or need[1] or need[3] or need[4]):
        dd, dgamma1, dbeta1 = inner_backward(
            g, v if folded is None else (v * folded).to(v.dtype), d, inner, var1, act1, eps1, need
        )
    dx, dw, _ = (
        (x.new_empty(0), x.new_empty(0), None)
        if dd is None
        else DEPTHWISE.raw("triton", backward=True)(dd, x, w, *window, [need[0], need[1], 0])
    )

    def wanted(which: int, gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        if need[which] and gradient is not None:
            return gradient.to(dtype)
        return x.new_empty(0, dtype=dtype)

    return (
        dx,
        dw,
        wanted(2, dv, v.dtype),
        wanted(3, dgamma1, wide),
        wanted(4, dbeta1, wide),
        wanted(5, dgamma2, wide),
        wanted(6, dbeta2, wide),
    )


def outer_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor | None,
    o: torch.Tensor | None,
    channels: int,
    stage: tuple[
        torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor, float | None
    ],  # gamma2, beta2, mean2, var2, eps2
    act: str,
    need_dbeta: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """g, dgamma2, dbeta2: g is the gradient of o, but without γ₂ (and dgamma2) if not N₂."""
    last = layouts.is_channels_last(x)
    dy = layouts.pixel_map(dy, last)
    var, eps = stage[3:]
    if eps is not None and o is not None:
        o, affine = layouts.pixel_map(o, last), layouts.normaliser(*stage)
        sums = normalise_backward(dy, o, affine, act, sums=2)
        means = layouts.standardised_means(sums, var, eps, dy.numel() // dy.size(1))
        g = layouts.empty_map(x, channels, dy.shape[2:])
        normalise_backward(dy, o, affine, act, out=g, means=means)
        return g, sums[1] * (var + eps).rsqrt(), sums[0]
    if act == "none" and not need_dbeta:
        return dy, None, None
    y = None if y is None else layouts.pixel_map(y, last)
    made = None if act == "none" else layouts.empty_map(x, channels, dy.shape[2:])
    (dbeta,) = normalise_backward(dy, y, (None, None, None), act, out=made, sums=1)
    return dy if made is None else made, None, dbeta


def inner_backward(
    g: torch.Tensor,
    v: torch.Tensor,
    d: torch.Tensor,
    inner: layouts.Normaliser,
    var: torch.Tensor,
    act: str,
    eps: float | None,
    need: list[int],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dd, dgamma1, dbeta1."""
    dd, sums = pointwise_backward(
        g,
        v,
        d,
        inner,
        act,
        scaled=eps is None,
        write=bool(need[0] or need[1]),
        sums=bool(need[3] or need[4]) or eps is not None,
    )
    if eps is None:
        return dd, sums[1] if sums else None, sums[0] if sums else None
    if dd is not None:
        means = layouts.standardised_means(sums, var, eps, d.numel() // d.size(1))
        normalise_backward(dd, d, inner, "none", out=dd, means=means)
    return dd, sums[1] * (var + eps).rsqrt(), sums[0]
