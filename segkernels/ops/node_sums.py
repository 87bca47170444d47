"""The Triton kernel of sums over the pixels that nodes share, and what kernels over nodes have in
common.

Pixels are read about a centre, x̃ = x − centre, which no result depends on but for its rounding. The
sums Σ f·(1, x̃, x̃²) of any weights f [B, K, H, W] come in shares, to be added in a fixed order by
`total`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from segkernels.fused import accumulation_dtype
from segkernels.ops import layouts, tiles
from segkernels.ops.nodes import SAMPLE
from segkernels.ops.tiles import aligned

SAMPLED = tl.constexpr(SAMPLE)


class Sums(NamedTuple):
    """Shares of a_n = Σ f·x̃ⁿ over the pixels of each group of images."""

    a0: torch.Tensor  # [groups, shares, K]
    a1: torch.Tensor  # [groups, shares, K, C]
    a2: torch.Tensor | None  # the same; of ‖x̃‖² [groups, shares · blocks of channels, K]


@triton.jit
def centred(x, centre, strides, sample, n, c, N, C, ALIGN: tl.constexpr):
    """x̃ of pixels n and channels c; x itself, in its own type, where there is no centre."""
    at = tiles.at_pixels(strides, sample, c, n, ALIGN)
    t = tl.load(x + at, mask=(n < N) & (c < C), other=0.0)
    if centre is not None:
        t = t.to(centre.dtype.element_ty) - tl.load(centre + c, mask=c < C, other=0.0)
    return t


@triton.jit
def of_nodes(table, k, c, K, C):
    """The table's [K, C] over nodes k and channels c, on whichever axes these lie."""
    return tl.load(table + k * C + c, mask=(k < K) & (c < C), other=0.0)


@triton.jit
def median_node(table, c, K, C):
    """The centre of the table's [K, C] in channels c, as `centre_of`."""
    step = tl.cdiv(K, SAMPLED)
    taken = tl.cdiv(K, step)
    i = tl.arange(0, SAMPLED)[:, None]
    at = i * step * C + c[None, :]
    sample = tl.load(table + at, mask=(i < taken) & (c[None, :] < C), other=float("inf"))
    rank = tl.zeros(sample.shape, tl.int32)
    for j in tl.range(0, SAMPLED, loop_unroll_factor=4):
        live = (j < taken) & (c < C)
        other = tl.load(table + j * step * C + c, mask=live, other=float("inf"))[None, :]
        rank += ((other < sample) | ((other == sample) & (j < i))).to(tl.int32)
    return tl.sum(tl.where(rank == (taken - 1) // 2, sample, 0.0), axis=0)


@triton.jit
def total(shares, at, live, count, stride, BLOCK_S: tl.constexpr):
    """The sum of `count` shares, `stride` apart, in a fixed order; at: [1, M], in the first one."""
    acc = tl.zeros((BLOCK_S, at.shape[1]), shares.dtype.element_ty)
    for first in range(0, count, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)[:, None]
        place = shares + share.to(tl.int64) * stride + at
        acc += tl.load(place, mask=(share < count) & live, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def node_sums_kernel(
    f,
    x,
    centre,  # [C] or None
    a0,  # [groups, shares, K]
    a1,  # [groups, shares, K, C]
    a2,  # the same, or [groups, shares · blocks of channels, K] where ISOTROPIC, or None
    K,
    C,
    N,
    strides_f,
    strides_x,
    group,  # tiles
    walk,  # tiles of a share
    ISOTROPIC: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A share of Σ f, Σ f·x̃, Σ f·x̃²: a run of the group's tiles, from image to image."""
    C = aligned(C, ALIGN)
    tile_count = tl.cdiv(N, BLOCK_N)
    shares = tl.cdiv(group, walk)
    start = tl.program_id(0) // shares * group
    begin = start + tl.program_id(0) % shares * walk
    end = tl.minimum(begin + walk, start + group)
    nodes = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k, c = nodes[:, None], channels[None, :]
    acc_0 = tl.zeros((BLOCK_K,), ACC)
    acc_1 = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    acc_2 = acc_0 if ISOTROPIC else acc_1
    for tile in range(begin, end):
        sample = tl.cast(tile // tile_count, tl.int64)
        n = tile % tile_count * BLOCK_N + tl.arange(0, BLOCK_N)
        row, col = n[None, :], n[:, None]
        at = tiles.at_pixels(strides_f, sample, k, row, 1)
        weights = tl.load(f + at, mask=(row < N) & (k < K), other=0.0)
        t = centred(x, centre, strides_x, sample, col, c, N, C, ALIGN)
        acc_0 += tl.sum(weights, axis=1)
        acc_1 = tiles.product(weights, t, acc_1, SPLIT)
        if a2 is not None:
            if ISOTROPIC:
                acc_2 += tl.sum(weights * tl.sum(t * t, axis=1)[None, :], axis=1)
            else:
                acc_2 = tiles.product(weights, t * t, acc_2, SPLIT)

    share = tl.program_id(0).to(tl.int64)
    live = (k < K) & (c < C)
    tl.store(a0 + share * K + nodes, acc_0, mask=(nodes < K) & (tl.program_id(1) == 0))
    tl.store(a1 + share * K * C + k * C + c, acc_1, mask=live)
    if a2 is not None:
        if ISOTROPIC:
            share = share * tl.num_programs(1) + tl.program_id(1)
            tl.store(a2 + share * K + nodes, acc_2, mask=nodes < K)
        else:
            tl.store(a2 + share * K * C + k * C + c, acc_2, mask=live)


@triton.jit
def node_totals_kernel(
    a,  # [B, shares, K, C]
    made,  # [B, K, C]
    K,
    C,
    shares,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sums of a node in an image, from its shares."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    first = row // K * shares * K + row % K
    acc = total(a, first * C + c[None, :], c[None, :] < C, shares, K * C, BLOCK_S)
    tiles.store(made + row * C + c, acc, c < C)


def flat(*maps: torch.Tensor | None) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """The maps as [B, C, N], and their strides; a None stays one."""
    flattened = [
        m if m is None else layouts.pixel_map(m, layouts.is_channels_last(m)) for m in maps
    ]
    return flattened, [(0, 0, 0) if m is None else layouts.map_strides(m) for m in flattened]


def how(x: torch.Tensor, *strides: tuple[int, int, int]) -> dict[str, Any]:
    """What the kernels know of x at compile time; strides: of maps with x's channels.

    SPLIT: float32 factors are multiplied as halves where the maps have 16 bits anyway.
    """
    apart = [s for batch, _, pixel in strides for s in (batch, pixel)]
    return {
        "SPLIT": x.element_size() == 2,
        "ACC": layouts.triton_type(x),
        "ALIGN": layouts.alignment(layouts.is_channels_last(x), x.size(1), *apart),
    }


def sums_tile(x: torch.Tensor, nodes: int) -> dict[str, int]:
    """Blocks of a kernel that keeps sums over pixels in registers, and its warps.

    In NCHW there is an address for every element that is on its way: fewer pixels, and stages.
    """
    last = layouts.is_channels_last(x)
    most = 16 if x.dtype == torch.float64 and not layouts.INTERPRETED else 64
    block_n = (64 if last else 32) if x.element_size() == 2 else 16
    if layouts.INTERPRETED:  # no registers to run out of, and every operation counts
        block_n = 64
    return {
        "BLOCK_N": layouts.fit(x.size(2) * x.size(3), block_n),
        "BLOCK_C": layouts.fit(x.size(1), most),
        "BLOCK_K": layouts.fit(nodes, most),
        "num_warps": 4,
        "num_stages": 3 if last else 2,
    }


def row_tile(channels: int) -> dict[str, int]:
    """Of a kernel that keeps all channels of a node in registers, and shares of them."""
    block_c = triton.next_power_of_2(channels)
    block_s = min(16, max(1, 4096 // block_c))
    return {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": 4 if block_c <= 2048 else 8}


def sums(
    f: torch.Tensor,  # [B, K, H, W]
    x: torch.Tensor,  # [B, C, H, W]
    centre: torch.Tensor | None,
    *,
    together: bool = False,
    squares: bool = False,
    isotropic: bool = False,
) -> Sums:
    """Σ f, Σ f·x̃ and, with `squares`, Σ f·x̃² of every image, or of all of them `together`.

    The shares of an image depend on its size alone.
    """
    (f, x), strides = flat(f, x)
    B, K, C, N = x.size(0), f.size(1), x.size(1), x.size(2) * x.size(3)
    tile = sums_tile(x, K)
    blocks = triton.cdiv(C, tile["BLOCK_C"]), triton.cdiv(K, tile["BLOCK_K"])
    tile_count = triton.cdiv(N, tile["BLOCK_N"])
    groups, group = (1, B * tile_count) if together else (B, tile_count)
    walk = max(1, triton.cdiv(group * blocks[0] * blocks[1], 256))
    shares = triton.cdiv(group, walk)

    def empty(*size: int) -> torch.Tensor:
        return x.new_empty((groups, *size), dtype=accumulation_dtype(x.dtype))

    a2 = empty(*((shares * blocks[0], K) if isotropic else (shares, K, C))) if squares else None
    made = Sums(empty(shares, K), empty(shares, K, C), a2)
    if groups * shares > 0:
        grid = (groups * shares, *blocks)
        node_sums_kernel[grid](
            *(f, x, centre, *made, K, C, N),
            *(*strides, group, walk),
            ISOTROPIC=isotropic,
            **how(x, strides[1]),
            **tile,
        )
    return made


def totals(a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sums [B, K, C] of shares [B, shares, K, C]."""
    B, shares, K, C = a.shape
    made = a.new_empty((B, K, C), dtype=dtype)
    if B > 0:
        node_totals_kernel[(B * K,)](a, made, K, C, shares, **row_tile(C))
    return made
