"""The ways to differentiate EM attention, on every backend that can run: what each takes for
constant, and that the rest has the gradient of its function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import segkernels
from benchmarks import baselines
from segkernels import timing
from segkernels.ops.em_attention.cases import PAPER
from tests.contract import LAYOUTS, case_of, check, cotangents_like
from tests.ops.attention import (
    DIFFERENTIATED,
    DTYPES,
    NORMS,
    OP,
    C,
    assigned,
    draw,
    em,
    same,
    written,
)
from tests.views import VIEWS


def as_differentiated(
    gradient: str, x: Tensor, mu: Tensor, lam: Tensor, iterations: int, norm: str
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The function whose derivative a mode has at a point: what it takes for constant is held at
    its value there."""
    if gradient == "full":
        return lambda x, mu, lam: written(x, mu, lam, iterations, norm)
    given = mu.detach().clone()  # gradcheck moves its arguments in place
    point = x.detach(), given, lam.detach()
    before, after = (written(*point, t, norm)[1] for t in (max(0, iterations - 1), iterations))
    if gradient == "last+bases":
        return lambda x, mu, lam: written(x, before + mu - given, lam, min(1, iterations), norm)

    def last(x: Tensor, mu: Tensor, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = assigned(x, before, lam)
        return (after @ z.mT).view_as(x), after, z.mT.unflatten(2, x.shape[2:])

    return last


def leaves(device: str) -> list[Tensor]:
    """Features, bases, temperature."""
    lam = torch.tensor(1.3, dtype=torch.float64, device=device)
    return [t.requires_grad_() for t in (*draw(device), lam)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("gradient", DIFFERENTIATED)
def test_gradients_of_every_result(
    gradient: str, iterations: int, norm: str, backend: str, device: str
) -> None:
    """Of each alone and of all, by every argument that has one in this mode."""
    x, mu, lam = ours = leaves(device)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    got = em(backend, x, mu, iterations, temperature=lam, gradient=gradient, norm=norm)
    expected = as_differentiated(gradient, *theirs, iterations, norm)(*theirs)
    same(got, expected)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in expected]
    constant = gradient == "last"
    assert [t.requires_grad for t in got] == [True, not constant, True]
    for outputs in ([0], [2], [0, 2]) if constant else ([0], [1], [2], [0, 1, 2]):
        chosen = [cotangents[i] for i in outputs]
        a, b = (
            torch.autograd.grad(
                [results[i] for i in outputs], arguments, chosen, True, allow_unused=True
            )
            for results, arguments in ((got, ours), (expected, theirs))
        )
        assert (a[1] is None) == constant
        zeros = [torch.zeros_like(t) for t in ours]
        same(*([z if d is None else d for d, z in zip(ds, zeros, strict=True)] for ds in (a, b)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gradient", DIFFERENTIATED)
def test_gradcheck(gradient: str, norm: str, backend: str, device: str) -> None:
    """Against central differences of the function that a mode differentiates."""
    point = leaves(device)
    held = as_differentiated(gradient, *point, 2, norm)

    def f(x: Tensor, mu: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
        """The values of that function with the gradients of the operator."""
        got = em(backend, x, mu, 2, temperature=lam, gradient=gradient, norm=norm)
        pairs = zip(got, held(x.detach(), mu.detach(), lam.detach()), strict=True)
        return tuple(t + (value - t).detach() for t, value in pairs if t.requires_grad)

    assert torch.autograd.gradcheck(f, point, fast_mode=True)


def test_one_iteration_with_its_bases_is_the_whole(backend: str, device: str) -> None:
    for iterations in (0, 1):
        made = []
        for gradient in ("last+bases", "full"):
            x, mu, lam = arguments = leaves(device)
            results = em(backend, x, mu, iterations, temperature=lam, gradient=gradient)
            total = sum(t.square().sum() for t in results)
            made.append(torch.autograd.grad(total, arguments))
        same(*made, 0.0)


def test_the_modes_differ_in_their_gradients_alone(backend: str, device: str) -> None:
    x, mu, lam = leaves(device)
    none, *others = (
        em(backend, x, mu, temperature=lam, gradient=gradient)
        for gradient in ("none", *DIFFERENTIATED)
    )
    for results in others:
        same(results, none)
    with torch.no_grad():
        same(em(backend, x, mu, temperature=lam, gradient="full"), none)


def test_without_a_gradient(backend: str, device: str) -> None:
    """As published: nothing that comes out is differentiated, in the midst of training."""
    x, mu, lam = leaves(device)
    w = torch.eye(C, dtype=x.dtype, device=device, requires_grad=True)
    for options in ({}, {"weight": w}):
        results = em(backend, x, mu, temperature=lam, **options)
        assert not any(t.requires_grad for t in results)
        x.grad = None
        (x * 2 + results[0]).sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))
        assert mu.grad is None and lam.grad is None and w.grad is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["odd_channels", "vectors", "several_tiles", "no_iteration"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_obeys_the_law_of_tolerance(
    dtype: torch.dtype, name: str, layout: str, backend: str, device: str
) -> None:
    """The contract has the other modes, whose bases have gradients."""
    case = replace(case_of(OP, name), gradient="last")
    inputs = case.inputs(dtype, LAYOUTS[layout], device)
    check(OP, case, inputs, backend, cotangents_like(OP, inputs))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("odd_channels", torch.float64), ("vectors", torch.bfloat16)]
)
def test_last_of_any_strides(
    name: str, dtype: torch.dtype, layout: str, view: str, backend: str, device: str
) -> None:
    case = replace(case_of(OP, name), gradient="last")
    inputs = case.inputs(dtype, LAYOUTS[layout], device)
    dy, dm, dz = cotangents_like(OP, inputs)
    check(OP, case, inputs, backend, (VIEWS[view](dy), dm, VIEWS[view](dz)))
    inputs["iterations"] = 1  # after more of them, equal pixels have equal bases and no gradient
    inputs["features"] = VIEWS[view](inputs["features"])
    check(OP, case, inputs, backend, cotangents_like(OP, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_is_saved(dtype: torch.dtype, backend: str, device: str) -> None:
    """For the backward through all iterations, beyond the inputs: a tenth of what eager saves."""
    if backend == "reference":
        pytest.skip("PyTorch saves what it will")
    case = replace(PAPER[0], shape=(1, 64, 33, 33), bases=32)
    inputs = case.inputs(dtype, device=device)
    given = [t.requires_grad_() for t in inputs.values() if isinstance(t, Tensor)]
    ours, eager = (
        timing.saved_bytes(lambda f=f, o=o: f(**inputs, **o), given)
        for f, o in (
            (segkernels.em_attention, {"backend": backend}),
            (baselines.em_attention, {}),
        )
    )
    assert 10 * ours <= eager
