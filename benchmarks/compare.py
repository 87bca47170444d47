"""Two reports side by side: which rows became slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from benchmarks.measure import Row
from benchmarks.work import EAGER, OURS
from segkernels.console import print_table

HEADER = ("row", "old ms", "new ms", "old/new", "× eager old", "× eager new", "")


@dataclass(frozen=True)
class Change:
    """One row of both reports; ratios above 1 are gains."""

    old: Row
    new: Row

    @property
    def time(self) -> float:
        return self.old.seconds[OURS]["median"] / self.new.seconds[OURS]["median"]

    @property
    def speedup(self) -> float:
        """Change of the ratio against eager, which a slower day of the machine leaves alone."""
        return self.new.ratios[EAGER]["median"] / self.old.ratios[EAGER]["median"]

    def regressed(self, threshold: float) -> bool:
        """Slower by more than the threshold, by the clock and against eager in its own run."""
        return max(self.time, self.speedup) < 1 - threshold


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The rows that both reports have a time for."""
    before = {row.key: row for row in old if row.timed}
    return [Change(before[row.key], row) for row in new if row.timed and row.key in before]


def lost(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Rows that had a time and are there without one: their results became wrong, or they fail."""
    timed = {row.key for row in old if row.timed}
    return [row for row in new if not row.timed and row.key in timed]


def main(old_path: Path, new_path: Path, threshold: float) -> int:
    """Print the comparison; 1: a row regressed or lost its time, 2: nothing can be compared."""
    try:
        (old_environment, old), (new_environment, new) = (
            report.read(old_path),
            report.read(new_path),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"cannot compare: {error}")
        return 2
    machines = [e["machine"] for e in (old_environment, new_environment)]
    if machines[0] != machines[1]:
        print(f"cannot compare: different machines\n  old: {machines[0]}\n  new: {machines[1]}")
        return 2
    pairs, gone = changes(old, new), lost(old, new)
    if not pairs and not gone:
        print("cannot compare: the reports have no row in common")
        return 2
    bad = [change for change in pairs if change.regressed(threshold)]
    lines = [_cells(change, change in bad) for change in pairs]
    lines += [(" ".join(row.key), "", "", "", "", "", f"lost: {row.note}") for row in gone]
    print_table(f"{old_environment['commit']} → {new_environment['commit']}", HEADER, lines)
    print(f"{len(pairs)} rows, {len(bad)} regressed by more than {threshold:.0%}, {len(gone)} lost")
    return 1 if bad or gone else 0


def _cells(change: Change, bad: bool) -> tuple[str, ...]:
    times = [row.seconds[OURS]["median"] * 1e3 for row in (change.old, change.new)]
    ratios = [row.ratios[EAGER]["median"] for row in (change.old, change.new)]
    return (
        " ".join(change.new.key),
        *(f"{t:.3f}" for t in times),
        f"{change.time:.2f}",
        *(f"{r:.2f}" for r in ratios),
        "REGRESSED" if bad else "",
    )
