"""One iteration's pass over the pixels: rows of pixels over all bases, which never leave registers
unless they are asked for, and their products with the same pixels, summed.

A program owns some tiles of an image, and a share of the sums. For each tile it walks over the
channels once for the rows, then once for the sums; the features are still in a cache by then.
Nothing is kept from tile to tile but the masses: addresses of all maps would not leave registers
enough (`disable_licm`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import assignment, layouts, node_sums, tiles
from segkernels.ops.assignment import Logits, assigned, sloped
from segkernels.ops.node_sums import centred, flat, how
from segkernels.ops.tiles import aligned

MOST_SHARES = 32  # of an image: more would move more bytes than its features


@triton.jit
def this_share(N, turns, BLOCK_N: tl.constexpr):
    """(share, sample, first tile, behind the last tile) of this program."""
    tile_count = tl.cdiv(N, BLOCK_N)
    shares = tl.cdiv(tile_count, turns)
    begin = tl.program_id(0) % shares * turns
    sample = (tl.program_id(0) // shares).to(tl.int64)
    return tl.program_id(0).to(tl.int64), sample, begin, tl.minimum(begin + turns, tile_count)


@triton.jit
def add_products(
    share,  # [K, C]
    rows,  # [pixels n, bases], 0 beyond the last pixel
    x,
    strides,
    sample,
    n,
    fresh,  # whether nothing is in the share yet
    K,
    C,
    N,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add Σ rows·x to the share."""
    rows = tl.trans(rows)
    k = tl.arange(0, rows.shape[0])[:, None]
    for first in range(0, C, BLOCK_C):
        c = (first + tl.arange(0, BLOCK_C))[None, :]
        live = (k < K) & (c < C)
        at = share + k * C + c
        t = centred(x, None, strides, sample, n, c, N, C, ALIGN)
        acc = tl.load(at, mask=live & (not fresh), other=0.0)
        tl.store(at, tiles.product(rows, t, acc, SPLIT), mask=live)


@triton.jit
def em_attention_expectation_kernel(
    x,
    lam,  # or None: 1
    p,  # [B, K, C]
    b,  # [B, K] or None
    z,  # or None
    a0,  # [B, shares, K]
    a1,  # [B, shares, K, C]
    K,
    C,
    N,
    turns,  # tiles of a share
    stride_p,  # of images
    stride_b,
    strides_x,
    strides_z,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z = softmax over k of λ(⟨p, x⟩ + b), and a share of Σ z and Σ z·x."""
    C = aligned(C, ALIGN)
    share, sample, begin, end = this_share(N, turns, BLOCK_N)
    bases = tl.arange(0, BLOCK_K)
    k = bases[None, :]
    p += sample * stride_p
    if b is not None:
        b += sample * stride_b
    mass = tl.zeros((BLOCK_K,), ACC)
    for tile in tl.range(begin, end, disable_licm=True):
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        rows = assigned(
            *(x, lam, None, p, None, b, strides_x, sample, n, k, K, C, N, 1),
            *(False, SPLIT, ACC, ALIGN, BLOCK_C),
        )
        if z is not None:
            at = tiles.at_pixels(strides_z, sample, k, n, 1)
            tl.store(z + at, rows, mask=(n < N) & (k < K))
        rows = tl.where(n < N, rows, 0.0)
        mass += tl.sum(rows, axis=0)
        add_products(
            *(a1 + share * K * C, rows, x, strides_x, sample, n, tile == begin),
            *(K, C, N, SPLIT, ALIGN, BLOCK_C),
        )
        tl.debug_barrier()  # what one thread has added, another may read for the next tile
    tl.store(a0 + share * K + bases, mass, mask=bases < K)


@triton.jit
def em_attention_gradient_kernel(
    x,
    z,
    dz,  # or None
    dy,  # or None
    da,  # [B, K, C] or None
    ds,  # [B, K]
    m,  # [B, K, C]
    dl,
    u,  # [B, shares, K, C] or None
    K,
    C,
    N,
    turns,  # tiles of a share
    stride_da,  # of images
    strides_x,
    strides_z,
    strides_dz,
    strides_dy,
    strides_dl,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dl = z·(g − Σ z·g) with g = dz + ⟨m, dy⟩ + ⟨da, x⟩ + ds, and a share of u = Σ dl·x."""
    C = aligned(C, ALIGN)
    share, sample, begin, end = this_share(N, turns, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    if da is not None:
        da += sample * stride_da
        ds += sample * K
    if dy is not None:
        m += sample * K * C
    for tile in tl.range(begin, end, disable_licm=True):
        n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        rows = sloped(
            *(x, z, dz, dy, None, da, ds, m, strides_x, strides_z, strides_dz, strides_dy),
            *(sample, n, k, K, C, N, SPLIT, ACC, ALIGN, BLOCK_C),
        )
        at = tiles.at_pixels(strides_dl, sample, k, n, 1)
        tl.store(dl + at, rows, mask=(n < N) & (k < K))
        if u is not None:
            rows = tl.where(n < N, rows, 0.0)
            add_products(
                *(u + share * K * C, rows, x, strides_x, sample, n, tile == begin),
                *(K, C, N, SPLIT, ALIGN, BLOCK_C),
            )
            tl.debug_barrier()  # what one thread has added, another may read for the next tile


def is_fused(x: torch.Tensor, bases: int) -> bool:
    """Whether one kernel makes a pass, where its rows fit the registers of a block; else the
    kernels of soft assignment, one after the other. Of float64 too few pixels would."""
    return bases <= 64 and (x.dtype != torch.float64 or layouts.INTERPRETED)


def pass_tile(x: torch.Tensor, bases: int) -> dict[str, int]:
    """Blocks of a pass, and its warps. Few channels on their way of float32 and float16, where a
    thread keeps all factors of a product, and two halves of each; in NCHW an address an element.
    """
    few = x.dtype != torch.bfloat16 or not layouts.is_channels_last(x)
    return {
        "BLOCK_N": layouts.fit(x.size(2) * x.size(3), 64),
        "BLOCK_C": layouts.fit(x.size(1), 16 if few and not layouts.INTERPRETED else 32),
        "BLOCK_K": layouts.fit(bases, 64),
        "num_warps": 8,
        "num_stages": 2 if x.dtype == torch.bfloat16 else 1,
    }


def share_of(N: int, block_n: int) -> tuple[int, int]:
    """(tiles of a share, shares of an image)."""
    tile_count = triton.cdiv(N, block_n)
    turns = max(1, triton.cdiv(tile_count, MOST_SHARES))
    return turns, triton.cdiv(tile_count, turns)


def expectation(
    x: torch.Tensor,
    logits: Logits,
    lam: torch.Tensor | None,
    z: torch.Tensor | None,  # [B, K, H, W], to be written if it is wanted
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of Σ z, [B, shares, K], and of Σ z·x, [B, shares, K, C]."""
    _, p, _, b = logits
    B, _, K, C = p.shape
    if not is_fused(x, K):
        a0, a1, _ = node_sums.sums(assignment.assign(x, logits, lam, z), x, None)
        return a0, a1
    (x, z), strides = flat(x, z)
    N = x.size(2) * x.size(3)
    tile = pass_tile(x, K)
    turns, shares = share_of(N, tile["BLOCK_N"])
    a0, a1 = p.new_empty(B, shares, K), p.new_empty(B, shares, K, C)
    if B * shares > 0:
        em_attention_expectation_kernel[(B * shares,)](
            *(x, lam, p, b, z, a0, a1, K, C, N, turns),
            *(p.stride(0), 0 if b is None else b.stride(0), *strides),
            **how(x, strides[0]),
            **tile,
        )
    return a0, a1


def gradient(
    x: torch.Tensor,
    z: torch.Tensor,  # [B, K, H, W]
    dl: torch.Tensor,  # [B, K, H, W], to be written
    dz: torch.Tensor | None,
    dy: torch.Tensor | None,
    m: torch.Tensor,  # [B, K, C]
    da: torch.Tensor | None,  # [B, K, C], dense but for the images
    ds: torch.Tensor | None,  # [B, K]
    summed: bool,
) -> torch.Tensor | None:
    """dl, the gradient of the logits, and shares of Σ dl·x, [B, shares, K, C], if wanted."""
    B, K, C = m.shape
    if not is_fused(x, K):
        assignment.slopes(x, z, dz, None, da, ds, dy, m, dl)
        return node_sums.sums(dl, x, None).a1 if summed else None
    (x, z, dz, dy), strides = flat(x, z, dz, dy)
    N = x.size(2) * x.size(3)
    tile = pass_tile(x, K)
    turns, shares = share_of(N, tile["BLOCK_N"]) if summed else (1, triton.cdiv(N, tile["BLOCK_N"]))
    u = m.new_empty(B, shares, K, C) if summed else None
    if B * shares > 0:
        em_attention_gradient_kernel[(B * shares,)](
            *(x, z, dz, dy, da, ds, m, dl, u, K, C, N, turns),
            *(0 if da is None else da.stride(0), *strides, layouts.map_strides(dl)),
            **how(x, strides[0], strides[3]),
            **tile,
        )
    return u
