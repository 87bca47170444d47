"""The Triton backend of depthwise_conv2d: y = w ⊛ x + b for R rates over one x, and its backward.

Forward: a program makes one tile of one rate's output; the rates are neighbours in the grid, so
that they meet in the cache over one reading of x. Backward: a program walks a few tiles of dx; the
taps of dy that make dx also make its share of dw and db, which stays in registers until the end.
The shares are summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.fused import accumulation_dtype
from segkernels.ops import layouts, tiles
from segkernels.ops.geometry import unflatten
from segkernels.ops.tiles import aligned, along_channels, along_pixels


@triton.jit
def depthwise_conv2d_forward_kernel(
    x,
    w,  # [R, KH·KW, C]
    bias,  # [R, C] or None
    y,
    C,
    size,  # (H, W)
    out_size,
    strides_x,
    strides_y,
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
    C = aligned(C, ALIGN)
    N = out_size[0] * out_size[1]
    rate, sample, _, start = tiles.this_tile(N, R, BLOCK_N)
    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    c = along_channels(tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), CHANNELS_LAST)
    acc = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    if bias is not None:
        acc += tl.load(bias + rate * C + c, mask=c < C, other=0.0).to(ACC)
    acc = tiles.depthwise_tile(
        acc,
        *(x, strides_x, w, sample, rate, start, n, c, C, size, out_size, stride, geometry),
        *(R, KH, KW, ALIGN, BLOCK_N),
    )
    at = tiles.at_pixels(strides_y, sample, rate * C + c, n, ALIGN)
    tiles.store(y + at, acc, (n < N) & (c < C))


@triton.jit
def depthwise_conv2d_backward_kernel(
    dy,
    x,
    w,  # [R, KH·KW, C]
    dx,  # or None, as dw and db
    dw,  # [shares, R, KH·KW, C]
    db,  # [shares, R, C]
    C,
    size,  # (H, W)
    out_size,
    strides_dy,
    strides_x,
    strides_dx,
    stride,
    geometry,
    walk,  # tiles per program
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tile t of a sample is the t-th block of its input pixels, and of its output pixels for db."""
    C = aligned(C, ALIGN)
    W, N = size[1], size[0] * size[1]
    Wo, No = out_size[1], out_size[0] * out_size[1]
    tile_count = tl.cdiv(tl.maximum(N, No), BLOCK_N)
    walk_count = tl.cdiv(tile_count, walk)
    first = tl.program_id(0) % walk_count * walk
    sample = (tl.program_id(0) // walk_count).to(tl.int64)
    share = tl.program_id(0).to(tl.int64) * R * C
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(channels, CHANNELS_LAST)

    zero = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    sums_w = ()
    sums_b = ()
    for _ in tl.static_range(R * KH * KW):
        sums_w += (zero,)
    for _ in tl.static_range(R):
        sums_b += (zero,)

    for tile in range(first, tl.minimum(first + walk, tile_count)):
        start = tile * BLOCK_N
        n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
        live = (n < N) & (c < C)
        value = zero
        if dw is not None:
            at = tiles.at_rows(strides_x, sample, c, n // W, n % W, ALIGN)
            value = tl.load(x + at, mask=live, other=0.0).to(ACC)
        sums = tiles.depthwise_backward_tile(
            (zero, sums_w),
            value,
            *(dy, strides_dy, w, sample, start, n, c, C, size, out_size, stride, geometry),
            *(R, KH, KW, dx is not None, ALIGN, BLOCK_N),
        )
        if dx is not None:
            tiles.store(dx + tiles.at_pixels(strides_dx, sample, c, n, ALIGN), sums[0], live)
        sums_w = sums[1]
        if db is not None:
            more_b = ()
            for rate in tl.static_range(R):
                at = tiles.at_rows(strides_dy, sample, rate * C + c, n // Wo, n % Wo, ALIGN)
                g = tl.load(dy + at, mask=(n < No) & (c < C), other=0.0)
                more_b += (sums_b[rate] + g.to(ACC),)
            sums_b = more_b

    if dw is not None:
        for t in tl.static_range(R * KH * KW):
            total = tiles.sum_pixels(sums_w[t], CHANNELS_LAST)
            tl.store(dw + share * (KH * KW) + t * C + channels, total, mask=channels < C)
    if db is not None:
        for rate in tl.static_range(R):
            total = tiles.sum_pixels(sums_b[rate], CHANNELS_LAST)
            tl.store(db + share + rate * C + channels, total, mask=channels < C)


def depthwise_conv2d(
    x: torch.Tensor,  # [B, C, H, W]
    w: torch.Tensor,  # [R, C, KH, KW]
    b: torch.Tensor | None,  # [R, C]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:  # [B, R·C, H', W']
    last = layouts.is_channels_last(x)
    R, C, KH, KW = w.shape
    Ho, Wo = unflatten(w, stride, padding, dilation).output_size(x.size(2), x.size(3))[0]
    y = layouts.empty_map(x, R * C, (Ho, Wo))
    if y.numel() == 0:
        return y
    x = layouts.readable(x, last)
    align = layouts.alignment(last, C, x.stride(0), x.stride(2), x.stride(3))
    block_n, block_c = layouts.window_shape(x, Ho * Wo, last, align)
    tile_count = triton.cdiv(Ho * Wo, block_n) * x.size(0)
    depthwise_conv2d_forward_kernel[(R * tile_count, triton.cdiv(C, block_c))](
        x,
        layouts.taps_major(w),
        None if b is None else b.contiguous(),
        *(y, C, (x.size(2), x.size(3)), (Ho, Wo)),
        *(x.stride(), layouts.map_strides(y)),
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
    return y


def depthwise_conv2d_backward(
    dy: torch.Tensor,  # [B, R·C, H', W']
    x: torch.Tensor,  # [B, C, H, W]
    w: torch.Tensor,  # [R, C, KH, KW]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    need: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    last = layouts.is_channels_last(x)
    B, C, H, W = x.shape
    R, _, KH, KW = w.shape
    Ho, Wo = dy.shape[2:]
    dx = layouts.empty_map(x, C, (H, W)) if need[0] else None
    dy, x = layouts.readable(dy, last), layouts.readable(x, last)
    align = layouts.alignment(last, C, *(t.stride(a) for t in (x, dy) for a in (0, 2, 3)))
    pixels = max(H * W, Ho * Wo)
    block_n, block_c, walk = layouts.backward_walk(x, R * KH * KW, pixels, last, align)
    shares = triton.cdiv(pixels, block_n * walk) * B

    acc = accumulation_dtype(x.dtype)
    dw = x.new_empty((shares, R, KH * KW, C), dtype=acc) if need[1] else None
    db = x.new_empty((shares, R, C), dtype=acc) if need[2] else None
    if shares * C > 0:
        depthwise_conv2d_backward_kernel[(shares, triton.cdiv(C, block_c))](
            dy,
            x,
            layouts.taps_major(w),
            dx,
            dw,
            db,
            *(C, (H, W), (Ho, Wo)),
            *(dy.stride(), x.stride()),
            (0, 0, 0) if dx is None else layouts.map_strides(dx),
            tuple(stride),
            layouts.rate_geometry(padding, dilation),
            walk,
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
    return (
        x.new_empty(0) if dx is None else dx,
        x.new_empty(0) if dw is None else layouts.channels_major(dw.sum(0), KH, KW).to(x.dtype),
        x.new_empty(0) if db is None else db.sum(0).to(x.dtype),
    )
