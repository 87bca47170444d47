"""Device functions shared by the Triton kernels of several operators.

A tile is a block of pixels times a block of channels. channels_last maps are read as [pixels,
channels], NCHW maps as [channels, pixels]: the axis that is dense in memory is the tile's last.
`along_pixels` and `along_channels` put a vector on its axis; everything after that is written once
for both layouts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from segkernels.ops import layouts

INTERPRETED = tl.constexpr(layouts.INTERPRETED)


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """A multiple of ALIGN that the compiler knows to be one (by itself it sees 16 only)."""
    return stride // ALIGN * ALIGN


@triton.jit
def this_tile(N, R: tl.constexpr, BLOCK_N: tl.constexpr):
    """(rate, sample, tile, first pixel) of this program; the rates are neighbours in the grid."""
    tile_count = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // R
    start = tile % tile_count * BLOCK_N
    return tl.program_id(0) % R, (tile // tile_count).to(tl.int64), tile.to(tl.int64), start


@triton.jit
def at_pixels(strides, sample, c, n, ALIGN: tl.constexpr):
    """Where channels c of pixels n lie; the strides lead to the next sample, channel, pixel."""
    at = sample * aligned(strides[0], ALIGN) + c.to(tl.int64) * strides[1]
    return at + n.to(tl.int64) * aligned(strides[2], ALIGN)


@triton.jit
def at_rows(strides, sample, c, i, j, ALIGN: tl.constexpr):
    """The same of rows i and columns j; the strides are those of x: [B, C, H, W]."""
    return at_pixels(strides, sample, c, i, ALIGN) + j.to(tl.int64) * aligned(strides[3], ALIGN)


@triton.jit
def within(t, size):
    """0 ≤ t < size."""
    return (t >= 0) & (t < size)


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
    """t in its storage type, to nearest even (by itself the interpreter truncates bfloat16)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = t.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, nearest, bits).to(tl.float32, bitcast=True)
    return t.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a·b without TF32. Not every target multiplies float64 matrices, nor the interpreter
    bfloat16 ones.
    """
    if acc.dtype == tl.float64:
        return acc + tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    elif INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def halves(t):
    """t = high + low in bfloat16, to 16 bits; an infinity or NaN is all high, and what is bfloat16
    has no low half.
    """
    if t.dtype == tl.bfloat16:
        return t, None
    else:
        high = rounded(t.to(tl.float32), tl.bfloat16)
        low = t.to(tl.float32) - high.to(tl.float32)
        return high, rounded(tl.where(low == low, low, 0.0), tl.bfloat16)


@triton.jit
def finite(t):
    """t, and 0 where it is not finite."""
    away = t.to(tl.float32)
    return tl.where(away - away == 0, t, 0.0)


@triton.jit
def product(a, b, acc, SPLIT: tl.constexpr):
    """acc + a·b in the accumulation type; SPLIT: of halves, by 16-bit matrix instructions.

    An ∞ times the low half of a float16 would be NaN beside ∞ times its high one. Centred pixels
    (float32) make NaN of ∞ anyway.
    """
    if SPLIT:
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        GIVEN: tl.constexpr = b.dtype == tl.float16  # a map or nodes, not centred
        if a_low is not None:
            acc = dot(a_low, finite(b_high) if GIVEN else b_high, acc)
        if b_low is not None:
            acc = dot(finite(a_high) if GIVEN else a_high, b_low, acc)
        return dot(a_high, b_high, acc)
    else:
        return dot(a.to(acc.dtype), b.to(acc.dtype), acc)


@triton.jit
def matmul(t, weight, acc, CHANNELS_LAST: tl.constexpr):
    """acc + the product of a tile of a map with a matrix over its channels."""
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
    """(t − center)·scale + shift per channel; c and in_c lie on its axis, a None drops out."""
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
def stage(t, center, scale, shift, c, in_c, ACT: tl.constexpr):
    """φ((t − center)·scale + shift)."""
    return activation(affine(t, center, scale, shift, c, in_c), ACT)


@triton.jit
def activation_backward(g, t, ACT: tl.constexpr):
    """g·φ'(t); t may be the argument or the value of φ: both give the same mask."""
    if ACT != "none":
        g = tl.where(t <= 0, 0.0, g)
    if ACT == "relu6":
        g = tl.where(t >= 6, 0.0, g)
    return g


@triton.jit
def stage_backward(g, t, center, scale, shift, c, in_c, ACT: tl.constexpr):
    """g·φ'((t − center)·scale + shift), and t − center."""
    away = affine(t, center, None, None, c, in_c)
    return activation_backward(g, affine(away, None, scale, shift, c, in_c), ACT), away


@triton.jit
def store(at, t, live):
    """t in the map's own type, as it is written where `live`."""
    stored = rounded(t, at.dtype.element_ty)
    tl.store(at, stored, mask=live)
    return stored


@triton.jit
def store_sum(sums, index, t, live, in_c, CHANNELS_LAST: tl.constexpr):
    """The tile's Σ t per channel."""
    tl.store(sums + index, sum_pixels(tl.where(live, t, 0.0), CHANNELS_LAST), mask=in_c)


@triton.jit
def store_moments(mean, m2, index, t, live, count, in_c, CHANNELS_LAST: tl.constexpr):
    """The tile's mean and Σ(t − mean)² per channel (Chan, Golub and LeVeque, 1983)."""
    center = sum_pixels(tl.where(live, t, 0.0), CHANNELS_LAST) / count
    tl.store(mean + index, center, mask=in_c)
    away = t - along_channels(center, CHANNELS_LAST)
    store_sum(m2, index, away * away, live, in_c, CHANNELS_LAST)


@triton.jit
def depthwise_tile(
    acc,  # [BLOCK_N, BLOCK_C] or its transpose
    x,
    strides_x,
    w,  # [R, KH·KW, C]
    sample,
    rate,
    start,  # the tile's first pixel
    n,  # its pixels and channels
    c,
    C,
    size,  # (H, W)
    out_size,
    stride,
    geometry,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """acc + Σ_ab w[a,b,c]·x[c, i·s + a·r − p, j·s + b·r − p]; tap rows off the map are skipped.

    A tap lies at one distance from its output pixel, whichever that is: a thread holds the pixels'
    places once, not once for every tap.
    """
    H, W = size[0], size[1]
    N, Wo = out_size[0] * out_size[1], out_size[1]
    pad_h, pad_w = pick(geometry, rate, 0, R), pick(geometry, rate, 1, R)
    dilation_h, dilation_w = pick(geometry, rate, 2, R), pick(geometry, rate, 3, R)
    i, j = n // Wo * stride[0] - pad_h, n % Wo * stride[1] - pad_w  # where the window begins
    first_row = start // Wo * stride[0] - pad_h
    last_row = (tl.minimum(start + BLOCK_N, N) - 1) // Wo * stride[0] - pad_h
    in_c = c < C
    live = (n < N) & in_c
    stride_xh, stride_xw = aligned(strides_x[2], ALIGN), aligned(strides_x[3], ALIGN)
    step_h = tl.cast(dilation_h, tl.int64) * stride_xh
    step_w = tl.cast(dilation_w, tl.int64) * stride_xw
    at = i.to(tl.int64) * stride_xh + j.to(tl.int64) * stride_xw
    x += sample * aligned(strides_x[0], ALIGN) + c.to(tl.int64) * strides_x[1]
    w += rate * (KH * KW) * C + c
    for a in tl.static_range(KH):
        down = a * dilation_h
        if (last_row + down >= 0) & (first_row + down < H):
            on_row = live & within(i + down, H)
            for b in tl.static_range(KW):
                inside = on_row & within(j + b * dilation_w, W)
                tap = tl.load(x + (at + (a * step_h + b * step_w)), mask=inside, other=0.0)
                weight = tl.load(w + (a * KW + b) * C, mask=in_c, other=0.0)
                acc += tap.to(acc.dtype) * weight.to(acc.dtype)
    return acc


@triton.jit
def depthwise_backward_row(
    sums,  # (dx, (dw of every tap)): tiles in the accumulation type
    x,  # the tile of x
    dy,  # pointers to the tile's channels of dy, this tap row's pixels of column 0
    w,  # pointers to the tile's channels of w, first tap
    live,  # where this tap row meets dy
    j,
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
    dx, before = sums
    dw = ()
    for t in tl.static_range(TAPS):
        if t // KW == ROW:
            at = j + pad - (t % KW) * dilation
            col = at // stride_w
            inside = live & within(at, Wo * stride_w) & (col * stride_w == at)
            g = tl.load(dy + col.to(tl.int64) * stride_dyw, mask=inside, other=0.0).to(x.dtype)
            if NEED_DX:
                dx += g * tl.load(w + t * C, mask=in_c, other=0.0).to(x.dtype)
            dw += (before[t] + tl.where(inside, x * g, 0.0),)  # a NaN of x meets no zero
        else:
            dw += (before[t],)
    return dx, dw


@triton.jit
def depthwise_backward_tile(
    sums,  # (dx, (dw of every tap)): tiles in the accumulation type
    x,  # the tile of x
    dy,
    strides_dy,
    w,  # [R, KH·KW, C]
    sample,
    start,  # the tile's first pixel
    n,  # its pixels and channels
    c,
    C,
    size,  # (H, W)
    out_size,
    stride,
    geometry,
    R: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    NEED_DX: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`sums` with a tile's share of dx and dw added: the same taps of dy serve both.

    dx[m] = Σ_ab w_ab·dy[n], dw_ab = Σ_m x[m]·dy[n], where n·s + (a, b)·r − p = m.
    """
    N, W = size[0] * size[1], size[1]
    Ho, Wo = out_size[0], out_size[1]
    i, j = n // W, n % W
    first_row, last_row = start // W, (tl.minimum(start + BLOCK_N, N) - 1) // W
    in_c = c < C
    live = (n < N) & in_c
    for rate in tl.static_range(R):
        for a in tl.static_range(KH):
            up = geometry[4 * rate] - a * geometry[4 * rate + 2]
            if (last_row + up >= 0) & (first_row + up < Ho * stride[0]):
                row = (i + up) // stride[0]
                sums = depthwise_backward_row(
                    sums,
                    x,
                    dy + at_pixels(strides_dy, sample, rate * C + c, row, ALIGN),
                    w + c,
                    live & within(i + up, Ho * stride[0]) & (row * stride[0] == i + up),
                    j,
                    in_c,
                    C,
                    Wo,
                    aligned(strides_dy[3], ALIGN),
                    stride[1],
                    geometry[4 * rate + 1],
                    geometry[4 * rate + 3],
                    rate * KH + a,
                    KW,
                    R * KH * KW,
                    NEED_DX,
                )
    return sums
