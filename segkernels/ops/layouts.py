"""What the launchers of Triton kernels share: memory layouts, and block sizes from shapes and
strides alone.

Nothing here depends on the device or on timing, so results do not either; the blocks of a forward
do not depend on the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from segkernels.fused import accumulation_dtype, memory_format

INTERPRETED: bool = triton.knobs.runtime.interpret

# (center, scale, shift) of (t − center)·scale + shift, per channel; a None is left out
Normaliser = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def triton_type(x: torch.Tensor) -> tl.dtype:
    """The type that sums over elements of x are kept in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def is_channels_last(x: torch.Tensor) -> bool:
    return memory_format(x) == torch.channels_last


def dense(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return t.contiguous(memory_format=layout)


def readable(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """t itself where the layout's last axis is dense or repeats one number, else a copy."""
    axis = 1 if channels_last else 3
    if t.size(axis) == 1 or t.stride(axis) in (0, 1):
        return t
    return dense(t, channels_last)


def pixel_map(t: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """readable, and with all pixels at one distance, so that a map is [B, C, N]."""
    t = readable(t, channels_last)
    if t.size(2) == 1 or t.stride(2) == t.size(3) * t.stride(3):
        return t
    return dense(t, channels_last)


def map_strides(t: torch.Tensor) -> tuple[int, int, int]:
    """Distances from sample to sample, channel to channel, pixel to pixel of a pixel_map."""
    return t.stride(0), t.stride(1), t.stride(3) if t.size(3) > 1 else t.stride(2)


def empty_map(
    x: torch.Tensor, channels: int, size: Sequence[int], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An unwritten [B, channels, H, W] of x's batch, memory format and, unless given, type."""
    shape, dtype = (x.size(0), channels, *size), dtype or x.dtype
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format(x))


def partial_sums(
    x: torch.Tensor, number: int, tile_count: int, channels: int
) -> list[torch.Tensor]:
    """Unwritten [tiles, channels] in the accumulation type, to be summed in order."""
    return [
        x.new_empty((tile_count, channels), dtype=accumulation_dtype(x.dtype))
        for _ in range(number)
    ]


def rate_geometry(padding: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """(p_h, p_w, r_h, r_w) of every rate, in a row: what `pick` reads."""
    pairs = zip(padding[::2], padding[1::2], dilation[::2], dilation[1::2], strict=True)
    return tuple(number for pair in pairs for number in pair)


def taps_major(w: torch.Tensor) -> torch.Tensor:
    """[R, C, KH, KW] as [R, KH·KW, C]: neighbouring channels of a tap lie side by side."""
    return w.flatten(2).transpose(1, 2).contiguous()


def channels_major(w: torch.Tensor, KH: int, KW: int) -> torch.Tensor:
    """The way back: [R, KH·KW, C] as [R, C, KH, KW]."""
    return w.transpose(1, 2).contiguous().unflatten(2, (KH, KW))


def tile_shape(
    channels: int, pixels: int, itemsize: int, channels_last: bool, elements: int
) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_C) of `elements` numbers, a 128-byte line or more along the dense axis."""
    if channels_last:
        block_c = min(triton.next_power_of_2(channels), 128 // itemsize)
        return min(triton.next_power_of_2(pixels), max(elements // block_c, 1)), block_c
    block_n = min(triton.next_power_of_2(pixels), 256, elements)
    return block_n, min(triton.next_power_of_2(channels), elements // block_n)


def alignment(channels_last: bool, *strides: int) -> int:
    """The largest power of two up to 16 that divides all of them; of no use in NCHW: 1."""
    return math.gcd(16, *strides) if channels_last else 1


def window_pixels(block_n: int, block_c: int, warps: int, x: torch.Tensor, align: int) -> int:
    """BLOCK_N of a tile that taps of a window are read for, at most 4 pixels a thread.

    A thread keeps its pixels' places and masks in registers: few where it reads 16 bytes of a
    pixel's channels at once, many where these are not aligned. Of NCHW tiles it has 2 anyway.
    """
    if INTERPRETED or not is_channels_last(x):
        return block_n
    vector = min(16 // x.element_size(), align)
    return min(block_n, 4 * 32 * warps * vector // block_c)


def window_shape(x: torch.Tensor, pixels: int, channels_last: bool, align: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_C) of a forward over windows; NCHW has a place and a mask an element, so that
    a thread gets half as many."""
    elements = 2048 if channels_last else 1024
    block_n, block_c = tile_shape(x.size(1), pixels, x.element_size(), channels_last, elements)
    return window_pixels(block_n, block_c, 4, x, align), block_c


def backward_walk(
    x: torch.Tensor, taps: int, pixels: int, channels_last: bool, align: int
) -> tuple[int, int, int]:
    """(BLOCK_N, BLOCK_C, tiles per program) of the depthwise backward.

    A thread keeps one sum per tap and element: 8 elements for 3×3, fewer for more taps. A walk of 8
    to 32 tiles keeps the shares of dw small beside the maps, and the programs many.
    """
    taps *= 2 if x.dtype == torch.float64 else 1
    if INTERPRETED:  # no registers to run out of, and every operation counts
        taps = 1
    most = 27 if channels_last else 25  # NCHW also keeps an address for every element
    per_thread = 8 if taps <= 12 else 4 if taps <= most else 2 if taps <= 36 else 1
    block_n, block_c = tile_shape(
        x.size(1), pixels, x.element_size(), channels_last, 128 * per_thread
    )
    block_n = window_pixels(block_n, block_c, 4, x, align)
    programs = x.size(0) * triton.cdiv(pixels, block_n) * triton.cdiv(x.size(1), block_c)
    return block_n, block_c, min(32, max(8, triton.next_power_of_2(programs // 2048 + 1)))


def fit(size: int, most: int) -> int:
    """A block that covers `size`, at least the 16 that a matrix instruction needs."""
    return min(most, max(16, triton.next_power_of_2(size)))


def product_shape(
    dtype: torch.dtype, pixels: int, summed: int, made: int, widest: int, taps: int = 1
) -> tuple[int, int, int, int]:
    """Of a product over channels: (BLOCK_N, block of the summed, of the made channels, warps).

    Where a window makes one factor, what the compiler keeps of every tap stands in registers beside
    the sums: with more taps than 5×5 there is room for half as many sums.
    """
    if dtype == torch.float64:
        most = 64 if INTERPRETED else 16
        return fit(pixels, most), fit(summed, most), fit(made, most), 4
    block_n = fit(pixels, 64 if taps <= 25 or INTERPRETED else 32)
    if dtype == torch.float32:
        return block_n, 16, fit(made, 64), 8
    made = fit(made, widest)
    return block_n, fit(summed, 32), made, 8 if made >= 128 else 4


def outer_product_shape(
    dtype: torch.dtype, pixels: int, columns: int, rows: int, channels_last: bool
) -> tuple[int, int, int, int]:
    """Of a product over pixels: (BLOCK_N, block of columns, of rows, warps)."""
    if dtype == torch.float64:
        most = 64 if INTERPRETED else 16
        return fit(pixels, most), fit(columns, most), fit(rows, most), 4
    if dtype == torch.float32:
        return 16, fit(columns, 64), fit(rows, 64), 8
    if channels_last:
        return fit(pixels, 64), fit(columns, 128), fit(rows, 128), 8
    return fit(pixels, 32), fit(columns, 64), fit(rows, 128), 8  # an address for every element


def normaliser(
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float | None,
) -> Normaliser:
    if eps is None:
        return None, gamma, beta
    scale = (var + eps).rsqrt()
    return mean, scale if gamma is None else gamma * scale, beta


def standardised_means(
    sums: list[torch.Tensor], var: torch.Tensor, eps: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ g/n and Σ g·(t − center)/(n·(var + eps)): what the moments' own gradient takes away."""
    count = max(count, 1)
    return sums[0] / count, sums[1] / (count * (var + eps))
