"""The regimes of em_attention's forward: which one an image and a GPU get, and that it is a matter
of speed alone: all outputs are the same bit for bit.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from segkernels import fused
from segkernels.fused import accumulation_dtype
from tests.contract import LAYOUTS
from tests.simt import executor
from tests.simt.executor import Device

pytestmark = executor.needs_executor

HOPPER, AMPERE = Device(), Device(ptx=80)
SMALL_CACHE = Device(ptx=80, l2=1 << 10)


class Call(NamedTuple):
    """Arguments of the operator."""

    shape: tuple[int, int, int, int]
    bases: int
    dtype: torch.dtype = torch.bfloat16
    layout: str = "nhwc"
    iterations: int = 3
    depth: int = -1
    clamp: bool = False
    temperature: float | None = None

    def arguments(self) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        wide = accumulation_dtype(self.dtype)
        x = torch.randn(self.shape, generator=generator).to(self.dtype)
        mu = torch.randn(self.shape[0], self.bases, self.shape[1], generator=generator, dtype=wide)
        lam = None if self.temperature is None else torch.tensor(self.temperature)
        x = x.to(memory_format=LAYOUTS[self.layout])
        return [x, mu, lam, None, None, self.iterations, self.depth, self.clamp, True]


CALLS = {
    "one tile": Call((2, 16, 7, 9), 8),
    "two tiles": Call((7, 20, 9, 16), 5, layout="nchw", depth=0),
    "eight parts": Call((2, 8, 33, 33), 40, iterations=2, depth=2),
    "nine parts": Call((2, 8, 36, 32), 3, torch.float32, iterations=2, depth=1, clamp=True),
    "float32": Call((3, 17, 15, 17), 9, torch.float32, depth=2, temperature=1.5),
    "float16": Call((2, 24, 15, 17), 64, torch.float16, layout="nchw", clamp=True),
}
# such a device has few teams
FEW = {
    "two tiles": Device(80, multiprocessors=1),
    "eight parts": Device(80, multiprocessors=3),
}


@cache
def library() -> Any:
    made = executor.build("watch")
    executor.replace_native(made)
    torch.set_num_threads(1)
    return made


def run(call: Call, device: Device) -> tuple[Tensor, ...]:
    """y, z, m, h, s, r."""
    with executor.on(device, library()):
        return tuple(fused.OPERATORS["em_attention"](*call.arguments(), backend="native"))


def launches(call: Call, device: Device) -> list[executor.Launch]:
    with executor.on(device, library()), executor.planned(library()) as made:
        fused.OPERATORS["em_attention"](*call.arguments(), backend="native")
    return made


def regime(made: list[executor.Launch]) -> str:
    team = re.search("(Cluster|Grid)Team", made[0].kernel)
    return team[1].lower() if team else "streaming"


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """One in which the executor's library stands in the place of the native one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as made:
        yield made


@pytest.mark.parametrize("name", CALLS)
def test_every_regime_has_the_same_bits(name: str, process: ProcessPoolExecutor) -> None:
    call = CALLS[name]
    devices = {"cluster": HOPPER, "grid": AMPERE, "streaming": SMALL_CACHE}
    if name == "nine parts":  # more than a cluster has blocks
        del devices["cluster"]
    for expected, device in devices.items():
        made = process.submit(launches, call, device).result()
        assert regime(made) == expected
        assert len(made) == (2 * call.iterations + 1 if expected == "streaming" else 1)
    first, *others = [process.submit(run, call, device).result() for device in devices.values()]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", FEW)
def test_the_number_of_teams_is_no_matter(name: str, process: ProcessPoolExecutor) -> None:
    call, few = CALLS[name], FEW[name]
    made, more = (process.submit(launches, call, d).result() for d in (few, AMPERE))
    assert regime(made) == "grid" and made[0].grid < more[0].grid
    results = [process.submit(run, call, d).result() for d in (few, AMPERE)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


B65 = Call((1, 512, 65, 65), 64)
RULE = {
    "33² in a cluster of 8": (Call((3, 512, 33, 33), 64), HOPPER, "cluster", (24, 8)),
    "33² in float": (Call((1, 512, 33, 33), 32, torch.float32), HOPPER, "grid", (8, 1)),
    "33² without clusters": (Call((3, 512, 33, 33), 64), AMPERE, "grid", (24, 1)),
    "less shared memory": (
        Call((1, 512, 33, 33), 64),
        Device(shared=163 << 10),
        "grid",
        (8, 1),
    ),
    "65²": (B65, HOPPER, "grid", (17, 1)),
    "65², as many as there is cache for": (
        B65._replace(shape=(9, 512, 65, 65)),
        HOPPER,
        "grid",
        (8 * 17, 1),
    ),
    "65², hardly any in the cache": (B65, Device(l2=4 << 20), "streaming", None),
    "an image as large as the cache, alone": (
        Call((1, 512, 128, 256), 64),
        HOPPER,
        "grid",
        (32, 1),
    ),
    "and with others": (Call((4, 512, 128, 256), 64), HOPPER, "streaming", None),
    "fewer blocks than parts": (B65, Device(multiprocessors=2), "streaming", None),
    "too many bases": (Call((1, 16, 9, 9), 65), HOPPER, "streaming", None),
    "too many bases in float": (Call((1, 16, 9, 9), 33, torch.float32), HOPPER, "streaming", None),
    "float64": (Call((1, 16, 9, 9), 4, torch.float64), HOPPER, "streaming", None),
    "no iteration": (Call((1, 16, 9, 9), 4, iterations=0), HOPPER, "streaming", None),
}


@pytest.mark.parametrize("name", RULE)
def test_the_rule(name: str, process: ProcessPoolExecutor) -> None:
    call, device, expected, grid = RULE[name]
    made = process.submit(launches, call, device).result()
    assert regime(made) == expected
    if grid:
        assert [(launch.grid, launch.cluster) for launch in made] == [grid]
