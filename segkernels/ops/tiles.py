"""Device functions shared by the Triton kernels of several operators.

A tile is a block of pixels times a block of channels. channels_last maps are read as [pixels, channels],
NCHW maps as [channels, pixels]: the axis that is contiguous in memory is always the tile's last. `along_pixels`
and `along_channels` put a vector on its axis; everything after that is written once for both layouts.
"""

from __future__ import annotations

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
def zeros(
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    if CHANNELS_LAST:
        return tl.zeros((BLOCK_N, BLOCK_C), ACC)
    else:
        return tl.zeros((BLOCK_C, BLOCK_N), ACC)


@triton.jit
def pick(geometry, rate, FIELD: tl.constexpr, R: tl.constexpr):
    """Field FIELD of (p_h, p_w, r_h, r_w) of a rate that is known at run time only."""
    value = geometry[FIELD]
    for q in tl.static_range(1, R):
        value = tl.where(rate == q, geometry[4 * q + FIELD], value)
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
def matmul(t, weight, acc, CHANNELS_LAST: tl.constexpr):
    """acc + the product of a tile of a map with a matrix over its channels, [BLOCK_N, ·] or [·, BLOCK_N]."""
    if CHANNELS_LAST:
        return dot(t, weight, acc)
    else:
        return dot(weight, t, acc)


@triton.jit
def weight_tile(v, k, m, stride_k, stride_m, K, M, CHANNELS_LAST: tl.constexpr):
    """v's block over the summed channels k and the made channels m, the way `matmul` takes it."""
    if CHANNELS_LAST:
        k, m = k[:, None], m[None, :]
    else:
        k, m = k[None, :], m[:, None]
    return tl.load(v + k * stride_k + m * stride_m, mask=(k < K) & (m < M), other=0.0)


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
def aligned(stride, ALIGN: tl.constexpr):
    """A multiple of ALIGN that the compiler knows to be one (of itself it looks for 16 only: not 728)."""
    return stride // ALIGN * ALIGN


@triton.jit
def depthwise_tile(
    acc,  # [BLOCK_N, BLOCK_C] or its transpose
    x,  # pointers to the tile's channels of x, first pixel
    w,  # pointers to the tile's channels of w, first tap
    i,  # output rows and columns, on the pixel axis
    j,
    live,  # of the tile
    in_c,  # on the channel axis
    first_row,  # of the tile, scalars
    last_row,
    C,
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
    """acc + Σ_ab w[a,b,c]·x[c, i·s + a·r − p, j·s + b·r − p]; a tap row outside the map costs nothing."""
    for a in tl.static_range(KH):
        down = a * pick(geometry, rate, 2, R) - pick(geometry, rate, 0, R)
        if (last_row * stride_h + down >= 0) & (first_row * stride_h + down < H):
            row = i * stride_h + down
            for b in tl.static_range(KW):
                col = j * stride_w + (b * pick(geometry, rate, 3, R) - pick(geometry, rate, 1, R))
                inside = live & (row >= 0) & (row < H) & (col >= 0) & (col < W)
                offset = row.to(tl.int64) * stride_xh + col.to(tl.int64) * stride_xw
                tap = tl.load(x + offset, mask=inside, other=0.0).to(acc.dtype)
                acc += tap * tl.load(w + (a * KW + b) * C, mask=in_c, other=0.0).to(acc.dtype)
    return acc


@triton.jit
def depthwise_backward_row(
    sums,  # (dx, dw of every tap), tiles in the accumulation type
    x,  # the tile of x
    dy,  # pointers to the tile's channels of dy, this tap row's pixels of column 0
    w,  # pointers to the tile's channels of w, first tap
    on_row,  # where this tap row meets dy, on the pixel axis
    j,
    live,
    in_c,
    C,
    Wo,
    stride_dyw,
    stride_w,
    pad,
    dilation,
    ROW: tl.constexpr,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    NEED_DX: tl.constexpr,
):
    """`sums` with the KW taps of row ROW added; rows are counted through all rates."""
    dx = sums[0]
    dw = ()
    for t in tl.static_range(TAPS):
        if t // KW == ROW:
            at = j + pad - (t % KW) * dilation
            col = at // stride_w
            inside = live & on_row & (at >= 0) & (col < Wo) & (col * stride_w == at)
            g = tl.load(dy + col.to(tl.int64) * stride_dyw, mask=inside, other=0.0).to(x.dtype)
            if NEED_DX:
                dx += g * tl.load(w + t * C, mask=in_c, other=0.0).to(x.dtype)
            dw = dw + (sums[1 + t] + x * g,)
        else:
            dw = dw + (sums[1 + t],)
    return (dx,) + dw


@triton.jit
def depthwise_backward_tile(
    sums,  # (dx, dw of every tap), tiles in the accumulation type
    x,  # the tile of x
    dy,  # pointers to the tile's channels of dy, first rate, first pixel
    w,  # pointers to the tile's channels of w, first tap
    i,  # input rows and columns, on the pixel axis
    j,
    live,
    in_c,
    first_row,  # of the tile, scalars
    last_row,
    C,
    Ho,
    Wo,
    stride_dyr,  # from rate to rate
    stride_dyh,
    stride_dyw,
    stride_h,
    stride_w,
    geometry,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    NEED_DX: tl.constexpr,
):
    """`sums` with a tile's share of dx and dw added: the same taps of dy serve both.

    dx[m] = Σ_ab w_ab·dy[n], dw_ab = Σ_m x[m]·dy[n], where n·s + (a, b)·r − p = m.
    """
    for rate in tl.static_range(R):
        for a in tl.static_range(KH):
            up = geometry[4 * rate] - a * geometry[4 * rate + 2]
            if (last_row + up >= 0) & (first_row + up < Ho * stride_h):
                row = (i + up) // stride_h
                sums = depthwise_backward_row(
                    sums,
                    x,
                    dy + (row.to(tl.int64) * stride_dyh + rate * stride_dyr),
                    w,
                    (i + up >= 0) & (row < Ho) & (row * stride_h == i + up),
                    j,
                    live,
                    in_c,
                    C,
                    Wo,
                    stride_dyw,
                    stride_w,
                    geometry[4 * rate + 1],
                    geometry[4 * rate + 3],
                    rate * KH + a,
                    KW,
                    R * KH * KW,
                    NEED_DX,
                )
    return sums
