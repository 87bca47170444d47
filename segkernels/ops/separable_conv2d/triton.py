"""The Triton backend of separable_conv2d: y = φ₂(γ₂·N₂(v·φ₁(γ₁·N₁(w ⊛ x) + β₁)) + β₂), and its backward.

Without N₁ one kernel goes from x to o; with it, d and its moments are made first. The backward makes d again from x; neither
d nor h is ever saved.
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
    mean1, var1, mean2, var2 = layouts.partial_sums(x, 4, 0, 0)
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
    need_dx, need_dw, need_dv, need_dgamma1, need_dbeta1, need_dgamma2, need_dbeta2 = need
    R, D, C = v.shape
    last = layouts.is_channels_last(x)
    acc = accumulation_dtype(x.dtype)
    count = dy.size(0) * dy.size(2) * dy.size(3)

    def wanted(needed: int, gradient: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty(0, dtype=dtype) if not needed or gradient is None else gradient.to(dtype)

    # through φ₂ and N₂: g is do where N₂ standardises, do/γ₂ where it does not
    g = dy = layouts.pixel_map(dy, last)
    dgamma2 = dbeta2 = None
    if eps2 is not None and o is not None:
        t, stage = layouts.pixel_map(o, last), layouts.normaliser(gamma2, beta2, mean2, var2, eps2)
        sums = normalise_backward(dy, t, stage, act2, sums=2)
        dgamma2, dbeta2 = sums[1] * (var2 + eps2).rsqrt(), sums[0]
        g = layouts.empty_map(x, R * D, dy.shape[2:])
        means = layouts.standardised_means(sums, var2, eps2, count)
        normalise_backward(dy, t, stage, act2, out=g, means=means)
    elif act2 != "none" or need_dbeta2:
        t = None if y is None else layouts.pixel_map(y, last)
        if act2 != "none":
            g = layouts.empty_map(x, R * D, dy.shape[2:])
        out = None if g is dy else g
        dbeta2 = next(
            iter(
                normalise_backward(
                    dy, t, (None, None, None), act2, out=out, sums=1 if need_dbeta2 else 0
                )
            ),
            None,
        )

    # through v
    folded = gamma2 if eps2 is None else None
    inner = layouts.normaliser(gamma1, beta1, mean1, var1, eps1)
    dv = dgamma1 = dbeta1 = None
    dx = dw = x.new_empty(0)
    need_inner = need_dx or need_dw or need_dgamma1 or need_dbeta1
    need_m = need_dv or (need_dgamma2 and eps2 is None)
    if need_inner or need_m:
        d = DEPTHWISE.raw("triton")(x, w, None, stride, padding, dilation)
    if need_m:
        m = weight_backward(g, d, inner, act1, R)
        dv = m if folded is None else m * folded.view(R, D, 1)
        if eps2 is None:
            dgamma2 = (v.to(acc) * m).sum(2).flatten()

    # through φ₁, N₁ and w
    if need_inner:
        scaled_v = v if folded is None else (v * folded.view(R, D, 1)).to(v.dtype)
        dd, sums = pointwise_backward(
            g,
            scaled_v,
            d,
            inner,
            act1,
            scaled=eps1 is None and gamma1 is not None,
            write=bool(need_dx or need_dw),
            sums=bool(need_dgamma1 or need_dbeta1 or eps1 is not None),
        )
        if sums:
            dbeta1 = sums[0]
            dgamma1 = sums[1] if eps1 is None else sums[1] * (var1 + eps1).rsqrt()
        if dd is not None:
            if eps1 is not None:
                means = layouts.standardised_means(sums, var1, eps1, count)
                normalise_backward(dd, d, inner, "none", out=dd, means=means)
            dx, dw, _ = DEPTHWISE.raw("triton", backward=True)(
                dd, x, w, stride, padding, dilation, [need_dx, need_dw, 0]
            )
    return (
        dx,
        dw,
        wanted(need_dv, dv, v.dtype),
        wanted(need_dgamma1, dgamma1, acc),
        wanted(need_dbeta1, dbeta1, acc),
        wanted(need_dgamma2, dgamma2, acc),
        wanted(need_dbeta2, dbeta2, acc),
    )
