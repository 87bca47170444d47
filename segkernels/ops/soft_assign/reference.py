"""The equations in plain PyTorch: the oracle, and a backend that runs everywhere."""

import torch.nn.functional as F
from torch import Tensor

from segkernels.fused import accumulation_dtype, memory_format
from segkernels.ops.nodes import centre_of


def soft_assign(
    x: Tensor, w: Tensor, s: Tensor, average: bool, normalise: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    centre = centre_of(w)
    w = w - centre
    t = x.flatten(2).to(accumulation_dtype(x.dtype)) - centre[:, None]  # [B, C, N]
    g = s**-2  # [K, C]
    shared = g.detach().amin(0)  # a square that all nodes have in common cancels in the softmax
    logits = (w * g) @ t - (g - shared) @ t.square() / 2 - (w.square() * g).sum(1)[:, None] / 2
    q = logits.softmax(1)  # [B, K, N]
    m = q.sum(2)  # [B, K]
    e = q @ t.transpose(1, 2) - m[:, :, None] * w  # [B, K, C]
    z = e / s
    if average:
        z = z / (m[:, :, None] + eps)
    if normalise:
        z = F.normalize(z, dim=2)
    q = q.unflatten(2, x.shape[2:]).contiguous(memory_format=memory_format(x))
    return z.to(x.dtype), q, e, m
