"""EM attention as published, and what to try it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import segkernels
from segkernels.fused import accumulation_dtype

OP = "em_attention"
B, C, H, W, K = 2, 12, 6, 7, 5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = ("additive", "clamp")
DIFFERENTIATED = ("last", "last+bases", "full")


def draw(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features around a few directions, and bases that have yet to find them."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(K, C, generator=generator, dtype=torch.float64), dim=1)
    nearest = torch.randint(K, (B, H, W), generator=generator)
    noise = torch.randn(B, C, H, W, generator=generator, dtype=torch.float64)
    x = 2 * directions[nearest].movedim(3, 1) + noise / 2
    mu = F.normalize(torch.randn(C, K, generator=generator, dtype=torch.float64), dim=0)
    return x.to(dtype).to(device), mu.to(accumulation_dtype(dtype)).to(device)


def written(
    x: Tensor,
    mu: Tensor,
    lam: Tensor | float = 1.0,
    iterations: int = 3,
    norm: str = "additive",
) -> tuple[Tensor, Tensor, Tensor]:
    """As published: a weighted mean over the pixels, then a division by its length."""
    t = x.flatten(2)
    mu = mu.expand(len(t), -1, -1)  # [B, C, K]
    z = assigned(x, mu, lam)
    for step in range(iterations):
        z = assigned(x, mu, lam) if step else z
        if norm == "additive":
            a = t @ (z / (1e-6 + z.sum(1, keepdim=True)))
            mu = a / (1e-6 + a.norm(dim=1, keepdim=True))
        else:
            mu = F.normalize(t @ F.normalize(z, p=1, dim=1), dim=1)
    return (mu @ z.mT).view_as(x), mu, z.mT.unflatten(2, x.shape[2:])


def assigned(x: Tensor, mu: Tensor, lam: Tensor | float) -> Tensor:
    return (lam * (x.flatten(2).mT @ mu)).softmax(2)  # [B, N, K]


def em(backend: str, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction, bases, assignment."""
    return segkernels.em_attention(*args, **options, return_assignment=True, backend=backend)


def same(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)
