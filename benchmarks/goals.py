"""What the kernels are held to, as data, and the verdicts of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.measure import PRODUCTS, Row
from benchmarks.work import BEST_RIVAL, COMPILED, EAGER, EXPANDED, OURS

EVERY = "*"  # any value: the worst of the rows decides


@dataclass(frozen=True)
class Goal:
    """A row (or, with "*", each of several rows) must be `ratio` times as fast as `against`."""

    op: str
    case: str
    dtype: str
    layout: str
    mode: str
    ratio: float
    against: str = EAGER
    device: str = "cpu"

    def covers(self, op: str, case: str, dtype: str, layout: str, mode: str, device: str) -> bool:
        asked = (self.op, self.case, self.dtype, self.layout, self.mode, self.device)
        given = (op, case, dtype, layout, mode, device.split(":")[0])
        return all(a in (EVERY, g) for a, g in zip(asked, given, strict=True))


@dataclass(frozen=True)
class Verdict:
    """The outcome of one goal: "met", "missed", "wrong results" or "not measured"."""

    goal: Goal
    outcome: str
    case: str = ""  # the row that decided
    median: float = 0.0
    low: float = 0.0
    high: float = 0.0
    at_minimum: float = 0.0  # ratio of the fastest calls
    rival: str = ""  # the way that the goal's row was held to

    def json(self) -> dict[str, object]:
        return asdict(self)


def _cpu_goals() -> Iterator[Goal]:
    """Two cores, batch 1. "*" in a layout's line: no case may be slower than eager."""
    last, depthwise, separable = "channels_last", "depthwise_conv2d", "separable_conv2d"
    for case in ("c256_65_r12", "c256_65_r24", "c256_65_r36"):
        yield Goal(depthwise, case, "float32", last, "forward", 7)
        yield Goal(depthwise, case, "float32", last, "backward", 25)
        yield Goal(depthwise, case, "bfloat16", last, "forward", 7)
        yield Goal(depthwise, case, "bfloat16", last, "backward", 40)
        yield Goal(separable, case, "float32", last, "forward", 2.5)
        yield Goal(separable, case, "float32", last, "forward+backward", 3.5)
    yield Goal(separable, "c256_65_r12_train", "float32", last, "forward+backward", 3.5)
    yield Goal(depthwise, "c2048_33_r12", "float32", last, "forward", 6)
    yield Goal(depthwise, "c2048_33_r12", "float32", last, "backward", 25)
    for case in ("c256_65_r1", "c304_129_r1"):
        yield Goal(depthwise, case, "float32", last, "forward", 1)
        yield Goal(depthwise, case, "float32", last, "backward", 2)
    for op in (depthwise, separable):
        for dtype in ("float32", "bfloat16"):
            yield Goal(op, EVERY, dtype, "nchw", "forward", 1)
            yield Goal(op, EVERY, dtype, "nchw", "backward", 1)
    yield from _node_goals()
    yield from _attention_goals()


def _node_goals() -> Iterator[Goal]:
    """Published broadcast form, multiplied out, that compiled; and the products alone."""
    both = "forward+backward"
    for op, case, mode, ratios in (
        ("soft_assign", "c512_65_k32", "forward", (70, 2.5, 2)),
        ("soft_assign", "c512_65_k32", both, (150, 5, 4)),
        ("soft_assign", "c512_65_k8", "forward", (40, 2.5, 2)),
        ("soft_assign", "c512_65_k8", both, (50, 3, 2)),
        ("soft_assign", "c512_65_k2", "forward", (4, 1.5, 1.2)),
        ("soft_assign", "c512_65_k2", both, (6, 2, 2)),
        ("encode", "c512_65_k32", "forward", (70, 2.5, 2)),
        ("encode", "c512_65_k32", both, (150, 5, 4)),
    ):
        for ratio, against in zip(ratios, (EAGER, EXPANDED, COMPILED), strict=True):
            yield Goal(op, case, "float32", "channels_last", mode, ratio, against)
        if mode == both or case == "c512_65_k32":
            yield Goal(op, case, "float32", "channels_last", mode, 1 / 1.5, PRODUCTS)
    yield Goal("soft_assign", "c512_65_k32", "float32", "nchw", "forward", 150)


def _attention_goals() -> Iterator[Goal]:
    """The fastest of eager and compiled, in either layout; and the products alone."""
    op, case, both = "em_attention", "c512_65_k64", "forward+backward"
    for layout in ("channels_last", "nchw"):
        for dtype, mode, ratio in (
            ("float32", "forward", 1.5),
            ("float32", both, 1.7),
            ("bfloat16", "forward", 1.6),
            ("bfloat16", both, 2),
        ):
            yield Goal(op, case, dtype, layout, mode, ratio, BEST_RIVAL)
            if dtype == "float32":
                yield Goal(op, case, dtype, layout, mode, 1 / 1.25, PRODUCTS)


GOALS = tuple(_cpu_goals())


def judge(rows: Sequence[Row], goals: Iterable[Goal] = GOALS) -> list[Verdict]:
    """One verdict a goal; where a goal covers several rows, that of the worst."""
    return [_verdict(goal, rows) for goal in goals]


def _verdict(goal: Goal, rows: Sequence[Row]) -> Verdict:
    covered = [
        r
        for r in rows
        if goal.covers(r.op, r.case, r.dtype, r.layout, r.mode, r.device)
        and (r.way(goal.against) in r.ratios or not r.timed)
    ]
    if not covered:
        return Verdict(goal, "not measured")
    for row in covered:
        if not row.timed:
            return Verdict(goal, "wrong results" if row.errors else "failed", row.case)
    worst = min(covered, key=lambda r: r.ratios[r.way(goal.against)]["median"])
    rival = worst.way(goal.against)
    ratio = worst.ratios[rival]
    fastest = worst.seconds[rival]["minimum"] / worst.seconds[OURS]["minimum"]
    outcome = "met" if ratio["median"] >= goal.ratio else "missed"
    spread = (ratio["median"], ratio["low"], ratio["high"], fastest)
    return Verdict(goal, outcome, worst.case, *spread, rival)
