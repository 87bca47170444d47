"""Triton kernels of depthwise_conv2d: d = w ⊛ x + b for R rates over one input, and its backward.

Forward: one program makes one tile of one rate's output; the rates are neighbours in the grid, so that they meet
in the cache over one reading of x. Backward: one program makes one tile of dx and, from the same taps of dy, that tile's
share of dw and db; the shares are summed in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import tiles
from segkernels.ops.tiles import along_channels, along_pixels


@triton.jit
def depthwise_conv2d_forward_kernel(
    x,
    w,
    bias,
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
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    N = Ho * Wo
    tile_count = tl.cdiv(N, BLOCK_N)
    rate = tl.program_id(0) % R
    start = tl.program_id(0) // R % tile_count * BLOCK_N
    sample = (tl.program_id(0) // R // tile_count).to(tl.int64)

    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    c = along_channels(tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), CHANNELS_LAST)
    in_c = c < C
    live = (n < N) & in_c
    channel = (rate * C + c).to(tl.int64)

    acc = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    if bias is not None:
        acc += tl.load(bias + channel, mask=in_c, other=0.0).to(ACC)
    acc = tiles.depthwise_tile(
        acc,
        x + sample * stride_xb + c.to(tl.int64) * stride_xc,
        w + channel * (KH * KW),
        n // Wo,
        n % Wo,
        live,
        in_c,
        start // Wo,
        (tl.minimum(start + BLOCK_N, N) - 1) // Wo,
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
    at = sample * stride_yb + channel * stride_yc + n.to(tl.int64) * stride_yn
    tl.store(y + at, tiles.rounded(acc, y.dtype.element_ty), mask=live)


@triton.jit
def depthwise_conv2d_backward_kernel(
    dy,
    x,
    w,
    dx,
    dw,
    db,
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
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tile t of a sample is the t-th block of its input pixels and of its output pixels (for db)."""
    N = H * W
    tile_count = tl.cdiv(tl.maximum(N, Ho * Wo), BLOCK_N)
    start = tl.program_id(0) % tile_count * BLOCK_N
    sample = (tl.program_id(0) // tile_count).to(tl.int64)
    share = tl.program_id(0).to(tl.int64) * R * C

    n = along_pixels(start + tl.arange(0, BLOCK_N), CHANNELS_LAST)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = along_channels(channels, CHANNELS_LAST)
    dy += sample * stride_dyb + c.to(tl.int64) * stride_dyc

    if db is not None:
        live = (n < Ho * Wo) & (c < C)
        at = (n // Wo).to(tl.int64) * stride_dyh + (n % Wo).to(tl.int64) * stride_dyw
        for rate in range(R):
            g = tl.load(dy + tl.cast(rate, tl.int64) * C * stride_dyc + at, mask=live, other=0.0)
            total = tiles.sum_pixels(g.to(ACC), CHANNELS_LAST)
            tl.store(db + share + rate * C + channels, total, mask=channels < C)

    live = (n < N) & (c < C)
    i = n // W
    j = n % W
    acc = tiles.zeros(BLOCK_N, BLOCK_C, ACC, CHANNELS_LAST)
    if dw is not None:
        at = c.to(tl.int64) * stride_xc + i.to(tl.int64) * stride_xh + j.to(tl.int64) * stride_xw
        acc = tl.load(x + sample * stride_xb + at, mask=live, other=0.0).to(ACC)
    acc = tiles.depthwise_backward_tile(
        acc,
        dy,
        w,
        dw + share * (KH * KW) if dw is not None else None,
        i,
        j,
        channels,
        live,
        start // W,
        (tl.minimum(start + BLOCK_N, N) - 1) // W,
        C,
        Ho,
        Wo,
        stride_dyc,
        stride_dyh,
        stride_dyw,
        stride_h,
        stride_w,
        geometry,
        R,
        KH,
        KW,
        dx is not None,
        dw is not None,
        CHANNELS_LAST,
    )
    if dx is not None:
        at = sample * stride_dxb + c.to(tl.int64) * stride_dxc + n.to(tl.int64) * stride_dxn
        tl.store(dx + at, tiles.rounded(acc, dx.dtype.element_ty), mask=live)


def depthwise_conv2d(
    x: torch.Tensor,  # [B, C, H, W]
    w: torch.Tensor,  # [R, C, KH, KW]
    b: torch.Tensor | None,  # [R, C]
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> torch.Tensor:  # [B, R·C, H', W']
    last = tiles.is_channels_last(x)
    R, C, KH, KW = w.shape
    Ho, Wo = tiles.output_size(x, w, stride, padding, dilation)
    y = tiles.empty_map(x, R * C, (Ho, Wo), last)
    if y.numel() == 0:
        return y
    x = tiles.readable(x, last)
    block_n, block_c = tiles.tile_shape(C, Ho * Wo, x.element_size(), last)
    grid = (R * triton.cdiv(Ho * Wo, block_n) * x.size(0), triton.cdiv(C, block_c))
    with torch.cuda.device_of(x):
        depthwise_conv2d_forward_kernel[grid](
            x,
            w.contiguous(),
            None if b is None else b.contiguous(),
            y,
            tiles.rate_geometry(padding, dilation),
            *(C, x.size(2), x.size(3), Ho, Wo),
            *x.stride(),
            *tiles.map_strides(y),
            *stride,
            R=R,
            KH=KH,
            KW=KW,
            ACC=tiles.triton_type(tiles.accumulation_type(x)),
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
    last = tiles.is_channels_last(x)
    B, C, H, W = x.shape
    R, _, KH, KW = w.shape
    Ho, Wo = dy.shape[2:]
    dy, x = tiles.readable(dy, last), tiles.readable(x, last)
    block_n, block_c = tiles.tile_shape(C, max(H * W, Ho * Wo), x.element_size(), last)
    tile_count = triton.cdiv(max(H * W, Ho * Wo), block_n) * B

    share = {"dtype": tiles.accumulation_type(x), "device": x.device}
    dx = tiles.empty_map(x, C, (H, W), last) if need[0] else None
    dw = torch.empty((tile_count, R, KH * KW, C), **share) if need[1] else None
    db = torch.empty((tile_count, R, C), **share) if need[2] else None
    if tile_count * C > 0:
        with torch.cuda.device_of(x):
            depthwise_conv2d_backward_kernel[(tile_count, triton.cdiv(C, block_c))](
                dy,
                x,
                w.contiguous(),
                dx,
                dw,
                db,
                tiles.rate_geometry(padding, dilation),
                *(C, H, W, Ho, Wo),
                *dy.stride(),
                *x.stride(),
                *((0, 0, 0) if dx is None else tiles.map_strides(dx)),
                *stride,
                R=R,
                KH=KH,
                KW=KW,
                ACC=tiles.triton_type(share["dtype"]),
                CHANNELS_LAST=last,
                BLOCK_N=block_n,
                BLOCK_C=block_c,
                num_warps=4,
            )
    none = x.new_empty(0)
    return (
        none if dx is None else dx,
        none if dw is None else dw.sum(0).view(R, KH, KW, C).permute(0, 3, 1, 2).to(x.dtype).contiguous(),
        none if db is None else db.sum(0).to(x.dtype),
    )
