"""The contract of every operator holds for its CUDA kernels, on the host executor, under each of
the executor's checks: one process per check and operator, as many at a time as there are cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from segkernels import fused
from tests.simt import executor

# build of the executor -> the contract's tests on it; the watch sees every path once
CHECKS = {
    "address": "",
    "watch": " and (no_worse or strided or many or partial)",
}
LONGEST_FIRST = [(check, op) for check in CHECKS for op in reversed(tuple(fused.OPERATORS))]
Runs = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]

pytestmark = executor.needs_executor


def contract(check: str, op: str) -> subprocess.CompletedProcess[str]:
    """Its tests in a process of their own; what PyTorch makes of the operators is left out."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not compile"]
    options += ["-k", f"native and {op}{CHECKS[check]}"]
    options += ["--capture=sys"]  # what a sanitizer says while it ends the process is to be read
    options += ["--device=simt", f"--simt-library={executor.build(check)}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/test_contract.py"],
        cwd=executor.ROOT,
        env=executor.environment(check),
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for check in CHECKS:
            executor.build(check)
        yield {key: pool.submit(contract, *key) for key in LONGEST_FIRST}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("op", fused.OPERATORS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(check: str, op: str, runs: Runs) -> None:
    done = runs[check, op].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-8000:]
