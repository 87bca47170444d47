"""The same cases under pytest-benchmark: pytest benchmarks --benchmark-only --benchmark-autosave.

Useful: --benchmark-compare --benchmark-compare-fail=median:10%, -k 'c256_65_r12 and float32',
--benchmark-json=FILE. On a GPU the fixture sees launch and wait; the time of the device alone, by
events, is in extra_info.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.accuracy import accuracy
from benchmarks.work import EAGER, LAYOUTS, MODES, OURS, Work, cases, cotangents, operators
from benchmarks.work import usable_backends as usable
from segkernels import timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [pytest.param(op, case, id=f"{op}-{case.name}") for op in operators() for case in cases(op)]


@pytest.mark.parametrize("way", [OURS, EAGER])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), CASES)
def test_operator(
    benchmark: Any, op: str, case: Any, dtype: str, layout: str, mode: str, way: str
) -> None:
    work = Work(op, case, dtype, layout, "", DEVICE)
    arguments = work.arguments()
    work = Work(op, case, dtype, layout, usable(op, arguments)[0], DEVICE)
    benchmark.group = f"{work.names} {mode}"
    with timing.side_stream(DEVICE):
        checked = accuracy(
            {way: work.ways(arguments, True, {})[way]},
            work.truth(arguments),
            work.yardstick(arguments),
            case.reduction,
        )
        assert way != OURS or checked.wrong() is None, checked.wrong()
        ready = work.ways(arguments, mode != "forward", {})[way]
        call = ready.call(mode, () if mode == "forward" else cotangents(ready.results()))
        benchmark.extra_info |= {
            "error": checked.of(mode)[way],
            "peak": timing.memory_of(call, DEVICE).peak,
        }
        if DEVICE == "cuda":
            run = timing.interleave({way: call}, device=DEVICE)
            benchmark.extra_info["device_seconds"] = run[way].median
        benchmark.pedantic(_waited(call), rounds=20, warmup_rounds=2, iterations=1)


def _waited(call: Callable[[], object]) -> Callable[[], object]:
    """The call until its result is there."""
    if DEVICE == "cpu":
        return call

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    return waited
