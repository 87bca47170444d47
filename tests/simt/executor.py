"""Builds csrc/*/cuda.cu with g++ against the host executor (include/simt.h), for CPU tensors.

`ops()` is `torch.ops.segkernels_simt`: the CUDA implementations, launch code included, under the
names and schemas of `torch.ops.segkernels`.
"""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

import segkernels  # noqa: F401  declares the operators

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# those checks that find addressing faults: all of them double the compile time
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
SANITIZE = [f"-fsanitize=address,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}"]


def sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/*/cuda.cu"))


def some_slow(combinations: Iterable[tuple], default: Callable[..., bool]) -> list:
    """Parameters of a test; those outside the default set are marked slow."""
    return [pytest.param(*c, marks=[] if default(*c) else [pytest.mark.slow]) for c in combinations]


def sanitized() -> bool:
    """Whether this process runs under the address sanitizer (its library must be loaded first)."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def build(flavour: str) -> Path:
    """The library for the sources as they are; compiled once per content."""
    torch_dir = Path(torch.__file__).parent
    flags = [
        *("-std=c++17", "-O1", "-fPIC", "-fno-extern-tls-init", "-DUSE_CUDA"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{path}" for path in (HERE / "include", HERE / "engine", ROOT / "csrc", torch_dir / "include")),
        *(["-DSIMT_WATCH"] if flavour == "watch" else []),
        *(SANITIZE if flavour == "address" else []),
    ]
    inputs = [
        p
        for folder in (ROOT / "csrc", HERE)
        for p in sorted(folder.rglob("*"))
        if p.suffix in SUFFIXES
    ]
    digest = hashlib.sha256(repr((flags, torch.__version__)).encode())
    for path in inputs:
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "simt" / digest.hexdigest()[:16]
    library = folder / "simt.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.parent.name}-{source.stem}.o")
        register = (
            ["-include", str(HERE / "include" / "register.h")] if source.suffix == ".cu" else []
        )
        if flavour == "watch" and source.suffix == ".cu":
            register += ["-fsanitize=thread"]
        run(["g++", *flags, *register, "-x", "c++", "-c", str(source), "-o", target])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sources(), *sorted((HERE / "engine").glob("*.cpp")), *(sorted((HERE / "watch").glob("*.cpp")) if flavour == "watch" else [])]))
    partial = library.with_suffix(f".{os.getpid()}")
    libs = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10"]
    run(
        [
            "g++",
            "-shared",
            "-Wl,-Bsymbolic-functions",
            *(SANITIZE if flavour == "address" else []),
            *objects,
            "-o",
            str(partial),
            *libs,
        ]
    )
    partial.replace(library)
    return library


SUFFIXES = (".cu", ".cuh", ".h", ".cpp")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@dataclass(frozen=True)
class Launch:
    """A launch as the host's code asked for it."""

    kernel: str  # mangled
    grid: int  # blocks
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    cluster: int  # blocks


@contextmanager
def planned() -> Iterator[list[Launch]]:
    """Within it the CUDA launch code runs, on CPU tensors, and launches nothing but is noted.

    The list is filled at the end. Results and what the host's code makes of them are undefined.
    """
    library = ctypes.CDLL(str(load("plain")))
    library.simt_planned.restype = ctypes.c_char_p
    launches: list[Launch] = []
    library.simt_plan(1)
    try:
        yield launches
    finally:
        library.simt_plan(0)
        for line in library.simt_planned().decode().splitlines():
            kernel, *numbers = line.split()
            launches.append(Launch(kernel, *map(int, numbers)))


@cache
def ops():
    """The operators on the executor; defines their schemas at the first call."""
    torch.set_num_threads(1)  # the executor has one thread, and the truths are tiny
    library = torch.library.Library("segkernels_simt", "DEF")
    for operator in (source.parent.name for source in sources()):
        for name in (operator, f"{operator}_backward"):
            schema = getattr(torch.ops.segkernels, name).default._schema
            library.define(str(schema).removeprefix("segkernels::"))
    torch.ops.load_library(str(build(sanitized())))
    ops.library = library  # lives as long as the process
    return torch.ops.segkernels_simt
