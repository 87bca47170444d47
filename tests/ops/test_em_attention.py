"""Laws of EM attention, on every backend that can run: what the equations say, and what follows
from them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import segkernels
from segkernels import fused, tolerance
from segkernels.fused import accumulation_dtype
from segkernels.ops.em_attention.cases import PAPER
from tests.contract import LAYOUTS
from tests.ops.attention import (
    DIFFERENTIATED,
    DTYPES,
    NORMS,
    OP,
    B,
    C,
    H,
    K,
    W,
    draw,
    em,
    same,
    written,
)


def lawful(got: Any, yardstick: Any, truth: Any, dtype: torch.dtype, longest: int) -> None:
    for tensors in zip(got, yardstick, truth, strict=True):
        error, allowed = tolerance.verdict(*tensors, dtype, longest)
        assert error <= allowed


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-13], ids=["", "tiny"])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_equals_its_definition(
    norm: str, iterations: int, scale: float, backend: str, device: str
) -> None:
    """Both forms of the two divisions in one; with tiny features each ε is seen."""
    x, mu = draw(device)
    x = scale * x
    for lam in (1.0, 1.7):
        got = em(backend, x, mu, iterations, temperature=lam, norm=norm)
        expected = written(x, mu, lam, iterations, norm)
        same((got[0] / scale, *got[1:]), (expected[0] / scale, *expected[1:]))
    if scale < 1 and iterations:
        assert (got[1].norm(dim=1) < 0.9).all()


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_responsibilities_sum_to_one(
    dtype: torch.dtype, iterations: int, backend: str, device: str
) -> None:
    z = em(backend, *draw(device, dtype), iterations)[2]
    assert (z >= 0).all() and tolerance.error(z.double().sum(1), torch.ones(B, H, W)) <= (
        tolerance.budget(z.dtype, K)
    )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bases_have_unit_length(dtype: torch.dtype, norm: str, backend: str, device: str) -> None:
    """Up to the additive ε, which shortens them: by ε(ε + s) / r."""
    x, mu = draw(device, dtype)
    _, m, z = em(backend, x, mu, norm=norm)
    length, rounding = m.double().norm(dim=1), tolerance.budget(m.dtype, C)
    a = x.double().flatten(2) @ z.double().flatten(2).mT  # [B, C, K]
    shorter = 1.01e-6 * (1e-6 + z.double().sum((2, 3))) / a.norm(dim=1)
    assert (length <= 1 + rounding).all()
    assert (length >= 1 - rounding - (shorter if norm == "additive" else 0)).all()


@pytest.mark.parametrize("lam", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_likelihood_does_not_fall(
    dtype: torch.dtype, lam: float, backend: str, device: str
) -> None:
    """It is what EM climbs, among bases of unit length: those of the clamped norm."""
    x, mu = draw(device, dtype)

    def likelihood(iterations: int) -> float:
        _, m, _ = em(backend, x, mu, iterations, temperature=lam, norm="clamp")
        scores = lam * x.double().flatten(2).mT @ m.double()  # [B, N, K]
        return scores.logsumexp(2).sum().item()

    found = [likelihood(t) for t in range(7)]
    rounding = tolerance.budget(dtype, H * W) * found[0]
    assert all(after >= before - rounding for before, after in pairwise(found))
    assert found[-1] > 1.05 * found[0]


def test_the_order_of_the_pixels_is_no_matter(backend: str, device: str) -> None:
    x, mu = draw(device)
    y, m, z = em(backend, x, mu)
    turned = em(backend, x.flip(2).mT, mu)
    same(turned, (y.flip(2).mT, m, z.flip(2).mT))


def test_the_order_of_the_bases_is_no_matter(backend: str, device: str) -> None:
    x, mu = draw(device)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    y, m, z = em(backend, x, mu)
    same(em(backend, x, mu[:, order]), (y, m[:, :, order], z[:, order]))


@pytest.mark.parametrize("norm", NORMS)
def test_iterations_compose(norm: str, backend: str, device: str) -> None:
    """Two of them, and two from where they ended, are four."""
    x, mu = draw(device)
    _, halfway, _ = em(backend, x, mu, 2, norm=norm)
    same(em(backend, x, halfway, 2, norm=norm), em(backend, x, mu, 4, norm=norm))


def test_no_iteration_reconstructs_from_the_bases_given(backend: str, device: str) -> None:
    x, mu = draw(device)
    z = torch.einsum("bchw,ck->bkhw", x, mu).softmax(1)
    y = torch.einsum("ck,bkhw->bchw", mu, z)
    same(em(backend, x, mu, 0), (y, mu.expand(B, -1, -1), z))


@pytest.mark.parametrize("iterations", [1, 4])
def test_one_base_is_the_direction_of_the_mean(iterations: int, backend: str, device: str) -> None:
    x, mu = draw(device)
    y, m, z = em(backend, x, mu[:, :1], iterations, norm="clamp")
    direction = F.normalize(x.mean((2, 3)), dim=1)
    same((m[:, :, 0], z), (direction, torch.ones(B, 1, H, W, device=device)))
    same([y], [direction[:, :, None, None].expand_as(x)])


def test_one_pixel_is_every_base(backend: str, device: str) -> None:
    """In its direction, and the reconstruction as well."""
    x, mu = draw(device)
    x = x[:, :, :1, :1]
    y, m, _ = em(backend, x, mu, norm="clamp")
    direction = F.normalize(x, dim=1)
    same((y, m), (direction, direction[:, :, 0].expand(-1, -1, K)))


def test_without_temperature_all_bases_share_alike(backend: str, device: str) -> None:
    x, mu = draw(device)
    _, m, z = em(backend, x, mu, temperature=0.0, norm="clamp")
    direction = F.normalize(x.mean((2, 3)), dim=1)
    same((m, z), (direction[:, :, None].expand(-1, -1, K), torch.full_like(z, 1 / K)))


def test_temperature_scales_the_features(backend: str, device: str) -> None:
    """The bases do not know their lengths."""
    x, mu = draw(device)
    hot = em(backend, x, mu, temperature=2.5, norm="clamp")
    same(hot, em(backend, 2.5 * x, mu, norm="clamp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_in_the_hundreds(dtype: torch.dtype, backend: str, device: str) -> None:
    case = replace(PAPER[0], shape=(1, 512, 17, 17), iterations=0, temperature=100.0)
    inputs = case.inputs(dtype, device=device)
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    del inputs["return_assignment"], wide["return_assignment"]
    z, yardstick, truth = (
        em(name, **given)[2]
        for name, given in ((backend, inputs), ("reference", inputs), ("reference", wide))
    )
    lawful([z], [yardstick], [truth], torch.float32, case.reduction)


@pytest.mark.parametrize(("outputs", "plain", "bias"), [(7, True, True), (20, False, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_folded_convolution_is_one_in_front(
    dtype: torch.dtype, outputs: int, plain: bool, bias: bool, backend: str, device: str
) -> None:
    """No worse than a map that is rounded to its type between the two."""
    x, _ = draw(device, dtype)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(outputs, C, 1, 1, generator=generator).div(2).to(dtype).to(device)
    b = torch.randn(outputs, generator=generator).to(dtype).to(device) if bias else None
    mu = F.normalize(torch.randn(outputs, K, generator=generator), dim=0).to(device)
    mu = mu.to(accumulation_dtype(dtype))

    def in_front(t: torch.dtype) -> tuple[Tensor, ...]:
        made = F.conv2d(x.to(t), w.to(t), None if b is None else b.to(t))
        return em("reference", made, mu.to(accumulation_dtype(t)), temperature=0.7)

    folded = {"weight": w.flatten(1) if plain else w, "bias": b, "temperature": 0.7}
    got = em(backend, x, mu, **folded)
    lawful(got, in_front(dtype), in_front(torch.float64), dtype, H * W)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_types_and_formats(dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    x, mu = draw(device, dtype)
    y, m, z = em(backend, x.to(memory_format=LAYOUTS[layout]), mu.half())
    wide = accumulation_dtype(dtype)
    assert (y.dtype, m.dtype, z.dtype) == (dtype, wide, wide)
    assert (y.shape, m.shape, z.shape) == (x.shape, (B, C, K), (B, K, H, W))
    assert all(t.is_contiguous(memory_format=LAYOUTS[layout]) for t in (y, z))
    assert len(segkernels.em_attention(x, mu, backend=backend)) == 2


BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "one for all": lambda mu: mu[None],
    "each its own": lambda mu: mu.repeat(B, 1, 1),
    "expanded": lambda mu: mu.expand(B, -1, -1),
    "transposed": lambda mu: mu.T.contiguous().T,
    "sliced": lambda mu: mu.new_full((B, C + 2, 2 * K), float("nan"))[:, 1:-1, ::2].copy_(mu),
}


@pytest.mark.parametrize("given", BASES)
def test_bases_of_any_shape_and_strides(given: str, backend: str, device: str) -> None:
    x, mu = draw(device)
    same(em(backend, x, BASES[given](mu)), em(backend, x, mu))


def test_bases_of_each_image(backend: str, device: str) -> None:
    x, mu = draw(device)
    both = em(backend, x, torch.stack([mu, -mu]))
    for image, own in enumerate((mu, -mu)):
        alone = em(backend, x[image : image + 1], own)
        same([t[image] for t in both], [t[0] for t in alone])


def test_half_bases_are_widened(backend: str, device: str) -> None:
    x, mu = draw(device)
    for low in (torch.bfloat16, torch.float16):
        same(em(backend, x, mu.to(low)), em(backend, x, mu.to(low).double()), 0.0)


def test_temperature_is_a_number_or_a_tensor_of_one(backend: str, device: str) -> None:
    x, mu = draw(device)
    expected = em(backend, x, mu, temperature=1.5)
    for size in ((), (1,), (1, 1, 1)):
        lam = torch.full(size, 1.5, dtype=torch.bfloat16, device=device, requires_grad=True)
        got = em(backend, x, mu, temperature=lam, gradient="full")
        same(got, expected)
        got[0].square().sum().backward()
        assert lam.grad is not None and lam.grad.shape == size and lam.grad.any()
        assert lam.grad.dtype == torch.bfloat16
    same(em(backend, x, mu, temperature=1), em(backend, x, mu))


@pytest.mark.parametrize("gradient", ["none", *DIFFERENTIATED])
def test_autocast(gradient: str, backend: str, device: str) -> None:
    """Features are cast; bases and temperature are not."""
    x, mu = (t.requires_grad_() for t in draw(device, torch.float32))
    lam = torch.tensor(1.3, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = em(backend, x, mu, temperature=lam, gradient=gradient)
    by_hand = em(backend, x.bfloat16(), mu, temperature=lam, gradient=gradient)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    same(got, by_hand, 0.0)
    if gradient != "none":
        dx, like = (torch.autograd.grad(t[0].square().sum(), x)[0] for t in (got, by_hand))
        same([dx], [like], 0.0)


@pytest.mark.parametrize("iterations", [0, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(0, 6, 7), (2, 0, 7)], ids=["no image", "no pixel"])
def test_nothing_to_fit(
    size: tuple[int, int, int], norm: str, iterations: int, backend: str, device: str
) -> None:
    """Bases without pixels are zero, and have no gradient; those given keep theirs."""
    mu = draw(device)[1].requires_grad_()
    x = torch.zeros(size[0], C, *size[1:], dtype=mu.dtype, device=device, requires_grad=True)
    y, m, z = em(backend, x, mu, iterations, gradient="full", norm=norm)
    assert y.shape == x.shape and z.shape == (size[0], K, *size[1:])
    same([m], [torch.zeros_like(m) if iterations else mu.expand(size[0], -1, -1)])
    dx, dmu = torch.autograd.grad((y, m, z), (x, mu), [torch.ones_like(t) for t in (y, m, z)])
    assert dx.shape == x.shape
    same([dmu], [torch.full_like(mu, 0 if iterations else size[0])])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_base_without_pixels(dtype: torch.dtype, norm: str, backend: str, device: str) -> None:
    """So far away that no pixel has any of it: zero, and what depends on it is finite."""
    x, mu = draw(device, dtype)
    x = x + 1
    mu[:, 2] = -1000.0
    x.requires_grad_(), mu.requires_grad_()
    results = em(backend, x, mu, 2, gradient="full", norm=norm)
    gradients = torch.autograd.grad(results, (x, mu), [torch.ones_like(t) for t in results])
    assert all(t.isfinite().all() for t in (*results, *gradients))
    first = em(backend, x, mu, 1, norm=norm)
    assert not first[1][:, :, 2].any() and not first[2][:, 2].any() and first[1][:, :, 3].any()


def test_more_bases_than_the_kernels_take(device: str) -> None:
    x = draw(device)[0]
    mu = torch.eye(C, 257, dtype=x.dtype, device=device)
    reasons = segkernels.explain(OP, x, mu)
    assert reasons["native"] == reasons["triton"] == "the kernels take up to 256 nodes, not 257"
    fused._decide.cache_clear()
    with pytest.warns(segkernels.SegkernelsPerformanceWarning, match="256 nodes"):
        same(segkernels.em_attention(x, mu), written(x, mu)[:2])
    with pytest.raises(segkernels.BackendUnavailableError, match="256 nodes, not 257"):
        segkernels.em_attention(x, mu, backend="native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segkernels.em_attention(x, mu, backend="reference")
