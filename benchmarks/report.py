"""The report: one table of rows, on a screen, in Markdown, and as numbers in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.goals import EVERY, Verdict
from benchmarks.measure import PRODUCTS, Row
from benchmarks.work import BEST_EAGER, BEST_RIVAL, COMPILED, EAGER, OURS
from segkernels.console import print_table

SCHEMA = 1
HEADER = (
    "case", "dtype", "layout", "mode", "backend", "time ms", "× eager", "× best eager",
    "× compile", "× best rival", "GFLOP/s", "GB/s", "% copy", "% products", "extra MB ours/eager",
    "saved MB ours/eager", "error ours/eager",
)  # fmt: skip
GOAL_HEADER = ("goal", "mode", "needs", "has", "range", "at minimum", "verdict")
NOTES = (
    "time: median, with the range of the middle 60 % of rounds; ×: how many times longer the",
    "other takes, median over pairs of one round; best eager: the fastest eager form in either",
    "memory format, scales folded where that is possible; best rival: the fastest of these and",
    "of the compiled form in both formats; % copy: of the speed at which a copy moves, in the",
    "same run, the least bytes that this work must move; % products: of the speed of the matrix",
    "products that the work cannot do without, alone; extra: peak memory beyond inputs and",
    "results; saved: kept for the backward, parameters excluded; error: largest error against",
    "float64, relative to the largest value. No time stands beside a wrong result.",
)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    name = (row.case, row.dtype, row.layout, row.mode, row.backend)
    error = _pair(row.errors, "{:.1e}".format)
    if not row.timed:
        return (*name, row.note or "not measured", *("",) * 10, error)
    seconds = row.seconds[OURS]
    low, high = seconds["low"] * 1e3, seconds["high"] * 1e3
    extra = {n: m["peak"] - m["result"] for n, m in row.memory.items()}
    return (
        *name,
        f"{seconds['median'] * 1e3:.3f} ({low:.3f}–{high:.3f})",
        _times(row.ratio(EAGER)),
        _times(row.ratio(BEST_EAGER)),
        _times(row.ratio(COMPILED)),
        _times(row.ratio(BEST_RIVAL)) + (f" {row.best_rival}" if row.best_rival else ""),
        f"{row.speed / 1e9:.1f}",
        f"{row.bandwidth / 1e9:.1f}",
        f"{row.copy_share * 100:.0f}",
        f"{row.ratios[PRODUCTS]['median'] * 100:.0f}" if PRODUCTS in row.ratios else "–",
        _pair(extra, _megabytes),
        _pair(row.saved, _megabytes),
        error,
    )


def goal_name(verdict: Verdict) -> str:
    goal = verdict.goal
    case = goal.case if goal.case != EVERY else f"every case (worst: {verdict.case or '–'})"
    return f"{goal.op} {case} {goal.dtype} {goal.layout}"


def goal_cells(verdict: Verdict) -> tuple[str, ...]:
    goal = verdict.goal
    measured = verdict.median > 0
    return (
        goal_name(verdict),
        goal.mode,
        f"≥ {goal.ratio:g}× {goal.against}{_which(verdict)}",
        f"{verdict.median:.2f}×" if measured else "",
        f"{verdict.low:.2f}–{verdict.high:.2f}" if measured else "",
        f"{verdict.at_minimum:.2f}×" if measured else "",
        verdict.outcome,
    )


def goals_in_short(verdicts: Iterable[Verdict]) -> list[tuple[str, ...]]:
    """A table of the measured goals: a line a case and mode, a column a rival, "has ≥ needs"."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for verdict in verdicts:
        if verdict.median > 0:
            met = verdict.outcome == "met"
            has = math.floor(verdict.median * 100) / 100  # rounded down: 1.999 is less than 2
            cell = f"{has:.2f} {'≥' if met else '<'} {verdict.goal.ratio:.3g}{_which(verdict)}"
            line = lines.setdefault((goal_name(verdict), verdict.goal.mode), {})
            line[verdict.goal.against] = cell if met else f"**{cell}**"
    rivals = list(dict.fromkeys(rival for line in lines.values() for rival in line))
    table = [(*name, *(line.get(rival, "") for rival in rivals)) for name, line in lines.items()]
    return [("case", "mode", *(f"× {rival}" for rival in rivals)), *table]


def print_report(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Tables on standard output: speed, then memory and accuracy, which would not fit beside it."""
    names = HEADER[:5]
    for op, group in _by_operator(rows):
        table = [cells(row) for row in group]
        print_table(op, HEADER[:14], [line[:14] for line in table])
        rest = [line[:5] + line[14:] for line in table]
        print_table(f"{op}: memory and accuracy", names + HEADER[14:], rest)
    if verdicts:
        print_table("goals", GOAL_HEADER, [goal_cells(v) for v in verdicts])


def markdown(rows: Sequence[Row], verdicts: Sequence[Verdict], environment: dict[str, Any]) -> str:
    parts = ["# Benchmark results", ""]
    parts += [f"- {key}: {_plain(value)}" for key, value in environment.items()]
    for op, group in _by_operator(rows):
        parts += ["", f"## {op}", "", *_markdown_table(HEADER, [cells(row) for row in group])]
    if verdicts:
        header, *lines = goals_in_short(verdicts)
        parts += ["", "## Goals in short", "", *_markdown_table(header, lines)]
        parts += ["", "## Goals", ""]
        parts += _markdown_table(GOAL_HEADER, [goal_cells(v) for v in verdicts])
    return "\n".join([*parts, "", *NOTES, ""])


def write(
    folder: Path,
    stem: str,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    environment: dict[str, Any],
) -> tuple[Path, Path]:
    """Write <folder>/<machine>/<stem>.json and .md; returns their paths."""
    target = folder / str(environment["machine"])
    target.mkdir(parents=True, exist_ok=True)
    content = {
        "schema": SCHEMA,
        "environment": environment,
        "rows": [asdict(row) for row in rows],
        "goals": [verdict.json() for verdict in verdicts],
    }
    numbers, text = target / f"{stem}.json", target / f"{stem}.md"
    numbers.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text.write_text(markdown(rows, verdicts, environment), encoding="utf-8")
    return numbers, text


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Environment and rows of a JSON report; ValueError when it is none of this schema."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a benchmark report of schema {SCHEMA}")
    return content["environment"], [Row(**row) for row in content["rows"]]


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    table = [header, ["---"] * len(header), *lines]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table]


def _by_operator(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.op, []).append(row)
    yield from groups.items()


def _which(verdict: Verdict) -> str:
    """Where a goal is against the best of several ways: which one that was."""
    return "" if verdict.rival in ("", verdict.goal.against) else f" ({verdict.rival})"


def _times(ratio: dict[str, float] | None) -> str:
    return (
        "–" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
    )


def _pair(values: dict[str, Any], text: Any) -> str:
    """ours/eager, empty where neither was measured."""
    known = [text(values[name]) if name in values else "–" for name in (OURS, EAGER)]
    return "/".join(known) if values else ""


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f}"


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
