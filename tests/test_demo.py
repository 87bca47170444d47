"""The main job as a user runs it, quick: exit status, files, mIoU, own picture, Ctrl-C, errors."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from segkernels.data import scenes
from segkernels.demo import QUICK, contest, main, network
from segkernels.demo.report import Report

ROOT = Path(__file__).resolve().parents[1]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "segkernels", "demo", "--quick", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}


def demo(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One quick demo with a picture of the user's own."""
    out = tmp_path_factory.mktemp("demo")
    Image.new("RGBA", (70, 45), (200, 60, 60, 255)).save(out / "own.png")
    return out, demo("--out", out, "--image", out / "own.png")


@pytest.fixture(scope="module")
def found(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    out, ran = finished
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads((out / "demo.json").read_text())
    return report


def test_it_learns(found: dict[str, Any]) -> None:
    training = found["training"]
    ceiling = training["ceiling"]["mean_iou"]
    assert 0.9 < ceiling < 1
    assert training["floor"] == pytest.approx(QUICK.floor * ceiling)
    assert training["before"]["mean_iou"] < 0.15
    assert training["after"]["mean_iou"] >= training["floor"]
    assert training["losses"][-1] < training["losses"][0] / 2


def test_it_compares_the_gradients_of_em_attention(
    finished: tuple[Path, subprocess.CompletedProcess[str]], found: dict[str, Any]
) -> None:
    """Both learn; the sentence says what was compared, on the screen and in the report."""
    attention, before = found["em_attention"], found["training"]["before"]["mean_iou"]
    assert attention["steps"] == QUICK.attention_steps
    assert set(attention["mean_iou"]) == {"none", "full"}
    assert all(iou > before for iou in attention["mean_iou"].values())
    assert attention["mean_iou"]["none"] != attention["mean_iou"]["full"]
    out, ran = finished
    line = f"with gradient 'full'; {QUICK.attention_steps} steps each"
    assert line in ran.stdout and line in (out / "report.md").read_text()


def test_it_checks(found: dict[str, Any]) -> None:
    assert found["ok"] and not found["failures"]
    names = [check["name"] for check in found["checks"]]
    assert len(names) == 6 and {"the trained network", "EMAU, 32 bases"} <= set(names)
    assert all(check["holds"] for check in found["checks"])


def test_it_times(found: dict[str, Any]) -> None:
    assert len(found["times"]) == 10
    for row in found["times"]:
        assert {"fused", "eager", "channels_last"} <= set(row["seconds"]) == set(row["peak"])
        assert min(row["seconds"].values()) > 0 and min(row["peak"].values()) > 0


def test_it_says_which_backend_and_why(found: dict[str, Any]) -> None:
    for backend in found["backends"].values():
        assert backend["reasons"][backend["taken"]] is None


def test_it_writes(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, ran = finished
    text = (out / "report.md").read_text()
    assert "mIoU" in text and "picture.png" in text and "image.png" in text
    assert (out / "picture.png").stat().st_size < 200_000
    with Image.open(out / "image.png") as picture:
        assert picture.width > 2 * 2 * 70 and picture.height > 2 * 45
    assert str(out / "report.md") in ran.stdout


def test_it_is_quiet_in_a_pipe(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, ran = finished
    assert "\x1b" not in ran.stdout + ran.stderr and "\r" not in ran.stderr
    assert "Warning" not in ran.stderr


def test_ctrl_c(tmp_path: Path) -> None:
    """While the network is being trained: status 130, what was done so far, no traceback."""
    process = subprocess.Popen(
        command("--out", tmp_path),
        env=environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background job's is off
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("DeepLabv3+"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # a shell says 130 of both: Python ends itself by the signal where it came during an import
    assert process.returncode in (130, -signal.SIGINT)
    assert "interrupted" in errors and "environment" in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "no-such-file.png"], ["no such file", "no-such-file.png"]),
        (["--image", __file__], ["cannot be read", __file__]),
        (["--out", f"{__file__}/report"], ["--out", "cannot be written"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", str(2**63)], ["--seed", str(2**63)]),
        (["--backend", "fast"], ["--backend", "reference"]),
    ],
)
def test_bad_options(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is computed or written."""
    try:
        status = main(["--quick", "--out", str(tmp_path), *arguments])
    except SystemExit as refused:  # argparse
        status = int(refused.code or 0)
    errors = capsys.readouterr().err
    assert status in (1, 2)
    assert all(word in errors for word in words), errors
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steep = dataclasses.replace(QUICK.recipe, steps=3, learning_rate=math.inf)
    plan = dataclasses.replace(QUICK, scenes=16, tests=1, recipe=steep)
    monkeypatch.setattr("segkernels.demo.QUICK", plan)
    assert main(["--quick", "--out", str(tmp_path), "--backend", "reference"]) == 1
    assert re.search(
        r"error: the loss became nan at step \d\n.*learning rate", capsys.readouterr().err
    )


class Wrong(nn.Module):
    """A layer whose result is off by a hundredth and its gradient right, or the other way round."""

    def __init__(self, layer: nn.Module, result: bool) -> None:
        super().__init__()
        self.layer, self.result = layer, result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x)
        off = 0.01 * y
        return y + off.detach() if self.result else y + off - off.detach()


@pytest.mark.parametrize("result", [True, False])
def test_a_wrong_layer_is_found(result: bool, tmp_path: Path) -> None:
    row = contest.contests("cpu", "reference", small=True)[1]
    right = contest.check(row)
    assert right.holds
    wrong = contest.check(
        contest.Contest(row.name, Wrong(row.ours, result), row.plain, row.x, True)
    )
    assert not wrong.holds
    assert (wrong.forward > wrong.allowed[0]) == result


def test_a_network_that_learned_nothing_fails() -> None:
    from segkernels.metrics import scores

    nothing = scores(torch.eye(len(scenes.CLASSES)).flip(0))
    report = Report(out=Path(), after=nothing, floor=0.4)
    assert report.failures() == ["mIoU 0.000 is below 0.400"]
    report.after = nothing._replace(mean_iou=float("nan"))
    assert len(report.failures()) == 1
    report.before, report.attention = nothing, {"none": 0.5, "full": float("nan")}
    assert "gradient 'full' learned nothing" in report.failures()[1]
    assert len(report.failures()) == 2


@pytest.mark.parametrize("attention", [None, "full"])
def test_the_network_is_its_seed(attention: Any) -> None:
    first, again, other = (
        network.build(seed, "reference", attention).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
