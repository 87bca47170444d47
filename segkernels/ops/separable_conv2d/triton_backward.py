"""The backward of separable_conv2d in Triton: from dy through φ₂ and N₂ to g, M = gᵀ·h and dh = g·v, through φ₁ and N₁
to dd, and from there depthwise_conv2d's own backward. d is made again from x, h from d on every load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import layouts, tiles
from segkernels.ops.depthwise_conv2d.triton import depthwise_conv2d, depthwise_conv2d_backward
from segkernels.ops.tiles import aligned, along_channels, along_pixels


@triton.jit
def separable_conv2d_normalise_backward_kernel(
    dy,
    t,  # y or the stage's input, or None where it is not looked at
    center,
    scale,
    shift,
    mean_g,  # None: no correction for the moments' own gradient
    mean_gt,
    g,  # or None
    sum_g,  # [tiles, C] or None
    sum_gt,
    C,
    N,
    stride_dyb,
    stride_dyc,
    stride_dyn,
    stride_tb,
    stride_tc,
    stride_tn,
    stride_gb,
    stride_gc,
    stride_gn,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g = dy·φ'(affine(t)) with each tile's Σ g and Σ g·(t − center); or, these known, the stage's input gradient.

    With mean_g = Σ g/n and mean_gt = Σ g·(t − center)/(n·(var + eps)): scale·(g − mean_g − (t − center)·mean_gt).
    """
    if CHANNELS_LAST:
        C, stride_dyn = aligned(C, ALIGN), aligned(stride_dyn, ALIGN)
        stride_tn, stride_gn = aligned(stride_tn, ALIGN), aligned(stride_gn, ALIGN)
        stride_dyb, stride_tb = aligned(stride_dyb, ALIGN), aligned(stride_tb, ALIGN)
        stride_gb = aligned(stride_gb, ALIGN)
    tile_count = tl.cdiv(N, BLOCK_N)
    sample = (tl.program_id(0) // tile_count).to(tl.int64)
    n = tl.program_id(0) % tile_count * BLOCK_N + tl.arange(0, BLOCK_N)
    n = along_pixels(n, CHANNELS_LAST)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(channels, CHANNELS_LAST)
    in_c = c < C
    live = (n < N) & in_c

    at = sample * stride_dyb + c.to(tl.int64) * stride_dyc + n.to(tl.int64) * stride_dyn
    acc = tl.load(dy + at, mask=live, other=0.0).to(ACC)
    if t is not None:
        at = sample * stride_tb + c.to(tl.int64) * stride_tc + n.to(tl.int64) * stride_tn
        value = tl.load(t + at, mask=live, other=0.0).to(ACC)
        away = tiles.affine(value, center, None, None, c, in_c)
        acc = tiles.activation_backward(
            acc, tiles.affine(away, None, scale, shift, c, in_c), ACT
        )
    if sum_g is not None:
        index = tl.program_id(0).to(tl.int64) * C + channels
        tl.store(sum_g + index, tiles.sum_pixels(acc, CHANNELS_LAST), mask=channels < C)
        if sum_gt is not None:
            total = tiles.sum_pixels(tl.where(live, acc * away, 0.0), CHANNELS_LAST)
            tl.store(sum_gt + index, total, mask=channels < C)
    if g is not None:
        if mean_g is not None:
            acc -= tl.load(mean_g + c, mask=in_c, other=0.0)
            acc -= away * tl.load(mean_gt + c, mask=in_c, other=0.0)
            acc *= tl.load(scale + c, mask=in_c, other=0.0)
        at = sample * stride_gb + c.to(tl.int64) * stride_gc + n.to(tl.int64) * stride_gn
        tl.store(g + at, tiles.rounded(acc, g.dtype.element_ty), mask=live)


@triton.jit
def separable_conv2d_pointwise_backward_kernel(
    g,
    v,  # [R, D, C]
    d,
    center,  # [R·C], each may be None
    scale,
    shift,
    out,  # or None
    sum_g,  # [tiles, R·C] or None
    sum_gt,
    C,
    D,
    N,
    stride_gb,
    stride_gc,
    stride_gn,
    stride_db,
    stride_dc,
    stride_dn,
    R: tl.constexpr,
    ACT: tl.constexpr,
    SCALED: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = (g·v)·φ'(affine(d)), times scale where SCALED, with each tile's sums as in the normalise backward."""
    if CHANNELS_LAST:
        C, D = aligned(C, ALIGN), aligned(D, ALIGN)
        stride_gn, stride_dn = aligned(stride_gn, ALIGN), aligned(stride_dn, ALIGN)
        stride_gb, stride_db = aligned(stride_gb, ALIGN), aligned(stride_db, ALIGN)
    tile_count = tl.cdiv(N, BLOCK_N)
    rate = tl.program_id(0) % R
    tile = tl.program_id(0) // R
    sample = (tile // tile_count).to(tl.int64)
    n = along_pixels(tile % tile_count * BLOCK_N + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(cs, CHANNELS_LAST)
    live = (n < N) & (c < C)

    acc = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    for first in range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        k = along_channels(ds, CHANNELS_LAST)
        at = (rate * D + k).to(tl.int64) * stride_gc + n.to(tl.int64) * stride_gn
        part = tl.load(g + sample * stride_gb + at, mask=(n < N) & (k < D), other=0.0)
        weight = tiles.weight_tile(v + rate * D * C, ds, cs, C, 1, D, C, CHANNELS_LAST)
        acc = tiles.matmul(part, weight, acc, CHANNELS_LAST)

    channel = rate * C + c
    at = sample * stride_db + channel.to(tl.int64) * stride_dc + n.to(tl.int64) * stride_dn
    value = tl.load(d + at, mask=live, other=0.0).to(ACC)
    away = tiles.affine(value, center, None, None, channel, c < C)
    acc = tiles.activation_backward(
        acc, tiles.affine(away, None, scale, shift, channel, c < C), ACT
    )
    if sum_g is not None:
        index = tile.to(tl.int64) * R * C + rate * C + cs
        total = tiles.sum_pixels(tl.where(live, acc, 0.0), CHANNELS_LAST)
        tl.store(sum_g + index, total, mask=cs < C)
        total = tiles.sum_pixels(tl.where(live, acc * away, 0.0), CHANNELS_LAST)
        tl.store(sum_gt + index, total, mask=cs < C)
    if out is not None:
        if SCALED:
            acc = tiles.affine(acc, None, scale, None, channel, c < C)
        tl.store(out + at, tiles.rounded(acc, out.dtype.element_ty), mask=live)


@triton.jit
def separable_conv2d_weight_backward_kernel(
    g,
    d,
    center,  # [R·C], each may be None
    scale,
    shift,
    m,  # [splits, R, D, C]
    B,
    C,
    D,
    N,
    stride_gb,
    stride_gc,
    stride_gn,
    stride_db,
    stride_dc,
    stride_dn,
    walk,  # tiles per program
    R: tl.constexpr,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """m = gᵀ·φ(affine(d)) of a run of pixel tiles, which goes on from sample to sample."""
    if CHANNELS_LAST:
        C, D = aligned(C, ALIGN), aligned(D, ALIGN)
        stride_gn, stride_dn = aligned(stride_gn, ALIGN), aligned(stride_dn, ALIGN)
        stride_gb, stride_db = aligned(stride_gb, ALIGN), aligned(stride_db, ALIGN)
    tile_count = tl.cdiv(N, BLOCK_N)
    rate = tl.program_id(1) % R
    first_d = tl.program_id(1) // R * BLOCK_D
    k = (first_d + tl.arange(0, BLOCK_D))[:, None]
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    g += (rate * D + k).to(tl.int64) * stride_gc
    d += (rate * C + c).to(tl.int64) * stride_dc

    acc = tl.zeros((BLOCK_D, BLOCK_C), ACC)
    first = tl.program_id(0) * walk
    for tile in range(first, tl.minimum(first + walk, B * tile_count)):
        sample = tl.cast(tile // tile_count, tl.int64)
        n = tile % tile_count * BLOCK_N + tl.arange(0, BLOCK_N)
        row, col = n[None, :], n[:, None]
        at = sample * stride_gb + row.to(tl.int64) * stride_gn
        part = tl.load(g + at, mask=(row < N) & (k < D), other=0.0)
        at = sample * stride_db + col.to(tl.int64) * stride_dn
        h = tl.load(d + at, mask=(col < N) & (c < C), other=0.0).to(ACC)
        h = tiles.affine(h, center, scale, shift, rate * C + c, c < C)
        h = tiles.rounded(tiles.activation(h, ACT), part.dtype)
        acc = tiles.dot(part, h, acc)
    at = (tl.program_id(0).to(tl.int64) * R + rate) * D * C + k * C + c
    tl.store(m + at, acc, mask=(k < D) & (c < C))


def normalise_backward(
    dy: torch.Tensor,
    t: torch.Tensor | None,
    stage: layouts.Normaliser,
    act: str,
    *,
    out: torch.Tensor | None = None,
    sums: int = 0,
    means: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> list[torch.Tensor]:
    """Fills `out`; returns Σ g and, for sums=2, Σ g·(t − center) per channel."""
    last = layouts.is_channels_last(next(a for a in (out, t, dy) if a is not None))
    C, N = dy.size(1), dy.size(2) * dy.size(3)
    block_n, block_c = layouts.tile_shape(C, N, dy.element_size(), last, 2048)
    tile_count = triton.cdiv(N, block_n) * dy.size(0)
    parts = layouts.partial_sums(dy, sums, tile_count, C)
    strides = [(0, 0, 0) if a is None else layouts.map_strides(a) for a in (dy, t, out)]
    if dy.numel() > 0:
        with torch.cuda.device_of(dy):
            separable_conv2d_normalise_backward_kernel[(tile_count, triton.cdiv(C, block_c))](
                *(dy, t, *stage, *means, out),
                *(*parts, None, None)[:2],
                *(C, N),
                *strides[0],
                *strides[1],
                *strides[2],
                ACT=act,
                ACC=layouts.triton_type(layouts.accumulation_type(dy)),
                ALIGN=layouts.alignment(C, *(s for a in strides for s in (a[0], a[2]))),
                CHANNELS_LAST=last,
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                num_warps=4,
            )
    return [part.sum(0) for part in parts]


def pointwise_backward(
    g: torch.Tensor,
    v: torch.Tensor,
    d: torch.Tensor,
    inner: layouts.Normaliser,
    act: str,
    scaled: bool,
    write: bool,
    sums: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """(g·v)·φ'(affine(d)), and its sums per channel."""
    R, D, C = v.shape
    last = layouts.is_channels_last(d)
    N = d.size(2) * d.size(3)
    block_n, block_d, block_c, warps = layouts.product_shape(d.dtype, N, D, C)
    tile_count = triton.cdiv(N, block_n) * d.size(0)
    out = torch.empty_like(d) if write else None
    parts = layouts.partial_sums(d, 2 * sums, tile_count, R * C)
    strides = (*layouts.map_strides(g), *layouts.map_strides(d))
    if d.numel() > 0:
        with torch.cuda.device_of(d):
            separable_conv2d_pointwise_backward_kernel[(R * tile_count, triton.cdiv(C, block_c))](
                *(g, v.contiguous(), d, *inner, out),
                *(parts or (None, None)),
                *(C, D, N),
                *strides,
                R=R,
                ACT=act,
                SCALED=scaled,
                ACC=layouts.triton_type(layouts.accumulation_type(d)),
                ALIGN=layouts.alignment(C, D, strides[0], strides[2]),
                CHANNELS_LAST=last,
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    return out, [part.sum(0) for part in parts]


def weight_backward(
    g: torch.Tensor, d: torch.Tensor, inner: layouts.Normaliser, act: str, R: int
) -> torch.Tensor:
    """M = gᵀ·φ(affine(d)), [R, D, C] in the accumulation type."""
    B, C, D, N = d.size(0), d.size(1) // R, g.size(1) // R, d.size(2) * d.size(3)
    block_n, block_c, block_d, warps = layouts.outer_product_shape(d.dtype, N, C, D)
    tile_count = triton.cdiv(N, block_n) * B
    blocks = R * triton.cdiv(D, block_d) * triton.cdiv(C, block_c)
    walk = triton.cdiv(tile_count, max(1, 512 // blocks))
    m = d.new_empty(
        (triton.cdiv(tile_count, max(walk, 1)), R, D, C), dtype=layouts.accumulation_type(d)
    )
    strides = (*layouts.map_strides(g), *layouts.map_strides(d))
    if m.numel() > 0:
        with torch.cuda.device_of(d):
            separable_conv2d_weight_backward_kernel[
                (m.size(0), R * triton.cdiv(D, block_d), triton.cdiv(C, block_c))
            ](
                *(g, d, *inner, m, B, C, D, N),
                *strides,
                walk,
                R=R,
                ACT=act,
                ACC=layouts.triton_type(m.dtype),
                ALIGN=layouts.alignment(C, D, strides[0], strides[2]),
                CHANNELS_LAST=layouts.is_channels_last(d),
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                BLOCK_D=block_d,
                num_warps=warps,
            )
    return m.sum(0)


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
    acc = layouts.accumulation_type(x)
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
        g = layouts.empty_map(x, R * D, dy.shape[2:], last)
        means = layouts.standardised_means(sums, var2, eps2, count)
        normalise_backward(dy, t, stage, act2, out=g, means=means)
    elif act2 != "none" or need_dbeta2:
        t = None if y is None else layouts.pixel_map(y, last)
        if act2 != "none":
            g = layouts.empty_map(x, R * D, dy.shape[2:], last)
        out = None if g is dy else g
        dbeta2 = next(iter(normalise_backward(
            dy, t, (None, None, None), act2, out=out, sums=1 if need_dbeta2 else 0
        )), None)

    # through v
    folded = gamma2 if eps2 is None else None
    inner = layouts.normaliser(gamma1, beta1, mean1, var1, eps1)
    dv = dgamma1 = dbeta1 = None
    dx = dw = x.new_empty(0)
    need_inner = need_dx or need_dw or need_dgamma1 or need_dbeta1
    need_m = need_dv or (need_dgamma2 and eps2 is None)
    if need_inner or need_m:
        d = depthwise_conv2d(x, w, None, stride, padding, dilation)
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
            dx, dw, _ = depthwise_conv2d_backward(
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
