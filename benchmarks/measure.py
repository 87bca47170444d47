"""One row: results checked against float64 first, then all ways timed in one interleaved run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import work as ways_of
from benchmarks.accuracy import accuracy
from benchmarks.work import (
    BEST_EAGER,
    BEST_RIVAL,
    COMPILED,
    COMPILED_OTHER,
    EAGER,
    EAGERS,
    EXPANDED,
    OURS,
    Arguments,
    Work,
)
from segkernels import timing
from segkernels.timing import Call, Run

COPY = "copy"
PRODUCTS = "products"
L2_BYTES = 180e6  # inputs beyond this many bytes between two uses leave no GPU's cache warm
MAX_SETS = 64

Compiled = Mapping[str, Callable[..., Any]]  # the compiled baseline by the names of its ways


@dataclass(frozen=True)
class Settings:
    """How long and with what a row is measured."""

    budget: float = 1.0
    rounds: tuple[int, int] = (7, 400)
    threads: int | None = None
    compiled: tuple[str, ...] = (COMPILED,)  # the compiled ways
    goals: bool = False  # and those that a goal is against


@dataclass
class Row:
    """One line of the report; seconds, ratios (way over ours), bytes and errors by way."""

    op: str
    case: str
    dtype: str
    layout: str
    mode: str
    backend: str
    device: str
    correct: bool
    note: str = ""
    clock: str = ""
    rounds: int = 0
    best_eager: str = ""
    best_rival: str = ""
    bytes: int = 0
    flops: int = 0
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    warm_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    saved: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    error_used: float = 0.0  # largest share of an allowed error; above 1 is wrong

    @property
    def key(self) -> tuple[str, ...]:
        return (self.op, self.case, self.dtype, self.layout, self.mode, self.backend, self.device)

    @property
    def timed(self) -> bool:
        return OURS in self.seconds

    @property
    def speed(self) -> float:
        """Operations per second."""
        return self.flops / self.seconds[OURS]["median"]

    @property
    def bandwidth(self) -> float:
        """Bytes per second that the least traffic of the work amounts to in our time."""
        return self.bytes / self.seconds[OURS]["median"]

    @property
    def copy_share(self) -> float:
        """Our bandwidth over that of a copy of the same bytes in the same run."""
        return self.ratios[COPY]["median"]

    def way(self, name: str) -> str:
        """The way that is meant: "best eager" and "best rival" are another in each row."""
        return {BEST_EAGER: self.best_eager, BEST_RIVAL: self.best_rival}.get(name, name)

    def ratio(self, name: str) -> dict[str, float] | None:
        return self.ratios.get(self.way(name))


def measure(work: Work, modes: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """The rows of one work, one a mode; without times where its results are wrong."""
    with timing.side_stream(work.device):
        arguments = work.arguments()
        compiled, note = _compiled(work, arguments, settings.compiled)
        ways = work.ways(arguments, True, compiled)
        checked = accuracy(
            ways, work.truth(arguments), work.yardstick(arguments), work.case.reduction
        )
        del ways
        wrong = checked.wrong()
        for mode in modes:
            row = empty(work, mode)
            row.errors, row.error_used = checked.of(mode), checked.used
            row.correct, row.note = wrong is None, wrong or note
            if row.correct:
                _fill(row, work, arguments, compiled, settings)
            yield row


def empty(work: Work, mode: str, note: str = "") -> Row:
    """A row without numbers: its note says why, and it stays in the table."""
    return Row(*work.key, mode, work.backend, work.device, correct=False, note=note)


def _compiled(work: Work, arguments: Arguments, names: tuple[str, ...]) -> tuple[Compiled, str]:
    """The compiled baseline after its first run in each way; none, and why, where that failed."""
    if not names:
        return {}, ""
    compiled = dict.fromkeys(names, work.compiled())
    try:
        ways = work.ways(arguments, True, compiled)
        for way in (ways[name] for name in names):
            way.call("forward+backward", ways_of.cotangents(way.results()))()
    except Exception as error:  # whatever a compiler raises: our row must not depend on it
        return {}, f"torch.compile failed: {type(error).__name__}"
    return compiled, ""


def _fill(
    row: Row, work: Work, arguments: Arguments, compiled: Compiled, settings: Settings
) -> None:
    grad = row.mode != "forward"
    row.flops, row.bytes = work.cost(row.mode)
    sets = _set_count(row.bytes) if row.device.startswith("cuda") else 1
    calls: dict[str, list[Call]] = {}
    for number, inputs in enumerate(ways_of.input_sets(arguments, sets)):
        ways = work.ways(inputs, grad, compiled)
        dy = ways_of.cotangents(ways[OURS].results()) if grad else ()
        for name, way in ways.items():
            calls.setdefault(name, []).append(way.call(row.mode, dy))
        if products := work.products(row.mode, inputs):
            calls.setdefault(PRODUCTS, []).append(products)
        calls.setdefault(COPY, []).append(timing.copy_of(row.bytes, row.device))
        if number == 0:
            row.memory = {
                name: asdict(timing.memory_of(call[0], row.device))
                for name, call in calls.items()
                if name in (OURS, EAGER, EXPANDED)
            }
            if grad:
                row.saved = {
                    name: timing.saved_bytes(ways[name].forward, ways[name].parameters)
                    for name in (OURS, EAGER, EXPANDED)
                    if name in ways
                }
    options: dict[str, Any] = {
        "device": row.device,
        "threads": settings.threads,
        "budget": settings.budget,
        "rounds": settings.rounds,
    }
    run = timing.interleave(calls, **options)
    _enter(row, run)
    if sets > 1:
        warm = timing.interleave({OURS: calls[OURS][0], EAGER: calls[EAGER][0]}, **options)
        row.warm_seconds = {n: asdict(t.spread) for n, t in warm.timings.items()}


def _enter(row: Row, run: Run) -> None:
    row.clock, row.rounds = run.clock, len(run[OURS].samples)
    row.seconds = {name: asdict(t.spread) for name, t in run.timings.items()}
    row.ratios = {name: asdict(run.ratio(name, OURS)) for name in run.timings if name != OURS}
    row.best_eager = _fastest(run, [name for name in EAGERS if name in run.timings])
    if {COMPILED, COMPILED_OTHER} <= run.timings.keys():
        row.best_rival = _fastest(run, [row.best_eager, COMPILED, COMPILED_OTHER])


def _fastest(run: Run, names: list[str]) -> str:
    return min(names, key=lambda name: run[name].median)


def _set_count(nbytes: int) -> int:
    """How many input sets it takes that none is found in the L2 cache when its turn comes again."""
    return min(max(4, math.ceil(L2_BYTES / max(nbytes, 1))), MAX_SETS)
