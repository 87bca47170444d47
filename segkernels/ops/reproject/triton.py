"""The Triton backend of reproject: y = r + Σ q·z, and dq = ⟨z, dy⟩; dz = Σ q·dy are sums over
pixels like those of an assignment."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.fused import memory_format
from segkernels.ops import layouts, node_sums, tiles
from segkernels.ops.distribute import distribute
from segkernels.ops.node_sums import flat, of_nodes
from segkernels.ops.tiles import aligned


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


def reproject(
    z: torch.Tensor,  # [B, K, D]
    q: torch.Tensor,  # [B, K, H, W]
    r: torch.Tensor | None,  # [B, D, H, W]
) -> torch.Tensor:  # [B, D, H, W]
    size, layout = (z.size(0), z.size(2), *q.shape[2:]), memory_format(q if r is None else r)
    y = torch.empty(size, dtype=z.dtype, device=z.device, memory_format=layout)
    return distribute(z.contiguous(), q, r, y)


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


def reproject_backward(
    dy: torch.Tensor,  # [B, D, H, W]
    z: torch.Tensor,  # [B, K, D]
    q: torch.Tensor,  # [B, K, H, W]
    need: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.contiguous()
    return (
        node_sums.totals(node_sums.sums(q, dy, None).a1, dy.dtype) if need[0] else z.new_empty(0),
        assignment_backward(dy, z, q) if need[1] else q.new_empty(0),
    )
