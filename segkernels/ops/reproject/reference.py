"""The equations in plain PyTorch: the oracle, and a backend that runs everywhere."""

from torch import Tensor

from segkernels.fused import memory_format


def reproject(z: Tensor, q: Tensor, r: Tensor | None) -> Tensor:
    y = z.to(q.dtype).transpose(1, 2) @ q.flatten(2)  # [B, D, N]
    y = y.unflatten(2, q.shape[2:])
    if r is not None:
        y = y + r
    return y.to(z.dtype).contiguous(memory_format=memory_format(q if r is None else r))
