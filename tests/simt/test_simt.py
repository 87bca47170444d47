"""The contract of every operator holds for its CUDA kernels, on the host executor, under each of
the executor's checks: one process per check and operator, as many at a time as there are cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from segkernels import fused
from tests.simt import executor

CONTRACT = executor.ROOT / "tests" / "test_contract.py"
CHECKS = [flavour for flavour in executor.FLAVOURS if flavour != "plain"]


def contract(flavour: str, library: Path, op: str) -> subprocess.CompletedProcess[str]:
    """Its tests in a process of their own; what PyTorch makes of the operators is left out."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not compile", "-k", f"native and {op}"]
    options.append("--capture=sys")  # what a sanitizer says while it ends the process is to be read
    command = [sys.executable, "-m", "pytest", *options, "--device=simt"]
    return subprocess.run(
        [*command, f"--simt-library={library}", str(CONTRACT)],
        cwd=executor.ROOT,
        env=executor.environment(flavour),
        capture_output=True,
        text=True,
    )


Runs = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (flavour, op): pool.submit(contract, flavour, executor.build(flavour), op)
            for flavour in CHECKS
            for op in fused.OPERATORS
        }
        pool.shutdown(cancel_futures=True)


@executor.needs_executor
@pytest.mark.parametrize("op", fused.OPERATORS)
@pytest.mark.parametrize("flavour", CHECKS)
def test_the_contract(flavour: str, op: str, runs: Runs) -> None:
    done = runs[flavour, op].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
