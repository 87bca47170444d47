"""The equations in plain PyTorch: the oracle, and a backend that runs everywhere."""

from typing import NamedTuple

import torch
from torch import Tensor

from segkernels.fused import accumulation_dtype, memory_format

EPSILON = 1e-6  # of the additive norm
LEAST = 1e-12  # of the clamped one


class Step(NamedTuple):
    """What one iteration makes of the bases it begins from."""

    mu: Tensor  # [B, K, D]
    z: Tensor  # [B, K, N]
    s: Tensor  # [B, K]
    r: Tensor


def responsibilities(t: Tensor, mu: Tensor, lam: Tensor | float) -> Tensor:
    return (lam * (mu @ t)).softmax(1)


def iterate(t: Tensor, mu: Tensor, lam: Tensor | float, clamp: bool) -> Step:
    z = responsibilities(t, mu, lam)
    s, a = z.sum(2), z @ t.mT  # [B, K], [B, K, D]
    r = a.norm(dim=2)
    d = torch.maximum(r, LEAST * s.clamp_min(LEAST)) if clamp else r + EPSILON * (EPSILON + s)
    return Step(a / d[:, :, None], z, s, r)


def em_attention(
    x: Tensor,
    mu: Tensor,
    lam: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    iterations: int,
    depth: int,
    clamp: bool,
    assignment: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t = x.flatten(2).to(accumulation_dtype(x.dtype))  # [B, C, N]
    if w is not None:
        t = w @ t if b is None else w @ t + b[:, None]
    heat: Tensor | float = 1.0 if lam is None else lam
    given, begins = mu, [mu]
    with torch.no_grad():
        for _ in range(iterations - max(0, depth)):
            begins, mu = [mu], iterate(t, mu, heat, clamp).mu
    steps: list[Step] = []
    if depth > 0:
        if depth < iterations:  # the gradient of a later beginning is handed to the given bases
            mu = mu + (given - given.detach())
        begins = []
        for _ in range(depth):
            begins.append(mu)
            steps.append(iterate(t, mu, heat, clamp))
            mu = steps[-1].mu
    z = steps[-1].z if steps else responsibilities(t, begins[0], heat)
    y = (mu.mT @ z).unflatten(2, x.shape[2:]).to(x.dtype)
    layout = memory_format(x)
    none, masses = mu.new_empty(0), mu.new_empty(*mu.shape[:2], 0)
    return (
        y.contiguous(memory_format=layout),
        z.unflatten(2, x.shape[2:]).contiguous(memory_format=layout) if assignment else none,
        mu.clone(),
        none if depth < 0 else torch.stack(begins, 1)[:, begins[0] is given :],
        torch.stack([step.s for step in steps], 1) if steps else masses.transpose(1, 2),
        torch.stack([step.r for step in steps], 1) if steps else masses.transpose(1, 2),
    )
