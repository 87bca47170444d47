"""Every Triton kernel compiled ahead of time, without a device, for sm_80, sm_90 and gfx942.

The launchers run on meta tensors of real sizes while `JITFunction.run` only takes notes: what is
compiled is what a GPU would be given, the same types, specialisation, blocks and warps. Kernels are
found by what the modules hold; one that no configuration launches fails.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)
triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from segkernels import fused  # noqa: E402

PACKAGE = Path(fused.__file__).parent
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}  # bytes a block


class Launch(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Map(NamedTuple):
    """A call of both operators on meta tensors: x [B, C, H, W], D outputs, R rates."""

    size: tuple[int, int, int, int]
    outputs: int
    rates: tuple[int, ...] = (12,)
    kernel: int = 3
    stride: int = 1
    dtype: torch.dtype = torch.bfloat16
    layout: torch.memory_format = torch.channels_last
    eps: float | None = None

    def depthwise(self) -> None:
        x, w, window = self._shared()
        bias = w.new_empty(w.shape[:2])
        y = _backend("depthwise_conv2d")(x, w, bias, *window)
        _backend("depthwise_conv2d", "_backward")(y, x, w, *window, [1, 1, 1])

    def separable(self) -> None:
        x, w, window = self._shared()
        rates, inputs = w.shape[:2]
        wide = fused.accumulation_dtype(self.dtype)
        v = w.new_empty(rates, self.outputs, inputs)
        inner = [w.new_empty(rates * inputs, dtype=wide)] * 2
        outer = [w.new_empty(rates * self.outputs, dtype=wide)] * 2
        how = ("relu", "relu6", self.eps, self.eps)
        y, o, *moments = _backend("separable_conv2d")(x, w, v, *inner, *outer, *how, *window)
        saved = (y, None) if self.eps is None else (None, o)
        _backend("separable_conv2d", "_backward")(
            y, x, *saved, w, v, *inner, *outer, *moments, *how, *window, [1] * 7
        )

    def _shared(self) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
        x = torch.empty(self.size, dtype=self.dtype, device="meta", memory_format=self.layout)
        w = x.new_empty(len(self.rates), x.size(1), self.kernel, self.kernel)
        padding = [r * (self.kernel // 2) for r in self.rates for _ in "hw"]
        return x, w, [[self.stride] * 2, padding, [r for r in self.rates for _ in "hw"]]


def _backend(op: str, direction: str = "") -> Any:
    return getattr(importlib.import_module(f"{fused.OPERATORS[op].package}.triton"), op + direction)


CONFIGURATIONS = {
    "nhwc-train": Map((16, 256, 65, 65), 256, eps=1e-5),
    "nchw": Map((16, 256, 65, 65), 256, layout=torch.contiguous_format),
}
MORE = {
    "nhwc": Map((16, 256, 65, 65), 256),
    "nhwc-fp32": Map((16, 256, 65, 65), 256, dtype=torch.float32),
    "xception-train": Map((16, 728, 33, 33), 728, rates=(1,), eps=1e-3),
    "xception-stride2": Map((16, 128, 129, 129), 256, rates=(1,), stride=2),
    "aspp-train": Map((16, 2048, 33, 33), 256, rates=(6, 12, 18), eps=1e-5),
    "decoder-fp16": Map((16, 304, 129, 129), 256, rates=(1,), dtype=torch.float16),
    "5x5": Map((16, 256, 65, 65), 256, rates=(2,), kernel=5),
    "7x7": Map((16, 256, 65, 65), 256, rates=(1,), kernel=7),
    "classes": Map((16, 21, 65, 65), 19, rates=(1,)),
    "odd-channels": Map((16, 21, 65, 65), 256, rates=(1,)),
    "nchw-train": Map((16, 256, 65, 65), 256, layout=torch.contiguous_format, eps=1e-5),
    "nchw-fp32-train": Map(
        (16, 256, 65, 65), 256, dtype=torch.float32, layout=torch.contiguous_format, eps=1e-5
    ),
    "nhwc-fp64-train": Map((2, 64, 33, 33), 48, dtype=torch.float64, eps=1e-5),
}


def launches(configuration: Map, operators: tuple[str, ...]) -> list[Launch]:
    """What the launchers would run, one launch of each kernel and block shape."""
    found: dict[str, Launch] = {}

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        optional = [i for i, a in enumerate(args) if a is None]
        found.setdefault(f"{self.__name__} {optional} {kwargs}", Launch(self, args, kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", note)
        for operator in operators:
            getattr(configuration, operator)()
    return list(found.values())


def compiled(launch: Launch, target: Any) -> Any:
    """The kernel, specialised the way a launch specialises it."""
    kernel, args, kwargs = launch
    backend = make_backend(target)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialisation, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(binary: Any, target: str) -> dict[str, int]:
    """Registers of a thread and bytes it spills (NVIDIA: its whole stack frame)."""
    if target == "gfx942":
        text = binary.asm["amdgcn"]
        registers, spilled = r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)"
    else:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [str(tool), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = r"REG:(\d+)", r"STACK:(\d+)"
    return {
        "registers": max(int(n) for n in re.findall(registers, text)),
        "spilled": max(int(n) for n in re.findall(spilled, text)),
    }


def check(configuration: Map, target: str, operators: tuple[str, ...]) -> None:
    for launch in launches(configuration, operators):
        binary = compiled(launch, TARGETS[target])
        used = resources(binary, target)
        what = f"{launch.kernel.__name__} {launch.kwargs}: {used}"
        assert used["spilled"] == 0, what
        assert 0 < used["registers"] <= 512 if target == "gfx942" else 255, what
        assert binary.metadata.shared <= SHARED_MEMORY[target], what


OPERATORS = ("depthwise", "separable")


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_spilling(name: str, operator: str) -> None:
    check(CONFIGURATIONS[name], "sm_90", (operator,))


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_for_other_targets(target: str, operator: str) -> None:
    check(MORE["nhwc"], target, (operator,))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS | MORE)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_everything(target: str, name: str) -> None:
    check((CONFIGURATIONS | MORE)[name], target, OPERATORS)


def test_every_kernel_is_compiled() -> None:
    every = {
        kernel.__name__ for path in PACKAGE.glob("ops/*/triton*.py") for kernel in _kernels(path)
    }
    seen = {
        launch.kernel.__name__
        for configuration in CONFIGURATIONS.values()
        for launch in launches(configuration, OPERATORS)
    }
    assert every == seen


def _kernels(path: Path) -> Iterator[Any]:
    module = importlib.import_module(
        ".".join(("segkernels", *path.relative_to(PACKAGE).with_suffix("").parts))
    )
    return (v for n, v in vars(module).items() if n.endswith("_kernel"))
