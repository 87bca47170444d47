"""BatchNorm as the affine stages of the operators: what a norm layer contributes, and how its
running statistics move.

    eval       y = γ (d - m̂) / √(v̂ + ε) + β = scale·d + shift          m̂, v̂ the running statistics
    training   y = γ (d - m) / √(v + ε) + β                             m, v the batch's own moments

The layers stay ordinary ``torch.nn.BatchNorm2d`` modules; nothing here owns a parameter.

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

Norms = Sequence[nn.BatchNorm2d | None]


class Affine(NamedTuple):
    """One affine stage over all rates: scale and shift [R·C], and eps where the batch's moments
    come first.
    """

    scale: Tensor | None
    shift: Tensor | None
    eps: float | None


def uses_batch_moments(norm: nn.BatchNorm2d) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def affine(norms: Norms) -> Affine:
    """The affine stage of R norms of one kind, rate by rate."""
    stages = [_affine(norm) for norm in norms]
    if len(stages) == 1:
        return stages[0]
    return Affine(
        _concatenated([s.scale for s in stages]),
        _concatenated([s.shift for s in stages]),
        stages[0].eps,
    )


def track(norms: Norms, mean: Tensor, var: Tensor, shape: Sequence[int]) -> None:
    """Moves the running statistics by the batch's moments (mean and biased var, [R·C]), as torch's
    own layer does in training.

    shape: [B, ..., H', W'] of the normalised map.
    """
    count = shape[0] * shape[-2] * shape[-1]
    channels = mean.shape[0] // len(norms)
    if count == 1:
        size = torch.Size([shape[0], channels, *shape[-2:]])
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {size}"
        )
    var = var * (count / (count - 1))  # unbiased
    for norm, m, v in zip(norms, mean.split(channels), var.split(channels), strict=True):
        if norm is not None:
            _track(norm, m, v)


def _affine(norm: nn.BatchNorm2d | None) -> Affine:
    if norm is None:
        return Affine(None, None, None)
    if uses_batch_moments(norm):
        return Affine(norm.weight, norm.bias, norm.eps)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(wide) + norm.eps)  # [C]
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale
    return Affine(scale, shift if norm.bias is None else norm.bias + shift, None)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    if not (norm.training and norm.track_running_stats):
        return
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    for running, moment in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        if running is None:
            continue
        moment = moment.to(running.dtype)
        if norm.momentum is None:  # cumulative average
            assert norm.num_batches_tracked is not None
            running.add_((moment - running) / norm.num_batches_tracked)
        else:
            running.lerp_(moment, norm.momentum)


def _concatenated(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None
