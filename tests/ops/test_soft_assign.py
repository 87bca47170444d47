"""Laws of soft assignment, on every backend that can run: what the equations say, and what follows
from them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import segkernels
from segkernels.ops.soft_assign.cases import PAPER

B, C, H, W, K = 2, 12, 6, 7, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [
    {},
    {"normalise": False},
    {"average": False},
    {"average": False, "normalise": False},
    {"eps": 0.1, "normalise": False},
]


def draw(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features, anchors, scales; every pixel is shared among some nodes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, H, W, generator=generator).to(dtype)
    w = torch.randn(K, C, generator=generator).to(dtype)
    s = (1 + torch.rand(K, C, generator=generator)).to(dtype)
    return x.to(device), w.to(device), s.to(device)


def written(
    x: Tensor,
    w: Tensor,
    s: Tensor,
    average: bool = True,
    normalise: bool = True,
    eps: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """The equations as the paper writes them, with their tensor of pixels, nodes and channels."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
    residuals = (pixels[:, :, None] - w) / s  # [B, N, K, C]
    q = torch.softmax(-residuals.square().sum(3) / 2, 2)  # [B, N, K]
    z = (q[..., None] * residuals).sum(1)
    if average:
        z = z / (q.sum(1) + eps)[..., None]
    if normalise:
        z = z / z.norm(dim=2, keepdim=True)
    return z, q.permute(0, 2, 1).unflatten(2, x.shape[2:])


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_its_definition(options: dict[str, Any], backend: str, device: str) -> None:
    """Both results, and the gradients of both with respect to all arguments."""
    ours = [t.requires_grad_() for t in draw(device)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    got = segkernels.soft_assign(*ours, **options, backend=backend)
    expected = written(*theirs, **options)
    for a, b in zip(got, expected, strict=True):
        same(a, b)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in expected]
    for outputs in ([0], [1], [0, 1]):
        chosen = [cotangents[i] for i in outputs]
        a = torch.autograd.grad([got[i] for i in outputs], ours, chosen, retain_graph=True)
        b = torch.autograd.grad([expected[i] for i in outputs], theirs, chosen, retain_graph=True)
        for mine, other in zip(a, b, strict=True):
            same(mine, other, 1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_assignment_sums_to_one(dtype: torch.dtype, backend: str, device: str) -> None:
    _, q = segkernels.soft_assign(*draw(device, dtype), backend=backend)
    assert (q >= 0).all()
    same(q.sum(1), torch.ones(B, H, W, device=device), 1e-6)


def test_permuting_nodes_permutes_results(backend: str, device: str) -> None:
    x, w, s = draw(device)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    z, q = segkernels.soft_assign(x, w, s, backend=backend)
    permuted = segkernels.soft_assign(x, w[order], s[order], backend=backend)
    same(permuted[0], z[:, order])
    same(permuted[1], q[:, order])


def test_permuting_pixels_permutes_the_assignment_alone(backend: str, device: str) -> None:
    x, w, s = draw(device)
    z, q = segkernels.soft_assign(x, w, s, backend=backend)
    turned = segkernels.soft_assign(x.flip(2).mT, w, s, backend=backend)
    same(turned[0], z)
    same(turned[1], q.flip(2).mT)


def test_shifting_features_and_anchors_changes_nothing(backend: str, device: str) -> None:
    x, w, s = draw(device)
    by = torch.linspace(-30, 40, C, dtype=torch.float64, device=device)
    for got, expected in zip(
        segkernels.soft_assign(x + by[:, None, None], w + by, s, backend=backend),
        segkernels.soft_assign(x, w, s, backend=backend),
        strict=True,
    ):
        same(got, expected)


FAR = {"features and anchors": (64.0, 64.0, 1.0), "features alone": (64.0, 0.0, 1 / 64)}


@pytest.mark.parametrize("far", FAR)
def test_no_cancellation_far_away(far: str, backend: str, device: str) -> None:
    """Float32, far from the origin or far from the anchors: what all nodes have in common is large
    and must not be rounded with the rest.
    """
    x, w, _ = draw(device, torch.float32)
    features_at, anchors_at, spread = FAR[far]
    x, w = x + features_at, spread * w + anchors_at
    s = torch.full_like(w, 2.0)
    _, q = segkernels.soft_assign(x, w, s, backend=backend)
    same(q, written(x.double(), w.double(), s.double())[1], 2e-5)


@pytest.mark.parametrize("at", [1000.0, -1000.0], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_anchor_far_from_the_others(
    dtype: torch.dtype, at: float, backend: str, device: str
) -> None:
    """The others keep their accuracy: what is rounded does not grow with the far one."""
    x, w, s = draw(device, dtype)
    w[2] = at
    _, q = segkernels.soft_assign(x, w, s, backend=backend)
    same(q, written(x.double(), w.double(), s.double())[1], 2e-5)


def test_scaling_everything_changes_nothing(backend: str, device: str) -> None:
    x, w, s = draw(device)
    for got, expected in zip(
        segkernels.soft_assign(8 * x, 8 * w, 8 * s, backend=backend),
        segkernels.soft_assign(x, w, s, backend=backend),
        strict=True,
    ):
        same(got, expected)


def test_the_sign_of_a_scale_turns_the_nodes(backend: str, device: str) -> None:
    x, w, s = draw(device)
    z, q = segkernels.soft_assign(x, w, s, backend=backend)
    turned = segkernels.soft_assign(x, w, -s, backend=backend)
    same(turned[0], -z)
    same(turned[1], q)


def test_one_pixel(backend: str, device: str) -> None:
    """Every node is the pixel's direction from its anchor, however little of the pixel it has."""
    x, w, s = draw(device)
    x = x[:, :, :1, :1]
    z, q = segkernels.soft_assign(x, w, s, eps=0.0, backend=backend)
    residuals = (x[:, :, 0, 0][:, None] - w) / s  # [B, K, C]
    same(z, residuals / residuals.norm(dim=2, keepdim=True))
    same(q[:, :, 0, 0], (-residuals.square().sum(2) / 2).softmax(1))


def test_one_node_takes_all(backend: str, device: str) -> None:
    x, w, s = draw(device)
    z, q = segkernels.soft_assign(x, w[:1], s[:1], normalise=False, backend=backend)
    same(q, torch.ones(B, 1, H, W, device=device))
    same(z[:, 0], (x.mean((2, 3)) - w[0]) / s[0], 1e-8)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_small_scales_assign_to_the_nearest_anchor(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    """And a node is the direction in which the mean of its pixels lies, or, without any, zero."""
    x, w, s = draw(device, dtype)
    z, q = segkernels.soft_assign(x, w, torch.full_like(s, 0.003), backend=backend)
    pixels, wide = x.flatten(2).mT.double(), w.double()  # [B, N, C]
    nearest = F.one_hot(torch.cdist(pixels, wide).argmin(2), K).double()  # [B, N, K]
    same(q.flatten(2), nearest.mT, 1e-6)
    e = nearest.mT @ pixels - nearest.sum(1)[..., None] * wide
    same(z, F.normalize(e, dim=2), 1e-2 if dtype == torch.bfloat16 else 1e-5)


def finite(backend: str, x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The results, which are finite as are their gradients."""
    arguments = [t.requires_grad_() for t in (x, w, s)]
    results = segkernels.soft_assign(*arguments, backend=backend)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    gradients = torch.autograd.grad(results, arguments, cotangents)
    for t in (*results, *gradients):
        assert t.isfinite().all()
    return results


@pytest.mark.parametrize("size", [(0, 6, 7), (2, 0, 7)], ids=["no image", "no pixel"])
def test_nothing_to_assign(size: tuple[int, int, int], backend: str, device: str) -> None:
    _, w, s = (t.requires_grad_() for t in draw(device))
    x = torch.zeros(size[0], C, *size[1:], dtype=w.dtype, device=device, requires_grad=True)
    z, q = segkernels.soft_assign(x, w, s, backend=backend)
    assert z.shape == (size[0], K, C) and not z.any() and q.shape == (size[0], K, *size[1:])
    gradients = torch.autograd.grad((z, q), (x, w, s), (torch.ones_like(z), torch.ones_like(q)))
    assert all(d.shape == t.shape for d, t in zip(gradients, (x, w, s), strict=True))
    assert not any(d.any() for d in gradients)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_an_empty_node(dtype: torch.dtype, backend: str, device: str) -> None:
    """So far away that no pixel has any of it: a node of zeros."""
    x, w, s = draw(device, dtype)
    w[2] = 1000.0
    z, q = finite(backend, x, w, s)
    assert not q[:, 2].any() and not z[:, 2].any() and z[:, 3].any()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_node_without_direction(dtype: torch.dtype, backend: str, device: str) -> None:
    """Its pixels lie on the anchor, or on opposite sides of it: a node of zeros."""
    x = torch.zeros(1, C, 1, 4, dtype=dtype, device=device)
    x[0, 0] = torch.tensor([0.0, 0.0, 1.0, -1.0])
    w = torch.zeros(2, C, dtype=dtype, device=device)
    w[1] = 1000.0
    z, _ = finite(backend, x, w, torch.ones_like(w))
    assert not z.any()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_scales_tiny_and_huge(dtype: torch.dtype, scale: float, backend: str, device: str) -> None:
    x, w, s = draw(device, dtype)
    z, q = finite(backend, x, w, (scale * s.double()).to(torch.promote_types(dtype, torch.float32)))
    # of unit length, up to bfloat16, where a pixel is the node's
    same(z.double().norm(dim=2), (q.sum((2, 3)) > 0.5).double(), 1e-2)
    if scale >= 1e3:
        same(q, torch.full_like(q, 1 / K), 1e-3)


@pytest.mark.parametrize("case", [c for c in PAPER if c.shape[1] == 512], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_in_the_hundreds(dtype: torch.dtype, case: Any, backend: str, device: str) -> None:
    """C = 512 and scales about a half: a product in bfloat16 or TF32 misses by a hundred times."""
    inputs = dataclasses.replace(case, shape=(1, 512, 17, 17)).inputs(dtype, device=device)
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in inputs.items()}
    _, truth = segkernels.soft_assign(**wide, backend="reference")
    _, q = segkernels.soft_assign(**inputs, backend=backend)
    assert (q - truth).abs().max() <= 5e-4
