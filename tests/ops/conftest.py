"""The backends that can run the operator whose laws a file holds (``test_<operator>.py``)."""

from __future__ import annotations

import importlib

import pytest

import segkernels
from segkernels import fused


@pytest.fixture(params=fused.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    name: str = request.param
    if name != "native" and request.config.getoption("--device") == "simt":
        pytest.skip(f"{name}: not what --device=simt is for")
    op = request.path.stem.removeprefix("test_")
    case = importlib.import_module(f"{fused.OPERATORS[op].package}.cases").AWKWARD[0]
    reason = segkernels.explain(op, **case.inputs(device=device))[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name
