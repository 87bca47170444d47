"""Options and fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from segkernels.nn import emau, pair
from tests.simt import executor


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        choices=("cpu", "cuda", "simt"),
        help="device of the contract tests; simt: the CUDA kernels on the CPU (tests/simt)",
    )
    parser.addoption(
        "--simt-library",
        type=Path,
        help="for --device=simt: this build of the host executor, not one of the present sources",
    )


def pytest_configure(config: pytest.Config) -> None:
    reason = executor.why_not()
    if reason and config.getoption("--device") == "simt":
        raise pytest.UsageError(f"--device=simt: {reason}")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "simt":
        executor.replace_native(
            request.config.getoption("--simt-library") or executor.build("watch")
        )
        return "cpu"
    return name


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest) -> None:
    """Two; one around the executor, which has one itself and runs beside others of its kind."""
    torch.set_num_threads(1 if request.config.getoption("--device") == "simt" else 2)


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


@pytest.fixture
def folded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a convolution was folded, of every call of em_attention by a layer."""
    seen: list[bool] = []
    operator = emau.em_attention

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(options.get("weight") is not None)
        return operator(*args, **options)

    monkeypatch.setattr(emau, "em_attention", noted)
    return seen
