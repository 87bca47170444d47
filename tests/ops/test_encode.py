"""Laws of residual encoding, on every backend that can run: what the equations say, and what
follows from them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import segkernels

B, C, H, W, K = 2, 12, 6, 7, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SCALES = {
    "negative": [-0.5, -0.1, -0.3, -0.2, -0.7],
    "positive": [0.5, 0.1, 0.3, 0.2, 0.7],
    "mixed": [0.05, -0.1, 0.02, -0.2, 0.01],
    "zero": [-0.5, 0.0, -0.3, 0.0, -0.7],
}


def draw(
    device: str, dtype: torch.dtype = torch.float64, kind: str = "negative"
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, codewords, scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, H, W, generator=generator).to(dtype)
    c = torch.randn(K, C, generator=generator).to(dtype)
    return x.to(device), c.to(device), torch.tensor(SCALES[kind], dtype=dtype, device=device)


def written(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The equations as the paper writes them, with their tensor of pixels, codewords, channels."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
    residuals = pixels[:, :, None] - c  # [B, N, K, C]
    q = torch.softmax(s * residuals.square().sum(3), 2)
    return (q[..., None] * residuals).sum(1)


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("kind", SCALES)
def test_equals_its_definition(kind: str, backend: str, device: str) -> None:
    """The result and its gradients; at a scale of zero, too."""
    ours = [t.requires_grad_() for t in draw(device, kind=kind)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    got, expected = segkernels.encode(*ours, backend=backend), written(*theirs)
    same(got, expected)
    de = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected)
    for a, b in zip(
        torch.autograd.grad(got, ours, de), torch.autograd.grad(expected, theirs, de), strict=True
    ):
        same(a, b, 1e-8)


def test_permuting_codewords_permutes_the_result(backend: str, device: str) -> None:
    x, c, s = draw(device)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    e = segkernels.encode(x, c, s, backend=backend)
    same(segkernels.encode(x, c[order], s[order], backend=backend), e[:, order])


def test_permuting_pixels_changes_nothing(backend: str, device: str) -> None:
    x, c, s = draw(device)
    e = segkernels.encode(x, c, s, backend=backend)
    same(segkernels.encode(x.flip(2).mT, c, s, backend=backend), e)


@pytest.mark.parametrize("kind", SCALES)
def test_shifting_features_and_codewords_changes_nothing(
    kind: str, backend: str, device: str
) -> None:
    x, c, s = draw(device, kind=kind)
    by = torch.linspace(-30, 40, C, dtype=torch.float64, device=device)
    e = segkernels.encode(x, c, s, backend=backend)
    same(segkernels.encode(x + by[:, None, None], c + by, s, backend=backend), e)


FAR = {"features and codewords": (64.0, 64.0, 1.0), "features alone": (64.0, 0.0, 1 / 64)}


@pytest.mark.parametrize("far", FAR)
def test_no_cancellation_far_away(far: str, backend: str, device: str) -> None:
    """Float32, far from the origin or far from the codewords: what all codewords have in common is
    large and must not be rounded with the rest.
    """
    x, c, _ = draw(device, torch.float32)
    features_at, codewords_at, spread = FAR[far]
    x, c = x + features_at, spread * c + codewords_at
    s = torch.full_like(c[:, 0], -0.2)
    e = segkernels.encode(x, c, s, backend=backend)
    expected = written(x.double(), c.double(), s.double())
    same(e / expected.abs().max(), expected / expected.abs().max(), 2e-5)


@pytest.mark.parametrize("at", [1000.0, -1000.0], ids=str)
def test_one_codeword_far_from_the_others(at: float, backend: str, device: str) -> None:
    """The others keep their accuracy: what is rounded does not grow with the far one."""
    x, c, s = draw(device, torch.float32)
    c[2] = at
    e = segkernels.encode(x, c, s, backend=backend)
    near = [0, 1, 3, 4]
    same(e[:, near], written(x.double(), c.double(), s.double())[:, near], 2e-4)


def test_equal_pixels_add_up(backend: str, device: str) -> None:
    """A map of N equal pixels is N times one pixel; the masses of one pixel are one."""
    x, c, s = draw(device)
    x = x[:, :, :1, :1]
    one = segkernels.encode(x, c, s, backend=backend)
    same(segkernels.encode(x.expand(-1, -1, H, W), c, s, backend=backend), H * W * one)
    residuals = x[:, :, 0, 0][:, None] - c  # [B, K, C]
    q = (s * residuals.square().sum(2)).softmax(1)
    same(one, q[..., None] * residuals)


def test_one_codeword_takes_all(backend: str, device: str) -> None:
    x, c, s = draw(device)
    e = segkernels.encode(x, c[:1], s[:1], backend=backend)
    same(e[:, 0], x.sum((2, 3)) - H * W * c[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strong_scales_assign_to_the_nearest_codeword(
    dtype: torch.dtype, backend: str, device: str
) -> None:
    x, c, s = draw(device, dtype)
    e = segkernels.encode(x, c, torch.full_like(s, -1e4), backend=backend).double()
    pixels, wide = x.flatten(2).mT.double(), c.double()  # [B, N, C]
    q = F.one_hot(torch.cdist(pixels, wide).argmin(2), K).double()
    expected = q.mT @ pixels - q.sum(1)[..., None] * wide
    same(e, expected, {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype])


def finite(backend: str, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The result, which is finite as are its gradients."""
    arguments = [t.requires_grad_() for t in (x, c, s)]
    e = segkernels.encode(*arguments, backend=backend)
    de = torch.randn(e.shape, generator=torch.Generator().manual_seed(1)).to(e)
    for t in (e, *torch.autograd.grad(e, arguments, de)):
        assert t.isfinite().all()
    return e


@pytest.mark.parametrize("size", [(0, 6, 7), (2, 0, 7)], ids=["no image", "no pixel"])
def test_nothing_to_encode(size: tuple[int, int, int], backend: str, device: str) -> None:
    _, c, s = (t.requires_grad_() for t in draw(device))
    x = torch.zeros(size[0], C, *size[1:], dtype=c.dtype, device=device, requires_grad=True)
    e = segkernels.encode(x, c, s, backend=backend)
    assert e.shape == (size[0], K, C) and not e.any()
    gradients = torch.autograd.grad(e, (x, c, s), torch.ones_like(e))
    assert all(d.shape == t.shape for d, t in zip(gradients, (x, c, s), strict=True))
    assert not any(d.any() for d in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_codeword(dtype: torch.dtype, backend: str, device: str) -> None:
    """So far away that no pixel has any of it."""
    x, c, s = draw(device, dtype)
    c[2] = 1000.0
    e = finite(backend, x, c, s)
    assert not e[:, 2].any() and e[:, 3].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pixels_on_a_codeword(dtype: torch.dtype, backend: str, device: str) -> None:
    """Nothing is left of them."""
    _, c, s = draw(device, dtype)
    x = c[:1, :, None, None].expand(B, C, H, W).clone()
    e = finite(backend, x, c.clone(), torch.full_like(s, -100.0))
    same(e, torch.zeros(B, K, C, device=device), 1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e3, 1e6, 1e12])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scales_tiny_and_huge(dtype: torch.dtype, scale: float, backend: str, device: str) -> None:
    x, c, s = draw(device, dtype)
    e = finite(backend, x, c, (scale * s.double()).to(torch.promote_types(dtype, torch.float32)))
    if scale <= 1e-6:  # all codewords share alike
        expected = (x.double().sum((2, 3))[:, None] - H * W * c.double()) / K
        same(e.double(), expected, 1e-2)
