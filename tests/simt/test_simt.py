"""The contract of every operator holds for its CUDA kernels, on the host executor, under each of
the executor's checks: one process per check and operator, as many at a time as there are cores.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from segkernels import fused
from tests.simt import executor

CHECKS = [flavour for flavour in executor.FLAVOURS if flavour != "plain"]
Runs = dict[tuple[str, str], "Future[subprocess.CompletedProcess[str]]"]

pytestmark = executor.needs_executor


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            (check, op): pool.submit(
                executor.contract, check, executor.build(check), f"native and {op}"
            )
            for check in CHECKS
            for op in fused.OPERATORS
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("op", fused.OPERATORS)
@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(check: str, op: str, runs: Runs) -> None:
    done = runs[check, op].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
