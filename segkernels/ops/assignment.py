"""Triton kernels of soft assignment, and what launches each: they know pixels, nodes and a table of
logits, not where the table comes from.

Pixels are read about a centre, x̃ = x − centre, which no result depends on but for its rounding.
Three kernels carry the operators: q = softmax of logits; the sums Σ f·(1, x̃, x̃²) over pixels of any
weights f [B, K, H, W], in shares that are summed in a fixed order (`total`); and the gradients of
the logits and of x̃. What a sum over the nodes of a tile of pixels needs stays in registers: no
tensor over pixels, nodes and channels exists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from segkernels.fused import accumulation_dtype, memory_format
from segkernels.ops import layouts, tiles
from segkernels.ops.tiles import aligned


class Logits(NamedTuple):
    """log q = ⟨p, x̃⟩ + ⟨r, x̃²⟩ + b, up to what all nodes share."""

    centre: torch.Tensor  # [C]
    p: torch.Tensor  # [K, C]
    r: torch.Tensor  # [K, C]; or [K], and the square is ‖x̃‖²
    b: torch.Tensor  # [shares, K]


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
def total(shares, at, live, count, stride, BLOCK_S: tl.constexpr):
    """The sum of `count` shares, `stride` apart, in a fixed order; at: [1, M], in the first one."""
    acc = tl.zeros((BLOCK_S, at.shape[1]), shares.dtype.element_ty)
    for first in range(0, count, BLOCK_S):
        share = first + tl.arange(0, BLOCK_S)[:, None]
        place = shares + share.to(tl.int64) * stride + at
        acc += tl.load(place, mask=(share < count) & live, other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def assignment_softmax_kernel(
    x,
    centre,  # [C]
    p,  # [K, C]
    r,  # [K, C], or [K] where ISOTROPIC
    b,  # [shares, K]
    q,
    K,
    C,
    N,
    shares,
    strides_x,
    strides_q,
    ISOTROPIC: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q = softmax over k of ⟨p, x̃⟩ + ⟨r, x̃²⟩ + b.

    The products of a block of channels are summed by themselves before they are added: of logits in
    the hundreds, rounding errors stay those of short sums.
    """
    C = aligned(C, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    nodes = tl.arange(0, BLOCK_K)
    k = nodes[None, :]
    logits = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    squares = tl.zeros((BLOCK_N,), ACC)
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        c = channels[:, None]
        t = centred(x, centre, strides_x, sample, n, channels[None, :], N, C, ALIGN)
        part = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        if ISOTROPIC:
            squares += tl.sum(t * t, axis=1)
        else:
            part = tiles.product(t * t, of_nodes(r, k, c, K, C), part, SPLIT)
        logits += tiles.product(t, of_nodes(p, k, c, K, C), part, SPLIT)
    if ISOTROPIC:
        logits += squares[:, None] * tl.load(r + k, mask=k < K, other=0.0)
    logits += total(b, k, k < K, shares, K, 16)[None, :]
    logits = tl.where(k < K, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    weights = weights / tl.sum(weights, axis=1)[:, None]
    at = tiles.at_pixels(strides_q, sample, k, n, 1)
    tl.store(q + at, weights, mask=(n < N) & (k < K))


@triton.jit
def assignment_sums_kernel(
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
def assignment_backward_kernel(
    x,
    q,
    dq,  # or None
    centre,  # [C]
    p,  # [K, C]
    r,  # [K, C], or [K] where ISOTROPIC
    h,  # [B, K, C] or None
    t,  # [B, K]
    dl,  # or None
    dx,  # or None
    K,
    C,
    N,
    strides_x,
    strides_q,
    strides_dq,
    strides_dl,
    strides_dx,
    ISOTROPIC: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dl = q·(g − Σ q·g) with g = dq + ⟨h, x̃⟩ + t; dx = Σ q·h + dl·(p + 2r·x̃)."""
    C = aligned(C, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    nodes = tl.arange(0, BLOCK_K)
    k = nodes[None, :]
    live = (n < N) & (k < K)
    g = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    if h is not None:
        h += sample * K * C
        for first in range(0, C, BLOCK_C):
            channels = first + tl.arange(0, BLOCK_C)
            part = centred(x, centre, strides_x, sample, n, channels[None, :], N, C, ALIGN)
            weight = of_nodes(h, k, channels[:, None], K, C).to(ACC)
            g = tiles.product(part, weight, g, SPLIT)
        g += tl.load(t + sample * K + k, mask=k < K, other=0.0)
    if dq is not None:
        g += tl.load(dq + tiles.at_pixels(strides_dq, sample, k, n, 1), mask=live, other=0.0)
    weights = tl.load(q + tiles.at_pixels(strides_q, sample, k, n, 1), mask=live, other=0.0)
    slope = weights * (g - tl.sum(weights * g, axis=1)[:, None])
    if dl is not None:
        tl.store(dl + tiles.at_pixels(strides_dl, sample, k, n, 1), slope, mask=live)

    if dx is not None:
        if ISOTROPIC:
            bend = tl.sum(slope * tl.load(r + k, mask=k < K, other=0.0), axis=1)[:, None]
        for first in range(0, C, BLOCK_C):
            c = (first + tl.arange(0, BLOCK_C))[None, :]
            away = centred(x, centre, strides_x, sample, n, c, N, C, ALIGN)
            acc = tl.zeros((BLOCK_N, BLOCK_C), ACC)
            if not ISOTROPIC:
                bend = tiles.product(slope, of_nodes(r, nodes[:, None], c, K, C), acc, SPLIT)
            if h is not None:
                weight = of_nodes(h, nodes[:, None], c, K, C).to(ACC)
                acc = tiles.product(weights, weight, acc, SPLIT)
            acc = tiles.product(slope, of_nodes(p, nodes[:, None], c, K, C), acc, SPLIT)
            at = tiles.at_pixels(strides_dx, sample, c, n, ALIGN)
            tiles.store(dx + at, acc + 2 * bend * away, (n < N) & (c < C))


def flat(*maps: torch.Tensor | None) -> tuple[list[Any], list[tuple[int, int, int]]]:
    """The maps as [B, C, N], and their strides; a None stays one."""
    flattened = [
        m if m is None else layouts.pixel_map(m, layouts.is_channels_last(m)) for m in maps
    ]
    return flattened, [(0, 0, 0) if m is None else layouts.map_strides(m) for m in flattened]


def how(x: torch.Tensor, isotropic: bool, *strides: tuple[int, int, int]) -> dict[str, Any]:
    """What the kernels know of x at compile time; strides: of maps with x's channels.

    SPLIT: float32 factors are multiplied as halves where the maps have 16 bits anyway.
    """
    apart = [s for batch, _, pixel in strides for s in (batch, pixel)]
    return {
        "ISOTROPIC": isotropic,
        "SPLIT": x.element_size() == 2,
        "ACC": layouts.triton_type(x),
        "ALIGN": layouts.alignment(layouts.is_channels_last(x), x.size(1), *apart),
    }


def pixel_tile(x: torch.Tensor, nodes: int) -> dict[str, int]:
    """Blocks of a kernel that keeps all nodes of some pixels in registers, and its warps."""
    block_k = layouts.fit(nodes, 256)
    if x.dtype == torch.float64 and not layouts.INTERPRETED:  # a product is a block of all three
        block_n, block_c = max(1, 256 // block_k), 16
    else:
        block_n = layouts.fit(x.size(2) * x.size(3), min(64, 4096 // block_k))
        block_c = layouts.fit(x.size(1), 64 if x.element_size() == 2 and block_k <= 64 else 32)
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_K": block_k, "num_warps": 4}


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


def table_tile(nodes: int, channels: int) -> dict[str, int]:
    """Blocks of a kernel over [K, C] that keeps all nodes of some channels in registers."""
    block_k = triton.next_power_of_2(nodes)
    block_c = min(triton.next_power_of_2(channels), max(16, min(64, 4096 // block_k)))
    return {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 4}


def row_tile(channels: int) -> dict[str, int]:
    """Of a kernel that keeps all channels of a node in registers, and shares of them."""
    block_c = triton.next_power_of_2(channels)
    block_s = min(16, max(1, 4096 // block_c))
    return {"BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": 4 if block_c <= 2048 else 8}


def assign(x: torch.Tensor, logits: Logits) -> torch.Tensor:
    """q, [B, K, H, W] in the accumulation type and x's memory format."""
    K, C = logits.p.shape
    q = torch.empty(
        (x.size(0), K, *x.shape[2:]),
        dtype=logits.p.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )
    if q.numel() > 0:
        (x,), (strides,) = flat(x)
        tile = pixel_tile(x, K)
        N = x.size(2) * x.size(3)
        assignment_softmax_kernel[(triton.cdiv(N, tile["BLOCK_N"]) * x.size(0),)](
            *(x, *logits, q, K, C, N, logits.b.size(0)),
            *(strides, layouts.map_strides(q)),
            **how(x, logits.r.dim() == 1, strides),
            **tile,
        )
    return q


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
        assignment_sums_kernel[grid](
            *(f, x, centre, *made, K, C, N),
            *(*strides, group, walk),
            **how(x, isotropic, strides[1]),
            **tile,
        )
    return made


def assign_backward(
    x: torch.Tensor,
    q: torch.Tensor,
    dq: torch.Tensor | None,
    logits: Logits,
    h: torch.Tensor | None,  # [B, K, C]
    t: torch.Tensor | None,  # [B, K]
    need_dx: bool,
    need_dl: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dx and dl, [B, K, H, W]: the gradients of x̃ and of the logits."""
    K, C = logits.p.shape
    dl = torch.empty_like(q) if need_dl else None
    dx = layouts.empty_map(x, C, x.shape[2:]) if need_dx else None
    maps, strides = flat(x, q, dq, dl, dx)
    if q.numel() > 0 and (need_dx or need_dl):
        x, q, dq = maps[:3]
        tile = pixel_tile(x, K)
        N = x.size(2) * x.size(3)
        assignment_backward_kernel[(triton.cdiv(N, tile["BLOCK_N"]) * x.size(0),)](
            *(x, q, dq, *logits[:3], h, t, dl, dx),
            *(K, C, N, *strides),
            **how(x, logits.r.dim() == 1, strides[0], strides[4]),
            **tile,
        )
    return dx, dl
