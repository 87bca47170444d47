"""Every golden case through its class in segkernels.compat: strict state_dict, outputs, gradients,
buffers after a step.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segkernels
from tests.compat.golden import (
    COMMITTED,
    FULL,
    construct,
    load_tensors,
    manifest,
    narrow,
    our_class,
    state,
)

# (outputs and buffers, gradients) per run, as the golden README suggests; relative to the largest
# element of each tensor.
TOLERANCES = {
    "float64": (1e-10, 1e-9),
    "float64 stored as float32": (1e-6, 1e-6),
    "float32": (1e-5, 2e-5),
}


def _cases() -> list[Any]:
    found = []
    for folder in (FULL, COMMITTED):
        for name, case in manifest(folder)["cases"].items():
            if case["mode"] != "none" and our_class(case) is not None:
                found.append(
                    pytest.param(
                        folder, case, id=f"{'full' if folder == FULL else 'committed'}-{name}"
                    )
                )
    return found


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("folder", "case"), _cases())
def test_case(folder: Path, case: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    tensors = load_tensors(folder, case)
    module = _module(case, tensors, dtype, backend)
    inputs = [_input(case, name, tensors[name], dtype) for name in _numbered(tensors, "input")]
    try:
        outputs = _flat(_call(case["call"], module, inputs))
    except segkernels.BackendUnavailableError as error:
        pytest.skip(str(error).splitlines()[0])
    cotangents = {
        i: tensors[f"cotangent.{i}"].to(dtype)
        for i in range(len(outputs))
        if f"cotangent.{i}" in tensors
    }
    torch.autograd.backward([outputs[i] for i in cotangents], list(cotangents.values()))

    got = {f"output.{i}": out.detach() for i, out in enumerate(outputs)}
    got |= {f"grad_input.{i}": x.grad for i, x in enumerate(inputs)}
    got |= {f"grad_param.{key}": p.grad for key, p in module.named_parameters()}
    got |= {f"buffer_after.{key}": b for key, b in module.named_buffers()}
    # what is withheld is no number to compare with: the published one is known to be wrong
    for name in set(case.get("grad_absent", [])) - set(case.get("grad_withheld", [])):
        assert got[name] is None or not got[name].any(), f"{name} should be absent or zero"
    _compare(case, tensors, got, dtype)


def _module(
    case: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, backend: str
) -> nn.Module:
    module = construct(case, backend=backend)
    if "modified" in case:
        narrow(module, {key[6:]: t.shape for key, t in tensors.items() if key.startswith("param.")})
    weights = state(case, tensors, module)
    module = module.to(dtype).to_empty(device="cpu")
    module.load_state_dict(weights, strict=True)
    assert list(module.state_dict()) and set(module.state_dict()) == set(weights)
    for name in case.get("dropout_set_to_zero", []):
        module.get_submodule(name).p = 0.0
    return module.train(case["mode"] == "train")


def _compare(
    case: dict[str, Any],
    expected: dict[str, Tensor],
    got: dict[str, Tensor | None],
    dtype: torch.dtype,
) -> None:
    rounded = any(
        t.dtype == torch.float32 for name, t in expected.items() if name.startswith("output.")
    )
    run = (
        "float32"
        if dtype == torch.float32
        else "float64 stored as float32"
        if rounded
        else "float64"
    )
    gradients = [
        t for name, t in expected.items() if name.startswith("grad_") and "_norm." not in name
    ]
    largest_gradient = max((t.abs().max().item() for t in gradients), default=0.0)
    cancelled = set(case.get("zero_up_to_rounding", []))
    checked = 0
    for name, reference in expected.items():
        kind, _, key = name.partition(".")
        if kind not in (
            "output",
            "grad_input",
            "grad_param",
            "buffer_after",
            "grad_param_sample",
            "grad_param_norm",
        ):
            continue
        value = got.get(f"grad_param.{key}" if kind.startswith("grad_param") else name)
        assert value is not None, f"{name}: no value"
        value = value.detach().double()
        if kind == "grad_param_sample":
            value = value.flatten()[:: case["grad_sample_stride"][key]]
        elif kind == "grad_param_norm":
            value = value.norm()
        tolerance = TOLERANCES[run][kind.startswith("grad")]
        if run == "float32":
            errors = case["reference_fp32_error"]
            tolerance = max(
                tolerance, 10 * errors["grad_param" if kind.startswith("grad_param") else kind]
            )
        reference = reference.double()
        scale = reference.abs().max().item()
        if name in cancelled or f"grad_param.{key}" in cancelled or scale == 0:
            scale = largest_gradient
        error = (value - reference).abs().max().item()
        assert error <= tolerance * scale, (
            f"{name}: error {error:.2e}, allowed {tolerance:.0e} of {scale:.2e}"
        )
        checked += 1
    assert checked > 0


def _input(case: dict[str, Any], name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.to(dtype).requires_grad_(name not in case.get("inputs_no_gradient", []))


def _numbered(tensors: dict[str, Tensor], kind: str) -> list[str]:
    return sorted(
        (name for name in tensors if name.startswith(f"{kind}.")),
        key=lambda name: int(name.split(".")[1]),
    )


def _call(text: str, module: nn.Module, inputs: list[Tensor]) -> Any:
    """``call`` of the manifest, such as ``module([input.0, ..., input.5])``."""
    text = re.sub(
        r"input\.(\d+), \.\.\., input\.(\d+)",
        lambda m: ", ".join(f"input.{i}" for i in range(int(m[1]), int(m[2]) + 1)),
        text,
    )
    text = re.sub(r"input\.(\d+)", r"inputs[\1]", text)
    names = {"module": module, "composition": module, "inputs": inputs}
    return eval(text, {"__builtins__": {}}, names)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for part in values for tensor in _flat(part)]


def _schemas() -> list[Any]:
    schemas = manifest(COMMITTED)["state_dict_schemas"] | manifest(FULL)["state_dict_schemas"]
    return [pytest.param(s, id=name) for name, s in schemas.items() if our_class(s) is not None]


@pytest.mark.parametrize("schema", _schemas())
def test_state_dict_of_the_full_size_class(schema: dict[str, Any]) -> None:
    module = construct(schema)
    parameters = dict(module.named_parameters())
    codes = {torch.float32: "f32", torch.int64: "i64"}
    got = {
        key: f"{'p' if key in parameters else 'b'} {codes[t.dtype]}[{','.join(map(str, t.shape))}]"
        for key, t in module.state_dict().items()
    }
    excluded = schema.get("excluded_prefix")
    assert {
        key: text for key, text in got.items() if not excluded or not key.startswith(excluded)
    } == schema["state_dict"]
    assert sum(p.numel() for p in parameters.values()) == schema["parameters"]


def test_the_committed_choice() -> None:
    """At most 3 MB, and every class that has a face is in it."""
    size = sum(path.stat().st_size for path in COMMITTED.iterdir())
    assert size <= 3_000_000
    there = {our_class(case) for case in manifest(COMMITTED)["cases"].values()}
    possible = {
        our_class(case) for case in manifest(FULL)["cases"].values() if case["mode"] != "none"
    }
    assert possible - {None} <= there, "python -m tests.compat.choose"
