"""The Triton backend of soft_assign: the table of logits, and what becomes of the sums over pixels.

A program of the small kernels holds one node with all its channels; `mass` is m + ε, or one where
the residuals are not averaged.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import assignment, node_sums, tiles
from segkernels.ops.assignment import Logits
from segkernels.ops.node_sums import median_node, of_nodes, total

SHORTEST = tl.constexpr(1e-12)  # a shorter node is divided by this


@triton.jit
def soft_assign_logits_kernel(
    w,  # [K, C]
    s,
    centre,  # [C]
    p,  # [K, C]
    r,
    b,  # [blocks, K]
    K,
    C,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """w̄, p = w̃/s² and r = −½(1/s² − min_k 1/s²) of some channels, their share of b = −½Σ w̃²/s²."""
    nodes = tl.arange(0, BLOCK_K)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k, c = nodes[:, None], channels[None, :]
    live = (k < K) & (c < C)
    anchors = of_nodes(w, k, c, K, C)
    middle = median_node(w, channels, K, C)
    away = tl.where(live, anchors - middle[None, :], 0.0)
    scales = tl.load(s + k * C + c, mask=live, other=1.0)
    precision = 1 / (scales * scales)
    shared = tl.min(tl.where(live, precision, float("inf")), axis=0)[None, :]
    tl.store(centre + channels, middle, mask=channels < C)
    tl.store(p + k * C + c, away * precision, mask=live)
    tl.store(r + k * C + c, (precision - shared) / -2, mask=live)
    share = tl.sum(away * away * precision, axis=1) / -2
    tl.store(b + tl.program_id(0) * K + nodes, share, mask=nodes < K)


@triton.jit
def anchor(w, s, centre, k, c, C):
    """w̃ and s of a node; 0 and 1 beyond the channels."""
    live = c < C
    away = tl.load(w + k * C + c, mask=live, other=0.0)
    away -= tl.load(centre + c, mask=live, other=0.0)
    return away, tl.load(s + k * C + c, mask=live, other=1.0)


@triton.jit
def clamped_length(z):
    """‖z‖, or what takes its place in a quotient where it is too short, and whether it is."""
    length = tl.sqrt(tl.sum(z * z, axis=0))
    short = length < SHORTEST
    return tl.where(short, SHORTEST, length), short  # a NaN stays one


@triton.jit
def soft_assign_nodes_kernel(
    w,  # [K, C]
    s,
    centre,
    a0,  # [B, shares, K]
    a1,  # [B, shares, K, C]
    z,  # [B, K, C]
    e,
    m,  # [B, K]
    K,
    C,
    shares,
    AVERAGE: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m = Σ q, e = Σ q·x̃ − m·w̃ and z of a node in an image."""
    row = tl.program_id(0).to(tl.int64)
    k, first = row % K, row // K * shares * K + row % K
    c = tl.arange(0, BLOCK_C)
    live = c < C
    away, scales = anchor(w, s, centre, k, c, C)
    mass = total(a0, first + tl.arange(0, 1)[None, :], True, shares, K, BLOCK_S)
    acc = total(a1, first * C + c[None, :], live[None, :], shares, K * C, BLOCK_S) - mass * away
    tl.store(m + row + tl.arange(0, 1), mass)
    tl.store(e + row * C + c, acc, mask=live)
    acc = acc / scales
    if AVERAGE:
        acc = acc / (mass + EPS)
    if NORMALISE:
        acc = acc / clamped_length(acc)[0]
    tiles.store(z + row * C + c, acc, live)


@triton.jit
def soft_assign_cotangents_kernel(
    dz,  # [B, K, C]
    w,  # [K, C]
    s,
    centre,
    e,  # [B, K, C]
    m,  # [B, K]
    h,  # [B, K, C]
    t,  # [B, K]
    K,
    C,
    AVERAGE: tl.constexpr,
    NORMALISE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """h = de = dz'/(s·mass) and t = dm − ⟨h, w̃⟩ of a node in an image."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    live = c < C
    away, scales = anchor(w, s, centre, row % K, c, C)
    residual = tl.load(e + row * C + c, mask=live, other=0.0)
    slope = tl.load(dz + row * C + c, mask=live, other=0.0).to(residual.dtype)
    mean = residual / scales
    if AVERAGE:
        mass = tl.load(m + row) + EPS
        mean = mean / mass
    if NORMALISE:
        length, short = clamped_length(mean)
        direction = mean / length
        along = tl.where(short, 0.0, tl.sum(direction * slope, axis=0))
        slope = (slope - direction * along) / length
    shift = -tl.sum(slope / scales * away, axis=0)
    slope = slope / scales
    if AVERAGE:
        slope = slope / mass
        shift = (shift - tl.sum(slope * residual, axis=0)) / mass
    tl.store(h + row * C + c, slope, mask=live)
    tl.store(t + row, shift)


@triton.jit
def soft_assign_gradients_kernel(
    w,  # [K, C]
    s,
    centre,
    h,  # [B, K, C] or None
    e,  # [B, K, C]
    m,  # [B, K]
    a0,  # [shares, K]
    a1,  # [shares, K, C]
    a2,
    dw,
    ds,
    B,
    K,
    C,
    shares,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dw = −Σ m·h + (a1 − w̃·a0)/s² and ds = −Σ h·e/s + (a2 − 2w̃·a1 + w̃²·a0)/s³ of a node."""
    k = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    live = c < C
    away, scales = anchor(w, s, centre, k, c, C)
    at = (k * C + c)[None, :]
    sum_0 = total(a0, k + tl.arange(0, 1)[None, :], True, shares, K, BLOCK_S)
    sum_1 = total(a1, at, live[None, :], shares, K * C, BLOCK_S)
    sum_2 = total(a2, at, live[None, :], shares, K * C, BLOCK_S)
    acc_w = (sum_1 - away * sum_0) / (scales * scales)
    acc_s = (sum_2 + away * (away * sum_0 - 2 * sum_1)) / (scales * scales * scales)
    if h is not None:
        for sample in range(0, B):
            row = tl.cast(sample, tl.int64) * K + k
            slope = tl.load(h + row * C + c, mask=live, other=0.0)
            acc_w -= tl.load(m + row) * slope
            acc_s -= slope * tl.load(e + row * C + c, mask=live, other=0.0) / scales
    tl.store(dw + k * C + c, acc_w, mask=live)
    tl.store(ds + k * C + c, acc_s, mask=live)


def logits_of(w: torch.Tensor, s: torch.Tensor) -> Logits:
    K, C = w.shape
    tile = assignment.table_tile(K, C)
    shares = triton.cdiv(C, tile["BLOCK_C"])
    made = Logits(w.new_empty(C), torch.empty_like(w), torch.empty_like(w), w.new_empty(shares, K))
    soft_assign_logits_kernel[(shares,)](w, s, *made, K, C, **tile)
    return made


def soft_assign(
    x: torch.Tensor,  # [B, C, H, W]
    w: torch.Tensor,  # [K, C]
    s: torch.Tensor,
    average: bool,
    normalise: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (K, C), B = w.shape, x.size(0)
    w, s = w.contiguous(), s.contiguous()
    logits = logits_of(w, s)
    q = assignment.assign(x, logits)
    a0, a1, _ = node_sums.sums(q, x, logits.centre)
    z, e, m = x.new_empty(B, K, C), w.new_empty(B, K, C), w.new_empty(B, K)
    if B > 0:
        soft_assign_nodes_kernel[(B * K,)](
            *(w, s, logits.centre, a0, a1, z, e, m, K, C, a0.size(1)),
            AVERAGE=average,
            NORMALISE=normalise,
            EPS=eps,
            **node_sums.row_tile(C),
        )
    return z, q, e, m


def soft_assign_backward(
    dz: torch.Tensor | None,  # [B, K, C]
    dq: torch.Tensor | None,  # [B, K, H, W]
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    q: torch.Tensor,  # [B, K, H, W]
    e: torch.Tensor,  # [B, K, C]
    m: torch.Tensor,  # [B, K]
    average: bool,
    normalise: bool,
    eps: float,
    need: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (K, C), B = w.shape, x.size(0)
    w, s = w.contiguous(), s.contiguous()
    logits = logits_of(w, s)
    row = node_sums.row_tile(C)
    h, t = None, None
    if dz is not None:
        h, t = torch.empty_like(e), torch.empty_like(m)
        if B > 0:
            soft_assign_cotangents_kernel[(B * K,)](
                *(dz.contiguous(), w, s, logits.centre, e, m, h, t, K, C),
                AVERAGE=average,
                NORMALISE=normalise,
                EPS=eps,
                BLOCK_C=row["BLOCK_C"],
                num_warps=row["num_warps"],
            )
    dl = assignment.slopes(x, q, dq, logits.centre, h, t)
    nothing = w.new_empty(0)
    dx, dw, ds = x.new_empty(0), nothing, nothing
    if need[0]:
        dx = assignment.features_backward(x, q, dl, logits, h)
    if need[1] or need[2]:
        a = node_sums.sums(dl, x, logits.centre, together=True, squares=True)
        dw, ds = torch.empty_like(w), torch.empty_like(s)
        soft_assign_gradients_kernel[(K,)](
            *(w, s, logits.centre, h, e, m, *a, dw, ds, B, K, C, a.a0.size(1)), **row
        )
    return dx, dw if need[1] else nothing, ds if need[2] else nothing
