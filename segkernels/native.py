"""The compiled library: loads it on first use; says what is in it, or why there is none."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def why_not(device: str) -> str | None:
    """None when native kernels for ``device`` are loaded and usable, else the reason why not."""
    if device not in ("cpu", "cuda"):
        return f"no native kernels for device {device!r}"
    library = Path(__file__).parent / f"_native_{device}.so"
    if not library.exists():
        return "the native library is not built: python -m segkernels build"
    torch.ops.load_library(library)
    return None
