"""Triton kernels of depthwise_conv2d: y = w ⊛ x + b for R rates over one input, and its backward.

Forward: a program makes one tile of one rate's output; the rates are neighbours in the grid, so that they meet
in the cache over one reading of x. Backward: a program walks a few tiles of dx; the taps of dy that make dx also make
its share of dw and db, which stays in registers until the end. The shares are summed in a fixed order.
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
    geometry,
    C,
    H,
    W,
    Ho,
    Wo,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yb,
    stride_yc,
    stride_yn,
    stride_h,
    stride_w,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if CHANNELS_LAST:
        C, stride_yn = aligned(C, ALIGN), aligned(stride_yn, ALIGN)
        stride_xh, stride_xw = aligned(stride_xh, ALIGN), aligned(stride_xw, ALIGN)
        stride_xb, stride_yb = aligned(stride_xb, ALIGN), aligned(stride_yb, ALIGN)
    N = Ho * Wo
    tile_count = tl.cdiv(N, BLOCK_N)
    rate = tl.program_id(0) % R
    start = tl.program_id(0) // R % tile_count * BLOCK_N
    sample = (tl.program_id(0) // R // tile_count).to(tl.int64)

    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    c = along_channels(tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), CHANNELS_LAST)
    in_c = c < C
    live = (n < N) & in_c
    acc = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    if bias is not None:
        acc += tl.load(bias + rate * C + c, mask=in_c, other=0.0).to(ACC)
    acc = tiles.depthwise_tile(
        acc,
        x + sample * stride_xb + c.to(tl.int64) * stride_xc,
        w + rate * (KH * KW) * C + c,
        n // Wo,
        n % Wo,
        live,
        in_c,
        start // Wo,
        (tl.minimum(start + BLOCK_N, N) - 1) // Wo,
        C,
        H,
        W,
        stride_xh,
        stride_xw,
        stride_h,
        stride_w,
        geometry,
        rate,
        R,
        KH,
        KW,
    )
    at = sample * stride_yb + (rate * C + c).to(tl.int64) * stride_yc + n.to(tl.int64) * stride_yn
    tl.store(y + at, tiles.rounded(acc, y.dtype.element_ty), mask=live)


@triton.jit
def depthwise_conv2d_backward_kernel(
    dy,
    x,
    w,  # [R, KH·KW, C]
    dx,  # or None, as dw and db
    dw,  # [shares, R, KH·KW, C]
    db,  # [shares, R, C]
    geometry,
    C,
    H,
    W,
    Ho,
    Wo,
    stride_dyb,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_dxb,
    stride_dxc,
    stride_dxn,
    stride_h,
    stride_w,
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
    """Tile t of a sample is the t-th block of its input pixels (dx, dw) and of its output pixels (db)."""
    if CHANNELS_LAST:
        C, stride_dxn = aligned(C, ALIGN), aligned(stride_dxn, ALIGN)
        stride_xh, stride_xw = aligned(stride_xh, ALIGN), aligned(stride_xw, ALIGN)
        stride_dyh, stride_dyw = aligned(stride_dyh, ALIGN), aligned(stride_dyw, ALIGN)
        stride_xb, stride_dxb = aligned(stride_xb, ALIGN), aligned(stride_dxb, ALIGN)
        stride_dyb = aligned(stride_dyb, ALIGN)
    N = H * W
    tile_count = tl.cdiv(tl.maximum(N, Ho * Wo), BLOCK_N)
    walk_count = tl.cdiv(tile_count, walk)
    first = tl.program_id(0) % walk_count * walk
    sample = (tl.program_id(0) // walk_count).to(tl.int64)
    share = tl.program_id(0).to(tl.int64) * R * C

    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(channels, CHANNELS_LAST)
    in_c = c < C
    x += sample * stride_xb + c.to(tl.int64) * stride_xc
    dy += sample * stride_dyb + c.to(tl.int64) * stride_dyc
    stride_dyr = C * tl.cast(stride_dyc, tl.int64)

    zero = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    sums_w = ()
    sums_b = ()
    for _ in tl.static_range(R * KH * KW):
        sums_w = sums_w + (zero,)
    for _ in tl.static_range(R):
        sums_b = sums_b + (zero,)

    for tile in range(first, tl.minimum(first + walk, tile_count)):
        start = tile * BLOCK_N
        n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
        live = (n < N) & in_c
        i = n // W
        j = n % W
        at = i.to(tl.int64) * stride_xh + j.to(tl.int64) * stride_xw
        sums = tiles.depthwise_backward_tile(
            (zero,) + sums_w,
            tl.load(x + at, mask=live, other=0.0).to(ACC) if dw is not None else zero,
            dy,
            w + c,
            i,
            j,
            live,
            in_c,
            start // W,
            (tl.minimum(start + BLOCK_N, N) - 1) // W,
            C,
            Ho,
            Wo,
            stride_dyr,
            stride_dyh,
            stride_dyw,
            stride_h,
            stride_w,
            geometry,
            R,
            KH,
            KW,
            dx is not None,
        )
        if dx is not None:
            at = sample * stride_dxb + c.to(tl.int64) * stride_dxc + n.to(tl.int64) * stride_dxn
            tl.store(dx + at, tiles.rounded(sums[0], dx.dtype.element_ty), mask=live)
        sums_w = sums[1:]
        if db is not None:
            live = (n < Ho * Wo) & in_c
            at = (n // Wo).to(tl.int64) * stride_dyh + (n % Wo).to(tl.int64) * stride_dyw
            more_b = ()
            for rate in tl.static_range(R):
                g = tl.load(dy + (at + rate * stride_dyr), mask=live, other=0.0)
                more_b = more_b + (sums_b[rate] + g.to(ACC),)
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
    block_n, block_c = layouts.tile_shape(C, Ho * Wo, x.element_size(), last, 2048)
    tile_count = triton.cdiv(Ho * Wo, block_n) * x.size(0)
    if y.numel() == 0:
        return y
    x = layouts.readable(x, last)
    with torch.cuda.device_of(x):
        depthwise_conv2d_forward_kernel[(R * tile_count, triton.cdiv(C, block_c))](
            x,
            layouts.taps_major(w),
            None if b is None else b.contiguous(),
            y,
            layouts.rate_geometry(padding, dilation),
            *(C, x.size(2), x.size(3), Ho, Wo),
            *x.stride(),
            *layouts.map_strides(y),
            *stride,
            R=R,
            KH=KH,
            KW=KW,
            ACC=layouts.triton_type(x),
            ALIGN=layouts.alignment(C, x.stride(0), x.stride(2), x.stride(3)),
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
    block_n, block_c, walk = layouts.backward_walk(x, R * KH * KW, max(H * W, Ho * Wo), last)
    shares = triton.cdiv(max(H * W, Ho * Wo), block_n * walk) * B

    acc = accumulation_dtype(x.dtype)
    dw = x.new_empty((shares, R, KH * KW, C), dtype=acc) if need[1] else None
    db = x.new_empty((shares, R, C), dtype=acc) if need[2] else None
    if shares * C > 0:
        with torch.cuda.device_of(x):
            depthwise_conv2d_backward_kernel[(shares, triton.cdiv(C, block_c))](
                dy,
                x,
                layouts.taps_major(w),
                dx,
                dw,
                db,
                layouts.rate_geometry(padding, dilation),
                *(C, H, W, Ho, Wo),
                *dy.stride(),
                *x.stride(),
                *((0, 0, 0) if dx is None else layouts.map_strides(dx)),
                *stride,
                walk,
                R=R,
                KH=KH,
                KW=KW,
                ACC=layouts.triton_type(x),
                ALIGN=layouts.alignment(C, *(t.stride(a) for t in (x, dy) for a in (0, 2, 3))),
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
