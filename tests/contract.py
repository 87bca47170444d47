"""Calls of any operator by its cases, with gradients, and the law of tolerance that they obey."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.utils._python_dispatch
from torch import Tensor

import segkernels
from benchmarks.work import gradients
from segkernels import fused, tolerance

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def cases(name: str) -> tuple[Any, ...]:
    module = importlib.import_module(f"{fused.OPERATORS[name].package}.cases")
    return tuple(module.AWKWARD)


def case_of(op: str, name: str) -> Any:
    return next(case for case in cases(op) if case.name == name)


def usable(request: pytest.FixtureRequest, op: str, device: str) -> str:
    """The backend that a fixture is parametrised by, where it can run ``op``; else the test is
    skipped, or, on the executor, fails: there it must."""
    name: str = request.param
    simt = request.config.getoption("--device") == "simt"
    if simt and name != "native":
        pytest.skip(f"{name}: not what --device=simt is for")
    reason = segkernels.explain(op, **cases(op)[0].inputs(device=device))[name]
    if reason is not None:
        lacking = pytest.fail if simt else pytest.skip
        lacking(f"{name}: {reason}")
    return name


def call(op: str, inputs: dict[str, Any], backend: str) -> tuple[Tensor, ...]:
    """The results of the public function, under the name of its operator."""
    out = getattr(segkernels, op)(**inputs, backend=backend)
    return out if isinstance(out, tuple) else (out,)


def map_of(inputs: dict[str, Any]) -> str:
    """The argument that is the map: the first of four dimensions."""
    return next(n for n, v in inputs.items() if isinstance(v, Tensor) and v.dim() == 4)


def typical(op: str) -> Any:
    """Several rates, where an operator has rates."""
    return next((c for c in cases(op) if c.name == "several_rates"), case_of(op, "odd_channels"))


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {n: v for n, v in inputs.items() if isinstance(v, Tensor)}


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()}


def with_gradients(
    op: str, inputs: dict[str, Any], backend: str, cotangents: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The results "y0", "y1", ... and the gradient of every tensor argument."""
    inputs = {
        n: v.detach().requires_grad_() if isinstance(v, Tensor) else v for n, v in inputs.items()
    }
    y = call(op, inputs, backend)
    named = leaves(inputs)
    dy = [d.to(t.dtype) for d, t in zip(cotangents, y, strict=True)]
    results = {f"y{i}": t.detach() for i, t in enumerate(y)}
    made = gradients(y, list(named.values()), dy)
    return results | dict(zip((f"d{n}" for n in named), made, strict=True))


def cotangents_like(op: str, inputs: dict[str, Any], seed: int = 1) -> tuple[Tensor, ...]:
    """Random cotangents in the layouts of the results, exactly representable in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(y.shape, generator=generator)
        .to(torch.bfloat16)
        .to(torch.float16)
        .to(y.device, y.dtype)
        .contiguous(memory_format=fused.memory_format(y))
        for y in call(op, inputs, "reference")
    )


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The operators that run meanwhile: .calls = [(operator, its arguments), ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def assert_lawful(
    got: dict[str, Tensor],
    yardstick: dict[str, Tensor],
    truth: dict[str, Tensor],
    case: Any,
    dtype: torch.dtype,
) -> None:
    largest = max(
        (
            t.abs().max().item()
            for n, t in truth.items()
            if n.rstrip("0123456789") != "y" and t.numel()
        ),
        default=0,
    )
    for name, true in truth.items():
        assert got[name].dtype == yardstick[name].dtype, name
        assert got[name].shape == yardstick[name].shape, name
        if true.numel():
            err, allowed = tolerance.verdict(
                got[name], yardstick[name], true, dtype, case.reduction, largest
            )
            assert err <= allowed, f"{name}: error {err:.3g} > {allowed:.3g} allowed"


def check(op: str, case: Any, inputs: dict[str, Any], backend: str, dy: tuple[Tensor, ...]) -> None:
    """Results and gradients of a call obey the law of tolerance."""
    truth = with_gradients(op, widened(inputs), "reference", dy)
    yardstick = with_gradients(op, inputs, "reference", dy)
    got = with_gradients(op, inputs, backend, dy)
    assert_lawful(got, yardstick, truth, case, inputs[map_of(inputs)].dtype)
