"""`doctor`: what this machine can run, whether it computes rightly, and one remedy per fault.

A finding is "ok", a "note" (something is left out, on purpose or for want of hardware) or "failed".
The exit status is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

import segkernels
from segkernels import fused, native, tolerance
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
        epilog="example: python -m segkernels explain depthwise_conv2d --shape 1,64,33,33",
    )
    parser.add_argument("operator", choices=list(fused.OPERATORS))
    parser.add_argument("--case", help="one of the operator's named cases (default: its first)")
    parser.add_argument("--shape", type=_map_size, help="the case with another input: B,C,H,W")
    parser.add_argument("--kernel", type=int, help="the case with another kernel size")
    parser.add_argument("--stride", type=int, help="the case with another stride")
    parser.add_argument("--dtype", default="float32", choices=[str(d)[6:] for d in fused.DTYPES])
    parser.add_argument("--device", default=_devices()[-1], choices=_devices())
    options = parser.parse_args(arguments)
    cases = {case.name: case for case in _cases(options.operator, "PAPER", "AWKWARD")}
    if options.case and options.case not in cases:
        parser.error(f"no case {options.case!r}; there are {', '.join(cases)}")
    case = cases[options.case or next(iter(cases))]
    if options.shape:
        case = dataclasses.replace(case, shape=options.shape)
    for name in ("kernel", "stride"):
        if (size := getattr(options, name)) is not None:
            case = dataclasses.replace(case, **{name: (size, size)})
    inputs = case.inputs(getattr(torch, options.dtype), device=options.device)
    try:
        reasons = fused.explain(options.operator, **inputs)
    except fused.UnsupportedInputError as error:
        parser.error(str(error))
    rows = [(backend, "note" if why else "ok", why or "usable") for backend, why in reasons.items()]
    title = f"{options.operator} {options.dtype} on {options.device}: {_shapes(inputs)}"
    print_table(title, ("backend", "status", "why"), rows)
    return 0


def _shapes(inputs: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'x'.join(map(str, value.shape)) if isinstance(value, Tensor) else value}"
        for name, value in inputs.items()
        if value is not None
    )


def _map_size(text: str) -> tuple[int, ...]:
    """ "1,64,33,33" as a tuple."""
    try:
        sizes = tuple(map(int, text.split(",")))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"four sizes B,C,H,W, not {text!r}")
    return sizes


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


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _torch() -> Finding:
    value = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if _release(torch.__version__) < (2, 11):
        return Finding("torch", "failed", value, "pip install 'torch>=2.11'")
    return Finding("torch", "ok", value)


def _triton() -> Finding:
    triton, numpy = _version("triton"), _version("numpy")
    if triton is None:
        return Finding("triton", "note", "none", "pip install triton (a GPU backend)")
    if _release(triton) < (3, 6):
        return Finding("triton", "failed", triton, "pip install 'triton>=3.6'")
    if _release(triton) < (3, 7) and _release(numpy or "0.0") >= (2, 4):
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


def _cases(op: str, *groups: str) -> list[Any]:
    module = importlib.import_module(f"segkernels.ops.{op}.cases")
    return [case for group in groups for case in getattr(module, group)]


def _test_case(op: str) -> Any:
    """The largest of the tests' cases: still small, and no degenerate one."""
    return max(_cases(op, "AWKWARD"), key=lambda case: case.cost(torch.float32)["forward"])


def _backends(op: str) -> dict[str, dict[str, str | None]]:
    """device -> backend -> None (usable) or why not."""
    case = _test_case(op)
    return {d: fused.explain(op, **case.inputs(device=d)) for d in _devices()}


def _usable(operators: dict[str, dict[str, dict[str, str | None]]]) -> Iterator[tuple[str, ...]]:
    for op, devices in operators.items():
        for device, reasons in devices.items():
            yield from ((op, device, b) for b, why in reasons.items() if why is None)


def _self_test(op: str, device: str, backend: str) -> Finding:
    """Result and gradients in float32, held to the law of tolerance on a small case."""
    name = f"{op} {device} {backend}"
    case = _test_case(op)
    inputs = case.inputs(device=device)
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    try:
        results = _results(op, backend, inputs)
        yardstick, truth = _results(op, "reference", inputs), _results(op, "reference", wide)
    except Exception as failure:  # a kernel may fail in any way; the report goes on
        first = str(failure).partition("\n")[0]
        return Finding(name, "failed", f"{type(failure).__name__}: {first}", REMEDY)
    verdicts = [
        tolerance.verdict(*tensors, torch.float32, case.reduction)
        for tensors in zip(results, yardstick, truth, strict=True)
    ]
    error, allowed = max(verdicts, key=lambda v: v[0] / v[1])
    value = f"error {error:.1e}, allowed {allowed:.1e}"
    if all(error <= allowed for error, allowed in verdicts):
        return Finding(name, "ok", value)
    remedy = f"{REMEDY}; meanwhile SEGKERNELS_BACKEND=reference; please report this"
    return Finding(name, "failed", value, remedy)


def _results(op: str, backend: str, inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs and the gradients of all tensors for fixed cotangents."""
    leaves = {n: v.detach().requires_grad_() for n, v in inputs.items() if isinstance(v, Tensor)}
    y = getattr(segkernels, op)(**(inputs | leaves), backend=backend)
    y = y if isinstance(y, tuple) else (y,)
    dy = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t) for t in y]
    return [t.detach() for t in y] + [*torch.autograd.grad(y, list(leaves.values()), dy)]


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
