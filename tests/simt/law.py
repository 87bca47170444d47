"""The equations in plain PyTorch, and the law of tolerance (segkernels.tolerance) against them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from segkernels import tolerance

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def results(function: Callable[..., Tensor], inputs: list[Tensor | None], dy: Tensor) -> list:
    """y and the gradient of every input; None for those that are None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def widened(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def check(got: dict[str, Tensor], yardstick: list, truth: list, dtype, longest_sum: int) -> None:
    """`yardstick`: the equations in `dtype`, `truth`: in float64; what is empty was not asked."""
    gradients = [t.abs().max().item() for t in truth[1:] if t is not None and t.numel()]
    for (name, value), rough, true in zip(got.items(), yardstick, truth, strict=True):
        if value.shape == (0,):
            continue
        assert value.shape == true.shape, f"{name}: {value.shape}, expected {true.shape}"
        assert value.dtype == rough.dtype, name
        largest = max(gradients, default=0.0)
        error, allowed = tolerance.verdict(value, rough, true, dtype, longest_sum, largest)
        assert error <= allowed, f"{name}: error {error:.3g} > {allowed:.3g} allowed"
