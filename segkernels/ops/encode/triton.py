"""The Triton backend of encode: the table of logits, and what becomes of the sums over pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import assignment, node_sums, tiles
from segkernels.ops.assignment import Logits
from segkernels.ops.node_sums import median_node, of_nodes, total


@triton.jit
def encode_logits_kernel(
    c,  # [K, C]
    s,  # [K]
    centre,  # [C]
    p,  # [K, C]
    r,  # [K]
    b,  # [blocks, K]
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """c̄ and p = −2 s·c̃ of a block of channels, its share of b = s·‖c̃‖², and r = s − s₀."""
    nodes = tl.arange(0, BLOCK_K)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k, at = nodes[:, None], channels[None, :]
    live = (k < K) & (at < C)
    words = of_nodes(c, k, at, K, C)
    middle = median_node(c, channels, K, C)
    words = tl.where(live, words - middle[None, :], 0.0)
    strength = tl.load(s + nodes, mask=nodes < K, other=0.0)
    tl.store(centre + channels, middle, mask=channels < C)
    tl.store(p + k * C + at, -2 * strength[:, None] * words, mask=live)
    share = strength * tl.sum(words * words, axis=1)
    tl.store(b + tl.program_id(0) * K + nodes, share, mask=nodes < K)
    least = tl.min(tl.where(nodes < K, strength, float("inf")), axis=0)
    most = tl.max(tl.where(nodes < K, strength, float("-inf")), axis=0)
    shared = tl.maximum(least, 0.0) + tl.minimum(most, 0.0)
    tl.store(r + nodes, strength - shared, mask=(nodes < K) & (tl.program_id(0) == 0))


@triton.jit
def encode_residuals_kernel(
    c,  # [K, C]
    centre,
    a0,  # [B, shares, K]
    a1,  # [B, shares, K, C]
    e,  # [B, K, C]
    m,  # [B, K]
    K,
    C,
    shares,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """e = Σ q·x̃ − m·c̃ and m = Σ q of a codeword in an image."""
    row = tl.program_id(0).to(tl.int64)
    k, first = row % K, row // K * shares * K + row % K
    at = tl.arange(0, BLOCK_C)
    live = at < C
    away = of_nodes(c, k, at, K, C) - tl.load(centre + at, mask=live, other=0.0)
    mass = total(a0, first + tl.arange(0, 1)[None, :], True, shares, K, BLOCK_S)
    acc = total(a1, first * C + at[None, :], live[None, :], shares, K * C, BLOCK_S)
    tiles.store(e + row * C + at, acc - mass * away, live)
    tl.store(m + row + tl.arange(0, 1), mass)


@triton.jit
def encode_shifts_kernel(
    de,  # [B, K, C]
    c,  # [K, C]
    centre,
    t,  # [B, K]
    K,
    C,
    BLOCK_C: tl.constexpr,
):
    """t = −⟨de, c̃⟩ of a codeword in an image."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_C)
    live = at < C
    away = of_nodes(c, row % K, at, K, C) - tl.load(centre + at, mask=live, other=0.0)
    slope = tl.load(de + row * C + at, mask=live, other=0.0).to(away.dtype)
    tl.store(t + row, -tl.sum(slope * away, axis=0))


@triton.jit
def encode_gradients_kernel(
    de,  # [B, K, C]
    c,  # [K, C]
    s,  # [K]
    m,  # [B, K]
    centre,
    a0,  # [shares, K]
    a1,  # [shares, K, C]
    a2,  # [shares · blocks, K]
    dc,
    ds,
    B,
    K,
    C,
    shares,
    squares,  # shares of a2
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dc = −Σ m·de − 2s·(a1 − c̃·a0) and ds = a2 − 2⟨c̃, a1⟩ + ‖c̃‖²·a0 of a codeword."""
    k = tl.program_id(0)
    at = tl.arange(0, BLOCK_C)
    live = at < C
    one = k + tl.arange(0, 1)
    away = of_nodes(c, k, at, K, C) - tl.load(centre + at, mask=live, other=0.0)
    sum_0 = total(a0, one[None, :], True, shares, K, BLOCK_S)
    sum_1 = total(a1, (k * C + at)[None, :], live[None, :], shares, K * C, BLOCK_S)
    sum_2 = total(a2, one[None, :], True, squares, K, BLOCK_S)
    acc = -2 * tl.load(s + k) * (sum_1 - away * sum_0)
    for sample in range(0, B):
        row = tl.cast(sample, tl.int64) * K + k
        slope = tl.load(de + row * C + at, mask=live, other=0.0).to(acc.dtype)
        acc -= tl.load(m + row) * slope
    tl.store(dc + k * C + at, acc, mask=live)
    bend = tl.sum(away * (away * sum_0 - 2 * sum_1), axis=0)
    tl.store(ds + one, sum_2 + bend)


def logits_of(c: torch.Tensor, s: torch.Tensor) -> Logits:
    K, C = c.shape
    tile = assignment.table_tile(K, C)
    shares = triton.cdiv(C, tile["BLOCK_C"])
    made = Logits(c.new_empty(C), torch.empty_like(c), torch.empty_like(s), c.new_empty(shares, K))
    encode_logits_kernel[(shares,)](c, s, *made, K, C, **tile)
    return made


def encode(
    x: torch.Tensor,  # [B, C, H, W]
    c: torch.Tensor,  # [K, C]
    s: torch.Tensor,  # [K]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (K, C), B = c.shape, x.size(0)
    c, s = c.contiguous(), s.contiguous()
    logits = logits_of(c, s)
    q = assignment.assign(x, logits)
    a0, a1, _ = node_sums.sums(q, x, logits.centre)
    e, m = x.new_empty(B, K, C), c.new_empty(B, K)
    if B > 0:
        encode_residuals_kernel[(B * K,)](
            *(c, logits.centre, a0, a1, e, m, K, C, a0.size(1)), **node_sums.row_tile(C)
        )
    return e, q, m


def encode_backward(
    de: torch.Tensor,  # [B, K, C]
    x: torch.Tensor,
    c: torch.Tensor,
    s: torch.Tensor,
    q: torch.Tensor,  # [B, K, H, W]
    m: torch.Tensor,  # [B, K]
    need: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (K, C), B = c.shape, x.size(0)
    de, c, s = de.contiguous(), c.contiguous(), s.contiguous()
    logits = logits_of(c, s)
    t = c.new_empty(B, K)
    row = node_sums.row_tile(C)
    if B > 0:
        encode_shifts_kernel[(B * K,)](
            *(de, c, logits.centre, t, K, C), BLOCK_C=row["BLOCK_C"], num_warps=row["num_warps"]
        )
    dl = assignment.slopes(x, q, None, logits.centre, de, t)
    nothing = c.new_empty(0)
    dx, dc, ds = x.new_empty(0), nothing, nothing
    if need[0]:
        dx = assignment.features_backward(x, q, dl, logits, de)
    if need[1] or need[2]:
        a = node_sums.sums(dl, x, logits.centre, together=True, squares=True, isotropic=True)
        assert a.a2 is not None
        dc, ds = torch.empty_like(c), torch.empty_like(s)
        encode_gradients_kernel[(K,)](
            *(de, c, s, m, logits.centre, *a, dc, ds),
            *(B, K, C, a.a0.size(1), a.a2.size(1)),
            **row,
        )
    return dx, dc if need[1] else nothing, ds if need[2] else nothing
