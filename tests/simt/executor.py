"""Builds csrc/*/cuda.cu with g++ against the host executor (include/simt.h): the CUDA kernels and
their launch code, registered for CPU tensors in the place of the native CPU library.

`pytest --device=simt` runs in a process of such a library.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from segkernels import native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
BUILD = ROOT / "build" / "simt"

# those checks that find addressing faults: all of them double the compile time
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero"
SANITIZE = (f"-fsanitize=address,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}")
WATCH = (f"-fsanitize=thread,{UNDEFINED}", f"-fno-sanitize-recover={UNDEFINED}")


class Flavour(NamedTuple):
    """A way to build the executor."""

    kernels: tuple[str, ...] = ()  # flags of the kernels and their launch code
    engine: tuple[str, ...] = ("-O2",)  # flags of the executor's own sources
    folders: tuple[str, ...] = ("engine",)  # which ones
    preloaded: tuple[str, ...] = ()  # the sanitizers' libraries, needed before anything else


FLAVOURS = {
    "plain": Flavour(),
    "address": Flavour(
        SANITIZE, ("-O2", *SANITIZE), preloaded=("libasan.so", "libubsan.so", "libstdc++.so")
    ),
    # the sanitizers' instrumentation, with watch/ in the place of their libraries
    "watch": Flavour(WATCH, ("-O2", "-DSIMT_WATCH"), ("engine", "watch")),
}
HEADERS = ("include", "engine", "watch")
REGISTER = HERE / "include" / "register.h"  # what every cuda.cu is compiled behind
COMPILE = (
    *(
        "g++",
        "-std=c++17",
        "-O1",  # -O2 compiles kernels twice as long
        "-fPIC",
        "-fno-extern-tls-init",
        "-fno-gnu-unique",
        "-DUSE_CUDA",
        "-x",
        "c++",
        "-c",
    ),
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *(f"-I{path}" for path in (*(HERE / name for name in HEADERS), TORCH / "include")),
)


@cache
def _compiler() -> str:
    """The version of g++."""
    command = ["g++", "-dumpfullversion", "-dumpversion"]
    return subprocess.check_output(command, text=True).strip()


def why_not() -> str | None:
    """None where the executor can be built and run, else the reason."""
    machine = f"{platform.system()} {platform.machine()}"
    if machine != "Linux x86_64":
        return f"the host executor's fibres are written for Linux x86_64, this is {machine}"
    if shutil.which("g++") is None:
        return "the host executor is compiled with g++, which is not here (apt install g++)"
    if int(_compiler().split(".")[0]) < 12:
        return f"the host executor needs g++ 12 or later (_Float16), this is {_compiler()}"
    return None


needs_executor = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def build(flavour: str = "plain", csrc: Path = CSRC) -> Path:
    """The library of the sources as they are; every object is compiled once per content."""
    BUILD.mkdir(parents=True, exist_ok=True)
    made = FLAVOURS[flavour]

    def compiled(source: Path) -> Path:
        kernels = source.suffix == ".cu"
        first = [REGISTER] if kernels else []
        flags = made.kernels if kernels else made.engine
        options = [*COMPILE, *flags, *(f"-include{path}" for path in first)]
        digest = _digest(options, included([source, *first], csrc))
        return _once(digest, ".o", [*options, f"-I{csrc}", f"-I{CSRC}", str(source)])

    sources = sorted(csrc.glob("*/cuda.cu"))
    for folder in made.folders:
        sources += sorted((HERE / folder).glob("*.cpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    flags = [flag for flag in made.engine if flag.startswith("-fsanitize")]
    command = ["g++", "-shared", "-Wl,-Bsymbolic-functions", *flags, *map(str, objects)]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    return _once(_digest(command, set()), ".so", [*command, *libraries])


def _digest(options: list[str], files: set[Path]) -> str:
    """Of all that an object is made of, but for the headers of the system and of PyTorch."""
    parts = [
        torch.__version__,
        _compiler(),
        *options,
        *(path.read_text() for path in sorted(files)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def included(waiting: list[Path], csrc: Path) -> set[Path]:
    """These files and the project's headers that they include, at any depth."""
    found = set()
    while waiting:
        path = waiting.pop()
        found.add(path)
        for name in re.findall(r'#include ["<]([^">]+)[">]', path.read_text()):
            folders = (path.parent, csrc, CSRC, *(HERE / folder for folder in HEADERS))
            waiting += [p for f in folders if (p := f / name).exists() and p not in found]
    return found


def _once(digest: str, suffix: str, command: list[str]) -> Path:
    """The file of this content; the command makes it (-o is added) where it is not there yet."""
    target = BUILD / f"{digest[:16]}{suffix}"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}{suffix}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        partial.replace(target)
    return target


def environment(flavour: str) -> dict[str, str]:
    """For a process that is to load a library of this flavour."""
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in FLAVOURS[flavour].preloaded
    ]
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }


def replace_native(library: Path) -> None:
    """Make this library the native one of this process, which has loaded none yet."""
    assert native._load.cache_info().currsize == 0, "a native library is already loaded"
    torch.ops.load_library(str(library))
    native._load = {"cpu": None}.get


class Launch(NamedTuple):
    """A launch as the host's code asked for it."""

    kernel: str  # mangled
    grid: int  # blocks
    threads: int  # of a block
    shared: int  # bytes of dynamic shared memory
    cluster: int  # blocks


class Device(NamedTuple):
    """What a library of the executor may say of its device; to begin with, that of an H200."""

    ptx: int = 90  # what the kernels are compiled for; clusters from 90 on
    multiprocessors: int = 132
    shared: int = 227 << 10  # bytes that a block can have
    l2: int = 50 << 20  # bytes


@contextmanager
def on(device: Device, library: Path) -> Iterator[None]:
    """Within it a loaded library has this device."""
    functions = ctypes.CDLL(str(library))
    functions.simt_device(*device)
    try:
        yield
    finally:
        functions.simt_device(*Device())


@contextmanager
def planned(library: Path) -> Iterator[list[Launch]]:
    """Within it the launch code of a loaded library runs and its launches are noted, not run.

    The list is filled at the end. Results, and what the host's code makes of them, are undefined.
    """
    functions = ctypes.CDLL(str(library))
    functions.simt_planned.restype = ctypes.c_char_p
    launches: list[Launch] = []
    functions.simt_plan(1)
    try:
        yield launches
    finally:
        functions.simt_plan(0)
        for line in functions.simt_planned().decode().splitlines():
            kernel, *numbers = line.split()
            launches.append(Launch(kernel, *map(int, numbers)))
