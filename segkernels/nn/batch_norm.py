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
    """The affine stage of R norms of one kind (mode, eps, which of γ and β exist), rate by rate."""
    present = [norm for norm in norms if norm is not None]
    if not present:
        return Affine(None, None, None)
    first = present[0]
    weight = _joined([norm.weight for norm in present])  # γ [R·C]
    bias = _joined([norm.bias for norm in present])  # β [R·C]
    if uses_batch_moments(first):
        return Affine(weight, bias, first.eps)
    mean = _joined([norm.running_mean for norm in present])
    var = _joined([norm.running_var for norm in present])
    assert mean is not None and var is not None
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(wide) + first.eps)
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
    return Affine(scale, shift, None)


def track(norms: Norms, mean: Tensor, var: Tensor, shape: Sequence[int]) -> None:
    """Moves the running statistics by the batch's moments (mean and biased var, [R·C]), as torch's
    own layer does in training.

    shape: [B, ..., H', W'] of the normalised map, which has more than one value a channel. (Where
    non-reentrant checkpointing stops its second run inside the operator, this is not reached again:
    the statistics then move once, and not twice as torch's.)
    """
    count = shape[0] * shape[-2] * shape[-1]
    channels = mean.shape[0] // len(norms)
    var = var * (count / (count - 1))  # unbiased
    for norm, m, v in zip(norms, mean.split(channels), var.split(channels), strict=True):
        if norm is not None:
            _track(norm, m, v)


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
        if norm.momentum is not None:
            running.lerp_(moment, norm.momentum)
        elif norm.num_batches_tracked is not None:  # cumulative average; without a count it rests
            running.add_((moment - running) / norm.num_batches_tracked)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    if len(present) <= 1:
        return present[0] if present else None
    return torch.cat(present)
