"""The Triton backend of em_attention: what the M-step makes of sums over pixels, and its gradient.

The pixels are those of an assignment without a centre. A program of the small kernels holds one
base with all its channels. The matrix products of a folded convolution are `distribute` of bases as
pixels: their order depends on no batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import layouts, node_sums
from segkernels.ops.assignment import Logits, assign
from segkernels.ops.distribute import distribute
from segkernels.ops.em_attention.triton_pass import expectation, gradient
from segkernels.ops.node_sums import total

EPSILON = tl.constexpr(1e-6)  # of the additive norm
LEAST = tl.constexpr(1e-12)  # of the clamped one


@triton.jit
def divisor(s, r, CLAMP: tl.constexpr):
    """d of the M-step, ∂d/∂s, and 1 − (r/d)·∂d/∂r, as what it is: of a difference nothing is left.
    A NaN of r stays one.
    """
    if CLAMP:
        least = tl.full(s.shape, LEAST, s.dtype)
        floor = least * tl.where(s < least, least, s)
        short = r < floor
        by_s = tl.where(short & (s >= least), least, 0.0)
        return tl.where(short, floor, r), by_s, tl.where(short, 1.0, 0.0)
    else:
        rest = EPSILON * (EPSILON + s)
        return r + rest, tl.full(s.shape, EPSILON, s.dtype), rest / (r + rest)


@triton.jit
def em_attention_bases_kernel(
    a0,  # [B, shares, K]
    a1,  # [B, shares, K, D]
    mu,  # [B, K, D]
    s,  # [B, K] or None, with r
    r,
    K,
    D,
    shares,
    stride_mu,  # of images
    stride_s,
    CLAMP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The M-step of a base in an image: s = Σ z, a = Σ z·x, r = ‖a‖ and mu = a/d."""
    row = tl.program_id(0).to(tl.int64)
    sample, k = row // K, row % K + tl.arange(0, 1)
    first = sample * shares * K + k
    c = tl.arange(0, BLOCK_C)
    mass = total(a0, first[None, :], True, shares, K, BLOCK_S)
    acc = total(a1, first * D + c[None, :], c[None, :] < D, shares, K * D, BLOCK_S)
    length = tl.sqrt(tl.sum(acc * acc, axis=0)) + tl.zeros_like(mass)
    d, _, _ = divisor(mass, length, CLAMP)
    tl.store(mu + sample * stride_mu + k * D + c, acc / d, mask=c < D)
    if s is not None:
        tl.store(s + sample * stride_s + k, mass)
        tl.store(r + sample * stride_s + k, length)


@triton.jit
def em_attention_bases_backward_kernel(
    v,  # [B, shares, K, D] or None
    u,
    dm,  # [B, K, D] or None
    lam,  # or None: 1
    mu,  # [B, K, D]
    dlam,  # [B, K] or None
    dmu,  # [B, K, D] or None
    da,
    s,  # [B, K] or None, with r, da and ds
    r,
    ds,
    K,
    D,
    shares_v,
    shares_u,
    stride_mu,  # of images
    stride_da,
    stride_s,
    CLAMP: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dmu = Σ z·dy + dm + λu with u = Σ dl·x, and through the M-step that made mu: da, ds of a base
    in an image; its share of dlam = ⟨mu, u⟩."""
    row = tl.program_id(0).to(tl.int64)
    sample, k = row // K, row % K + tl.arange(0, 1)
    c = tl.arange(0, BLOCK_C)
    live = c < D
    base = tl.load(mu + sample * stride_mu + k * D + c, mask=live, other=0.0)
    slope = tl.zeros_like(base)
    if u is not None:
        at = (sample * shares_u * K + k) * D + c
        slope = total(u, at[None, :], live[None, :], shares_u, K * D, BLOCK_S)
        if dlam is not None:
            tl.store(dlam + sample * stride_s + k, tl.sum(base * slope, axis=0))
        if lam is not None:
            slope *= tl.load(lam)
    if v is not None:
        at = (sample * shares_v * K + k) * D + c
        slope += total(v, at[None, :], live[None, :], shares_v, K * D, BLOCK_S)
    if dm is not None:
        slope += tl.load(dm + row * D + c, mask=live, other=0.0)
    if dmu is not None:
        tl.store(dmu + row * D + c, slope, mask=live)
    if s is not None:
        at = sample * stride_s + k
        d, by_s, rest = divisor(tl.load(s + at), tl.load(r + at), CLAMP)
        length = tl.sqrt(tl.sum(base * base, axis=0))
        direction = tl.where(length == 0, 0.0, base / length)
        radial = tl.sum(direction * slope, axis=0) * direction
        acc = ((slope - radial) + rest * radial) / d
        tl.store(da + sample * stride_da + k * D + c, acc, mask=live)
        along = tl.sum(base * slope, axis=0)
        tl.store(ds + row + tl.arange(0, 1), -along * by_s / d)


def products(
    t: torch.Tensor,  # [B, K, S]
    table: torch.Tensor,  # [S, D]
    r: torch.Tensor | None = None,  # [B, K, D]
) -> torch.Tensor:  # [B, K, D]
    """r + t·table; the rows of an image are its pixels."""

    def pixels(t: torch.Tensor) -> torch.Tensor:
        return t.unsqueeze(2).permute(0, 3, 1, 2)

    made = t.new_empty(*t.shape[:2], table.size(1))
    table = table.contiguous().expand(t.size(0), -1, -1)
    distribute(table, pixels(t), None if r is None else pixels(r), pixels(made))
    return made


def logits_of(mu: torch.Tensor, w: torch.Tensor | None, b: torch.Tensor | None) -> Logits:
    p = (mu if w is None else products(mu, w))[:, None]
    return Logits(None, p, None, None if b is None else products(mu, b[:, None]).mT)


def sums_of(
    x: torch.Tensor,
    mu: torch.Tensor,
    lam: torch.Tensor | None,
    w: torch.Tensor | None,
    b: torch.Tensor | None,
    z: torch.Tensor | None,  # [B, K, H, W], to be written if it is wanted
) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of s, [B, shares, K], and of a, [B, shares, K, D]."""
    a0, a1 = expectation(x, logits_of(mu, w, b), lam, z)
    if w is None:
        return a0, a1
    s = node_sums.totals(a0[..., None], a0.dtype)  # [B, K, 1]
    a = products(node_sums.totals(a1, a1.dtype), w.mT, None if b is None else s * b)
    return s.mT, a[:, None]


def m_step(
    sums: tuple[torch.Tensor, torch.Tensor],
    mu: torch.Tensor,  # [B, K, D], to be written
    s: torch.Tensor | None,  # [B, K], to be written, and r
    r: torch.Tensor | None,
    clamp: bool,
) -> torch.Tensor:
    B, K, D = mu.shape
    if B > 0:
        em_attention_bases_kernel[(B * K,)](
            *(*sums, mu, s, r, K, D, sums[0].size(1)),
            *(mu.stride(0), 0 if s is None else s.stride(0)),
            CLAMP=clamp,
            **node_sums.row_tile(D),
        )
    return mu


def em_attention(
    x: torch.Tensor,  # [B, C, H, W]
    mu: torch.Tensor,  # [B, K, D]
    lam: torch.Tensor | None,
    w: torch.Tensor | None,  # [D, C]
    b: torch.Tensor | None,  # [D]
    iterations: int,
    depth: int,
    clamp: bool,
    assignment: bool,
) -> tuple[torch.Tensor, ...]:
    B, K, D = mu.shape
    E = 0 if depth < 0 else max(1, depth)
    y = layouts.empty_map(x, D, x.shape[2:])
    z = layouts.empty_map(x, K, x.shape[2:], mu.dtype)
    E -= iterations <= E  # where the first step begins from mu, that is known
    h = mu.new_empty((B, E, K, D) if depth >= 0 else (0,))
    s, r = (mu.new_empty(B, max(0, depth), K) for _ in range(2))
    m = mu.contiguous()
    for t in range(1, iterations + 1):
        after, step = t - iterations + E, t - 1 - iterations + depth
        m = m_step(
            sums_of(x, m, lam, w, b, z if t == iterations else None),
            h[:, after] if 0 <= after < E else mu.new_empty(B, K, D),
            s[:, step] if step >= 0 else None,
            r[:, step] if step >= 0 else None,
            clamp,
        )
    if iterations == 0:
        assign(x, logits_of(m, w, b), lam, z)
    distribute(m, z, None, y)
    return y, z if assignment else z.new_empty(0), m if iterations else m.clone(), h, s, r


def bases_backward(
    v: torch.Tensor | None,  # [B, shares, K, C], as in the kernel
    u: torch.Tensor | None,
    dm: torch.Tensor | None,  # [B, K, C]
    lam: torch.Tensor | None,
    mu: torch.Tensor,  # [B, K, C]
    dlam: torch.Tensor,  # [B, K]
    dmu: torch.Tensor | None = None,
    da: torch.Tensor | None = None,
    step: tuple[torch.Tensor | None, ...] = (None, None, None),  # s, r, ds
    clamp: bool = False,
) -> None:
    B, K, C = mu.shape
    if B > 0:
        em_attention_bases_backward_kernel[(B * K,)](
            *(v, u, dm, lam, mu, dlam, dmu, da, *step, K, C),
            *(0 if v is None else v.size(1), 0 if u is None else u.size(1)),
            *(mu.stride(0), 0 if da is None else da.stride(0), dlam.stride(0)),
            CLAMP=clamp,
            **node_sums.row_tile(C),
        )


def em_attention_backward(
    dy: torch.Tensor | None,  # [B, C, H, W]
    dz: torch.Tensor | None,  # [B, K, H, W]
    dm: torch.Tensor | None,  # [B, K, C]
    x: torch.Tensor,
    mu: torch.Tensor,  # [B, K, C]
    m: torch.Tensor,  # [B, K, C]
    h: torch.Tensor,  # [B, E or E - 1, K, C]
    s: torch.Tensor,  # [B, depth, K]
    r: torch.Tensor,
    lam: torch.Tensor | None,
    depth: int,
    clamp: bool,
    need: list[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    E = max(1, depth)
    h = h if h.size(1) == E else torch.cat([mu[:, None], h], 1)
    B, _, K, C = h.shape
    maps = layouts.empty_map(x, 2 * E * K, x.shape[2:], h.dtype)
    z, dl = (part.split(K, 1) for part in maps.split(E * K, 1))
    table = h.new_empty(B, 2, E, K, C)  # da, then λ·mu: dx takes them by z and dl
    shares = h.new_empty(B, E, K)  # of dlam
    assign(x, Logits(None, h, None, None), lam, maps[:, : E * K])
    dm = dm if dm is None else dm.contiguous()
    v, u, ds = None, None, None
    if dy is not None and (depth > 0 or need[1]):
        v = node_sums.sums(z[-1], dy, None).a1
    for e in reversed(range(E)):
        last = e == E - 1
        if depth > 0:
            after, share = (m, shares[:, 0]) if last else (h[:, e + 1], shares[:, e + 1])
            ds = h.new_empty(B, K)
            step = s[:, e], r[:, e], ds
            bases_backward(v, u, dm, lam, after, share, da=table[:, 0, e], step=step, clamp=clamp)
            v, dm = None, None
        da = None if ds is None else table[:, 0, e]
        given = (dz, dy) if last else (None, None)
        summed = e > 0 or need[1] > 0 or need[2] > 0
        u = gradient(x, z[e], dl[e], *given, m, da, ds, summed)
    dx, dmu, dlam = x.new_empty(0), h.new_empty(0), h.new_empty(0)
    if need[0]:
        dx = layouts.empty_map(x, C, x.shape[2:])
        table[:, 1] = h if lam is None else h * lam
        first = 0 if depth > 0 else 1
        distribute(table[:, first:].flatten(1, 3), maps[:, first * E * K :], None, dx)
    if need[1]:
        dmu = torch.empty_like(m)
    if need[1] or need[2]:
        bases_backward(v, u, dm, lam, h[:, 0], shares[:, 0], dmu if need[1] else None)
        dlam = shares.sum() if need[2] else dlam
    return dx, dmu, dlam
