"""Laws of the re-projection, on every backend that can run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import segkernels

B, K, H, W, D = 2, 5, 6, 7, 12


def draw(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, assignment, residual."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, K, D), (B, K, H, W), (B, D, H, W))
    return tuple(  # type: ignore[return-value]
        torch.randn(size, generator=generator, dtype=torch.float64).to(device) for size in sizes
    )


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("residual", [False, True])
def test_equals_its_definition(residual: bool, backend: str, device: str) -> None:
    given = [t.requires_grad_() for t in draw(device)][: 2 + residual]
    z, q, *r = given
    got = segkernels.reproject(*given, backend=backend)
    expected = torch.einsum("bkd,bkhw->bdhw", z, q) + sum(r)
    same(got, expected)
    dy = torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(1)).to(expected)
    for a, b in zip(
        torch.autograd.grad(got, given, dy), torch.autograd.grad(expected, given, dy), strict=True
    ):
        same(a, b)


def test_the_order_of_the_nodes_is_no_matter(backend: str, device: str) -> None:
    z, q, r = draw(device)
    order = torch.tensor([3, 0, 4, 1, 2], device=device)
    y = segkernels.reproject(z, q, r, backend=backend)
    same(segkernels.reproject(z[:, order], q[:, order], r, backend=backend), y)


def test_graphs_side_by_side_add_up(backend: str, device: str) -> None:
    z, q, r = draw(device)
    first = segkernels.reproject(z[:, :2], q[:, :2], r, backend=backend)
    both = segkernels.reproject(z[:, 2:], q[:, 2:], first, backend=backend)
    same(both, segkernels.reproject(z, q, r, backend=backend))


def test_a_hard_assignment_copies_the_nodes(backend: str, device: str) -> None:
    z, q, _ = draw(device)
    nearest = q.argmax(1)  # [B, H, W]
    hard = F.one_hot(nearest, K).movedim(3, 1).to(q)
    y = segkernels.reproject(z, hard, backend=backend)
    assert torch.equal(y[1, :, 2, 3], z[1, nearest[1, 2, 3]])


@pytest.mark.parametrize("size", [(0, 6, 7), (2, 0, 7)], ids=["no image", "no pixel"])
def test_nothing_to_reproject(size: tuple[int, int, int], backend: str, device: str) -> None:
    z = draw(device)[0][: size[0]].requires_grad_()
    q = torch.zeros(size[0], K, *size[1:], dtype=z.dtype, device=device, requires_grad=True)
    y = segkernels.reproject(z, q, backend=backend)
    assert y.shape == (size[0], D, *size[1:])
    dz, dq = torch.autograd.grad(y, (z, q), torch.ones_like(y))
    assert dz.shape == z.shape and dq.shape == q.shape and not dz.any()
