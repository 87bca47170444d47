"""Whether a result may have a time: its error against float64, held to the law of tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.work import OURS, Way, cotangent
from segkernels import tolerance


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64 by way, each relative to the tensor's largest true value.

    For every way: that of the result, and those of the gradients in the order of the leaves.
    """

    forward: dict[str, float]
    backward: dict[str, tuple[float, ...]]
    allowed: tuple[float, tuple[float, ...]]

    def of(self, mode: str) -> dict[str, float]:
        """The largest error that concerns a row of this mode."""
        if mode == "forward":
            return self.forward
        worst = {name: max(errors) for name, errors in self.backward.items()}
        if mode == "backward":
            return worst
        return {name: max(self.forward[name], error) for name, error in worst.items()}

    @property
    def used(self) -> float:
        """The largest share that our result or a gradient takes of the error it may have."""
        errors = (self.forward[OURS], *self.backward[OURS])
        allowed = (self.allowed[0], *self.allowed[1])
        shares = [e / a for e, a in zip(errors, allowed, strict=True)]
        return math.nan if any(map(math.isnan, shares)) else max(shares)

    def wrong(self) -> str | None:
        """Why our results get no time, or None."""
        if self.used <= 1:  # not for a NaN
            return None
        if not self.forward[OURS] <= self.allowed[0]:
            return f"wrong result: error {self.forward[OURS]:.1e}, allowed {self.allowed[0]:.1e}"
        pairs = zip(self.backward[OURS], self.allowed[1], strict=True)
        i, error, allowed = next((i, e, a) for i, (e, a) in enumerate(pairs) if not e <= a)
        return f"wrong gradient {i}: error {error:.1e}, allowed {allowed:.1e}"


def accuracy(ways: Mapping[str, Way], truth: Way, yardstick: Way, length: int) -> Accuracy:
    """Run every way once, forward and backward. `length` is the longest sum of the operator.

    What ours may be is the law of tolerance, where the reference in the same type is the yardstick.
    """
    y = truth.forward()
    dy = cotangent(yardstick.forward())
    true = (y.detach(), torch.autograd.grad(y, truth.leaves, dy.double()))
    errors = {name: _errors(way, dy, true) for name, way in ways.items()}
    forward, backward = _errors(yardstick, dy, true)
    budget = tolerance.budget(dy.dtype, length)
    return Accuracy(
        {name: result for name, (result, _) in errors.items()},
        {name: gradients for name, (_, gradients) in errors.items()},
        (forward + budget, tuple(e + budget for e in backward)),
    )


def _errors(
    way: Way, dy: Tensor, true: tuple[Tensor, Sequence[Tensor]]
) -> tuple[float, tuple[float, ...]]:
    y = way.forward()
    if y.shape != dy.shape:
        return math.inf, (math.inf,) * len(true[1])
    gradients = torch.autograd.grad(y, way.leaves, dy)
    largest = max((t.abs().max().item() for t in true[1] if t.numel()), default=0.0)
    pairs = zip(gradients, true[1], strict=True)
    return tolerance.error(y, true[0]), tuple(tolerance.error(g, t, largest) for g, t in pairs)
