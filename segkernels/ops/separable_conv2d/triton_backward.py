"""Triton kernels of separable_conv2d's backward, what launches each; h is made on load."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.fused import accumulation_dtype
from segkernels.ops import layouts, tiles
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
    strides_dy,
    strides_t,
    strides_g,
    ACT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """g = dy·φ'(affine(t)), and each tile's Σ g and Σ g·(t − center) for the parameters' gradients.

    These known, the gradient of a standardised stage's input is scale·(g − mean_g − (t − center)·
    mean_gt), with mean_g = Σ g/n and mean_gt = Σ g·(t − center)/(n·(var + eps)).
    """
    C = aligned(C, ALIGN)
    _, sample, tile, start = tiles.this_tile(N, 1, BLOCK_N)
    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(channels, CHANNELS_LAST)
    in_c = c < C
    live = (n < N) & in_c

    at = tiles.at_pixels(strides_dy, sample, c, n, ALIGN)
    acc = tl.load(dy + at, mask=live, other=0.0).to(ACC)
    if t is not None:
        at = tiles.at_pixels(strides_t, sample, c, n, ALIGN)
        value = tl.load(t + at, mask=live, other=0.0).to(ACC)
        acc, away = tiles.stage_backward(acc, value, center, scale, shift, c, in_c, ACT)
    if sum_g is not None:
        index = tile * C + channels
        tiles.store_sum(sum_g, index, acc, live, channels < C, CHANNELS_LAST)
        if sum_gt is not None:
            tiles.store_sum(sum_gt, index, acc * away, live, channels < C, CHANNELS_LAST)
    if g is not None:
        if mean_g is not None:
            acc -= tl.load(mean_g + c, mask=in_c, other=0.0)
            acc -= away * tl.load(mean_gt + c, mask=in_c, other=0.0)
            acc *= tl.load(scale + c, mask=in_c, other=0.0)
        tiles.store(g + tiles.at_pixels(strides_g, sample, c, n, ALIGN), acc, live)


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
    strides_g,
    strides_d,
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
    """out = (g·v)·φ'(affine(d)), times scale where SCALED; sums as in normalise_backward."""
    C, D = aligned(C, ALIGN), aligned(D, ALIGN)
    rate, sample, tile, start = tiles.this_tile(N, R, BLOCK_N)
    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    for first in range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        k = along_channels(ds, CHANNELS_LAST)
        at = tiles.at_pixels(strides_g, sample, rate * D + k, n, ALIGN)
        part = tl.load(g + at, mask=(n < N) & (k < D), other=0.0)
        weight = tiles.weight_tile(v + rate * D * C, ds, cs, C, 1, D, C, CHANNELS_LAST)
        acc = tiles.matmul(part, weight, acc, CHANNELS_LAST)

    in_c = along_channels(cs, CHANNELS_LAST) < C
    c = rate * C + along_channels(cs, CHANNELS_LAST)
    live = (n < N) & in_c
    at = tiles.at_pixels(strides_d, sample, c, n, ALIGN)
    value = tl.load(d + at, mask=live, other=0.0).to(ACC)
    acc, away = tiles.stage_backward(acc, value, center, scale, shift, c, in_c, ACT)
    if sum_g is not None:
        index = (tile * R + rate) * C + cs
        tiles.store_sum(sum_g, index, acc, live, cs < C, CHANNELS_LAST)
        tiles.store_sum(sum_gt, index, acc * away, live, cs < C, CHANNELS_LAST)
    if out is not None:
        if SCALED:
            acc = tiles.affine(acc, None, scale, None, c, in_c)
        tiles.store(out + at, acc, live)


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
    strides_g,
    strides_d,
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
    C, D = aligned(C, ALIGN), aligned(D, ALIGN)
    tile_count = tl.cdiv(N, BLOCK_N)
    rate = tl.program_id(1) % R
    k = (tl.program_id(1) // R * BLOCK_D + tl.arange(0, BLOCK_D))[:, None]
    c = (tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    acc = tl.zeros((BLOCK_D, BLOCK_C), ACC)
    first = tl.program_id(0) * walk
    for tile in range(first, tl.minimum(first + walk, B * tile_count)):
        sample = tl.cast(tile // tile_count, tl.int64)
        n = tile % tile_count * BLOCK_N + tl.arange(0, BLOCK_N)
        row, col = n[None, :], n[:, None]
        at = tiles.at_pixels(strides_g, sample, rate * D + k, row, ALIGN)
        part = tl.load(g + at, mask=(row < N) & (k < D), other=0.0)
        at = tiles.at_pixels(strides_d, sample, rate * C + c, col, ALIGN)
        h = tl.load(d + at, mask=(col < N) & (c < C), other=0.0).to(ACC)
        h = tiles.stage(h, center, scale, shift, rate * C + c, c < C, ACT)
        acc = tiles.dot(part, tiles.rounded(h, part.dtype), acc)
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
        separable_conv2d_normalise_backward_kernel[(tile_count, triton.cdiv(C, block_c))](
            *(dy, t, *stage, *means, out),
            *(*parts, None, None)[:2],
            *(C, N),
            *strides,
            ACT=act,
            ACC=layouts.triton_type(dy),
            ALIGN=layouts.alignment(last, C, *(s for a in strides for s in (a[0], a[2]))),
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
    block_n, block_d, block_c, warps = layouts.product_shape(d.dtype, N, D, C, 128)
    tile_count = triton.cdiv(N, block_n) * d.size(0)
    out = torch.empty_like(d) if write else None
    parts = layouts.partial_sums(d, 2 * sums, tile_count, R * C)
    strides = layouts.map_strides(g), layouts.map_strides(d)
    pipeline = {} if last else {"num_stages": 2}  # NCHW: an address for every element of a stage
    if d.numel() > 0:
        separable_conv2d_pointwise_backward_kernel[(R * tile_count, triton.cdiv(C, block_c))](
            *(g, v.contiguous(), d, *inner, out),
            *(parts or (None, None)),
            *(C, D, N),
            *strides,
            R=R,
            ACT=act,
            SCALED=scaled,
            ACC=layouts.triton_type(d),
            ALIGN=layouts.alignment(last, C, D, strides[0][0], strides[0][2]),
            CHANNELS_LAST=last,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            BLOCK_D=block_d,
            num_warps=warps,
            **pipeline,
        )
    return out, [part.sum(0) for part in parts]


def weight_backward(
    g: torch.Tensor, d: torch.Tensor, inner: layouts.Normaliser, act: str, R: int
) -> torch.Tensor:
    """M = gᵀ·φ(affine(d)), [R, D, C] in the accumulation type."""
    B, C, D, N = d.size(0), d.size(1) // R, g.size(1) // R, d.size(2) * d.size(3)
    last = layouts.is_channels_last(d)
    block_n, block_c, block_d, warps = layouts.outer_product_shape(d.dtype, N, C, D, last)
    tile_count = triton.cdiv(N, block_n) * B
    blocks = R * triton.cdiv(D, block_d) * triton.cdiv(C, block_c)
    walk = triton.cdiv(tile_count, max(1, 512 // blocks))
    m = d.new_empty(
        (triton.cdiv(tile_count, max(walk, 1)), R, D, C), dtype=accumulation_dtype(d.dtype)
    )
    strides = layouts.map_strides(g), layouts.map_strides(d)
    if m.numel() > 0:
        separable_conv2d_weight_backward_kernel[
            (m.size(0), R * triton.cdiv(D, block_d), triton.cdiv(C, block_c))
        ](
            *(g, d, *inner, m, B, C, D, N),
            *strides,
            walk,
            R=R,
            ACT=act,
            ACC=layouts.triton_type(d),
            ALIGN=layouts.alignment(last, C, D, strides[0][0], strides[0][2]),
            CHANNELS_LAST=last,
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            BLOCK_D=block_d,
            num_warps=warps,
        )
    return m.sum(0)
