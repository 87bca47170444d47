"""What this machine can compile with: torch, compilers, ninja, CUDA architectures, parallel jobs.

Standard library only, and no import of torch: `setup.py` uses this before either can be imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ARCHS = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX")
GIB = 1 << 30


class BuildError(RuntimeError):
    """A build that was asked for cannot be done, or failed; the text says why and what to do."""


class Tool(NamedTuple):
    """A compiler: the command that starts it and the version it reports."""

    command: tuple[str, ...]
    version: str


class Torch(NamedTuple):
    """The installed PyTorch, read from its files: to import it takes a second and is not needed."""

    root: Path
    version: str
    cuda: str | None
    hip: str | None

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(number) for number in re.findall(r"\d+", self.version)[:2])


def find_torch() -> Torch | None:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    facts: dict[str, Any] = {}
    exec((root / "version.py").read_text(), facts)
    return Torch(root, facts["__version__"], facts.get("cuda"), facts.get("hip"))


def find_compiler(env: Mapping[str, str]) -> Tool | None:
    """CXX if it is set (then only that), else the first C++ compiler on PATH."""
    for text in [env["CXX"]] if env.get("CXX") else ["g++", "clang++", "c++"]:
        first, *rest = shlex.split(text)
        path = shutil.which(first, path=env.get("PATH"))
        if path and (banner := _output((path, *rest, "--version"))):
            return Tool((path, *rest), banner.splitlines()[0].strip())
    return None


def find_nvcc(env: Mapping[str, str]) -> Tool | None:
    """nvcc: under CUDA_HOME or CUDA_PATH if set, else on PATH or in its usual folder."""
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    path = None if home else shutil.which("nvcc", path=env.get("PATH"))
    path = path or str(Path(home or "/usr/local/cuda") / "bin" / "nvcc")
    release = re.search(r"release (\d+\.\d+)", _output((path, "--version")))
    return Tool((path,), release[1]) if release else None


def find_ninja() -> str | None:
    """The ninja of this Python's environment, else the one on PATH."""
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else shutil.which("ninja")


def choose_archs(env: Mapping[str, str], nvcc: Tool) -> tuple[tuple[str, ...], str]:
    """The CUDA architectures to compile for, and where that list comes from.

    One that this nvcc does not know, or below 8.0, is an error in SEGKERNELS_CUDA_ARCHS and left
    out of any other list.
    """
    known = set(_output((*nvcc.command, "--list-gpu-arch")).split())
    capabilities = _output(
        ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"), env.get("PATH")
    ).split()
    for source, text in (
        ("SEGKERNELS_CUDA_ARCHS", env.get("SEGKERNELS_CUDA_ARCHS", "")),
        ("TORCH_CUDA_ARCH_LIST", env.get("TORCH_CUDA_ARCH_LIST", "")),
        ("the GPUs here", " ".join(sorted({c.replace("9.0", "9.0a") for c in capabilities}))),
        ("default list", " ".join(ARCHS)),
    ):
        wanted = [arch for arch in re.split(r"[\s,;]+", text) if arch]
        bad = [arch for arch in wanted if not _supported(arch, known)]
        if bad and source == "SEGKERNELS_CUDA_ARCHS":
            raise BuildError(
                f"SEGKERNELS_CUDA_ARCHS asks for {' '.join(bad)}\n"
                f"  nvcc {nvcc.version} knows: {' '.join(sorted(known)) or 'not told'}\n"
                f'  expected numbers from 8.0 on, e.g. SEGKERNELS_CUDA_ARCHS="{" ".join(ARCHS)}"'
            )
        if good := tuple(arch for arch in wanted if arch not in bad):
            return good, source
    raise BuildError(f"nvcc {nvcc.version} knows none of {' '.join(ARCHS)}: a newer CUDA is needed")


def _supported(arch: str, known: set[str]) -> bool:
    form = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
    if form is None or int(form[1]) < 8:
        return False
    return not known or f"compute_{form[1]}{form[2]}" in known


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` runs on a device of this compute capability.

    A binary runs on its own and later minor versions of its major one, PTX on anything from its
    version on, and code for an arch-specific target ("9.0a") on exactly that one.
    """
    for arch in archs:
        number = arch.removesuffix("+PTX")
        major, minor = (int(n) for n in re.findall(r"\d+", number))
        if number.endswith(("a", "f")):
            runs = capability == (major, minor)
        elif arch.endswith("+PTX"):
            runs = capability >= (major, minor)
        else:
            runs = capability[0] == major and capability[1] >= minor
        if runs:
            return True
    return False


def choose_jobs(env: Mapping[str, str]) -> tuple[int, str]:
    """How many compilations at once: MAX_JOBS, else one per core and per 2 GiB of free memory.

    A source takes below 1 GiB; the other half of the memory stays with the rest of the machine.
    """
    if text := env.get("MAX_JOBS"):
        if not text.isdigit() or int(text) < 1:
            raise BuildError(f"MAX_JOBS={text}: expected a whole number from 1 on, e.g. MAX_JOBS=4")
        return int(text), "MAX_JOBS"
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    free = _free_memory()
    return max(1, min(cores, free // (2 * GIB))), f"{cores} cores, {free / GIB:.0f} GiB free"


def _free_memory() -> int:
    """Bytes that can be taken: the machine's, or the container's if those are fewer."""
    free = 16 * GIB
    with contextlib.suppress(OSError):
        available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available[1]) * 1024 if available else free
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return max(0, free)


def _output(command: Sequence[str], path: str | None = None) -> str:
    """What a command prints, or nothing where it cannot run."""
    program = shutil.which(command[0], path=path)
    try:
        done = subprocess.run(
            [program or command[0], *command[1:]],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
