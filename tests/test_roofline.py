"""The prediction: blocks that fit, the bound that holds, every case of every operator."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import roofline
from benchmarks.budget import Budget
from benchmarks.machine_code import Figures
from benchmarks.work import cases, operators
from tests.simt import executor


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 128, 0, 16),  # all 2048 threads
        (33, 128, 0, 12),  # 40 registers after rounding: 51 warps
        (255, 128, 0, 2),
        (32, 32, 0, 32),  # no more blocks than that
        (32, 128, 100 << 10, 2),
        (32, 128, 227 << 10, 1),
        (32, 128, 228 << 10, 0),
    ],
)
def test_blocks_that_an_sm_holds(registers, threads, shared, blocks) -> None:
    assert roofline.resident(roofline.GPUS["sm_90a"], registers, threads, shared) == blocks


@pytest.mark.parametrize(
    ("figures", "cost", "unit", "bound", "seconds"),
    [
        (Figures(32, ffma=9), (1, int(4.32e9)), "fp32", "memory", 1e-3),
        (Figures(32, ffma=9), (int(67e9), 1), "fp32", "fp32", 1e-3),
        (Figures(32, ffma=1, dfma=9), (int(34e9), 1), "fp64", "fp64", 1e-3),
        (Figures(32, ffma=9, matrix=1), (int(0.63 * 989e9), 1), "tensor", "tensor", 1e-3),
        (Figures(32, ffma=9), (1, 1), "fp32", "launches", 0),
    ],
)
def test_the_roofline(figures, cost, unit, bound, seconds) -> None:
    case = SimpleNamespace(name="c", cost=lambda _: {"forward": cost})
    planned = SimpleNamespace(kernel="_Z1fv", grid=1320, threads=256, shared=0)
    what = ("op", case, "float64" if unit == "fp64" else "float32", "nchw", "forward")
    made = roofline.predict("sm_90a", (what, [planned]), {"f": figures})
    assert (made.unit, made.bound) == (unit, bound)
    assert made.seconds == pytest.approx(seconds + roofline.LAUNCH, rel=1e-6)
    assert made.launches[0].occupancy == 1 and made.launches[0].waves == 1320 / (8 * 132)
    assert json.loads(json.dumps(made.json()))["bound"] == bound


@executor.needs_executor
def test_every_case_is_predicted() -> None:
    """Every kernel that the launch code names is in the budget, and a block of it fits an SM."""
    selection = [
        (op, case, dtype, layout)
        for op in operators()
        for case in cases(op)
        for dtype, layout in (("bfloat16", "channels_last"), ("float32", "nchw"))
    ]
    budget = Budget.read().kernels
    for arch in roofline.GPUS:
        plans = roofline.plans(arch, selection, executor.build("watch"))
        assert [what for what, _ in plans] == [
            (*which, mode) for which in selection for mode in ("forward", "backward")
        ]
        for plan in plans:
            made = roofline.predict(arch, plan, budget[arch, "cuda"])
            assert made.launches and made.seconds > 0
            assert made.dtype != "float32" or made.unit == "fp32"
            for launch in made.launches:
                assert launch.blocks >= 1, launch
