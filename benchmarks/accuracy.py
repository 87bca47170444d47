"""Whether a result may have a time: its error against float64, held to the law of tolerance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.work import OURS, Tensors, Way, cotangents, gradients
from segkernels import tolerance


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64 by way, each relative to the tensor's largest true value.

    For every way: those of the results, and those of the gradients in the order of the leaves.
    """

    forward: dict[str, tuple[float, ...]]
    backward: dict[str, tuple[float, ...]]
    allowed: tuple[tuple[float, ...], tuple[float, ...]]

    def of(self, mode: str) -> dict[str, float]:
        """The largest error that concerns a row of this mode."""
        concerned = {
            "forward": (self.forward,),
            "backward": (self.backward,),
        }.get(mode, (self.forward, self.backward))
        return {name: max(e for part in concerned for e in part[name]) for name in self.forward}

    @property
    def used(self) -> float:
        """The largest share that our result or a gradient takes of the error it may have."""
        errors = self.forward[OURS] + self.backward[OURS]
        allowed = self.allowed[0] + self.allowed[1]
        shares = [e / a for e, a in zip(errors, allowed, strict=True)]
        return math.nan if any(map(math.isnan, shares)) else max(shares)

    def wrong(self) -> str | None:
        """Why our results get no time, or None."""
        if self.used <= 1:  # not for a NaN
            return None
        kinds = zip(
            ("result", "gradient"), (self.forward, self.backward), self.allowed, strict=True
        )
        what, i, error, allowed = next(
            (what, i, e, a)
            for what, errors, limits in kinds
            for i, (e, a) in enumerate(zip(errors[OURS], limits, strict=True))
            if not e <= a
        )
        return f"wrong {what} {i}: error {error:.1e}, allowed {allowed:.1e}"


def accuracy(ways: Mapping[str, Way], truth: Way, yardstick: Way, length: int) -> Accuracy:
    """Run every way once, forward and backward. `length` is the longest sum of the operator.

    What ours may be is the law of tolerance, where the reference in the same type is the yardstick.
    """
    y = truth.results()
    dy = cotangents(yardstick.results())
    dt = gradients(y, truth.leaves, [d.double() for d in dy])
    true = (tuple(t.detach() for t in y), dt)
    errors = {name: _errors(way, dy, true) for name, way in ways.items()}
    forward, backward = _errors(yardstick, dy, true)
    budget = tolerance.budget(dy[0].dtype, length)
    return Accuracy(
        {name: result for name, (result, _) in errors.items()},
        {name: gradient for name, (_, gradient) in errors.items()},
        (tuple(e + budget for e in forward), tuple(e + budget for e in backward)),
    )


def _errors(
    way: Way, dy: Tensors, true: tuple[Tensors, Sequence[Tensor]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    y = way.results()
    if [t.shape for t in y] != [d.shape for d in dy]:
        return (math.inf,) * len(dy), (math.inf,) * len(true[1])
    made = gradients(y, way.leaves, [d.to(t.dtype) for d, t in zip(dy, y, strict=True)])
    largest = max((t.abs().max().item() for t in true[1] if t.numel()), default=0.0)
    return (
        tuple(tolerance.error(*pair) for pair in zip(y, true[0], strict=True)),
        tuple(tolerance.error(*pair, largest) for pair in zip(made, true[1], strict=True)),
    )
