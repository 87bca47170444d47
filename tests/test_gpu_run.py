"""`make gpu` as far as it goes without a GPU: stages, their time, the report, no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from segkernels.fused import OPERATORS


def stage(code: str, seconds: float = 60, junit: Path | None = None) -> gpu.Stage:
    return gpu.Stage("a stage", (sys.executable, "-S", "-c", code), seconds, junit)


def in_time() -> float:
    return time.monotonic() + 60


@pytest.mark.parametrize(("code", "status"), [("pass", "passed"), ("exit(3)", "failed")])
def test_a_stage_passes_or_fails(code, status) -> None:
    assert gpu.run(stage(code), in_time()).status == status


def test_a_stage_out_of_time_is_interrupted_and_may_still_finish(tmp_path) -> None:
    code = (
        "import time, pathlib\n"
        "try: time.sleep(60)\n"
        f"except KeyboardInterrupt: pathlib.Path({str(tmp_path / 'kept')!r}).touch()"
    )
    outcome = gpu.run(stage(code, 5.2), in_time())
    assert outcome.status == "out of time"
    assert outcome.seconds < 50  # of the 60 it would have slept
    assert (tmp_path / "kept").exists()


def test_a_stage_without_time_is_left_out() -> None:
    outcome = gpu.run(stage("raise SystemExit(3)"), time.monotonic() + 1)
    assert (outcome.status, outcome.detail) == ("left out", "no time left")


def test_its_tests_are_counted(tmp_path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><skipped/></testcase></testsuite></testsuites>"
    )
    assert gpu.detail(stage("", junit=junit)) == "1 passed, 1 skipped, 1 failed: b"


def test_the_order_and_the_time_of_the_stages(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "/bin/compute-sanitizer")
    stages = list(gpu.stages(tmp_path, tmp_path / "out", time.monotonic() + 500))
    names = [s.name for s in stages]
    assert names == ["contract", "gpu tests", "memcheck", "racecheck", "benchmarks"]
    assert stages[0].seconds < 500 - gpu.FOR_BENCHMARKS
    assert "--device=cuda" in stages[0].command
    assert stages[-1].seconds > gpu.FOR_BENCHMARKS


def test_without_a_device_it_stops_after_the_build(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run: list[str] = []

    def noted(stage: gpu.Stage, _: float) -> gpu.Outcome:
        run.append(stage.name)
        return gpu.Outcome(stage.name, "passed", 0)

    monkeypatch.setattr(gpu, "run", noted)
    assert gpu.main([]) == 1
    assert run == ["build"]
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("measured", [True, False])
def test_the_report(measured, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "machine", lambda _: "a-gpu")
    monkeypatch.setattr(gpu, "environment", lambda *_: {"gpu": "A"})
    outcomes = [gpu.Outcome("contract", "failed", 12.3, "1 failed: b")]
    since = time.time()
    numbers, text = gpu.write(tmp_path, outcomes, since)
    numbers.write_text(json.dumps({"rows": [1], "environment": {"gpu": "B"}}))
    text.write_text("# Benchmark results\n")
    os.utime(numbers, (since, since + 10 if measured else since - 10))
    assert gpu.write(tmp_path, outcomes, since) == (numbers, text)
    content = json.loads(numbers.read_text())
    assert content["stages"][0]["detail"] == "1 failed: b"
    assert content["environment"] == {"gpu": "B" if measured else "A"}
    assert content.get("rows") == ([1] if measured else None)
    assert "| contract | failed | 12 | 1 failed: b |" in text.read_text()
    assert text.read_text().startswith("# Benchmark" if measured else "# a-gpu")


def test_the_sanitizers_short_list_names_tests_of_the_contract() -> None:
    """Every operator on the native backend; few tests, for a tool that slows them 50-fold."""
    command = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider")
    done = subprocess.run(
        (*command, "tests/test_contract.py", "-k", gpu.SHORT_LIST),
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
    )
    picked = [line for line in done.stdout.splitlines() if "::" in line]
    for operator in OPERATORS:
        assert any(operator in name and "native" in name for name in picked), done.stdout
    assert len(picked) <= 4 * len(OPERATORS)
