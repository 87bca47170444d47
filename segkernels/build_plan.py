"""The plan of a native build: which libraries, with which tools and flags, and why not the others.

Standard library only: `setup.py` uses this before torch can be imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from segkernels.toolchain import (
    BuildError,
    Tool,
    Torch,
    choose_archs,
    choose_jobs,
    find_compiler,
    find_ninja,
    find_nvcc,
    find_torch,
)

REQUESTS = ("auto", "none", "cpu", "cuda")
STABLE_ABI = (
    2,
    11,
)  # the oldest torch whose stable ABI the sources use; later ones run the same file
REMEDY = "python -m segkernels build"
MARK = b"segkernels-build:"  # stands before the metadata inside a library

SOURCES = {"cpu": "*/cpu.cpp", "cuda": "*/cuda.cu"}
HASHED = {"cpu": ("*/cpu.cpp", "**/*.h"), "cuda": ("*/cuda.cu", "**/*.cuh", "**/*.h")}


class Tree(NamedTuple):
    """Where things lie: `csrc/` is beside the package in a checkout, inside it when installed."""

    package: Path
    csrc: Path

    @classmethod
    def here(cls) -> Tree:
        package = Path(__file__).resolve().parent
        inside = package / "csrc"
        return cls(package, inside if inside.is_dir() else package.parent / "csrc")

    @property
    def work(self) -> Path:
        return self.csrc.parent / "build" / "native"

    @property
    def version(self) -> str:
        found = re.search(r'__version__ = "(.+)"', (self.package / "_version.py").read_text())
        return found[1] if found else "unknown"

    def sources(self, library: str) -> list[Path]:
        return sorted(self.csrc.glob(SOURCES[library]))

    def source_hash(self, library: str) -> str | None:
        """Hash of all that a library is compiled from; None where it has no sources."""
        files = sorted({file for pattern in HASHED[library] for file in self.csrc.glob(pattern)})
        digest = hashlib.sha256()
        for file in files:
            name = file.relative_to(self.csrc).as_posix()
            digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()[:16] if self.sources(library) else None


@dataclass(frozen=True)
class Plan:
    """What will be compiled and how; `skipped` says of each other library why not."""

    request: str
    tree: Tree
    torch: Torch | None
    compiler: Tool | None
    nvcc: Tool | None
    libraries: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    archs: tuple[str, ...] = ()
    archs_from: str = ""
    jobs: int = 1
    jobs_from: str = ""
    cxxflags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def build_info(self) -> bool:
        """Whether the metadata module can be built too: it needs Python's headers."""
        headers = Path(sysconfig.get_path("include")) / "Python.h"
        return (self.tree.csrc / "build_info.cpp").exists() and headers.exists()

    def text(self) -> str:
        """The few lines that a person reads before anything is compiled."""
        lines = {"torch": "not installed", "compiler": "none found", "nvcc": "none found"}
        if self.torch:
            lines["torch"] = f"{self.torch.version}, CUDA {self.torch.cuda or 'none'}"
        if self.compiler:
            lines["compiler"] = self.compiler.version
        if self.nvcc:
            lines["nvcc"] = self.nvcc.version
        for library in SOURCES:
            count = len(self.tree.sources(library))
            found = f"{count} source file{'s' * (count != 1)} -> _native_{library}.so"
            lines[library] = f"no: {self.skipped[library]}" if library in self.skipped else found
        if "cuda" in self.libraries:
            lines["archs"] = f"{' '.join(self.archs)} ({self.archs_from})"
        if self.libraries:
            lines["jobs"] = f"{self.jobs} ({self.jobs_from})"
        pairs = [*lines.items(), *(("note", note) for note in self.notes)]
        body = "\n".join(f"  {name:<9} {value}" for name, value in pairs)
        return f"segkernels {self.tree.version}, native build ({self.request})\n{body}"

    def flags(self, library: str) -> tuple[str, ...]:
        """Compiler flags of a library; none names this machine's instruction set."""
        target = "0x{:02x}{:02x}000000000000".format(*STABLE_ABI)
        shared = ("-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={target}")
        if library == "cpu":
            # GCC 12 sees uninitialised values in its own AVX-512 headers
            warnings = ("-Wall", "-Wextra", "-Wno-maybe-uninitialized")
            return (*shared, "-fPIC", "-fvisibility=hidden", *warnings, *self.cxxflags)
        threads = max(1, self.jobs // max(1, len(self.tree.sources(library))))
        host = ("-DUSE_CUDA", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-t={threads}")
        return (*shared, *host, *(flag for arch in self.archs for flag in _gencode(arch)))

    def metadata(self, library: str) -> dict[str, Any]:
        """What a library is; embedded in it, and read by `native.py` before loading it."""
        assert self.torch and self.compiler, "a plan with a library has both"
        facts: dict[str, Any] = {
            "library": library,
            "version": self.tree.version,
            "source_hash": self.tree.source_hash(library),
            "compiler": self.compiler.version,
            "flags": " ".join(self.flags(library)),
            "machine": platform.machine(),
            "torch": self.torch.version,
            "torch_target": "{}.{}".format(*STABLE_ABI),
        }
        if library == "cuda" and self.nvcc:
            facts |= {"torch_cuda": self.torch.cuda, "nvcc": self.nvcc.version, "archs": self.archs}
        return facts


def _gencode(arch: str) -> Iterator[str]:
    number = arch.removesuffix("+PTX").replace(".", "")
    yield f"-gencode=arch=compute_{number},code=sm_{number}"
    if arch.endswith("+PTX"):
        yield f"-gencode=arch=compute_{number},code=compute_{number}"


def make_plan(
    request: str | None = None, *, env: Mapping[str, str] | None = None, tree: Tree | None = None
) -> Plan:
    """Look at the machine and decide. Raises BuildError where what is named cannot be built."""
    env = os.environ if env is None else env
    request = request or env.get("SEGKERNELS_BUILD") or "auto"
    if request not in REQUESTS:
        raise BuildError(f"SEGKERNELS_BUILD={request}: expected one of {', '.join(REQUESTS)}")
    tree = tree or Tree.here()
    torch, compiler, nvcc = find_torch(), find_compiler(env), find_nvcc(env)

    skipped = {}
    if why := _why_nothing(request, torch, compiler, env) or _why_sourceless(tree, "cpu"):
        skipped["cpu"] = why
    if why := _why_nothing(request, torch, compiler, env) or _why_not_cuda(
        request, tree, torch, nvcc
    ):
        skipped["cuda"] = why
    named = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}.get(request, ())
    if lost := [f"  {library}: {skipped[library]}" for library in named if library in skipped]:
        lines = "\n".join(lost)
        raise BuildError(
            f"'{request}' was asked for and cannot be built\n{lines}\n"
            f"  SEGKERNELS_BUILD=auto builds what this machine can"
        )

    libraries = tuple(library for library in SOURCES if library not in skipped)
    archs, archs_from = choose_archs(env, nvcc) if nvcc and "cuda" in libraries else ((), "")
    jobs, jobs_from = choose_jobs(env)
    return Plan(
        request=request,
        tree=tree,
        torch=torch,
        compiler=compiler,
        nvcc=nvcc,
        libraries=libraries,
        skipped=skipped,
        archs=archs,
        archs_from=archs_from,
        jobs=jobs,
        jobs_from=jobs_from,
        cxxflags=tuple(shlex.split(env.get("CXXFLAGS", ""))),
        notes=tuple(_notes(torch, nvcc, libraries)),
    )


def _why_nothing(
    request: str, torch: Torch | None, compiler: Tool | None, env: Mapping[str, str]
) -> str | None:
    """Why no library at all can be compiled."""
    if request == "none":
        return "SEGKERNELS_BUILD=none"
    if torch is None:
        return f"torch cannot be found here; once it is installed: {REMEDY}"
    if torch.release < STABLE_ABI:
        return f"torch {torch.version} is older than {STABLE_ABI[0]}.{STABLE_ABI[1]}"
    if compiler is None:
        where = f"CXX={env['CXX']} does not run" if env.get("CXX") else "no C++ compiler on PATH"
        return f"{where}; install g++ or clang++, then: {REMEDY}"
    return None


def _why_sourceless(tree: Tree, library: str) -> str | None:
    return None if tree.sources(library) else f"no sources {tree.csrc / SOURCES[library]}"


def _why_not_cuda(request: str, tree: Tree, torch: Torch | None, nvcc: Tool | None) -> str | None:
    if request == "cpu":
        return "only the CPU library was asked for"
    if nvcc is None:
        return "no working nvcc on PATH or under CUDA_HOME"
    if torch and torch.hip:
        return f"torch {torch.version} is a ROCm build"
    if torch and torch.cuda is None and request == "auto":
        return (
            "a CPU build of torch cannot load it (SEGKERNELS_BUILD=cuda compiles it all the same)"
        )
    if torch and torch.cuda and torch.cuda.split(".")[0] != nvcc.version.split(".")[0]:
        wanted = f"set CUDA_HOME to a CUDA {torch.cuda} toolkit"
        return f"nvcc is CUDA {nvcc.version}, torch {torch.version} is CUDA {torch.cuda}: {wanted}"
    return _why_sourceless(tree, "cuda")


def _notes(torch: Torch | None, nvcc: Tool | None, libraries: tuple[str, ...]) -> Iterator[str]:
    if "cuda" in libraries and torch and nvcc:
        if torch.cuda is None:
            yield "CUDA is compiled only: this CPU build of torch cannot load it"
        elif torch.cuda != nvcc.version:
            yield f"nvcc is CUDA {nvcc.version}, torch has {torch.cuda}: one major version, works"
    if libraries and find_ninja() is None:
        yield "without ninja everything is compiled anew each time; pip install ninja"
