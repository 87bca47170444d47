"""The backends that can run the operator whose laws a file holds (``test_<operator>.py``)."""

from __future__ import annotations

import pytest

from segkernels import fused
from tests.contract import usable


@pytest.fixture(params=fused.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    return usable(request, request.path.stem.removeprefix("test_"), device)
