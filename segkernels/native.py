"""The compiled libraries: loads the one for a device type on first use, or says why it cannot.

    why_not("cpu")  -> None: loaded, its operators are registered with PyTorch's dispatcher
                    -> text: the whole reason, and the command that mends it

Nothing is loaded at import and nothing is ever compiled here (`segkernels/build.py` does that).
A library tells what it is before it is loaded: its metadata stands in the file as text.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from segkernels.build_plan import MARK, REMEDY, Tree
from segkernels.toolchain import covers

INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "baseline")


def why_not(device: str | torch.device) -> str | None:
    """None where the native kernels for this device ("cpu", "cuda:1", ...) run; else the reason.

    The first call loads the library; the answer is then kept. "cuda" is the current device.
    """
    device = torch.device(device)
    reason = _load(device.type)
    if reason is None and device.type == "cuda":
        current = device.index is None
        reason = _why_not_device(torch.cuda.current_device() if current else device.index)
    return reason


def build_info() -> dict[str, Any]:
    """Each library's metadata (None: not built) and the instruction sets of this CPU.

    The metadata says source hash, compiler, flags, torch, and for CUDA the architectures.
    """
    try:
        sets = importlib.import_module("segkernels._build_info").instruction_sets()
    except ImportError:  # not built, or for another Python: PyTorch's word for it must do
        sets = [torch.backends.cpu.get_cpu_capability()]
    return {"cpu": metadata("cpu"), "cuda": metadata("cuda"), "instruction_sets": sets}


def metadata(library: str) -> dict[str, Any] | None:
    """What a compiled library says of itself, read without loading it; None if it is not there."""
    try:
        content = _file(library).read_bytes()
    except FileNotFoundError:
        return None
    start = content.find(MARK + b"{")
    if start < 0:
        return {}
    facts: dict[str, Any] = json.loads(content[start + len(MARK) : content.index(b"\0", start)])
    return facts


def _file(library: str) -> Path:
    return Tree.here().package / f"_native_{library}.so"


@functools.cache
def _load(library: str) -> str | None:
    """Load a library, once; a failure is kept like a success, so that it is not repeated."""
    if library not in ("cpu", "cuda"):
        return f"there are no native kernels for {library!r} devices, only for cpu and cuda"
    if library == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    wish = os.environ.get("SEGKERNELS_ISA")
    if library == "cpu" and wish and wish not in INSTRUCTION_SETS:
        return f"SEGKERNELS_ISA={wish} is none of {', '.join(INSTRUCTION_SETS)}"
    facts = metadata(library)
    if facts is None:
        return f"the native library for {library} is not built; to build it: {REMEDY}"
    if reason := _why_unfit(library, facts):
        return f"{reason}; to build it for this environment: {REMEDY}"
    newest = Tree.here().source_hash(library)
    if newest and newest != facts["source_hash"]:
        name = _file(library).name
        warnings.warn(f"segkernels: {name} is older than its sources: {REMEDY}", stacklevel=2)
    try:
        torch.ops.load_library(str(_file(library)))
    except (OSError, RuntimeError) as error:
        built = f"built with torch {facts['torch']}, here is torch {torch.__version__}"
        return f"{_file(library).name} does not load ({built}): {error}; to build it anew: {REMEDY}"
    return None


def _why_unfit(library: str, facts: dict[str, Any]) -> str | None:
    """Why a library cannot work here, from its metadata alone."""
    name = _file(library).name
    if not facts:
        return f"{name} carries no segkernels metadata"
    if facts["machine"] != platform.machine():
        return f"{name} was built for {facts['machine']}, this machine is {platform.machine()}"
    oldest = tuple(int(number) for number in facts["torch_target"].split("."))
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < oldest:
        return f"{name} needs torch {facts['torch_target']} or later, here is {torch.__version__}"
    if library == "cuda":
        if torch.version.hip:
            return f"{name} is for CUDA, this torch is a ROCm build"
        built = facts["torch_cuda"]
        if built is None:
            return f"{name} was compiled against a CPU build of torch"
        if built.split(".")[0] != str(torch.version.cuda).split(".")[0]:
            return f"{name} was built for CUDA {built}, this torch has CUDA {torch.version.cuda}"
    return None


@functools.cache
def _why_not_device(index: int) -> str | None:
    facts = metadata("cuda") or {}
    capability = torch.cuda.get_device_capability(index)
    if covers(facts["archs"], capability):
        return None
    number = "{}.{}".format(*capability)
    device = f"{torch.cuda.get_device_name(index)} (compute capability {number})"
    built = f"_native_cuda.so is built for {' '.join(facts['archs'])}, not for {device}"
    return f"{built}; to build it: SEGKERNELS_CUDA_ARCHS={number} {REMEDY}"
