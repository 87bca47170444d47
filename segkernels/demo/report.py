"""What the demo found, as text, as Markdown and as JSON."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from segkernels._version import __version__
from segkernels.data.scenes import CLASSES
from segkernels.demo.contest import FUSED, Check, Times
from segkernels.metrics import Scores
from segkernels.ops.em_attention import Gradient

Table = tuple[Sequence[str], list[Sequence[str]]]

COMPARED: tuple[Gradient, ...] = ("none", "full")  # gradients of EM attention
CHECKS = "Fused against plain PyTorch in float32: error from float64, relative to the largest value"
TIMES = (
    "Milliseconds per call / peak memory in MB. eager is NCHW; fused and compiled are channels_last"
)


@dataclass
class Report:
    """Filled in stage by stage."""

    out: Path
    stages: list[str] = field(default_factory=list)  # the finished ones
    training: str = ""  # how far a training that is under way has come
    environment: dict[str, str] = field(default_factory=dict)
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: Scores | None = None
    after: Scores | None = None
    ceiling: Scores | None = None
    floor: float = 0.0  # mIoU that must be reached
    losses: list[float] = field(default_factory=list)
    training_seconds: float = 0.0
    attention_steps: int = 0
    attention: dict[str, float] = field(default_factory=dict)  # gradient -> mIoU
    checks: list[Check] = field(default_factory=list)
    times: list[Times] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def done(self) -> str:
        """The finished stages, and how far training came."""
        partial = [] if "training" in self.stages or not self.training else [self.training]
        return ", ".join([*self.stages, *partial]) or "nothing"

    def attention_line(self) -> str:
        """What EM attention came to, in one sentence."""
        results = ", ".join(f"{iou:.3f} with gradient '{g}'" for g, iou in self.attention.items())
        return (
            f"EM attention in the graphs' place: mIoU {results}; {self.attention_steps} steps each,"
            " equal weights at first, equal batches"
        )

    def failures(self) -> list[str]:
        """What did not hold, one line each."""
        assert self.after is not None
        lines = []
        if not self.after.mean_iou >= self.floor:
            lines.append(f"mIoU {self.after.mean_iou:.3f} is below {self.floor:.3f}")
        lines += [
            f"EM attention with gradient '{gradient}' learned nothing: mIoU {iou:.3f}"
            for gradient, iou in self.attention.items()
            if not (self.before is not None and iou > self.before.mean_iou)
        ]
        lines += [
            f"{check.name}: an error is larger than allowed"
            for check in self.checks
            if not check.holds
        ]
        return lines

    def write(self) -> None:
        """report.md and demo.json into the folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "demo.json").write_text(
            json.dumps(self._json(), indent=2) + "\n", encoding="utf-8"
        )
        (self.out / "report.md").write_text(self._markdown(), encoding="utf-8")
        self.files[:0] = ["report.md", "demo.json"]

    def _json(self) -> dict[str, Any]:
        return {
            "ok": not self.failures(),
            "failures": self.failures(),
            "seconds": round(self.seconds(), 1),
            "environment": self.environment,
            "backends": self.backends,
            "training": {
                "seconds": round(self.training_seconds, 1),
                "losses": [round(loss, 4) for loss in self.losses],
                "floor": self.floor,
                "before": _scores(self.before),
                "after": _scores(self.after),
                "ceiling": _scores(self.ceiling),
            },
            "em_attention": {
                "steps": self.attention_steps,
                "mean_iou": {gradient: _number(iou) for gradient, iou in self.attention.items()},
            },
            "checks": [asdict(check) | {"holds": check.holds} for check in self.checks],
            "times": [asdict(row) for row in self.times],
        }

    def _markdown(self) -> str:
        assert self.before is not None and self.after is not None and self.ceiling is not None
        columns = (self.before, self.after, self.ceiling)
        scored = [("mIoU", *(f"{s.mean_iou:.3f}" for s in columns))]
        scored += [
            (name, *(f"{s.class_iou[k]:.3f}" for s in columns)) for k, name in enumerate(CLASSES)
        ]
        parts = [
            "# segkernels demo",
            "\n".join(f"- {name}: {value}" for name, value in self.environment.items()),
            "## Backends",
            _markdown(
                ("operator", "runs on"), [(op, b["taken"]) for op, b in self.backends.items()]
            ),
            f"## IoU, {len(self.losses)} training steps in {self.training_seconds:.0f} s",
            _markdown(("", "before", "after", "ceiling"), scored),
            f"Needed: mIoU {self.floor:.3f}. The ceiling is the score of an oracle that knows all "
            "but what the picture hides.",
            self.attention_line() + ".",
            *(f"![{name}]({name})" for name in self.files if name.endswith(".png")),
            f"## {CHECKS}",
            _markdown(*check_table(self.checks)),
            f"## {TIMES}",
            _markdown(*time_table(self.times)),
            "\n".join(f"failed: {failure}" for failure in self.failures()) or "All held.",
        ]
        return "\n\n".join(parts) + "\n"


def environment(device: str) -> dict[str, str]:
    """The machine by its model, and the software."""
    return {
        "segkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu(),
        "threads": str(torch.get_num_threads()),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = model[1].strip() if model else platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def check_table(checks: Sequence[Check]) -> Table:
    """Header and rows."""
    header = ("", "forward", "allowed", "gradient", "allowed", "")
    rows: list[Sequence[str]] = []
    for check in checks:
        pairs = ((check.forward, check.allowed[0]), (check.gradient, check.allowed[1]))
        cells = ["" if v is None else f"{v:.1e}" for pair in pairs for v in pair]
        rows.append((check.name, *cells, "ok" if check.holds else "failed"))
    return header, rows


def time_table(times: Sequence[Times]) -> Table:
    """Header and rows; the last column is the best of the others over ours."""
    names = list(dict.fromkeys(name for row in times for name in row.seconds)) or [FUSED]
    header = ("", "work", *names, "best of the others / fused")
    rows: list[Sequence[str]] = []
    for row in times:
        cells = [
            f"{1e3 * row.seconds[name]:.2f} / {row.peak[name] / 1e6:.1f}"
            if name in row.seconds
            else ""
            for name in names
        ]
        rows.append((row.name, row.work, *cells, f"{row.ratio:.2f}x"))
    return header, rows


def _scores(scores: Scores | None) -> dict[str, Any] | None:
    """Plain numbers; NaN (a class that is nowhere) becomes null, as JSON has none."""
    if scores is None:
        return None
    plain = {
        n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in scores._asdict().items()
    }
    return {
        n: [_number(x) for x in v] if isinstance(v, list) else _number(v) for n, v in plain.items()
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
