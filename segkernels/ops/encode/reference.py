"""The equations in plain PyTorch: the oracle, and a backend that runs everywhere."""

from torch import Tensor

from segkernels.fused import accumulation_dtype, memory_format
from segkernels.ops.nodes import centre_of


def encode(x: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    centre = centre_of(c)
    c = c - centre
    t = x.flatten(2).to(accumulation_dtype(x.dtype)) - centre[:, None]  # [B, C, N]
    # a square that all codewords have in common cancels in the softmax
    shared = s.detach().amin().clamp(min=0) + s.detach().amax().clamp(max=0)
    near = -2 * s[:, None] * c  # [K, C]
    logits = (
        (s - shared)[:, None] * t.square().sum(1, keepdim=True)
        + near @ t
        + (s * c.square().sum(1))[:, None]
    )
    q = logits.softmax(1)  # [B, K, N]
    m = q.sum(2)  # [B, K]
    e = q @ t.transpose(1, 2) - m[:, :, None] * c  # [B, K, C]
    q = q.unflatten(2, x.shape[2:]).contiguous(memory_format=memory_format(x))
    return e.to(x.dtype), q, m
