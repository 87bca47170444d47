"""Truths in float64, and how far from them a kernel may be.

A value made of n terms, accumulated in type A and stored in type T, is off by at most
n·eps(A)·Σ|terms| + eps(T)·|value|; Σ|terms| is the same formula on absolute values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def depthwise(x: Tensor, w: Tensor, b: Tensor | None, stride, padding, dilation) -> Tensor:
    """Depthwise convolution of every rate, concatenated: [B, R·C, H', W']."""
    R, C = w.shape[:2]
    return torch.cat(
        [
            F.conv2d(
                x,
                w[r].unsqueeze(1),
                None if b is None else b[r],
                tuple(stride),
                tuple(padding[2 * r : 2 * r + 2]),
                tuple(dilation[2 * r : 2 * r + 2]),
                groups=C,
            )
            for r in range(R)
        ],
        1,
    )


def gradients(function, inputs: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, dy))


def check(
    name: str, got: Tensor, truth: Tensor, magnitude: Tensor, terms: int, roundings: int = 1
) -> None:
    """`roundings`: of stored intermediates of got's type that enter the value, itself included."""
    storage = torch.finfo(got.dtype).eps
    budget = (terms + 4) * torch.finfo(accumulation(got.dtype)).eps + (roundings - 1) * storage
    bound = budget * magnitude + storage * truth.abs() + torch.finfo(got.dtype).tiny
    if got.dtype == torch.float16:
        bound = bound + 2.0**-24  # the step of subnormal numbers
    error = (got.double() - truth).abs()
    assert got.shape == truth.shape, (
        f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    )
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{name}: error is {worst:.3g} of the bound"
