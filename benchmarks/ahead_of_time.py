"""The Triton kernels of named cases, compiled without a device, and what the binaries tell.

The public functions run forward and backward on meta tensors, through the hall, with the launchers
of the Triton backend as they are, while `JITFunction.run` only takes notes: what is compiled is
what a GPU would be given, the same types, specialisation, blocks and warps. Operators and cases are
found by rule; a kernel that no case launches is not compiled.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.machine_code import AMD, Figures, count, disassemble, tool
from benchmarks.work import DTYPES, LAYOUTS, forward_and_backward
from segkernels import fused

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Call(NamedTuple):
    """One call of an operator's public function, and its backward."""

    op: str
    case: Any
    dtype: str
    layout: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.case.name} {self.dtype} {self.layout}"


class Launch(NamedTuple):
    """A kernel with the arguments that a launcher gives it."""

    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Specialised(NamedTuple):
    """A kernel as it is compiled for a launch."""

    source: Any
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.source.hash(), str(self.options)


def calls(
    dtypes: Iterable[str], layouts: Iterable[str] = tuple(LAYOUTS), group: str = "PAPER"
) -> Iterator[Call]:
    """Every operator's cases of a group, by type and layout."""
    layouts = tuple(layouts)
    for dtype in dtypes:
        for op in fused.OPERATORS:
            for case in getattr(importlib.import_module(f"segkernels.ops.{op}.cases"), group):
                yield from (Call(op, case, dtype, layout) for layout in layouts)


def launches(call: Call) -> list[Launch]:
    """What the launchers would run, forward and backward, in order."""
    found: list[Launch] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(Launch(self, args, kwargs))

    def launcher(operator: fused.Operator, _: str, backward: bool = False) -> Any:
        module = importlib.import_module(f"{operator.package}.triton")
        return getattr(module, operator.name + "_backward" * backward)

    arguments = call.case.inputs(DTYPES[call.dtype], LAYOUTS[call.layout], "meta")
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.object(fused.Operator, "raw", launcher),  # a registered one has no body for meta
        mock.patch.object(fused, "_choose", lambda *_: "triton"),
    ):
        tuple(forward_and_backward(call.op, arguments))
    return found


def specialised(launch: Launch, target: GPUTarget) -> Specialised:
    """The kernel, specialised the way a launch specialises it."""
    kernel, args, kwargs = launch
    backend = make_backend(target)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialisation, options
    )
    return Specialised(ASTSource(kernel, signature, constants, attributes), options.__dict__)


def named(some: Iterable[Call], target: str) -> dict[str, Specialised]:
    """The distinct kernels of the calls, each by the first call that launches it."""
    found: dict[tuple[str, str], str] = {}
    kernels: dict[str, Specialised] = {}
    for call in some:
        for launch in launches(call):
            made = specialised(launch, TARGETS[target])
            if made.key in found:
                continue
            name = f"{call.name} {launch.kernel.__name__}"
            number = sum(n == name or n.startswith(f"{name} #") for n in kernels)
            found[made.key] = name = f"{name} #{number + 1}" if number else name
            kernels[name] = made
    return kernels


def compiled(kernels: dict[str, Specialised], target: str, jobs: int) -> dict[str, Figures]:
    """Compile for a target, several at once: Triton's compiler leaves the interpreter's lock."""

    def one(kernel: Specialised) -> Figures:
        binary = triton.compile(kernel.source, target=TARGETS[target], options=kernel.options)
        return figures(binary, target)

    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(kernels, pool.map(one, kernels.values()), strict=True))


def figures(binary: Any, target: str) -> Figures:
    if TARGETS[target].backend == "hip":
        return _amd(binary.asm["amdgcn"], binary.metadata.shared)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        command = [tool("cuobjdump"), "-res-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (instructions,) = disassemble(cubin).values()
    registers, stack = (max(map(int, re.findall(rf"{w}:(\d+)", text))) for w in ("REG", "STACK"))
    # a Triton kernel has no arrays of its own: its frame is what it spills
    return count(instructions)._replace(
        registers=registers, stack=stack, spill_stores=stack, shared=binary.metadata.shared
    )


def _amd(text: str, shared: int) -> Figures:
    """From the assembly: its instructions, and the metadata that closes it."""

    def largest(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)))

    mnemonics = re.findall(r"^\t([a-z]\w+)", text, re.MULTILINE)
    return count(mnemonics, AMD)._replace(
        registers=largest("vgpr_count"),
        stack=largest("private_segment_fixed_size"),
        spill_stores=largest("vgpr_spill_count"),
        shared=shared,
    )
