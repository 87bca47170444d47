"""The peak memory of operators over nodes, beyond inputs and results, against plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import segkernels
from benchmarks import baselines
from benchmarks.work import as_tuple, cases
from segkernels import timing


def extra(function: Callable[..., Any], inputs: dict[str, Any], train: bool) -> int:
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor)]

    def call() -> Any:
        with torch.set_grad_enabled(train):
            y = function(**inputs)
        if not train:
            return y
        y = as_tuple(y)
        return torch.autograd.grad(y, leaves, [torch.ones_like(t) for t in y])

    for leaf in leaves:
        leaf.requires_grad_(train)
    return timing.memory_of(call).extra


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("op", baselines.EXPANDED)
def test_a_fraction_of_the_expanded_form(op: str, train: bool) -> None:
    """At most a quarter of it, and a fiftieth of one tensor of pixels, nodes and channels, of which
    the published form makes several."""
    case = next(c for c in cases(op) if c.nodes == 32)
    inputs = case.inputs()
    if reason := segkernels.explain(op, **inputs)["native"]:
        pytest.skip(reason)
    ours = extra(partial(getattr(segkernels, op), backend="native"), inputs, train)
    batch, channels, height, width = case.shape
    residuals = 4 * batch * height * width * case.nodes * channels  # bytes
    assert ours <= extra(baselines.EXPANDED[op], inputs, train) / 4
    assert ours <= residuals / 50
