"""Triton kernels of soft assignment, and what launches each: they know pixels, nodes and a table of
logits, not where the table comes from.

q = softmax of logits; the gradients of the logits; those of the pixels. The sums over pixels are
node_sums'. No tensor over pixels, nodes and channels exists. A table is all images' own, or each
image has one, or several.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from segkernels.ops import layouts, tiles
from segkernels.ops.node_sums import centred, flat, how, of_nodes, total
from segkernels.ops.tiles import aligned


class Logits(NamedTuple):
    """log q = ⟨p, x̃⟩ + ⟨r, x̃²⟩ + b, up to what all nodes share; a None is left out."""

    centre: torch.Tensor | None  # [C]
    p: torch.Tensor  # [K, C]; or [B, E, K, C], of E assignments of an image
    r: torch.Tensor | None  # [K, C]; or [K], and the square is ‖x̃‖²
    b: torch.Tensor | None  # [shares, K]; or [B, E, K]

    @property
    def isotropic(self) -> bool:
        return self.r is not None and self.r.dim() == 1


@triton.jit
def assigned(
    x,
    lam,  # or None: 1
    centre,  # [C] or None
    p,  # [K, C]
    r,  # [K, C], or [K] where ISOTROPIC, or None
    b,  # [shares, K] or None
    strides,
    sample,
    n,
    k,
    K,
    C,
    N,
    shares,
    ISOTROPIC: tl.constexpr,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """q of pixels n and all nodes k: softmax over k of λ(⟨p, x̃⟩ + ⟨r, x̃²⟩ + b).

    The products of a block of channels are summed by themselves before they are added: of logits in
    the hundreds, rounding errors stay those of short sums.
    """
    logits = tl.zeros((n.shape[0], k.shape[1]), ACC)
    squares = tl.zeros((n.shape[0],), ACC)
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        c = channels[:, None]
        t = centred(x, centre, strides, sample, n, channels[None, :], N, C, ALIGN)
        part = tl.zeros(logits.shape, ACC)
        if r is not None:
            if ISOTROPIC:
                squares += tl.sum(t * t, axis=1)
            else:
                part = tiles.product(t * t, of_nodes(r, k, c, K, C), part, SPLIT)
        logits += tiles.product(t, of_nodes(p, k, c, K, C), part, SPLIT)
    if ISOTROPIC:
        logits += squares[:, None] * tl.load(r + k, mask=k < K, other=0.0)
    if b is not None:
        logits += total(b, k, k < K, shares, K, 16)[None, :]
    if lam is not None:
        logits *= tl.load(lam)
    logits = tl.where(k < K, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def assignment_softmax_kernel(
    x,
    lam,  # or None: 1
    centre,  # [C] or None
    p,  # [K, C], or [B, E, K, C]
    r,  # [K, C], or [K] where ISOTROPIC, or None
    b,  # [shares, K], or [B, E, K], or None
    q,  # of all E one after another
    K,
    C,
    N,
    shares,
    strides_p,  # of images and assignments
    strides_b,
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
    """q of a tile of pixels."""
    C = aligned(C, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    own = tl.program_id(1)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    p += sample * strides_p[0] + own * strides_p[1]
    if b is not None:
        b += sample * strides_b[0] + own * strides_b[1]
    weights = assigned(
        *(x, lam, centre, p, r, b, strides_x, sample, n, k, K, C, N, shares),
        *(ISOTROPIC, SPLIT, ACC, ALIGN, BLOCK_C),
    )
    at = tiles.at_pixels(strides_q, sample, own * K + k, n, 1)
    tl.store(q + at, weights, mask=(n < N) & (k < K))


@triton.jit
def projected(
    acc,  # [pixels n, nodes k]
    x,
    centre,  # [C] or None
    table,  # [K, C]
    strides,
    sample,
    n,
    k,
    K,
    C,
    N,
    SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """acc + ⟨table, x̃⟩."""
    for first in range(0, C, BLOCK_C):
        channels = first + tl.arange(0, BLOCK_C)
        away = centred(x, centre, strides, sample, n, channels[None, :], N, C, ALIGN)
        nodes = of_nodes(table, k, channels[:, None], K, C).to(acc.dtype)
        acc = tiles.product(away, nodes, acc, SPLIT)
    return acc


@triton.jit
def sloped(
    x,
    q,
    dq,  # or None
    dy,  # or None
    centre,  # [C] or None
    h,  # [K, C] or None
    t,  # [K]
    z,  # [K, C]
    strides_x,
    strides_q,
    strides_dq,
    strides_dy,
    sample,
    n,
    k,
    K,
    C,
    N,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dl of pixels n and all nodes k: q·(g − Σ q·g) with g = dq + ⟨z, dy⟩ + ⟨h, x̃⟩ + t."""
    live = (n < N) & (k < K)
    g = tl.zeros((n.shape[0], k.shape[1]), ACC)
    if dy is not None:
        g = projected(g, dy, None, z, strides_dy, sample, n, k, K, C, N, SPLIT, ALIGN, BLOCK_C)
    if h is not None:
        g = projected(g, x, centre, h, strides_x, sample, n, k, K, C, N, SPLIT, ALIGN, BLOCK_C)
        g += tl.load(t + k, mask=k < K, other=0.0)
    if dq is not None:
        g += tl.load(dq + tiles.at_pixels(strides_dq, sample, k, n, 1), mask=live, other=0.0)
    weights = tl.load(q + tiles.at_pixels(strides_q, sample, k, n, 1), mask=live, other=0.0)
    return weights * (g - tl.sum(weights * g, axis=1)[:, None])


@triton.jit
def assignment_slopes_kernel(
    x,
    q,
    dq,  # or None
    dy,  # or None
    centre,  # [C] or None
    h,  # [B, K, C] or None
    t,  # [B, K]
    z,  # [B, K, C]
    dl,
    K,
    C,
    N,
    stride_h,  # of images
    strides_x,
    strides_q,
    strides_dq,
    strides_dy,
    strides_dl,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dl of a tile of pixels."""
    C = aligned(C, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    if h is not None:
        h += sample * stride_h
        t += sample * K
    if dy is not None:
        z += sample * K * C
    slope = sloped(
        *(x, q, dq, dy, centre, h, t, z, strides_x, strides_q, strides_dq, strides_dy),
        *(sample, n, k, K, C, N, SPLIT, ACC, ALIGN, BLOCK_C),
    )
    at = tiles.at_pixels(strides_dl, sample, k, n, 1)
    tl.store(dl + at, slope, mask=(n < N) & (k < K))


@triton.jit
def assignment_features_backward_kernel(
    x,
    q,
    dl,
    centre,  # [C]
    p,  # [K, C]
    r,  # [K, C], or [K] where ISOTROPIC
    h,  # [B, K, C] or None
    dx,
    K,
    C,
    N,
    strides_x,
    strides_q,
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
    """dx = Σ_k q·h + dl·(p + 2r·x̃)."""
    C = aligned(C, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    bend = tl.zeros((BLOCK_N, 1), ACC) if ISOTROPIC else acc
    if h is not None:
        h += sample * K * C
    for first in range(0, K, BLOCK_K):
        nodes = first + tl.arange(0, BLOCK_K)
        k, row = nodes[None, :], nodes[:, None]
        live = (n < N) & (k < K)
        slope = tl.load(dl + tiles.at_pixels(strides_dl, sample, k, n, 1), mask=live, other=0.0)
        acc = tiles.product(slope, of_nodes(p, row, c, K, C), acc, SPLIT)
        if ISOTROPIC:
            curvature = tl.load(r + k, mask=k < K, other=0.0)
            bend += tl.sum(slope * curvature, axis=1)[:, None]
        else:
            bend = tiles.product(slope, of_nodes(r, row, c, K, C), bend, SPLIT)
        if h is not None:
            at = tiles.at_pixels(strides_q, sample, k, n, 1)
            weights = tl.load(q + at, mask=live, other=0.0)
            acc = tiles.product(weights, of_nodes(h, row, c, K, C).to(ACC), acc, SPLIT)
    acc += 2 * bend * centred(x, centre, strides_x, sample, n, c, N, C, ALIGN)
    at = tiles.at_pixels(strides_dx, sample, c, n, ALIGN)
    tiles.store(dx + at, acc, (n < N) & (c < C))


def pixel_tile(x: torch.Tensor, nodes: int) -> dict[str, int]:
    """Blocks of a kernel that keeps all nodes of some pixels in registers, and its warps."""
    block_k = layouts.fit(nodes, 256)
    block_c = layouts.fit(x.size(1), 32 if block_k <= 64 else 16)
    if x.dtype == torch.float64 and not layouts.INTERPRETED:  # a product is a block of all three
        block_n, block_c = max(1, 256 // block_k), 16
    else:
        block_n = layouts.fit(x.size(2) * x.size(3), 64 if block_k <= 64 else 16)
    warps = 4 if block_k <= 64 else 8
    return {"BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_K": block_k, "num_warps": warps}


def table_tile(nodes: int, channels: int) -> dict[str, int]:
    """Blocks of a kernel over [K, C] that keeps all nodes of some channels in registers."""
    block_k = triton.next_power_of_2(nodes)
    block_c = min(triton.next_power_of_2(channels), max(16, min(64, 4096 // block_k)))
    return {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": 4}


def assign(
    x: torch.Tensor,
    logits: Logits,
    lam: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, [B, K, H, W] in the accumulation type and x's memory format; of E assignments of an image
    [B, E·K, H, W]."""
    centre, p, r, b = logits
    *own, K, C = p.shape
    count, shares = (own[1], 1) if own else (1, 0 if b is None else b.size(0))
    if q is None:
        q = layouts.empty_map(x, count * K, x.shape[2:], p.dtype)
    if q.numel() > 0:
        (x,), (strides,) = flat(x)
        tile = pixel_tile(x, K)
        N = x.size(2) * x.size(3)
        assignment_softmax_kernel[(triton.cdiv(N, tile["BLOCK_N"]) * x.size(0), count)](
            *(x, lam, centre, p, r, b, q, K, C, N, shares),
            *(
                p.stride()[:2] if own else (0, 0),
                b.stride()[:2] if own and b is not None else (0, 0),
            ),
            *(strides, layouts.map_strides(q)),
            ISOTROPIC=logits.isotropic,
            **how(x, strides),
            **tile,
        )
    return q


def slopes(
    x: torch.Tensor,
    q: torch.Tensor,
    dq: torch.Tensor | None,
    centre: torch.Tensor | None,
    h: torch.Tensor | None,  # [B, K, C], dense but for the images
    t: torch.Tensor | None,  # [B, K]
    dy: torch.Tensor | None = None,
    z: torch.Tensor | None = None,  # [B, K, C]
    dl: torch.Tensor | None = None,
) -> torch.Tensor:
    """dl, the gradient of the logits, [B, K, H, W] like q."""
    if dl is None:
        dl = torch.empty_like(q)
    if dl.numel() > 0:
        (x, q, dq, dy), strides = flat(x, q, dq, dy)
        tile = pixel_tile(x, q.size(1))
        N = x.size(2) * x.size(3)
        assignment_slopes_kernel[(triton.cdiv(N, tile["BLOCK_N"]) * x.size(0),)](
            *(x, q, dq, dy, centre, h, t, z, dl),
            *(q.size(1), x.size(1), N),
            *(0 if h is None else h.stride(0), *strides, layouts.map_strides(dl)),
            **how(x, strides[0], strides[3]),
            **tile,
            num_stages=2,  # with more there are more addresses than registers
        )
    return dl


def features_backward(
    x: torch.Tensor, q: torch.Tensor, dl: torch.Tensor, logits: Logits, h: torch.Tensor | None
) -> torch.Tensor:
    dx = layouts.empty_map(x, x.size(1), x.shape[2:])
    if dx.numel() > 0:
        (x, q, dl, _), strides = flat(x, q, dl, dx)
        K, C = logits.p.shape
        N = x.size(2) * x.size(3)
        block_n, block_k, block_c, warps = layouts.product_shape(x.dtype, N, K, C, 32)
        grid = (triton.cdiv(N, block_n) * x.size(0), triton.cdiv(C, block_c))
        assignment_features_backward_kernel[grid](
            *(x, q, dl, logits.centre, logits.p, logits.r, h, dx),
            *(K, C, N, *strides),
            ISOTROPIC=logits.isotropic,
            **how(x, strides[0], strides[3]),
            BLOCK_N=block_n,
            BLOCK_C=block_c,
            BLOCK_K=block_k,
            num_warps=warps,
        )
    return dx
