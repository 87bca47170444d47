"""Whether a result may have a time: its error against float64, held to the law of tolerance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.work import OURS, Way, cotangent


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

    Law of tolerance: ours may err by as much as the plain reference does in the same type, plus the
    rounding of one stored result and of `length` terms summed in another order.
    """
    y = truth.forward()
    dy = cotangent(yardstick.forward())
    true = (y.detach(), torch.autograd.grad(y, truth.leaves, dy.double()))
    forward, backward = {}, {}
    for name, way in {**ways, _YARDSTICK: yardstick}.items():
        forward[name], backward[name] = _errors(way, dy, true)
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    budget = 2 * torch.finfo(dy.dtype).eps + 4 * torch.finfo(wide).eps * length**0.5
    allowed = (forward.pop(_YARDSTICK) + budget, backward.pop(_YARDSTICK) + budget)
    return Accuracy(forward, backward, allowed)


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest true value; 0 for empty results."""
    if result.shape != truth.shape:
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    largest = truth.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((result.double() - truth).abs().max() / largest)


_YARDSTICK = "the reference in the same type"


def _errors(way: Way, dy: Tensor, true: tuple[Tensor, Sequence[Tensor]]) -> tuple[float, float]:
    y = way.forward()
    forward = relative_error(y.detach(), true[0])
    if y.shape != dy.shape:
        return forward, float("inf")
    gradients = torch.autograd.grad(y, way.leaves, dy)
    pairs = zip(gradients, true[1], strict=True)
    return forward, max(relative_error(g, t) for g, t in pairs)
