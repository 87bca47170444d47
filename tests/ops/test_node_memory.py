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
    """Beyond what comes out: results, and in training gradients; what goes in is there before."""
    leaves = [t.requires_grad_(train) for t in inputs.values() if isinstance(t, torch.Tensor)]
    dy = [torch.ones_like(t) for t in as_tuple(function(**inputs))]

    def call() -> Any:
        y = as_tuple(function(**inputs))
        return (*y, *torch.autograd.grad(y, leaves, dy)) if train else y

    return timing.memory_of(call).extra


def native(op: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    if reason := segkernels.explain(op, **inputs)["native"]:
        pytest.skip(reason)
    return partial(getattr(segkernels, op), backend="native")


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("op", baselines.EXPANDED)
def test_a_fraction_of_the_expanded_form(op: str, train: bool) -> None:
    """At most a quarter of it, and a fiftieth of one tensor of pixels, nodes and channels, of which
    the published form makes several."""
    case = next(c for c in cases(op) if c.nodes == 32)
    inputs = case.inputs()
    ours = extra(native(op, inputs), inputs, train)
    batch, channels, height, width = case.shape
    residuals = 4 * batch * height * width * case.nodes * channels  # bytes
    assert ours <= extra(baselines.EXPANDED[op], inputs, train) / 4
    assert ours <= residuals / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_em_attention(dtype: torch.dtype) -> None:
    """Through all iterations: at most a third of what the published loop takes."""
    case = next(c for c in cases("em_attention") if c.name == "c512_65_k64")
    inputs = case.inputs(dtype)
    ours = extra(native("em_attention", inputs), inputs, train=True)
    assert ours <= extra(baselines.em_attention, inputs, train=True) / 3
