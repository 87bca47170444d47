"""The equations in plain PyTorch: the oracle, and a backend that runs everywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor


def separable_conv2d(
    x: Tensor,
    w: Tensor,
    v: Tensor,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    act1: str,
    act2: str,
    eps1: float | None,
    eps2: float | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[Tensor, ...]:
    d = [
        F.conv2d(x, w_r.unsqueeze(1), None, stride, p, r, groups=w.shape[1])
        for w_r, p, r in zip(w, _pairs(padding), _pairs(dilation), strict=True)
    ]  # R x [B, C, H', W']
    h, mean1, var1 = _stage(torch.cat(d, 1), gamma1, beta1, act1, eps1)
    o = [
        F.conv2d(h_r, v_r[:, :, None, None]) for h_r, v_r in zip(h.chunk(len(v), 1), v, strict=True)
    ]
    y, mean2, var2 = _stage(torch.cat(o, 1), gamma2, beta2, act2, eps2)
    return y, x.new_empty([0]), mean1, var1, mean2, var2


def _stage(
    d: Tensor, gamma: Tensor | None, beta: Tensor | None, act: str, eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """phi(gamma N(d) + beta), and the moments of d: [B, C, H, W] -> the same, [C], [C]."""
    wide = torch.float64 if d.dtype == torch.float64 else torch.float32
    mean = var = d.new_empty([0], dtype=wide)
    if eps is not None:
        var, mean = torch.var_mean(d.detach().to(wide), (0, 2, 3), correction=0)
        d = F.batch_norm(d, None, None, gamma, beta, training=True, eps=eps)
    else:
        if gamma is not None:
            d = d * gamma.to(d.dtype)[:, None, None]
        if beta is not None:
            d = d + beta.to(d.dtype)[:, None, None]
    return (F.relu(d) if act == "relu" else F.relu6(d) if act == "relu6" else d), mean, var


def _pairs(flat: list[int]) -> list[list[int]]:
    return [list(pair) for pair in zip(flat[::2], flat[1::2], strict=True)]
