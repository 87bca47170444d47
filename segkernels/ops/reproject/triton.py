"""The Triton backend of reproject: y = r + Σ q·z, and dq = ⟨z, dy⟩; dz = Σ q·dy are sums over
pixels like those of an assignment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.fused import memory_format
from segkernels.ops import layouts, node_sums, tiles
from segkernels.ops.node_sums import flat, of_nodes, total
from segkernels.ops.tiles import aligned


@triton.jit
def reproject_forward_kernel(
    z,  # [B, K, D]
    q,
    r,  # or None
    y,
    K,
    D,
    N,
    strides_q,
    strides_r,
    strides_y,
    SPLIT: tl.constexpr,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = r + Σ_k q·z."""
    D = aligned(D, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    live = (n < N) & (d < D)
    acc = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    if r is not None:
        residual = r + tiles.at_pixels(strides_r, sample, d, n, ALIGN)
        acc += tl.load(residual, mask=live, other=0.0).to(ACC)
    for first in range(0, K, BLOCK_K):
        nodes = first + tl.arange(0, BLOCK_K)
        k = nodes[None, :]
        at = tiles.at_pixels(strides_q, sample, k, n, 1)
        weights = tl.load(q + at, mask=(n < N) & (k < K), other=0.0)
        node = of_nodes(z + sample * K * D, nodes[:, None], d, K, D)
        acc = tiles.product(weights, node, acc, SPLIT)
    tiles.store(y + tiles.at_pixels(strides_y, sample, d, n, ALIGN), acc, live)


@triton.jit
def reproject_assignment_backward_kernel(
    dy,
    z,  # [B, K, D]
    dq,
    K,
    D,
    N,
    strides_dy,
    strides_dq,
    ACC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dq = ⟨z, dy⟩; both factors have the type of the maps."""
    D = aligned(D, ALIGN)
    _, sample, _, start = tiles.this_tile(N, 1, BLOCK_N)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for first in range(0, D, BLOCK_D):
        channels = first + tl.arange(0, BLOCK_D)
        d = channels[None, :]
        at = tiles.at_pixels(strides_dy, sample, d, n, ALIGN)
        slope = tl.load(dy + at, mask=(n < N) & (d < D), other=0.0)
        node = of_nodes(z + sample * K * D, k, channels[:, None], K, D)
        acc = tiles.dot(slope, node, acc)
    at = tiles.at_pixels(strides_dq, sample, k, n, 1)
    tl.store(dq + at, acc, mask=(n < N) & (k < K))


@triton.jit
def reproject_nodes_backward_kernel(
    shares_of_dz,  # [B, shares, K, D]
    dz,  # [B, K, D]
    K,
    D,
    shares,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz of a node in an image, from its shares."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_C)
    first = row // K * shares * K + row % K
    acc = total(shares_of_dz, first * D + d[None, :], d[None, :] < D, shares, K * D, BLOCK_S)
    tiles.store(dz + row * D + d, acc, d < D)


def reproject(
    z: torch.Tensor,  # [B, K, D]
    q: torch.Tensor,  # [B, K, H, W]
    r: torch.Tensor | None,  # [B, D, H, W]
) -> torch.Tensor:  # [B, D, H, W]
    B, K, D = z.shape
    y = torch.empty(
        (B, D, *q.shape[2:]),
        dtype=z.dtype,
        device=z.device,
        memory_format=memory_format(q if r is None else r),
    )
    if y.numel() == 0:
        return y
    (q, r), strides = flat(q, r)
    N = y.size(2) * y.size(3)
    block_n, block_k, block_d, warps = layouts.product_shape(z.dtype, N, K, D, 64)
    apart = [s[i] for s in (strides[1], layouts.map_strides(y)) for i in (0, 2)]
    reproject_forward_kernel[(triton.cdiv(N, block_n) * B, triton.cdiv(D, block_d))](
        *(z.contiguous(), q, r, y, K, D, N),
        *(*strides, layouts.map_strides(y)),
        SPLIT=z.element_size() == 2,
        ACC=layouts.triton_type(z),
        ALIGN=layouts.alignment(layouts.is_channels_last(y), D, *apart),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return y


def assignment_backward(dy: torch.Tensor, z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """dq in q's type and memory format."""
    B, K, D = z.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device, memory_format=memory_format(q))
    if dq.numel() == 0:
        return dq
    (dy,), (strides,) = flat(dy)
    N = dy.size(2) * dy.size(3)
    block_n, block_d, block_k, warps = layouts.product_shape(z.dtype, N, D, K, 64)
    last = layouts.is_channels_last(dy)
    reproject_assignment_backward_kernel[(triton.cdiv(N, block_n) * B, triton.cdiv(K, block_k))](
        *(dy, z, dq, K, D, N),
        *(strides, layouts.map_strides(dq)),
        ACC=layouts.triton_type(z),
        ALIGN=layouts.alignment(last, D, strides[0], strides[2]),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=warps,
    )
    return dq


def nodes_backward(dy: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    B, K, D = q.size(0), q.size(1), dy.size(1)
    dz = dy.new_empty(B, K, D)
    shares = node_sums.sums(q, dy, None).a1
    if B > 0:
        reproject_nodes_backward_kernel[(B * K,)](
            *(shares, dz, K, D, shares.size(1)), **node_sums.row_tile(D)
        )
    return dz


def reproject_backward(
    dy: torch.Tensor,  # [B, D, H, W]
    z: torch.Tensor,  # [B, K, D]
    q: torch.Tensor,  # [B, K, H, W]
    need: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.contiguous()
    return (
        nodes_backward(dy, q) if need[0] else z.new_empty(0),
        assignment_backward(dy, z, q) if need[1] else q.new_empty(0),
    )
