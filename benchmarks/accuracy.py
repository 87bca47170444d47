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
    """Errors by way against float64, relative to the largest true value, and what ours may be."""

    forward: dict[str, float]
    backward: dict[str, float]
    allowed: tuple[float, float]

    def of(self, mode: str) -> dict[str, float]:
        """The errors a row of this mode shows: its forward's, its gradients', or the larger."""
        if mode == "forward":
            return self.forward
        if mode == "backward":
            return self.backward
        return {n: max(e, self.backward[n]) for n, e in self.forward.items() if n in self.backward}

    def wrong(self) -> str | None:
        """Why our results get no time, or None."""
        pairs = (
            ("forward", self.forward[OURS], self.allowed[0]),
            ("backward", self.backward[OURS], self.allowed[1]),
        )
        for what, error, allowed in pairs:
            if not error <= allowed:  # a NaN is wrong as well
                return f"{what}: error {error:.2e} against float64, allowed {allowed:.2e}"
        return None


def accuracy(ways: Mapping[str, Way], truth: Way, yardstick: Way, length: int) -> Accuracy:
    """Run every way once, forward and backward. `length` is the longest sum of the operator.

    What ours may be is the law of tolerance, where the reference in the same type is the yardstick.
    """
    y = truth.forward()
    dy = cotangent(yardstick.forward())
    true = (y.detach(), torch.autograd.grad(y, truth.leaves, dy.double()))
    forward, backward = {}, {}
    for name, way in {**ways, _YARDSTICK: yardstick}.items():
        forward[name], backward[name] = _errors(way, dy, true)
    budget = tolerance.budget(dy.dtype, length)
    allowed = (forward.pop(_YARDSTICK) + budget, backward.pop(_YARDSTICK) + budget)
    return Accuracy(forward, backward, allowed)


_YARDSTICK = "the reference in the same type"


def _errors(way: Way, dy: Tensor, true: tuple[Tensor, Sequence[Tensor]]) -> tuple[float, float]:
    y = way.forward()
    forward = _error(y, true[0])
    if y.shape != dy.shape:
        return forward, math.inf
    gradients = torch.autograd.grad(y, way.leaves, dy)
    pairs = zip(gradients, true[1], strict=True)
    return forward, max(_error(g, t) for g, t in pairs)


def _error(got: Tensor, truth: Tensor) -> float:
    return tolerance.error(got, truth) if got.shape == truth.shape else math.inf
