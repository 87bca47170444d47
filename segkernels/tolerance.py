"""The law of tolerance: how wrong a fused backend may be, measured, never chosen by hand.

Inputs are drawn in a type T and widened to float64, where the reference gives the truth. The fused
result in T may then err by no more than the reference computed in T does, plus the rounding of a
result and of its longest sum:

    error(fused) <= error(reference in T) + 2 eps(T) + 4 eps(accumulation type) sqrt(longest sum)

with error(t) = max|t - truth| / max|truth|. A gradient whose true value is zero (a shift in front
of a standardisation has none) is measured against the largest gradient of the call instead.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from segkernels.fused import accumulation_dtype

VANISHING = 1e-10  # a share of the largest gradient that is nothing but float64's rounding


def error(got: Tensor, truth: Tensor, largest: float = 0.0) -> float:
    """max|got - truth| / max|truth|; infinite where they are not finite in the same way.

    ``largest``: the largest of all true gradients of the call, the scale of a vanishing one.
    """
    got, truth = got.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if not torch.equal(got.isfinite(), finite) or not torch.allclose(
        got[~finite], truth[~finite], equal_nan=True
    ):
        return math.inf
    if not finite.any():
        return 0.0
    scale = truth[finite].abs().max().item()
    scale = largest if scale < VANISHING * largest else scale
    return (got - truth)[finite].abs().max().item() / (scale or 1.0)


def budget(dtype: torch.dtype, longest_sum: int) -> float:
    """What rounding alone may add in ``dtype``."""
    wide = torch.finfo(accumulation_dtype(dtype)).eps
    return 2 * torch.finfo(dtype).eps + 4 * wide * math.sqrt(longest_sum)


def verdict(
    got: Tensor,
    yardstick: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    longest_sum: int,
    largest: float = 0.0,
) -> tuple[float, float]:
    """(error of ``got``, error allowed); ``yardstick`` is the reference computed in ``dtype``."""
    allowed = error(yardstick, truth, largest) + budget(dtype, longest_sum)
    return error(got, truth, largest), allowed
