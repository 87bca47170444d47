"""Triton kernels of separable_conv2d's forward, and what launches each.

Every stage reads (t − center)·scale + shift on load: center = mean and scale = γ/√(var + eps) where
the stage is standardised by the batch's moments, else no center and scale = γ.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import layouts, tiles
from segkernels.ops.tiles import aligned, along_channels, along_pixels


@triton.jit
def separable_conv2d_depthwise_kernel(
    x,
    w,  # [R, KH·KW, C]
    d,
    mean,  # [tiles, R·C]
    m2,
    C,
    size,  # (H, W)
    out_size,
    strides_x,
    strides_d,
    stride,
    geometry,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """d = w ⊛ x for N₁, and the moments of each tile of d as it is stored."""
    C = aligned(C, ALIGN)
    N = out_size[0] * out_size[1]
    rate, sample, tile, start = tiles.this_tile(N, R, BLOCK_N)
    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(channels, CHANNELS_LAST)
    live = (n < N) & (c < C)
    acc = tiles.depthwise_tile(
        tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST),
        *(x, strides_x, w, sample, rate, start, n, c, C, size, out_size, stride, geometry),
        *(R, KH, KW, ALIGN, BLOCK_N),
    )
    stored = tiles.store(d + tiles.at_pixels(strides_d, sample, rate * C + c, n, ALIGN), acc, live)
    index = (tile * R + rate) * C + channels
    count = tl.minimum(N - start, BLOCK_N).to(ACC)
    tiles.store_moments(mean, m2, index, stored.to(ACC), live, count, channels < C, CHANNELS_LAST)


@triton.jit
def separable_conv2d_pointwise_kernel(
    x,  # the input; or d, where w is None
    w,  # [R, KH·KW, C]
    v,  # [R, D, C]
    center1,  # [R·C], each may be None
    scale1,
    shift1,
    scale2,  # [R·D], each may be None
    shift2,
    out,  # y; or o, where its moments are asked for
    mean,  # [tiles, R·D] or None
    m2,
    C,
    D,
    size,  # (H, W)
    out_size,
    strides_x,
    strides_out,
    stride,
    geometry,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """o = v·φ₁(affine(d)), d made from x or read; then the outer affine and φ₂, or o's moments."""
    C = aligned(C, ALIGN)
    N = out_size[0] * out_size[1]
    rate, sample, tile, start = tiles.this_tile(N, R, BLOCK_N)
    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tiles.zeros(BLOCK_N, BLOCK_D, ACC, CHANNELS_LAST)
    for first in range(0, C, BLOCK_C):
        cs = first + tl.arange(0, BLOCK_C)
        c = along_channels(cs, CHANNELS_LAST)
        if w is None:
            at = tiles.at_pixels(strides_x, sample, rate * C + c, n, ALIGN)
            h = tl.load(x + at, mask=(n < N) & (c < C), other=0.0).to(ACC)
        else:
            h = tiles.depthwise_tile(
                tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST),
                *(x, strides_x, w, sample, rate, start, n, c, C, size, out_size, stride, geometry),
                *(R, KH, KW, ALIGN, BLOCK_N),
            )
        h = tiles.stage(h, center1, scale1, shift1, rate * C + c, c < C, ACT1)
        weight = tiles.weight_tile(v + rate * D * C, cs, ds, 1, C, C, D, CHANNELS_LAST)
        acc = tiles.matmul(tiles.rounded(h, v.dtype.element_ty), weight, acc, CHANNELS_LAST)

    d = along_channels(ds, CHANNELS_LAST)
    live = (n < N) & (d < D)
    if mean is None:
        acc = tiles.stage(acc, None, scale2, shift2, rate * D + d, d < D, ACT2)
    at = tiles.at_pixels(strides_out, sample, rate * D + d, n, 1)
    stored = tiles.store(out + at, acc, live)
    if mean is not None:
        index = (tile * R + rate) * D + ds
        count = tl.minimum(N - start, BLOCK_N).to(ACC)
        tiles.store_moments(mean, m2, index, stored.to(ACC), live, count, ds < D, CHANNELS_LAST)


@triton.jit
def rows_of_moments(
    first, c, B, C, N, TILE: tl.constexpr, ACC: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Where the moments of BLOCK_T tiles lie, which exist, and how many pixels each is of."""
    tile_count = tl.cdiv(N, TILE)
    t = first + tl.arange(0, BLOCK_T)[:, None]
    count = tl.minimum(N - t % tile_count * TILE, TILE).to(ACC)
    return t.to(tl.int64) * C + c, (t < B * tile_count) & (c < C), count


@triton.jit
def separable_conv2d_moments_kernel(
    means,  # [B·tile_count, C]
    m2s,
    mean,  # [C]
    var,
    B,
    C,
    N,
    TILE: tl.constexpr,  # pixels
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean = Σ nₜ·meanₜ/n, var = Σ (M2ₜ + nₜ(meanₜ − mean)²)/n over the tiles, in a fixed order."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.cast(B, ACC) * tl.cast(N, ACC)
    sums = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    for first in range(0, B * tl.cdiv(N, TILE), BLOCK_T):
        at, live, count = rows_of_moments(first, c, B, C, N, TILE, ACC, BLOCK_T)
        sums += count * tl.load(means + at, mask=live, other=0.0)
    center = tl.sum(sums, axis=0)[None, :] / total
    sums = tl.zeros((BLOCK_T, BLOCK_C), ACC)
    for first in range(0, B * tl.cdiv(N, TILE), BLOCK_T):
        at, live, count = rows_of_moments(first, c, B, C, N, TILE, ACC, BLOCK_T)
        away = tl.load(means + at, mask=live, other=0.0) - center
        m2 = tl.load(m2s + at, mask=live, other=0.0)
        sums += tl.where(live, m2 + count * away * away, 0.0)
    tl.store(mean + c, center, mask=c < C)
    tl.store(var + c, tl.sum(sums, axis=0)[None, :] / total, mask=c < C)


@triton.jit
def separable_conv2d_activation_kernel(
    o,
    center,
    scale,
    shift,
    y,
    C,
    N,
    strides_o,
    strides_y,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = φ(affine(o))."""
    C = aligned(C, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    c = along_channels(tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), CHANNELS_LAST)
    live = (n < N) & (c < C)
    at = tiles.at_pixels(strides_o, sample, c, n, ALIGN)
    t = tl.load(o + at, mask=live, other=0.0).to(ACC)
    t = tiles.stage(t, center, scale, shift, c, c < C, ACT)
    tiles.store(y + tiles.at_pixels(strides_y, sample, c, n, ALIGN), t, live)


def depthwise(
    x: torch.Tensor,
    w: torch.Tensor,
    size: tuple[int, int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """d = w ⊛ x with its mean and biased variance per channel, [R·C]."""
    last = layouts.is_channels_last(x)
    R, C, KH, KW = w.shape
    N = size[0] * size[1]
    d = layouts.empty_map(x, R * C, size)
    x = layouts.readable(x, last)
    align = layouts.alignment(last, C, x.stride(0), x.stride(2), x.stride(3))
    block_n, block_c = layouts.window_shape(x, N, last, align)
    tile_count = triton.cdiv(N, block_n) * x.size(0)
    parts = layouts.partial_sums(x, 2, tile_count, R * C)
    if d.numel() > 0:
        separable_conv2d_depthwise_kernel[(R * tile_count, triton.cdiv(C, block_c))](
            *(x, layouts.taps_major(w), d, *parts),
            *(C, (x.size(2), x.size(3)), size),
            *(x.stride(), layouts.map_strides(d)),
            tuple(stride),
            layouts.rate_geometry(padding, dilation),
            R=R,
            KH=KH,
            KW=KW,
            ACC=layouts.triton_type(x),
            ALIGN=align,
            CHANNELS_LAST=last,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return d, *merge_moments(parts, x.size(0), N, block_n)


def pointwise(
    source: torch.Tensor,  # x, or d where eps1 is given
    w: torch.Tensor,
    v: torch.Tensor,
    inner: layouts.Normaliser,
    outer: tuple[torch.Tensor | None, torch.Tensor | None],
    act1: str,
    act2: str,
    eps1: float | None,
    eps2: float | None,
    size: tuple[int, int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """y, or o where eps2 is given; the moments of o's tiles; the pixels in a tile."""
    R, D, C = v.shape
    last = layouts.is_channels_last(source)
    out = layouts.empty_map(source, R * D, size)
    N = size[0] * size[1]
    source = layouts.readable(source, last) if eps1 is None else source
    strides = source.stride() if eps1 is None else layouts.map_strides(source)
    align = layouts.alignment(last, C, strides[0], *strides[2:])
    taps = w.size(2) * w.size(3) if eps1 is None else 1
    block_n, block_c, block_d, warps = layouts.product_shape(
        source.dtype, N, C, D, 256 if last else 128, taps
    )
    if eps1 is None:
        block_n = layouts.window_pixels(block_n, block_c, warps, source, align)
    tile_count = triton.cdiv(N, block_n) * source.size(0)
    parts = layouts.partial_sums(source, 0 if eps2 is None else 2, tile_count, R * D)
    if out.numel() == 0:
        return out, parts, block_n
    separable_conv2d_pointwise_kernel[(R * tile_count, triton.cdiv(D, block_d))](
        source,
        layouts.taps_major(w) if eps1 is None else None,
        v.contiguous(),
        *inner,
        *outer,
        out,
        *(parts or (None, None)),
        *(C, D, (source.size(2), source.size(3)), size),
        *(strides, layouts.map_strides(out)),
        tuple(stride),
        layouts.rate_geometry(padding, dilation),
        R=R,
        KH=w.size(2),
        KW=w.size(3),
        ACT1=act1,
        ACT2=act2,
        ACC=layouts.triton_type(source),
        ALIGN=align,
        CHANNELS_LAST=last,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return out, parts, block_n


def merge_moments(
    parts: list[torch.Tensor], B: int, N: int, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel; zeros of an empty batch."""
    means, m2s = parts
    C = means.size(1)
    mean, var = means.new_zeros(C), means.new_zeros(C)
    if means.numel() > 0:
        separable_conv2d_moments_kernel[(triton.cdiv(C, 32),)](
            *(means, m2s, mean, var, B, C, N),
            TILE=tile,
            ACC=layouts.triton_type(means),
            BLOCK_T=64,
            BLOCK_C=32,
            num_warps=4,
        )
    return mean, var


def activate(o: torch.Tensor, outer: layouts.Normaliser, act: str) -> torch.Tensor:
    """φ(affine(o)) of a map that this file has made."""
    last = layouts.is_channels_last(o)
    C, N = o.size(1), o.size(2) * o.size(3)
    y = torch.empty_like(o)
    if o.numel() == 0:
        return y
    block_n, block_c = layouts.tile_shape(C, N, o.element_size(), last, 2048)
    separable_conv2d_activation_kernel[
        (triton.cdiv(N, block_n) * o.size(0), triton.cdiv(C, block_c))
    ](
        *(o, *outer, y, C, N),
        *(layouts.map_strides(o), layouts.map_strides(y)),
        ACT=act,
        ACC=layouts.triton_type(o),
        ALIGN=layouts.alignment(last, C),
        CHANNELS_LAST=last,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return y
