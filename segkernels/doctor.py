"""`doctor`: what this machine can run, whether it computes rightly, and one remedy per fault.

A finding is "ok", a "note" (something is left out, on purpose or for want of hardware) or "failed".
The exit status is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import segkernels
from segkernels import fused, native
from segkernels._version import __version__
from segkernels.build_plan import REMEDY
from segkernels.console import print_table
from segkernels.toolchain import find_compiler, find_nvcc


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: str  # ok, note, failed
    value: str
    remedy: str = ""


def main(arguments: list[str] | None = None) -> int:
    """`python -m segkernels doctor`; 1 when something failed."""
    parser = argparse.ArgumentParser(
        prog="python -m segkernels doctor",
        description="What this machine can run and why not the rest; tests each backend's numbers.",
        epilog="example: python -m segkernels doctor --json > doctor.json",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parser.parse_args(arguments)
    environment = list(_environment())
    backends = {name: _backends(name) for name in fused.OPERATORS}
    tests = [_self_test(*test) for test in _usable(backends)]
    failed = any(finding.status == "failed" for finding in [*environment, *tests])
    if options.json:
        report = {
            "version": __version__,
            "ok": not failed,
            "environment": [asdict(finding) for finding in environment],
            "operators": backends,
            "self_tests": [asdict(finding) for finding in tests],
            "build": native.build_info(),
        }
        print(json.dumps(report, indent=2))
    else:
        _print(environment, backends, tests)
    return int(failed)


def explain_main(arguments: list[str] | None = None) -> int:
    """`python -m segkernels explain`: the table backend -> usable or why not, for one input."""
    parser = argparse.ArgumentParser(
        prog="python -m segkernels explain",
        description="Which backends can run an operator on an input, and why not the others.",
        epilog="example: python -m segkernels explain depthwise_conv2d --dtype float16",
    )
    parser.add_argument("operator", choices=list(fused.OPERATORS))
    parser.add_argument("--case", help="a case of the operator (default: its smallest)")
    parser.add_argument("--shape", help="another input size for that case: B,C,H,W")
    parser.add_argument("--dtype", default="float32", choices=[str(d)[6:] for d in fused.DTYPES])
    parser.add_argument("--device", default=_devices()[-1], choices=_devices())
    options = parser.parse_args(arguments)
    inputs = _inputs(options.operator, options.device, getattr(torch, options.dtype))
    reasons = fused.explain(options.operator, **inputs)
    rows = [(backend, "note" if why else "ok", why or "usable") for backend, why in reasons.items()]
    shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in inputs.items() if isinstance(t, Tensor))
    title = f"{options.operator} on {options.device}, {options.dtype}: {shapes}"
    print_table(title, ("backend", "", "why"), rows)
    return 0


# ---- the environment -----------------------------------------------------------------------------


def _environment() -> Iterator[Finding]:
    yield Finding("segkernels", "ok", __version__)
    yield Finding("python", "ok", platform.python_version())
    yield _torch()
    yield Finding("numpy", "ok", _version("numpy") or "none")
    yield _triton()
    yield _torchvision()
    compiler, nvcc = find_compiler(os.environ), find_nvcc(os.environ)
    if compiler:
        yield Finding("compiler", "ok", compiler.version)
    else:
        yield Finding("compiler", "note", "none", "install g++ to compile the native kernels")
    yield Finding("nvcc", "ok", f"CUDA {nvcc.version}" if nvcc else "none")
    yield Finding("instruction sets", "ok", ", ".join(native.build_info()["instruction_sets"]))
    for device in _devices():
        yield _native(device)
    yield _gpu()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _torch() -> Finding:
    value = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if _numbers(torch.__version__) < (2, 11):
        return Finding("torch", "failed", value, "pip install 'torch>=2.11'")
    return Finding("torch", "ok", value)


def _triton() -> Finding:
    triton, numpy = _version("triton"), _version("numpy")
    if triton is None:
        return Finding("triton", "note", "none", "pip install triton (a GPU backend)")
    if _numbers(triton) < (3, 6):
        return Finding("triton", "failed", triton, "pip install 'triton>=3.6'")
    if _numbers(triton) < (3, 7) and _numbers(numpy or "0.0") >= (2, 4):
        status = "failed" if os.environ.get("TRITON_INTERPRET") == "1" else "note"
        value = f"{triton}; its interpreter does not work with numpy {numpy}"
        return Finding("triton", status, value, "pip install 'triton>=3.7.1' or 'numpy<2.4'")
    return Finding("triton", "ok", triton)


def _torchvision() -> Finding:
    """Not used here, but one built for another torch breaks whatever imports it."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "none (not needed)")
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # of any kind: it is not our package
        value = f"{_version('torchvision')} does not import: {str(error).splitlines()[0]}"
        remedy = "pip uninstall torchvision, or install the one that matches this torch"
        return Finding("torchvision", "failed", value, remedy)
    return Finding("torchvision", "ok", f"{_version('torchvision')} (not needed)")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "note", "none that torch can use")
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return Finding("GPU", "ok", f"{name}, compute capability {major}.{minor}")


def _native(device: str) -> Finding:
    reason = native.why_not(device)
    if reason is None:
        facts = native.metadata(device) or {}
        return Finding(
            f"native {device}", "ok", f"{facts['compiler']}, source {facts['source_hash']}"
        )
    fault, _, remedy = reason.rpartition("; to build it")
    return Finding(f"native {device}", "failed", fault, remedy.partition(": ")[2])


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


# ---- the operators -------------------------------------------------------------------------------


def _smallest(op: str) -> tuple[Any, Any]:
    """The module of an operator's cases, and the case with the least work."""
    cases = importlib.import_module(f"segkernels.ops.{op}.cases")
    return cases, min(cases.CASES, key=lambda c: cases.cost(c, torch.float32, "forward").flops)


def _inputs(op: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    cases, case = _smallest(op)
    inputs: dict[str, Any] = cases.inputs(case, dtype, torch.channels_last, device)
    return inputs


def _backends(op: str) -> dict[str, dict[str, str | None]]:
    """device -> backend -> None (usable) or why not."""
    return {d: fused.explain(op, **_inputs(op, d, torch.float32)) for d in _devices()}


def _usable(operators: dict[str, dict[str, dict[str, str | None]]]) -> Iterator[tuple[str, ...]]:
    for op, devices in operators.items():
        for device, reasons in devices.items():
            yield from ((op, device, b) for b, why in reasons.items() if why is None)


def _self_test(op: str, device: str, backend: str) -> Finding:
    """Result and gradients in float32 against the reference in float64, on the smallest case.

    Law of tolerance: no worse than the reference in float32 by more than the rounding of one result
    and of one sum of the operator's longest length.
    """
    name = f"{op} {device} {backend}"
    started = time.perf_counter()
    inputs = _inputs(op, device, torch.float32)
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    try:
        truth = _results(op, "reference", wide)
        error = _error(_results(op, backend, inputs), truth)
        yardstick = _error(_results(op, "reference", inputs), truth)
    except Exception as failure:  # a kernel may fail in any way; the report goes on
        first = str(failure).splitlines()[0] if str(failure) else ""
        return Finding(name, "failed", f"{type(failure).__name__}: {first}", REMEDY)
    cases, case = _smallest(op)
    eps = torch.finfo(torch.float32).eps
    allowed = yardstick + 2 * eps + 4 * eps * cases.length(case) ** 0.5
    seconds = time.perf_counter() - started
    value = f"largest error {error:.1e}, allowed {allowed:.1e} ({seconds:.2f} s)"
    if error <= allowed:
        return Finding(name, "ok", value)
    remedy = f"{REMEDY}; meanwhile SEGKERNELS_BACKEND=reference; please report this"
    return Finding(name, "failed", value, remedy)


def _results(op: str, backend: str, inputs: dict[str, Any]) -> list[Tensor]:
    """The output and the gradients of all tensors for a fixed cotangent."""
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.items() if isinstance(v, Tensor)}
    y = getattr(segkernels, op)(**(inputs | leaves), backend=backend)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)]


def _error(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error, each tensor's relative to its largest true value; NaN stays NaN."""
    errors = [
        (r - t).abs().max() / t.abs().max().clamp_min(1e-30)
        for r, t in zip(results, truth, strict=True)
    ]
    return float(torch.stack(errors).max())


# ---- the report ----------------------------------------------------------------------------------


def _print(
    environment: list[Finding],
    backends: dict[str, dict[str, dict[str, str | None]]],
    tests: list[Finding],
) -> None:
    header = ("", "status", "found")
    print_table("Environment", header, [(f.name, f.status, f.value) for f in environment])
    rows = [
        (op, device, backend, "note" if why else "ok", why or "usable")
        for op, devices in backends.items()
        for device, reasons in devices.items()
        for backend, why in reasons.items()
    ]
    print_table("Operators", ("operator", "device", "backend", "status", "why"), rows)
    print_table("Self-tests", header, [(f.name, f.status, f.value) for f in tests])
    findings = [*environment, *tests]
    for finding in findings:
        if finding.remedy:
            print(f"{finding.status}: {finding.name}: {finding.remedy}")
    failed = sum(finding.status == "failed" for finding in findings)
    print(f"{failed} failed" if failed else "all well")
