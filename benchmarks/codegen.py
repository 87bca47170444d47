"""python -m benchmarks codegen: what the compilers make of every kernel, held to a budget.

Compiles every CUDA kernel instantiation for sm_80, sm_90a and sm_100, and every Triton kernel of
the papers' cases for sm_80, sm_90 and gfx942; needs no GPU. Prints what changed against the budget
(budget.py has the law), then a prediction of every case's time (roofline.py): nothing here is
measured.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks import machine_code, roofline
from benchmarks.budget import BUDGET, Budget, Group, Kernels, judge
from benchmarks.work import DTYPES, LAYOUTS, cases, operators
from segkernels.toolchain import BuildError, choose_jobs

ARCHS = {"sm_80": "8.0", "sm_90a": "9.0a", "sm_100": "10.0"}
GROUPS: tuple[Group, ...] = (
    *((target, "cuda") for target in ARCHS),
    *((target, "triton") for target in ("sm_80", "sm_90", "gfx942")),
)
TRITON_DTYPES = ("bfloat16", "float32")


def main(arguments: Sequence[str]) -> int:
    """0: within the budget; 1: something is worse, or cannot be compiled."""
    options = _parser().parse_args(arguments)
    here = compilers()
    try:
        if options.update:
            return _update(here)
        now = _compile([g for g in GROUPS if not options.arch or g[0] in options.arch], here)
    except (BuildError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    budget = Budget.read()
    worse = sum([_compare(group, budget, kernels, here) for group, kernels in now.items()])
    print(f"{sum(map(len, now.values()))} kernels, {worse} worse than the budget\n")
    predictions = _predict(options, {**budget.kernels, **now})
    roofline.report(predictions)
    if options.json:
        roofline.write(options.json, predictions, here)
    return int(worse > 0)


def compilers() -> dict[str, str]:
    """Those that are here, by kind, with their versions."""
    found = {}
    with contextlib.suppress(BuildError):
        found["cuda"] = machine_code.nvcc_version()
    if machine_code.triton_compiles():
        found["triton"] = importlib.metadata.version("triton")
    return found


def compiled(group: Group) -> Kernels:
    """Every CUDA kernel, or every Triton kernel of the papers' cases, compiled for a target."""
    target, kind = group
    if kind == "cuda":
        return machine_code.cuda_kernels(ARCHS[target])
    from benchmarks import ahead_of_time

    kernels = ahead_of_time.named(ahead_of_time.calls(TRITON_DTYPES), target)
    return ahead_of_time.compiled(kernels, target, choose_jobs(os.environ)[0])


def _parser() -> argparse.ArgumentParser:
    targets = sorted({target for target, _ in GROUPS})
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks codegen",
        description="What the compilers make of every kernel, held to a committed budget; then a "
        "prediction of every case's time.",
    )
    parser.add_argument(
        "--update", action="store_true", help=f"write {BUDGET.name} anew, and predict nothing"
    )
    parser.add_argument(
        "--arch",
        action="append",
        choices=targets,
        help="compile and predict for it, repeatable; default: all, a prediction for sm_90a",
    )
    parser.add_argument(
        "--case", action="append", metavar="PATTERN", help="to predict, repeatable; default: all"
    )
    for name, choices, default in (
        ("dtype", DTYPES, "float32 and bfloat16"),
        ("layout", LAYOUTS, "channels_last"),
    ):
        text = f"to predict, repeatable; default: {default}"
        parser.add_argument(f"--{name}", action="append", choices=list(choices), help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the prediction there")
    return parser


def _compile(groups: Sequence[Group], here: Mapping[str, str]) -> dict[Group, Kernels]:
    made: dict[Group, Kernels] = {}
    for group in groups:
        if group[1] in here:
            print("compiling", *group, file=sys.stderr, flush=True)
            made[group] = compiled(group)
        else:
            print("note: no compiler here for", *group, file=sys.stderr)
    return made


def _update(here: Mapping[str, str]) -> int:
    now = _compile(GROUPS, here)
    if len(now) < len(GROUPS):
        raise BuildError("the budget is written whole: nvcc and Triton are needed")
    Budget(here, now).write()
    print(f"wrote {BUDGET}: {sum(map(len, now.values()))} kernels")
    return 0


def _compare(group: Group, budget: Budget, now: Kernels, here: Mapping[str, str]) -> int:
    """Print what changed; how many kernels are worse."""
    target, kind = group
    version = budget.compilers.get(kind)
    if here[kind] != version:
        print(
            f"{kind} {here[kind]} is here, the budget of {target} is of {version}: only spills, "
            "stack, lost matrix instructions and the limit of shared memory count"
        )
    verdicts = judge(target, budget.kernels.get(group, {}), now, here[kind] == version)
    for verdict in verdicts:
        for word, what in (("WORSE", verdict.worse), ("better", verdict.better)):
            if what:
                print(f"{word}  {target} {kind} {verdict.name}: {', '.join(what)}")
    return sum(bool(verdict.worse) for verdict in verdicts)


def _predict(
    options: argparse.Namespace, kernels: Mapping[Group, Kernels]
) -> list[roofline.Prediction]:
    """For the GPUs asked for, from the figures just made, else the budget's."""

    selection = [
        (op, case, dtype, layout)
        for op in operators()
        for case in cases(op)
        if any(fnmatchcase(case.name, pattern) for pattern in options.case or "*")
        for dtype in options.dtype or ("float32", "bfloat16")
        for layout in options.layout or ("channels_last",)
    ]
    return [
        roofline.predict(arch, plan, kernels[arch, "cuda"])
        for arch in roofline.GPUS
        if arch in (options.arch or ["sm_90a"])
        for plan in roofline.plans(arch, selection)
    ]
