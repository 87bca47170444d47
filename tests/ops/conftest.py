"""The backends that can run the operator whose laws a file holds (``test_<operator>...py``)."""

from __future__ import annotations

import pytest

from segkernels import fused
from tests.contract import usable


@pytest.fixture(params=fused.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    stem = request.path.stem.removeprefix("test_")
    return usable(request, next(op for op in fused.OPERATORS if stem.startswith(op)), device)
