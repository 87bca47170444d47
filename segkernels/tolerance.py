"""The law of tolerance: how wrong a fused backend may be, measured, never chosen by hand.

Inputs are drawn in a type T and widened to float64, where the reference gives the truth. The fused
result in T may then err by no more than the reference computed in T does, plus the rounding of a
result and of its longest sum:

    error(fused) <= error(reference in T) + 2 eps(T) + 4 eps(accumulation type) sqrt(longest sum)

with error(t) = max|t - truth| / max|truth|.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segkernels.fused import accumulation_dtype


def error(got: Tensor, truth: Tensor) -> float:
    """max|got - truth| / max|truth|; infinite where only one of them is not finite."""
    got, truth = got.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.equal(got.isnan(), truth.isnan()):
        return math.inf
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().item()
    return (got - truth)[finite].abs().max().item() / (scale or 1.0)


def budget(dtype: torch.dtype, longest_sum: int) -> float:
    """What rounding alone may add in ``dtype``."""
    wide = torch.finfo(accumulation_dtype(dtype)).eps
    return 2 * torch.finfo(dtype).eps + 4 * wide * math.sqrt(longest_sum)


def verdict(
    got: Tensor, yardstick: Tensor, truth: Tensor, dtype: torch.dtype, longest_sum: int
) -> tuple[float, float]:
    """(error of ``got``, error allowed); ``yardstick`` is the reference computed in ``dtype``."""
    return error(got, truth), error(yardstick, truth) + budget(dtype, longest_sum)
