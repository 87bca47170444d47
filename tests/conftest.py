"""Options and fixtures that every test may use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkernels.nn import pair


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the contract tests: cpu or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The backend of every call of the separable operator by a layer."""
    seen: list[str | None] = []
    operator = pair.separable_conv2d

    def noted(*args: Any, backend: str | None, **options: Any) -> Any:
        seen.append(backend)
        return operator(*args, backend=backend, **options)

    monkeypatch.setattr(pair, "separable_conv2d", noted)
    return seen
