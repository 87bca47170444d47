"""The loader of the native libraries: every reason it can give, and the library it can load."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segkernels import fused, native
from segkernels.build_plan import MARK, Tree
from segkernels.toolchain import find_compiler


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package in place of the real one, and a loader that has loaded nothing."""
    for function in (native._load, native._why_not_device):
        function.cache_clear()
    monkeypatch.setattr(Tree, "here", lambda: Tree(tmp_path, tmp_path / "csrc"))
    yield tmp_path
    for function in (native._load, native._why_not_device):
        function.cache_clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA 13 torch with an A100, for everything that only asks."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=0: "NVIDIA A100")


def library(package: Path, device_type: str, **facts: Any) -> Path:
    """A file with a library's metadata, and nothing that could be loaded."""
    default = {
        "source_hash": "0",
        "machine": platform.machine(),
        "torch": "2.13.0",
        "torch_target": "2.11",
        "torch_cuda": "13.0",
        "archs": ["8.0", "9.0a"],
    }
    path = package / f"_native_{device_type}.so"
    path.write_bytes(b"\x7fELF..." + MARK + json.dumps(default | facts).encode() + b"\0...")
    return path


def test_a_device_without_native_kernels() -> None:
    assert "only for cpu and cuda" in str(native.why_not("mps"))


def test_not_built(package) -> None:
    assert native.why_not("cpu") == (
        "the native library for cpu is not built; to build it: python -m segkernels build"
    )
    assert native.metadata("cpu") is None


def test_an_unknown_instruction_set(package, monkeypatch) -> None:
    monkeypatch.setenv("SEGKERNELS_ISA", "avx")
    known = "avx512_bf16, avx512, avx2, baseline"
    assert native.why_not("cpu") == f"SEGKERNELS_ISA=avx is none of {known}"


def test_no_gpu(package, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert native.why_not("cuda") == "torch sees no CUDA device"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"machine": "riscv64"}, f"was built for riscv64, this machine is {platform.machine()}"),
        ({"torch_target": "3.1"}, "needs torch 3.1 or later"),
        ({"torch_cuda": None}, "was compiled against a CPU build of torch"),
        ({"torch_cuda": "12.8"}, "was built for CUDA 12.8, this torch has CUDA 13.0"),
    ],
)
def test_built_for_something_else(package, cuda, facts, reason) -> None:
    library(package, "cuda", **facts)
    said = str(native.why_not("cuda"))
    assert reason in said
    assert said.endswith("to build it for this environment: python -m segkernels build")


def test_a_library_that_does_not_load(package) -> None:
    library(package, "cpu", torch="9.9.9")
    said = str(native.why_not("cpu"))
    assert f"built with torch 9.9.9, here is torch {torch.__version__}" in said
    assert "_native_cpu.so" in said
    assert said.endswith("to build it anew: python -m segkernels build")


def test_a_file_that_is_not_ours(package) -> None:
    (package / "_native_cpu.so").write_bytes(b"something")
    assert "carries no segkernels metadata" in str(native.why_not("cpu"))


def test_a_gpu_it_is_not_compiled_for(package, cuda, monkeypatch) -> None:
    library(package, "cuda")
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    assert native.why_not("cuda") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=0: (12, 0))
    native._why_not_device.cache_clear()
    assert native.why_not("cuda") == (
        "_native_cuda.so is built for 8.0 9.0a, not for NVIDIA A100 (compute capability 12.0); "
        "to build it: SEGKERNELS_CUDA_ARCHS=12.0 python -m segkernels build"
    )


def test_every_gpu_is_asked_for_itself(package, cuda, monkeypatch) -> None:
    """Of two GPUs the second is too new; which of them is the current one does not matter."""
    library(package, "cuda")
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    capability = {0: (8, 0), 1: (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability.__getitem__)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    for current in capability:
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        first, second = (native.why_not(torch.device("cuda", index)) for index in capability)
        assert first is None and "compute capability 12.0" in str(second)
        assert native.why_not("cuda") == (first, second)[current]
        package_name = fused.OPERATORS["depthwise_conv2d"].package
        kinds = [(package_name, torch.device("cuda", i), torch.float32, None) for i in capability]
        assert [fused._reasons(kind)["native"] for kind in kinds] == [first, second]


def test_triton_launches_on_the_gpu_of_the_map(monkeypatch) -> None:
    """Triton takes the current device; the operator makes it that of its first tensor."""
    at: list[object] = []

    @contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        at.append(x)
        yield
        at.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    operator = fused.OPERATORS["depthwise_conv2d"]
    kernels = SimpleNamespace(depthwise_conv2d=lambda x, *_: at[-1] is x)
    monkeypatch.setitem(sys.modules, f"{operator.package}.triton", kernels)
    assert operator._lazy(operator.name)(torch.empty(1)) is True
    assert not at


def test_a_library_older_than_its_sources_warns_once(package, monkeypatch) -> None:
    library(package, "cpu")
    (package / "csrc" / "toy").mkdir(parents=True)
    (package / "csrc" / "toy" / "cpu.cpp").write_text("int x;\n")
    monkeypatch.setattr(torch.ops, "load_library", lambda _: None)
    with pytest.warns(UserWarning, match="older than its sources: python -m segkernels build"):
        assert native.why_not("cpu") is None
    assert native.why_not("cpu") is None  # and no second warning: pytest would raise it


@pytest.mark.build
@pytest.mark.skipif(find_compiler(os.environ) is None, reason="no C++ compiler")
def test_a_library_that_loads(package, monkeypatch) -> None:
    from segkernels.build import build
    from segkernels.build_plan import make_plan

    (package / "csrc" / "toy").mkdir(parents=True)
    (package / "csrc" / "toy" / "cpu.cpp").write_text("int segkernels_toy() { return 1; }\n")
    (package / "_version.py").write_text('__version__ = "1"\n')
    build(make_plan("cpu", tree=Tree.here()))
    assert native.why_not("cpu") is None
    facts = native.build_info()["cpu"]
    assert facts["torch"] == torch.__version__
    assert facts["torch_target"] == "2.11"
    assert "-O3" in facts["flags"]
    assert native.build_info()["cuda"] is None
