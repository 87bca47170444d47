"""A prediction of every case's time on a GPU from what the compiler made: nothing is measured.

    time ≥ max(bytes / bandwidth, operations / peak of their unit) + launches · overhead

bytes and operations are those of the case (`cost`), the unit is what the kernels' instructions say:
tensor cores where there are matrix instructions, else the FP64 or the FP32 pipes. It is a bound
with attainable rates, blind to cache misses, bank conflicts and index arithmetic; measurements will
be held against it. Of each kernel launched: how many of its blocks an SM holds by registers, shared
memory and threads, the occupancy, and how many waves its grid makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.environment import environment
from benchmarks.machine_code import Figures, readable
from benchmarks.work import DTYPES, LAYOUTS, MODES, forward_and_backward
from segkernels.console import print_table

# Of a data sheet's figure a kernel gets, at best: 0.9 of the bandwidth (a copy: 4.3 of 4.8 TB/s on
# an H200), 0.8 of the tensor cores' (cuBLAS: 790 of 989 TFLOP/s).
BANDWIDTH_SHARE = 0.9
TENSOR_SHARE = 0.8
LAUNCH = 2.5e-6  # seconds from one kernel of a stream to the next
REGISTERS, THREADS, BLOCKS, WARP = 65536, 2048, 32, 32  # an SM's, on all three
MIX = ("matrix", "wgmma", "ffma", "dfma", "loads", "loads16", "instructions")
RESERVED = 1024  # bytes of shared memory that the system takes of every block


class Gpu(NamedTuple):
    """A data sheet: SMs, bytes/s, operations/s by unit, bytes of shared memory an SM and of cache.

    mma: 16-bit products by mma.sync (HMMA), wgmma: by what a warpgroup or an SM starts together.
    """

    name: str
    sms: int
    bandwidth: float
    mma: float
    wgmma: float
    fp32: float
    fp64: float
    shared: int
    l2: int


# Data sheets of NVIDIA's A100 80 GB SXM, H200 SXM and B200 (a DGX B200's figures over 8), without
# sparsity; shared memory: CUDA C++ Programming Guide, compute capabilities; L2 cache: the tuning
# guides of Ampere, Hopper and Blackwell. mma.sync has 0.63 of Hopper's peak (Luo et al., arXiv
# 2402.13499), and on B200, for want of a figure, the same share.
GPUS = {
    "sm_80": Gpu("A100", 108, 2.039e12, 312e12, 312e12, 19.5e12, 9.7e12, 164 << 10, 40 << 20),
    "sm_90a": Gpu("H200", 132, 4.8e12, 0.63 * 989e12, 989e12, 67e12, 34e12, 228 << 10, 50 << 20),
    "sm_100": Gpu("B200", 148, 8e12, 0.63 * 2250e12, 2250e12, 75e12, 37e12, 228 << 10, 126 << 20),
}


class Planned(Protocol):
    """A launch that was not made: the kernel's symbol, blocks, threads a block, dynamic bytes."""

    kernel: str
    grid: int
    threads: int
    shared: int


class Launch(NamedTuple):
    """A kernel of a case and how it fills the GPU."""

    kernel: str
    grid: int
    threads: int
    shared: int  # static and dynamic bytes a block
    registers: int
    blocks: int  # that one SM holds
    occupancy: float
    waves: float
    mix: dict[str, int]  # instructions in its code, by kind


@dataclass(frozen=True)
class Prediction:
    """One case, type, layout and mode; times in seconds."""

    gpu: str
    op: str
    case: str
    dtype: str
    layout: str
    mode: str
    bytes: int
    flops: int
    unit: str  # tensor, fp32 or fp64
    memory: float
    compute: float
    overhead: float
    launches: tuple[Launch, ...]

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.overhead

    @property
    def bound(self) -> str:
        parts = {"memory": self.memory, self.unit: self.compute, "launches": self.overhead}
        return max(parts, key=lambda part: parts[part])

    def json(self) -> dict[str, Any]:
        launches = [launch._asdict() for launch in self.launches]
        return asdict(self) | {"seconds": self.seconds, "bound": self.bound, "launches": launches}


def resident(gpu: Gpu, registers: int, threads: int, shared: int) -> int:
    """Blocks that an SM holds at once. Registers are given to warps 256 at a time, in each of the
    SM's four parts; shared memory to blocks 128 bytes at a time."""
    warps = math.ceil(threads / WARP)
    a_warp = 256 * math.ceil(registers * WARP / 256)
    by_registers = 4 * (REGISTERS // 4 // a_warp) // warps
    by_shared = gpu.shared // (128 * math.ceil((shared + RESERVED) / 128))
    return min(BLOCKS, THREADS // WARP // warps, by_registers, by_shared)


def launch(gpu: Gpu, planned: Planned, name: str, figures: Figures) -> Launch:
    shared = figures.shared + planned.shared
    blocks = resident(gpu, figures.registers, planned.threads, shared)
    occupancy = blocks * planned.threads / THREADS
    waves = planned.grid / (max(1, blocks) * gpu.sms)
    mix = {kind: n for kind in MIX if (n := getattr(figures, kind))}
    size = (planned.grid, planned.threads, shared, figures.registers)
    return Launch(name, *size, blocks, occupancy, waves, mix)


def predict(
    arch: str,
    plan: Plan,
    kernels: Mapping[str, Figures],
) -> Prediction:
    """From the launches of a case and the figures of the kernels, by short name."""
    gpu, ((op, case, dtype, layout, mode), planned) = GPUS[arch], plan
    names = readable(p.kernel for p in planned)
    launches = [launch(gpu, p, names[p.kernel], kernels[names[p.kernel]]) for p in planned]
    mix = {kind: sum(a.mix.get(kind, 0) for a in launches) for kind in MIX}
    unit = "tensor" if mix["matrix"] else "fp64" if dtype == "float64" else "fp32"
    tensor = gpu.wgmma * TENSOR_SHARE if mix["wgmma"] else min(gpu.mma, gpu.wgmma * TENSOR_SHARE)
    peak = {"tensor": tensor, "fp32": gpu.fp32, "fp64": gpu.fp64}[unit]
    flops, nbytes = case.cost(DTYPES[dtype])[mode]
    return Prediction(
        gpu.name, op, case.name, dtype, layout, mode, nbytes, flops, unit,
        memory=nbytes / (gpu.bandwidth * BANDWIDTH_SHARE),
        compute=flops / peak,
        overhead=len(launches) * LAUNCH,
        launches=tuple(launches),
    )  # fmt: skip


Plan = tuple[tuple[str, Any, str, str, str], list[Planned]]  # op, case, dtype, layout, mode


def plans(
    arch: str, selection: Iterable[tuple[str, Any, str, str]], library: Path | None = None
) -> list[Plan]:
    """What the launch code of cuda.cu would launch on a GPU for each op, case, dtype and layout,
    forward and backward: it runs on CPU tensors, in a build of the host executor, and takes notes.

    In a process of its own, where that library stands in the place of the native one.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_plans, arch, list(selection), library).result()


def _plans(
    arch: str, selection: list[tuple[str, Any, str, str]], library: Path | None
) -> list[Plan]:
    executor = import_module("tests.simt.executor")  # mypy is for what has types
    library = library or executor.build()
    executor.replace_native(library)
    gpu, ptx = GPUS[arch], int(arch.strip("sm_a"))
    device = executor.Device(ptx, gpu.sms, gpu.shared - RESERVED, gpu.l2)
    made: list[Plan] = []
    for op, case, dtype, layout in selection:
        arguments = case.inputs(DTYPES[dtype], LAYOUTS[layout]) | {"backend": "native"}
        passes = forward_and_backward(op, arguments)
        for mode in MODES[:2]:
            with executor.on(device, library), executor.planned(library) as launches:
                next(passes)
            made.append(((op, case, dtype, layout, mode), launches))
    return made


def report(predictions: Sequence[Prediction]) -> None:
    """A table for each GPU: a line a case, and below it one for each kernel that it launches."""
    times = ("at least", "bound", "memory", "compute", "launches")
    fill = ("blocks × threads", "shared", "registers", "blocks/SM", "occupancy", "waves")
    header = ("", *times, *fill, "instructions")
    for gpu in dict.fromkeys(p.gpu for p in predictions):
        rows: list[tuple[str, ...]] = []
        for p in (p for p in predictions if p.gpu == gpu):
            what = f"{p.op} {p.case} {p.dtype} {p.layout} {p.mode}"
            parts = (f"{t * 1e6:.1f}" for t in (p.memory, p.compute, p.overhead))
            rows.append((what, f"{p.seconds * 1e6:.1f}", p.bound, *parts, *("",) * 7))
            rows += [(f"  {a.kernel}", *("",) * 5, *_cells(a)) for a in p.launches]
        print_table(f"{gpu}: predicted from the binaries, not measured; µs", header, rows)


def _cells(a: Launch) -> tuple[str, ...]:
    size = (f"{a.grid} × {a.threads}", f"{a.shared}", f"{a.registers}")
    mix = " ".join(f"{n} {kind}" for kind, n in a.mix.items())
    return *size, f"{a.blocks}", f"{a.occupancy:.0%}", f"{a.waves:.2f}", mix


def write(path: Path, predictions: Sequence[Prediction], compilers: Mapping[str, str]) -> None:
    content = {
        "what": "predicted from the binaries, not measured",
        "environment": environment("cpu", 1),
        "compilers": compilers,
        "predictions": [p.json() for p in predictions],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
