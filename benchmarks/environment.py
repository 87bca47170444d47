"""Where a result was measured: the machine by its model (never by its name), and the software."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "sve")


def environment(device: str, threads: int) -> dict[str, Any]:
    """The block that every result file carries."""
    cpu, flags = _cpu()
    block: dict[str, Any] = {
        "machine": machine(device),
        "device": device,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        block |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return block


def machine(device: str) -> str:
    """A folder name from the model: nvidia-h200, intel-xeon-processor-2-cores."""
    if device.startswith("cuda"):
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"{_cpu()[0]} {os.cpu_count()} cores")


def _slug(words: str) -> str:
    plain = re.sub(r"\((R|TM|tm|r)\)|@.*GHz|CPU", " ", words)
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def _cpu() -> tuple[str, set[str]]:
    """Model name and instruction flags."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        model[1].strip() if model else platform.processor() or platform.machine(),
        set(flags[1].split()) if flags else set(),
    )


def _commit() -> str:
    """The commit measured; "+" where the tree differs from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent
        ran = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        )
        return ran.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
