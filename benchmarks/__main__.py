"""python -m benchmarks: run the benchmarks; compare two of their reports; watch code generation."""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks import codegen, compare, report
from benchmarks.environment import environment
from benchmarks.goals import EVERY, GOALS, Goal, judge
from benchmarks.layers import STEP, SeparableStep
from benchmarks.measure import Row, Settings, empty, measure
from benchmarks.work import (
    BEST_RIVAL,
    COMPILED,
    COMPILED_OTHER,
    DTYPES,
    LAYOUTS,
    MODES,
    Work,
    cases,
    operators,
    usable_backends,
)
from segkernels.progress import Progress

QUICK_SECONDS = 45  # when --quick stops taking up rows
QUICK_CASES = ["c256_65_r1", "c256_65_r12", "c256_65_r12_train", "c2048_33_r12", "c304_129_r1"]
Plan = list[tuple[Work, tuple[str, ...]]]


def main(argv: Sequence[str] | None = None) -> int:
    """0: measured; 1: wrong or failed rows, missed goals, regressions; 2: usage; 130: Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["compare"]:
        parsed = _compare_parser().parse_args(arguments[1:])
        return compare.main(parsed.old, parsed.new, parsed.threshold)
    if arguments[:1] == ["codegen"]:
        return codegen.main(arguments[1:])
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.backends.cudnn.benchmark = True
    plan = _plan(options)
    if not plan:
        print("no row matches; --list shows what there is", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{work.names}: {', '.join(modes)}" for work, modes in plan))
        return 0
    block = environment(options.device, torch.get_num_threads())
    if block["load"] > 1:
        print(
            f"note: the machine is busy (load {block['load']}), times will scatter", file=sys.stderr
        )
    limit = options.limit or (QUICK_SECONDS if options.quick else None)
    rows, finished = _run(plan, _settings(options), limit)
    verdicts = [
        v for v in judge(rows, _goals(options)) if options.goals or v.outcome != "not measured"
    ]
    report.print_report(rows, verdicts)
    stem = datetime.now(timezone.utc).date().isoformat() + ("-goals" if options.goals else "")
    numbers, text = report.write(options.out, stem, rows, verdicts, block)
    print(f"\nwrote {numbers}\n      {text}")
    if not finished:
        return 130
    missed = options.goals and any(v.outcome != "met" for v in verdicts)
    return int(missed or any(not row.correct for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m segkernels bench",
        description="Times every operator against plain PyTorch, with its results checked first.",
        epilog="compare OLD.json NEW.json: which rows became slower. "
        "codegen: what the compilers make of every kernel, and a prediction of its time.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="float32, channels_last, no torch.compile: under a minute",
    )
    parser.add_argument(
        "--goals",
        action="store_true",
        help="exactly the rows that have a goal, with more repetitions",
    )
    for name, choices in (
        ("dtype", list(DTYPES)),
        ("layout", list(LAYOUTS)),
        ("mode", [*MODES, STEP]),
    ):
        parser.add_argument(f"--{name}", action="append", choices=choices, help="repeatable")
    parser.add_argument("--op", action="append", choices=operators(), help="repeatable")
    parser.add_argument(
        "--case", action="append", metavar="PATTERN", help="name or pattern (c256_*), repeatable"
    )
    parser.add_argument(
        "--backend",
        action="append",
        choices=["native", "triton", "reference"],
        help="repeatable; default: what can run",
    )
    parser.add_argument(
        "--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--threads", type=_positive(int), help="PyTorch's threads (default: its own choice)"
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="leave torch.compile out (it takes most of the time)",
    )
    parser.add_argument("--budget", type=_positive(float), help="seconds of timing a row")
    parser.add_argument(
        "--limit",
        type=_positive(float),
        help="stop taking up rows after so many seconds; what matters most comes first",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="writes OUT/<machine>/<date>.json and .md",
    )
    parser.add_argument("--list", action="store_true", help="only show the rows")
    return parser


def _device(text: str) -> str:
    """A device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError):  # no such name, no such number; torch without CUDA
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(
            f"no device {text!r} here, only {', '.join(here)}"
        ) from None
    return text


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"a positive {kind.__name__}, not {text!r}")
        return value

    return read


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="loss that counts (default 0.1)"
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    if options.goals:
        return Settings(options.budget or 4.0, (21, 400), options.threads, (), goals=True)
    if options.quick:
        return Settings(options.budget or 0.25, (5, 100), options.threads, ())
    compiled = () if options.no_compile else (COMPILED,)
    return Settings(
        options.budget or 1.0, threads=options.threads, compiled=compiled, goals=bool(compiled)
    )


def _plan(options: argparse.Namespace) -> Plan:
    """Works with their modes: those with goals of their own first, the operators in turns."""
    dtypes = options.dtype or (["float32"] if options.quick else ["float32", "bfloat16"])
    layouts = options.layout or (["channels_last"] if options.quick else list(LAYOUTS))
    patterns = options.case or (QUICK_CASES if options.quick else ["*"])
    wanted = options.mode or [*MODES, STEP]
    works: list[tuple[int, Work]] = []
    for op in options.op or operators():
        backends = options.backend or _backends(op, options.device)
        chosen = [c for c in cases(op) if any(fnmatchcase(c.name, p) for p in patterns)]
        kinds = itertools.product(chosen, dtypes, layouts, backends)
        for place, (case, dtype, layout, backend) in enumerate(kinds):
            what = (op, case, dtype, layout, backend, options.device)
            works.append((place, Work(*what)))
            if SeparableStep.fits(op, case):
                works.append((place, SeparableStep(*what)))
    works.sort(key=lambda item: (_rank(item[1]), item[0]))
    modes = [tuple(m for m in work.modes if m in wanted) for _, work in works]
    plan = [(work, some) for (_, work), some in zip(works, modes, strict=True)]
    if options.goals:
        plan = [(work, _with_goals(work, some)) for work, some in plan]
    return [(work, some) for work, some in plan if some]


def _covering(work: Work, mode: str) -> list[Goal]:
    return [g for g in GOALS if g.covers(*work.key, mode, work.device)]


def _rank(work: Work) -> int:
    """0 with a goal of its own, 1 with one for many rows, 2 without."""
    covering = [g.case for m in work.modes for g in _covering(work, m)]
    return 2 if not covering else int(all(case == EVERY for case in covering))


def _backends(op: str, device: str) -> list[str]:
    first = Work(op, cases(op)[0], "float32", "channels_last", "reference", device)
    return usable_backends(op, first.arguments())


def _with_goals(work: Work, modes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(m for m in modes if _covering(work, m))


def _goals(options: argparse.Namespace) -> list[Goal]:
    return [g for g in GOALS if g.device == options.device.split(":")[0]]


def _compiled(work: Work, settings: Settings) -> tuple[str, ...]:
    """The compiled ways, with those that the goals of this work are against."""
    rivals = {g.against for m in work.modes for g in _covering(work, m) if settings.goals}
    both = (COMPILED, COMPILED_OTHER) if BEST_RIVAL in rivals else ()
    return tuple(sorted({*settings.compiled, *both, *(rivals & {COMPILED})}))


def _run(plan: Plan, settings: Settings, limit: float | None) -> tuple[list[Row], bool]:
    """Rows, and False after an interrupt. An interrupt and the limit keep what there is."""
    rows: list[Row] = []
    planned = sum(len(modes) for _, modes in plan)
    start = time.monotonic()
    try:
        with Progress("benchmarks", planned) as progress:
            every = (row for work, modes in plan for row in _rows(work, modes, settings))
            for row in every:
                rows.append(row)
                progress.advance(note=f"{row.op} {row.case} {row.dtype} {row.layout}")
                if limit is not None and time.monotonic() - start > limit:
                    break
        if len(rows) < planned:
            print(f"time limit: {len(rows)} of {planned} rows measured", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: the report has what was measured", file=sys.stderr)
        return rows, False
    return rows, True


def _rows(work: Work, modes: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """The rows of one work; one that fails is a row that says so."""
    done = 0
    try:
        compiled = _compiled(work, settings)
        for row in measure(work, modes, replace(settings, compiled=compiled)):
            done += 1
            yield row
    except (RuntimeError, ValueError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        yield from (empty(work, mode, f"{type(error).__name__}: {first}") for mode in modes[done:])


if __name__ == "__main__":
    sys.exit(main())
