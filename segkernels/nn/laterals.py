"""Features of earlier stages beside those of the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def with_laterals(
    x: Tensor,
    others: Iterable[Tensor],
    project: Iterable[Callable[[Tensor], Tensor]],
    fuse: Callable[[Tensor], Tensor],
    *,
    align_corners: bool = False,
) -> Tensor:
    """fuse([x, P₁(x₁), P₂(x₂), …]): x [B, C, H, W] concatenated over channels with the projections
    of the other maps at its size.
    """
    sides = [
        F.interpolate(p(y), x.shape[-2:], mode="bilinear", align_corners=align_corners)
        for p, y in zip(project, others, strict=True)
    ]
    return fuse(torch.cat([x, *sides], 1))
