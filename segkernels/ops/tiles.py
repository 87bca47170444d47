"""Device functions shared by the Triton kernels of several operators, and the layout rules their launchers share.

A tile is a block of pixels times a block of channels. channels_last maps are read as [pixels, channels],
NCHW maps as [channels, pixels]: the axis that is contiguous in memory is always the tile's last. `along_pixels`
and `along_channels` put a vector on its axis; everything after that is written once for both layouts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def along_pixels(t, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return t[:, None]
    else:
        return t[None, :]


@triton.jit
def along_channels(t, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return t[None, :]
    else:
        return t[:, None]


@triton.jit
def sum_pixels(t, CHANNELS_LAST: tl.constexpr):
    """Σ over the pixels of a tile, one number per channel."""
    return tl.sum(t, axis=0 if CHANNELS_LAST else 1)


@triton.jit
def zeros(BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return tl.zeros((BLOCK_N, BLOCK_C), ACC)
    else:
        return tl.zeros((BLOCK_C, BLOCK_N), ACC)


@triton.jit
def pick(values, rate, FIELD: tl.constexpr, FIELDS: tl.constexpr, R: tl.constexpr):
    """values[rate·FIELDS + FIELD], `rate` being known at run time only."""
    value = values[FIELD]
    for q in tl.static_range(1, R):
        value = tl.where(rate == q, values[q * FIELDS + FIELD], value)
    return value


@triton.jit
def rounded(t, dtype: tl.constexpr):
    """t in its storage type, to nearest even (the interpreter by itself truncates to bfloat16)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = t.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, nearest, bits).to(tl.float32, bitcast=True)
    return t.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a·b without TF32. float64 has no matrix instruction everywhere; interpreted bfloat16 has none at all."""
    if acc.dtype == tl.float64:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def affine(t, center, scale, shift, c, in_c):
    """(t − center)·scale + shift per channel; c, in_c lie on the tile's channel axis, a None is left out."""
    if center is not None:
        t -= tl.load(center + c, mask=in_c, other=0.0)
    if scale is not None:
        t *= tl.load(scale + c, mask=in_c, other=0.0)
    if shift is not None:
        t += tl.load(shift + c, mask=in_c, other=0.0)
    return t


@triton.jit
def activation(t, ACT: tl.constexpr):
    """φ(t); NaN passes through."""
    if ACT != "none":
        t = tl.where(t < 0, 0.0, t)
    if ACT == "relu6":
        t = tl.where(t > 6, 6.0, t)
    return t


@triton.jit
def activation_backward(g, t, ACT: tl.constexpr):
    """g·φ'(t); t may be the argument or the value of φ: both give the same mask."""
    if ACT != "none":
        g = tl.where(t <= 0, 0.0, g)
    if ACT == "relu6":
        g = tl.where(t >= 6, 0.0, g)
    return g


@triton.jit
def store_moments(mean, m2, index, t, live, count, in_c, CHANNELS_LAST: tl.constexpr):
    """The tile's mean and Σ(t − mean)² per channel, the parts of Chan, Golub and LeVeque's merge (1983)."""
    center = sum_pixels(tl.where(live, t, 0.0), CHANNELS_LAST) / count
    away = tl.where(live, t - along_channels(center, CHANNELS_LAST), 0.0)
    tl.store(mean + index, center, mask=in_c)
    tl.store(m2 + index, sum_pixels(away * away, CHANNELS_LAST), mask=in_c)


@triton.jit
def depthwise_tile(
    acc,  # [BLOCK_N, BLOCK_C] or its transpose
    x,  # pointers to the tile's channels of x, first pixel
    w,  # pointers to the tile's channels of w, first tap
    i,
    j,  # output rows and columns, on the pixel axis
    live,  # of the tile
    in_c,  # on the channel axis
    first_row,
    last_row,  # of the tile, scalars
    H,
    W,
    stride_xh,
    stride_xw,
    stride_h,
    stride_w,
    geometry,
    rate,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
):
    """acc + Σ_ab w[c,a,b]·x[c, i·s + a·r − p, j·s + b·r − p]; a tap row outside the map costs nothing."""
    for a in tl.static_range(KH):
        down = a * pick(geometry, rate, 2, 4, R) - pick(geometry, rate, 0, 4, R)
        if (last_row * stride_h + down >= 0) & (first_row * stride_h + down < H):
            row = i * stride_h + down
            for b in tl.static_range(KW):
                right = b * pick(geometry, rate, 3, 4, R) - pick(geometry, rate, 1, 4, R)
                col = j * stride_w + right
                inside = live & (row >= 0) & (row < H) & (col >= 0) & (col < W)
                offset = row.to(tl.int64) * stride_xh + col.to(tl.int64) * stride_xw
                tap = tl.load(x + offset, mask=inside, other=0.0).to(acc.dtype)
                acc += tap * tl.load(w + (a * KW + b), mask=in_c, other=0.0).to(acc.dtype)
    return acc


@triton.jit
def depthwise_backward_tile(
    x,  # the tile of x, in the accumulation type
    dy,  # pointers to the tile's channels of dy, first pixel, first rate
    w,  # [R, C, KH, KW]
    dw,  # [R, KH·KW, C], this tile's share
    i,
    j,  # input rows and columns, on the pixel axis
    c,
    live,
    first_row,
    last_row,
    C,
    Ho,
    Wo,
    stride_dyc,
    stride_dyh,
    stride_dyw,
    stride_h,
    stride_w,
    geometry,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """dx of a tile, and its share of dw: the same taps of dy serve both.

    dx[m] = Σ_ab w_ab·dy[n], dw_ab = Σ_m x[m]·dy[n], where n·s + (a, b)·r − p = m.
    """
    dx = tl.zeros_like(x)
    in_c = c < C
    channel = along_channels(c, CHANNELS_LAST)
    in_channel = channel < C
    for rate in range(R):
        taps = dy + tl.cast(rate, tl.int64) * C * stride_dyc
        for a in tl.static_range(KH):
            up = pick(geometry, rate, 0, 4, R) - a * pick(geometry, rate, 2, 4, R)
            part = dw + tl.cast(rate, tl.int64) * (KH * KW * C) + a * KW * C + c
            if (last_row + up >= 0) & (first_row + up < Ho * stride_h):
                row = (i + up) // stride_h
                on_row = (i + up >= 0) & (row < Ho) & (row * stride_h == i + up)
                for b in tl.static_range(KW):
                    at = j + pick(geometry, rate, 1, 4, R) - b * pick(geometry, rate, 3, 4, R)
                    col = at // stride_w
                    inside = live & on_row & (at >= 0) & (col < Wo) & (col * stride_w == at)
                    offset = row.to(tl.int64) * stride_dyh + col.to(tl.int64) * stride_dyw
                    g = tl.load(taps + offset, mask=inside, other=0.0).to(x.dtype)
                    if NEED_DX:
                        tap = (rate * C + channel) * (KH * KW) + (a * KW + b)
                        dx += g * tl.load(w + tap, mask=in_channel, other=0.0).to(x.dtype)
                    if NEED_DW:
                        tl.store(part + b * C, sum_pixels(x * g, CHANNELS_LAST), mask=in_c)
            elif NEED_DW:
                for b in tl.static_range(KW):
                    tl.store(part + b * C, tl.zeros_like(c).to(x.dtype), mask=in_c)
    return dx


def accumulation_type(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def triton_type(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def is_channels_last(x: torch.Tensor) -> bool:
    """PyTorch's own reading of the strides (c10/core/MemoryFormat.h, is_channels_last_strides_2d)."""
    if x.stride(1) == 0:
        return False
    least = 0
    for axis in (1, 3, 2, 0):
        size, stride = x.size(axis), x.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == x.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def readable(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t itself where its last axis in memory is dense (or repeats one number), else a copy in the layout."""
    axis = 1 if channels_last else 3
    if t.size(axis) == 1 or t.stride(axis) in (0, 1):
        return t
    return t.contiguous(memory_format=memory_format(channels_last))


def pixel_map(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """readable, and with pixels at one distance from each other, so that a map is [B, C, N]."""
    t = readable(t, channels_last)
    if t.size(2) == 1 or t.stride(2) == t.size(3) * t.stride(3):
        return t
    return t.contiguous(memory_format=memory_format(channels_last))


def map_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Distances from sample to sample, channel to channel, pixel to pixel of a pixel_map."""
    return t.stride(0), t.stride(1), t.stride(3) if t.size(3) > 1 else t.stride(2)


def empty_map(x: torch.Tensor, channels: int, size: tuple[int, int], channels_last: bool) -> torch.Tensor:
    """An unwritten map of x's batch and type in the layout."""
    shape = (x.size(0), channels, *size)
    return torch.empty(
        shape, dtype=x.dtype, device=x.device, memory_format=memory_format(channels_last)
    )


def rate_geometry(padding: list[int], dilation: list[int]) -> tuple[int, ...]:
    """(p_h, p_w, r_h, r_w) of every rate, in a row: what `pick` reads."""
    pairs = zip(padding[::2], padding[1::2], dilation[::2], dilation[1::2], strict=True)
    return tuple(number for pair in pairs for number in pair)


def output_size(
    x: torch.Tensor, w: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> tuple[int, int]:
    """⌊(H + 2p − r(k − 1) − 1)/s⌋ + 1, rows and columns."""
    rows, cols = (
        (x.size(2 + a) + 2 * padding[a] - dilation[a] * (w.size(2 + a) - 1) - 1) // stride[a] + 1
        for a in (0, 1)
    )
    return rows, cols


def tile_shape(channels: int, pixels: int, itemsize: int, channels_last: bool) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_C) of an elementwise or depthwise tile: at least a 128-byte line along the dense axis."""
    elements = 4096 if itemsize < 8 else 1024
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), 128 // itemsize)
        return min(triton.next_power_of_2(pixels), elements // block_c), block_c
    block_n = min(triton.next_power_of_2(pixels), 512)
    return block_n, min(triton.next_power_of_2(channels), elements // block_n)
