"""make gpu: build, test and measure on a machine with a GPU, in at most nine minutes.

No network and no virtual environment are needed: what is measured is the torch of the Python that
runs this file. Tests come before timings and what matters most comes first; at the end of the time
there is a report of what there is: <out>/<gpu>/<date>.json and .md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import __main__ as benchmarks

ROOT = Path(__file__).resolve().parent.parent
SANITIZED = "test_every_element_is_written and odd_channels"  # a short list of tiny cases
REPORT_SECONDS = 15.0  # kept back for a row that is under way and for writing


@dataclass(frozen=True)
class Step:
    """A command and the share of the time that is left which it may take."""

    name: str
    command: tuple[str, ...]
    share: float
    needed: bool = False  # without it the rest is pointless


def steps() -> list[Step]:
    """Build, contract, and the sanitizers where they are installed."""
    python = (sys.executable, "-m")
    plan = [Step("build", (*python, "segkernels", "build"), 0.4, needed=True)]
    if importlib.util.find_spec("pytest") is None:
        plan.append(Step("self-test (no pytest here)", (*python, "segkernels", "doctor"), 0.2))
        return plan
    options = ("-q", "-p", "no:cacheprovider", "-m", "not compile", "--device", "cuda")
    contract = (*python, "pytest", "tests/test_contract.py", *options)
    plan.append(Step("contract", contract, 0.5))
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        plan += [
            Step(tool, (sanitizer, "--tool", tool, *contract, "-k", SANITIZED), 0.15)
            for tool in ("memcheck", "racecheck")
        ]
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    """0: built, tested and measured; 1: something failed (the report says what)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    end = time.monotonic() + 60 * options.minutes - REPORT_SECONDS
    checks: dict[str, str] = {}
    for step in steps():
        checks[step.name] = outcome = run(step, max(end - time.monotonic(), 0.0) * step.share)
        print(f"== {step.name}: {outcome}", flush=True)
        if step.needed and outcome != "passed":
            return 1
    if not torch.cuda.is_available():
        print("== no CUDA device here: the libraries are built, nothing on a GPU was run")
        return 1
    left = max(end - time.monotonic(), 1.0)
    arguments = ["--device", "cuda", "--limit", f"{left:.0f}", "--out", str(options.out)]
    status = benchmarks.main(arguments, checks)
    failed = [name for name, outcome in checks.items() if outcome != "passed"]
    return int(status != 0 or bool(failed))


def run(step: Step, seconds: float) -> str:
    """Run one step within its time: "passed", "failed (status)" or "stopped after ... s"."""
    print(f"== {step.name}: {' '.join(step.command)}  (at most {seconds:.0f} s)", flush=True)
    start = time.monotonic()
    environment = os.environ | {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count()))}
    if "SEGKERNELS_CUDA_ARCHS" not in environment and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        environment["SEGKERNELS_CUDA_ARCHS"] = f"{major}.{minor}" + "a" * (major == 9)
    process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _stop(process)
        return f"stopped after {time.monotonic() - start:.0f} s"
    except KeyboardInterrupt:
        _stop(process)
        raise
    return "passed" if status == 0 else f"failed (status {status})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt, so that pytest prints what it has; then kill what has not ended."""
    for number in (signal.SIGINT, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(8)
            return
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    sys.exit(main())
