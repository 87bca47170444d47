"""The Triton kernels, interpreted on the CPU, against the equations in plain PyTorch in float64.

The interpreter must be chosen before Triton is imported, so this file runs itself again, as a
subprocess with TRITON_INTERPRET=1; there the tests are real. The contract reaches the same kernels
under that variable.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import segkernels
from segkernels import tolerance
from segkernels.fused import accumulation_dtype, memory_format
from segkernels.ops.soft_assign.cases import PAPER

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.triton_interpret
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


CONTRACT = str(Path(__file__).parents[1] / "test_contract.py")
RUNS = {
    "kernels": (__file__, "-m", "not slow"),
    "contract": (CONTRACT, "-k", "triton and (kernel_1 or one_row) and not compile and not export"),
    "contract-tiles": (CONTRACT, "-k", "triton and no_worse and several_tiles-bfloat16"),
}
SLOW_RUNS = {
    "kernels-slow": (__file__, "-m", "slow"),
    "contract-whole": (CONTRACT, "-k", "triton"),
}


@pytest.mark.skipif(INTERPRETED, reason="already there")
@pytest.mark.parametrize(
    "arguments",
    [
        *(pytest.param(run, id=name) for name, run in RUNS.items()),
        *(pytest.param(run, id=name, marks=pytest.mark.slow) for name, run in SLOW_RUNS.items()),
    ],
)
def test_in_the_interpreter(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def kernel(op: str, direction: str = "") -> Any:
    return getattr(importlib.import_module(f"segkernels.ops.{op}.triton"), op + direction)


def draw(*size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def depthwise(x: Tensor, w: Tensor, b: Tensor | None, *window: list[int]) -> Tensor:
    stride, padding, dilation = window
    rates = range(w.shape[0])
    return torch.cat(
        [
            F.conv2d(
                x,
                w[r].unsqueeze(1),
                None if b is None else b[r],
                stride,
                padding[2 * r : 2 * r + 2],
                dilation[2 * r : 2 * r + 2],
                groups=x.shape[1],
            )
            for r in rates
        ],
        1,
    )


def stage(
    t: Tensor, gamma: Tensor | None, beta: Tensor | None, act: str, eps: float | None
) -> Tensor:
    """φ(γ·N(t) + β)."""
    if eps is not None:
        var, mean = torch.var_mean(t, (0, 2, 3), correction=0, keepdim=True)
        t = (t - mean) / (var + eps).sqrt()
    t = t if gamma is None else t * gamma.view(1, -1, 1, 1).to(t.dtype)
    t = t if beta is None else t + beta.view(1, -1, 1, 1).to(t.dtype)
    return {"none": t, "relu": t.relu(), "relu6": F.relu6(t)}[act]


def separable(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    acts: tuple[str, str],
    eps: tuple[float | None, float | None],
    *window: list[int],
) -> Tensor:
    h = stage(depthwise(x, w, None, *window), gamma1, beta1, acts[0], eps[0])
    o = F.conv2d(h, v.reshape(-1, v.shape[2], 1, 1), groups=v.shape[0])
    return stage(o, gamma2, beta2, acts[1], eps[1])


def strided(dy: Tensor, how: str) -> Tensor:
    """The same numbers at other strides: those that cat, transpose and sum().backward() leave."""
    if how == "transposed":
        return dy.transpose(2, 3).contiguous().transpose(2, 3)
    if how == "expanded":
        return dy[:1, :1, :1, :1].expand(dy.shape)
    if how == "sliced":
        wide = dy.new_full((dy.shape[0], dy.shape[1] + 3, *dy.shape[2:]), float("nan"))
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, 2:-1] = dy
        return wide[:, 2:-1]
    return dy


def truth(f: Any, dtype: torch.dtype, dy: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    """[y, gradients …] of the equations computed in dtype."""
    inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs]
    y = f(inputs)
    wanted = [t for t in inputs if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(dtype))]


def assert_lawful(
    got: list[Tensor], f: Any, dy: Tensor, inputs: list[Tensor | None], longest: int
) -> None:
    dtype = dy.dtype
    exact = truth(f, torch.float64, dy, inputs)
    for i, (a, e, r) in enumerate(zip(got, exact, truth(f, dtype, dy, inputs), strict=True)):
        error, allowed = tolerance.verdict(a, r, e, dtype, longest)
        assert error <= allowed, f"result {i}: error {error:.2g}, allowed {allowed:.2g}"


DEPTHWISE = {  # B C H W, R kernel stride dilation
    "odd": ((2, 5, 7, 9), (1, 3, 3), (1, 1), [2, 1]),
    "three-rates-beyond": ((1, 3, 9, 8), (3, 3, 3), (1, 1), [1, 1, 2, 3, 12, 12]),
    "stride": ((1, 2, 9, 7), (1, 5, 3), (2, 1), [1, 2]),
    "blocks": ((2, 33, 9, 4), (1, 3, 3), (2, 2), [1, 1]),
}


# every case in float64 and in 16 bits, once in each layout; the other combinations are slow
DEFAULT = {("fp64", "nchw"), ("bf16", "nhwc")}
COMBINATIONS = [
    pytest.param(d, lay, marks=[] if (d, lay) in DEFAULT else [pytest.mark.slow])
    for d in DTYPES
    for lay in LAYOUTS
]


@interpreted
@pytest.mark.parametrize(("dtype", "layout"), COMBINATIONS)
@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise(case: str, dtype: str, layout: str) -> None:
    size, (rates, *window_size), stride, dilation = DEPTHWISE[case]
    padding = [d * (k // 2) for d, k in zip(dilation, window_size * rates, strict=True)]
    window = (list(stride), padding, dilation)
    x = draw(*size, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    w = draw(rates, size[1], *window_size, dtype=x.dtype, seed=1) / 3
    b = draw(rates, size[1], dtype=x.dtype, seed=2)
    y = kernel("depthwise_conv2d")(x, w, b, *window)
    assert memory_format(y) == memory_format(x)
    views = ("dense", "transposed", "expanded", "sliced") if dtype == "fp64" else ("transposed",)
    for how in views:
        dy = strided(draw(*y.shape, dtype=x.dtype, seed=3), how)
        got = kernel("depthwise_conv2d", "_backward")(dy, x, w, *window, [1, 1, 1])
        assert_lawful([y, *got], lambda t: depthwise(*t, *window), dy, [x, w, b], x[:, 0].numel())
    again = kernel("depthwise_conv2d", "_backward")(dy, x, w, *window, [1, 1, 1])
    assert all(map(torch.equal, got, again))


SEPARABLE = {  # B C H W, D R k stride dilation, eps, activations, affine
    "inference": ((2, 5, 7, 9), (7, 1, 3, 1), [2, 1], (None, None), ("relu", "relu6"), True),
    "training": ((2, 5, 7, 9), (7, 1, 3, 1), [2, 1], (1e-5, 1e-3), ("relu6", "relu"), True),
    "outer": ((2, 5, 7, 5), (7, 2, 3, 2), [2, 1, 1, 9], (None, 1e-3), ("relu", "none"), True),
    "inner": ((1, 33, 6, 5), (19, 2, 3, 1), [1, 1, 12, 12], (1e-5, None), ("none", "relu"), True),
    "bare": ((2, 4, 5, 5), (3, 1, 5, 1), [1, 1], (None, None), ("none", "none"), False),
}


@interpreted
@pytest.mark.parametrize(("dtype", "layout"), [*zip(DTYPES, [*LAYOUTS] * 2, strict=True)])
@pytest.mark.parametrize("case", SEPARABLE)
def test_separable(case: str, dtype: str, layout: str) -> None:
    size, (outputs, rates, k, stride), dilation, eps, acts, affine = SEPARABLE[case]
    window = ([stride, stride], [d * (k // 2) for d in dilation], dilation)
    x = draw(*size, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    w = draw(rates, size[1], k, k, dtype=x.dtype, seed=1) / 3
    v = draw(rates, outputs, size[1], dtype=x.dtype, seed=2) / size[1] ** 0.5
    wide = accumulation_dtype(x.dtype)
    widths = [rates * n for n in (size[1], size[1], outputs, outputs)]
    terms = [  # γ around 1, β around 0
        (i + 1) % 2 + draw(n, dtype=wide, seed=3 + i) / 4 if affine else None
        for i, n in enumerate(widths)
    ]
    y, o, *moments = kernel("separable_conv2d")(x, w, v, *terms, *acts, *eps, *window)
    assert memory_format(y) == memory_format(x)
    dy = strided(
        draw(*y.shape, dtype=x.dtype, seed=9), "transposed" if dtype == "fp64" else "sliced"
    )
    saved = (None, o) if eps[1] is not None else (None if acts[1] == "none" else y, None)
    arguments = (dy, x, *saved, w, v, *terms, *moments, *acts, *eps, *window)
    got = kernel("separable_conv2d", "_backward")(*arguments, [1, 1, 1] + [int(affine)] * 4)
    if x.dtype.itemsize > 2:  # 16-bit rounding moves values across the activations' kinks
        assert_lawful(
            [y, *(g for g in got if g.numel())],
            lambda t: separable(*t, acts, eps, *window),
            dy,
            [x, w, v, *terms],
            max(x[:, 0].numel(), *size),
        )
    else:
        exact = separable(
            *(None if t is None else t.double() for t in (x, w, v, *terms)), acts, eps, *window
        )
        rough = separable(x, w, v, *terms, acts, eps, *window)
        error, allowed = tolerance.verdict(y, rough, exact, x.dtype, size[1] * k * k)
        assert error <= allowed
        assert all(g.isfinite().all() for g in got)
    again = kernel("separable_conv2d", "_backward")(*arguments, [1, 1, 1] + [int(affine)] * 4)
    assert all(map(torch.equal, got, again))


@interpreted
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", [c for c in PAPER if c.shape[1] == 512], ids=lambda c: c.name)
def test_assignment_of_narrow_nodes(case: Any, dtype: str) -> None:
    """Logits in the hundreds: a product of bfloat16 that are not halves misses by a hundredfold."""
    inputs = replace(case, shape=(1, 512, 5, 9)).inputs(DTYPES[dtype])
    wide = {n: t.double() if isinstance(t, Tensor) else t for n, t in inputs.items()}
    _, exact = segkernels.soft_assign(**wide, backend="reference")
    _, q = segkernels.soft_assign(**inputs, backend="triton")
    assert (q - exact).abs().max() <= 5e-4


EM = {  # (B, C, H, W), D, T, arguments; D: a folded convolution to as many channels
    "last": ((2, 7, 5, 6), None, 2, {"gradient": "last", "temperature": 1.5}),
    "last-clamp": ((2, 7, 5, 6), None, 3, {"gradient": "last", "norm": "clamp"}),
    "last+bases": ((2, 7, 5, 6), None, 3, {"gradient": "last+bases", "own": True}),
    "full": ((2, 7, 5, 6), None, 2, {"gradient": "full", "own": True, "norm": "clamp"}),
    "no-iteration": ((2, 7, 5, 6), None, 0, {"gradient": "full", "own": True}),
    "none": ((2, 7, 5, 6), None, 2, {"gradient": "none", "own": True}),
    "shares-of-tiles": ((1, 3, 46, 45), None, 2, {"gradient": "full", "temperature": 1.5}),
    "folded": ((2, 7, 5, 6), 9, 2, {"gradient": "none", "temperature": 0.5}),
    "folded-own": ((2, 19, 5, 6), 3, 2, {"gradient": "none", "own": True}),
    "folded-no-bias": ((1, 7, 5, 6), 17, 0, {"gradient": "none", "bias": False}),
}


@interpreted
@pytest.mark.parametrize(("dtype", "layout"), sorted(DEFAULT))
@pytest.mark.parametrize("case", EM)
def test_em_attention(case: str, dtype: str, layout: str) -> None:
    """Every way to differentiate, by each of the results alone and by all."""
    size, outputs, iterations, options = EM[case]
    options = dict(options)
    x = draw(*size, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])
    wide, D = accumulation_dtype(x.dtype), outputs or size[1]
    own = size[:1] if options.pop("own", False) else ()
    inputs: dict[str, Tensor] = {
        "features": x,
        "bases": F.normalize(draw(*own, D, 4, dtype=wide, seed=1), dim=-2),
    }
    if "temperature" in options:
        inputs["temperature"] = torch.tensor(options.pop("temperature"), dtype=wide)
    bias = options.pop("bias", True)
    if outputs is not None:
        inputs["weight"] = draw(D, size[1], dtype=wide, seed=2) / size[1] ** 0.5
        if bias:
            inputs["bias"] = draw(D, dtype=wide, seed=3)

    def run(dtype: torch.dtype | None, backend: str, of: slice) -> list[Tensor]:
        given = {n: t.detach().to(dtype or t.dtype) for n, t in inputs.items()}
        leaves = [given[n].requires_grad_() for n in given if n not in ("weight", "bias")]
        made = segkernels.em_attention(
            **given, iterations=iterations, return_assignment=True, backend=backend, **options
        )
        graded = [y for y in made if y.requires_grad][of]
        dy = [draw(*y.shape, dtype=torch.float16, seed=5).to(y.dtype) for y in graded]
        gradients = (
            [] if not graded else torch.autograd.grad(graded, leaves, dy, materialize_grads=True)
        )
        return [*made, *gradients]

    longest = max(D, *size, size[0] * size[2] * size[3] * 4)
    alone = [slice(i, i + 1) for i in range(3)] if dtype == "fp64" else []
    for of in (slice(None), *alone):
        exact, rough = run(torch.float64, "reference", of), run(None, "reference", of)
        got = run(None, "triton", of)
        assert memory_format(got[0]) == memory_format(x)
        scale = max((t.abs().max().item() for t in exact[3:]), default=0.0)
        for i, (a, e, r) in enumerate(zip(got, exact, rough, strict=True)):
            error, allowed = tolerance.verdict(a, r, e, x.dtype, longest, scale)
            assert error <= allowed, f"{of} result {i}: error {error:.2g}, allowed {allowed:.2g}"


@interpreted
@pytest.mark.parametrize("size", [(0, 3, 4, 5), (1, 1, 1, 1)], ids=["no-samples", "one-pixel"])
def test_smallest(size: tuple[int, ...]) -> None:
    x, w, v = (
        draw(*size, dtype=torch.float32),
        torch.ones(1, size[1], 3, 3),
        torch.ones(1, 2, size[1]),
    )
    window = ([1, 1], [1, 1], [1, 1])
    y = kernel("depthwise_conv2d")(x, w, None, *window)
    dx, dw, db = kernel("depthwise_conv2d", "_backward")(y, x, w, *window, [1, 1, 1])
    assert torch.equal(dx, y if size[0] == 0 else x) and torch.equal(db[0], y.sum((0, 2, 3)))
    assert dw.sum() == (x * x).sum()
    how = ("relu", "relu", 1e-5, 1e-5)
    y, o, *moments = kernel("separable_conv2d")(x, w, v, *[None] * 4, *how, *window)
    made = kernel("separable_conv2d", "_backward")(
        y, x, None, o, w, v, *[None] * 4, *moments, *how, *window, [1, 1, 1, 0, 0, 0, 0]
    )
    assert [g.shape for g in made[:3]] == [x.shape, w.shape, v.shape]
    assert all(g.isfinite().all() for g in made)


@interpreted
def test_nothing_needed_is_nothing_made() -> None:
    x, w = draw(1, 2, 4, 4, dtype=torch.float32), torch.ones(1, 2, 3, 3)
    window = ([1, 1], [1, 1], [1, 1])
    for need in ([1, 0, 0], [0, 1, 0], [0, 0, 1]):
        made = kernel("depthwise_conv2d", "_backward")(x, x, w, *window, need)
        assert [int(g.numel() > 0) for g in made] == need
