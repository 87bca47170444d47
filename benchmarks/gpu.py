"""`make gpu`: build, test and measure on a machine with a GPU, in one command and a fixed time.

Uses the Python that runs it and fetches nothing. What matters most comes first, so that a run that
is stopped (by its budget or by Ctrl-C) has it: the native build, the contract of every operator on
the GPU, the other GPU tests, compute-sanitizer on a few of them, the benchmarks. Writes
`<out>/<gpu>/<date>.json` and `.md`: the benchmarks' report with the outcome of each stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.environment import environment, machine
from segkernels.native import build_info

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 520.0  # seconds: below nine minutes with the start of Python and the writing
FOR_BENCHMARKS = 150.0  # what the tests leave to the benchmarks
# of the contract, for compute-sanitizer: it slows a kernel 50-fold
SHORT_LIST = "no_worse and float32 and odd_channels"


@dataclass(frozen=True)
class Stage:
    """One command, the most seconds it may take, and the file in which pytest tells of it."""

    name: str
    command: tuple[str, ...]
    seconds: float
    junit: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: passed, failed, out of time, interrupted or left out."""

    name: str
    status: str
    seconds: float
    detail: str = ""


def main(arguments: list[str] | None = None) -> int:
    """0: everything passed; 1: something failed or was left out; 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description="Build, test and measure on a machine with a GPU."
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    since, deadline = time.time(), time.monotonic() + options.budget
    outcomes = [run(build_stage(), deadline)]
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device, and all that follows needs one", file=sys.stderr)
        return 1
    with TemporaryDirectory() as folder:
        for stage in stages(Path(folder), options.out, deadline):
            if outcomes[-1].status == "interrupted":
                break
            outcomes.append(run(stage, deadline))
    numbers, text = write(options.out, outcomes, since)
    print(
        "\n"
        + "\n".join(f"{o.name:<22}{o.status:<14}{o.seconds:5.0f} s  {o.detail}" for o in outcomes)
    )
    print(f"\nwrote {numbers}\n      {text}")
    if outcomes[-1].status == "interrupted":
        return 130
    return int(any(outcome.status not in ("passed", "left out") for outcome in outcomes))


def build_stage() -> Stage:
    return Stage("build", (sys.executable, "-m", "segkernels", "build", "cuda"), 240)


def stages(folder: Path, out: Path, deadline: float) -> Iterator[Stage]:
    """After the build; each is made when its turn comes, for the time that is then left."""

    def tests(name: str, *arguments: str, share: float = 1, tool: tuple[str, ...] = ()) -> Stage:
        junit = folder / f"{name.replace(' ', '-')}.xml"
        pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}")
        command = (*tool, sys.executable, *pytest, *arguments)
        left = deadline - time.monotonic() - FOR_BENCHMARKS
        return Stage(name, command, share * left, junit)

    contract = "tests/test_contract.py"
    yield tests("contract", contract, "--device=cuda")
    yield tests("gpu tests", "-m", "gpu", "--device=cuda", f"--ignore={contract}")
    if sanitizer := shutil.which("compute-sanitizer"):
        for check in ("memcheck", "racecheck"):
            tool = (sanitizer, f"--tool={check}", "--error-exitcode=9")
            pick = (contract, "--device=cuda", "-k", SHORT_LIST)
            yield tests(check, *pick, share=0.4, tool=tool)
    benchmarks = ("-m", "benchmarks", "--device=cuda", f"--out={out}")
    left = deadline - time.monotonic() - 15
    yield Stage("benchmarks", (sys.executable, *benchmarks, f"--limit={left - 20:.0f}"), left)


def run(stage: Stage, deadline: float) -> Outcome:
    """Run a stage in its time, its output passing through; an interrupted one may still finish."""
    seconds = min(stage.seconds, deadline - time.monotonic())
    print(f"\n== {stage.name} (at most {max(0, seconds):.0f} s)", flush=True)
    if seconds < 5:
        return Outcome(stage.name, "left out", 0.0, "no time left")
    started = time.monotonic()
    process = subprocess.Popen(
        stage.command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(seconds)
        status = "passed" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
    except KeyboardInterrupt:
        status = "interrupted"
    if process.returncode is None:
        stop(process)
    return Outcome(stage.name, status, time.monotonic() - started, detail(stage))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C to the stage and all it started; what has not ended ten seconds later is killed."""
    for signal_, seconds in ((signal.SIGINT, 10.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return


def detail(stage: Stage) -> str:
    """The numbers of tests, and the first failures by name."""
    if stage.junit is None or not stage.junit.exists():
        return ""
    cases = list(ElementTree.parse(stage.junit).iter("testcase"))
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = [
        case.get("name", "")
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    names = f": {', '.join(failed[:5])}" if failed else ""
    passed = len(cases) - skipped - len(failed)
    return f"{passed} passed, {skipped} skipped, {len(failed)} failed{names}"


def write(out: Path, outcomes: list[Outcome], since: float) -> tuple[Path, Path]:
    """Add the stages to the report that the benchmarks wrote after `since`, or to an empty one."""
    stem = datetime.now(timezone.utc).date().isoformat()
    folder = out / machine("cuda")
    folder.mkdir(parents=True, exist_ok=True)
    numbers, text = folder / f"{stem}.json", folder / f"{stem}.md"
    content, before = {}, f"# {machine('cuda')}, {stem}\n"
    if numbers.exists() and numbers.stat().st_mtime >= since:
        content, before = json.loads(numbers.read_text()), text.read_text(encoding="utf-8")
    content.setdefault("environment", environment("cuda", torch.get_num_threads()))
    content |= {"stages": [asdict(outcome) for outcome in outcomes], "build": build_info()}
    numbers.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = "".join(f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.detail} |\n" for o in outcomes)
    table = f"\n## Stages of `make gpu`\n\n| stage | outcome | s | |\n|---|---|---|---|\n{rows}"
    text.write_text(before + table, encoding="utf-8")
    return numbers, text


if __name__ == "__main__":
    sys.exit(main())
