"""Lloyd's algorithm: clusters of pixels, from which layers over nodes begin.

Source: Lloyd, "Least Squares Quantization in PCM", 1982; seeds: Arthur and Vassilvitskii,
"k-means++", SODA 2007.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segkernels.fused import UnsupportedInputError

ITERATIONS = 50  # at most; it ends when no pixel changes its cluster


class Clusters(NamedTuple):
    centres: Tensor  # [K, C]
    deviations: Tensor  # [K, C], standard deviations about the centre


@torch.no_grad()
def kmeans(owner: str, features: Tensor, nodes: int, *, seed: int = 0) -> Clusters:
    """K clusters of the pixels of ``features``: [B, C, H, W]; the same for the same seed.

    Raises UnsupportedInputError where fewer than K pixels are distinct, or one is not finite.
    """
    points = features.detach().movedim(1, 3).flatten(0, 2)  # [N, C]
    points = points.to(torch.promote_types(points.dtype, torch.float32))
    if not points.isfinite().all():
        raise UnsupportedInputError(f"{owner}: init_from needs finite features")
    mean = points.mean(0)
    points = points - mean  # cdist expands its squares: about the mean they cancel less
    centres = _seeds(owner, points, nodes, seed)
    labels: Tensor | None = None
    for _ in range(ITERATIONS):
        before = labels
        distance, labels = torch.cdist(points, centres).min(1)  # [N]
        if before is not None and torch.equal(labels, before):
            break
        members, counts = _members(points, labels, nodes)
        centres = members @ points / counts[:, None]
        empty = (members.sum(1) == 0).nonzero()[:, 0]  # such a cluster begins anew, far from others
        centres[empty] = points[distance.topk(len(empty)).indices]
    labels = torch.cdist(points, centres).argmin(1)
    members, counts = _members(points, labels, nodes)
    variances = members @ (points - centres[labels]).square() / counts[:, None]
    return Clusters(centres + mean, variances.sqrt())


def _seeds(owner: str, points: Tensor, nodes: int, seed: int) -> Tensor:
    """K distinct pixels, each drawn in proportion to its squared distance from those before it."""
    generator = torch.Generator().manual_seed(seed)
    weights = points.new_ones(len(points), dtype=torch.float64)
    seeds = points[:0]
    for count in range(nodes):
        total = weights.cumsum(0)
        if not (len(total) and total[-1] > 0):
            raise UnsupportedInputError(
                f"{owner}: init_from needs as many distinct pixels as nodes"
                f"\n  nodes: {nodes}\n  distinct pixels: {count} of {len(points)}"
            )
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(total) * total[-1]
        seeds = torch.cat([seeds, points[torch.searchsorted(total, drawn, right=True)][None]])
        nearest = (points - seeds[-1]).square().sum(1, dtype=torch.float64)
        weights = nearest if count == 0 else weights.minimum(nearest)
    return seeds


def _members(points: Tensor, labels: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """[K, N], one where a pixel belongs to the cluster, and how many do, at least 1: [K]."""
    members = F.one_hot(labels, nodes).to(points.dtype).T
    return members, members.sum(1).clamp(min=1)
