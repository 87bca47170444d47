"""The Triton kernel that hands nodes out to pixels, and what launches it: y = r + Σ_k q·z."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from segkernels.ops import layouts, tiles
from segkernels.ops.node_sums import flat, of_nodes
from segkernels.ops.tiles import aligned


@triton.jit
def distribute_kernel(
    z,  # [K, D], or [B, K, D]
    q,
    r,  # or None
    y,
    K,
    D,
    N,
    stride_z,  # of images
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
        node = of_nodes(z + sample * stride_z, nodes[:, None], d, K, D)
        weights = tl.load(q + at, mask=(n < N) & (k < K), other=0.0)
        acc = tiles.product(weights, node, acc, SPLIT)
    tiles.store(y + tiles.at_pixels(strides_y, sample, d, n, ALIGN), acc, live)


def distribute(
    z: torch.Tensor,  # [B, K, D], dense but for the images
    q: torch.Tensor,  # [B, K, H, W]
    r: torch.Tensor | None,  # [B, D, H, W]
    y: torch.Tensor,  # [B, D, H, W], to be written
) -> torch.Tensor:
    """y = r + Σ_k q·z."""
    if y.numel() == 0:
        return y
    B, K, D = z.shape
    (q, r), strides = flat(q, r)
    N = y.size(2) * y.size(3)
    block_n, block_k, block_d, warps = layouts.product_shape(y.dtype, N, K, D, 64)
    if y.dtype == torch.float16 and not layouts.INTERPRETED:  # two halves of each
        block_k = 16
    apart = [s[i] for s in (strides[1], layouts.map_strides(y)) for i in (0, 2)]
    distribute_kernel[(triton.cdiv(N, block_n) * B, triton.cdiv(D, block_d))](
        *(z, q, r, y, K, D, N, z.stride(0)),
        *(*strides, layouts.map_strides(y)),
        SPLIT=y.element_size() == 2,
        ACC=layouts.triton_type(y),
        ALIGN=layouts.alignment(layouts.is_channels_last(y), D, *apart),
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=2 if block_k < K else 1,  # of a single block there is none to fetch ahead
    )
    return y
