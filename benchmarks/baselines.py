"""What the kernels are measured against: each operator as a user of plain PyTorch writes it.

A function carries the name and the arguments of the operator's public function and is its published
form. `EXPANDED` holds the algebraically better form, differentiable as well, where one exists;
`FOLDED`, for inference, one that prepares arguments once (as a deployed network would) and returns
the call; `PRODUCTS`, the matrix products alone that a mode cannot do without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[int, int]


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: Any = "same",
    dilation: Any = 1,
) -> Tensor:
    """Grouped convolution, one group a channel; one convolution a rate, concatenated."""
    if weight.dim() == 4:
        weight, padding, dilation = weight[None], [padding], [dilation]
        bias = None if bias is None else bias[None]
    y = [
        F.conv2d(
            x,
            weight[r],
            None if bias is None else bias[r],
            stride,
            _pixels(padding if padding == "same" else padding[r], dilation[r], weight.shape[-2:]),
            dilation[r],
            groups=x.shape[1],
        )
        for r in range(len(weight))
    ]
    return y[0] if len(y) == 1 else torch.cat(y, dim=1)


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: Any = "same",
    dilation: Any = 1,
    *,
    inner_scale: Tensor | None = None,
    inner_shift: Tensor | None = None,
    inner_activation: str | None = None,
    outer_scale: Tensor | None = None,
    outer_shift: Tensor | None = None,
    outer_activation: str | None = None,
    inner_eps: float | None = None,
    outer_eps: float | None = None,
) -> Tensor:
    """Depthwise convolution, batch norm, activation, 1x1 convolution, batch norm, activation."""
    d = depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
    h = _activated(_affine(d, inner_scale, inner_shift, inner_eps), inner_activation)
    if pointwise_weight.dim() == 4:
        o = F.conv2d(h, pointwise_weight, pointwise_bias)
    else:
        rates = len(pointwise_weight)
        biases = [None] * rates if pointwise_bias is None else list(pointwise_bias)
        branches = h.chunk(rates, dim=1)
        triples = zip(branches, pointwise_weight, biases, strict=True)
        o = torch.cat([F.conv2d(b, v, bias) for b, v, bias in triples], dim=1)
    return _activated(_affine(o, outer_scale, outer_shift, outer_eps), outer_activation)


def _folded_separable(**arguments: Any) -> Callable[[], Tensor] | None:
    """Inference with every scale folded into the weights and every shift into the biases."""
    if arguments.get("inner_eps") is not None or arguments.get("outer_eps") is not None:
        return None
    if all(
        arguments.get(f"{s}_{p}") is None for s in ("inner", "outer") for p in ("scale", "shift")
    ):
        return None
    folded = dict(arguments)
    for stage, kind in (("inner", "depthwise"), ("outer", "pointwise")):
        weight, bias = arguments[f"{kind}_weight"], arguments.get(f"{kind}_bias")
        scale, shift = folded.pop(f"{stage}_scale", None), folded.pop(f"{stage}_shift", None)
        channels = weight.shape[:-3]
        if scale is not None:
            scale = scale.reshape(*channels).to(weight.dtype)
            folded[f"{kind}_weight"] = weight * scale[..., None, None, None]
            bias = None if bias is None else bias * scale
        if shift is not None:
            shift = shift.reshape(*channels).to(weight.dtype)
            bias = shift if bias is None else bias + shift
        folded[f"{kind}_bias"] = bias
    return lambda: separable_conv2d(**folded)


def soft_assign(
    features: Tensor,
    anchors: Tensor,
    scales: Tensor,
    *,
    average: bool = True,
    normalise: bool = True,
    eps: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """As published ports write it: every residual of a pixel to a node exists."""
    x = _pixels_first(features)[:, :, None]  # [B, N, 1, C]
    residuals = (x - anchors.to(x.dtype)) / scales.to(x.dtype)
    q = (residuals.square().sum(3) / -2).softmax(2)  # [B, N, K]
    z = (q[..., None] * residuals).sum(1)
    return _finished(z, q, features, average, normalise, eps)


def _expanded_soft_assign(
    features: Tensor,
    anchors: Tensor,
    scales: Tensor,
    *,
    average: bool = True,
    normalise: bool = True,
    eps: float = 1e-9,
) -> tuple[Tensor, Tensor]:
    """The square multiplied out: three matrix products (and, in 16 bits, wrong assignments)."""
    x = _pixels_first(features)
    w, s = anchors.to(x.dtype), scales.to(x.dtype)
    g = s**-2
    logits = x @ (w * g).T - x.square() @ (g / 2).T - (w.square() * g).sum(1) / 2
    q = logits.softmax(2)  # [B, N, K]
    z = (q.transpose(1, 2) @ x - q.sum(1)[..., None] * w) / s
    return _finished(z, q, features, average, normalise, eps)


def _finished(
    z: Tensor, q: Tensor, features: Tensor, average: bool, normalise: bool, eps: float
) -> tuple[Tensor, Tensor]:
    if average:
        z = z / (q.sum(1)[..., None] + eps)
    if normalise:
        z = F.normalize(z, dim=2)
    return z, q.transpose(1, 2).unflatten(2, features.shape[2:])


def encode(features: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """As published: every residual of a pixel to a codeword exists."""
    x = _pixels_first(features)[:, :, None]  # [B, N, 1, C]
    residuals = x - codewords.to(x.dtype)
    q = (scale.to(x.dtype) * residuals.square().sum(3)).softmax(2)  # [B, N, K]
    return (q[..., None] * residuals).sum(1)


def _expanded_encode(features: Tensor, codewords: Tensor, scale: Tensor) -> Tensor:
    """The square multiplied out: two matrix products."""
    x = _pixels_first(features)
    c, s = codewords.to(x.dtype), scale.to(x.dtype)
    squares = x.square().sum(2, keepdim=True) + c.square().sum(1)
    q = (s * (squares - 2 * x @ c.T)).softmax(2)  # [B, N, K]
    return q.transpose(1, 2) @ x - q.sum(1)[..., None] * c


def reproject(nodes: Tensor, assignment: Tensor, residual: Tensor | None = None) -> Tensor:
    """One batched matrix product, into the residual where there is one."""
    q = _pixels_first(assignment).to(nodes.dtype)  # [B, N, K]
    y = q @ nodes if residual is None else torch.baddbmm(_pixels_first(residual), q, nodes)
    return y.transpose(1, 2).unflatten(2, assignment.shape[2:])


def em_attention(
    features: Tensor,
    bases: Tensor,
    iterations: int = 3,
    *,
    temperature: float | Tensor = 1.0,
    gradient: str = "none",
    norm: str = "additive",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    return_assignment: bool = False,
) -> tuple[Tensor, ...]:
    """EMANet's unit over [B, C, N]: the responsibilities divided by their sums over the pixels,
    then the bases by their lengths. gradient: "none", "last" or "full"."""
    if weight is not None:
        features = F.conv2d(features, weight.reshape(*weight.shape[:2], 1, 1), bias)
    x = features.flatten(2)
    mu = bases.to(x.dtype).expand(len(x), -1, -1)  # [B, C, K]

    def assigned(mu: Tensor) -> Tensor:
        scores = torch.bmm(x.mT, mu)  # [B, N, K]
        plain = isinstance(temperature, float) and temperature == 1
        return (scores if plain else scores * temperature).softmax(2)

    def fitted(z: Tensor) -> Tensor:
        if norm == "clamp":
            return F.normalize(torch.bmm(x, F.normalize(z, p=1, dim=1)), dim=1)
        mu = torch.bmm(x, z / (1e-6 + z.sum(1, keepdim=True)))
        return mu / (1e-6 + mu.norm(dim=1, keepdim=True))

    recorded = torch.is_grad_enabled()
    with torch.set_grad_enabled(recorded and gradient == "full"):
        for _ in range(iterations - 1):
            mu = fitted(assigned(mu))
    with torch.set_grad_enabled(recorded and gradient != "none"):
        z = assigned(mu)
        mu = fitted(z) if iterations else mu
        mu = mu if gradient == "full" else mu.detach()
        y = torch.bmm(mu, z.mT).unflatten(2, features.shape[2:])
    return (y, mu, z.mT.unflatten(2, features.shape[2:])) if return_assignment else (y, mu)


def _pixels_first(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, N, C]"""
    return x.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class _NodeProducts:
    """Products of all pixels with all nodes: to [B, N, K], to [B, K, C], to [B, N, C]."""

    scores: int
    gathers: int
    spreads: int

    def __add__(self, other: _NodeProducts) -> _NodeProducts:
        return _NodeProducts(
            self.scores + other.scores, self.gathers + other.gathers, self.spreads + other.spreads
        )

    def call(self, features: Tensor, nodes: Tensor) -> Callable[[], list[Tensor]]:
        x = _pixels_first(features).detach()
        w = nodes.detach().to(x.dtype)  # [K, C]
        q = torch.rand(*x.shape[:2], len(w), device=x.device).to(x.dtype)
        return lambda: [
            *(x @ w.T for _ in range(self.scores)),
            *(q.transpose(1, 2) @ x for _ in range(self.gathers)),
            *(q @ w for _ in range(self.spreads)),
        ]


def _products(
    mode: str, forward: _NodeProducts, backward: _NodeProducts, features: Tensor, nodes: Tensor
) -> Callable[[], list[Tensor]]:
    needed = {"forward": forward, "backward": backward}.get(mode, forward + backward)
    return needed.call(features, nodes)


def _soft_assign_products(
    mode: str, features: Tensor, anchors: Tensor, **_: Any
) -> Callable[[], list[Tensor]]:
    return _products(mode, _NodeProducts(2, 1, 0), _NodeProducts(1, 2, 3), features, anchors)


def _encode_products(
    mode: str, features: Tensor, codewords: Tensor, **_: Any
) -> Callable[[], list[Tensor]]:
    return _products(mode, _NodeProducts(1, 1, 0), _NodeProducts(1, 1, 2), features, codewords)


def _em_attention_products(
    mode: str, features: Tensor, bases: Tensor, iterations: int, gradient: str, **_: Any
) -> Callable[[], list[Tensor]]:
    t = iterations
    forward, full = _NodeProducts(t, t, 1), _NodeProducts(2 * t + 1, t + 1, 2 * t)
    backward = _NodeProducts(2, 0, 1) if gradient == "last" else full
    return _products(mode, forward, backward, features, bases.mT)


EXPANDED: dict[str, Callable[..., Any]] = {
    "soft_assign": _expanded_soft_assign,
    "encode": _expanded_encode,
}

PRODUCTS: dict[str, Callable[..., Callable[[], list[Tensor]]]] = {
    "soft_assign": _soft_assign_products,
    "encode": _encode_products,
    "em_attention": _em_attention_products,
}

FOLDED: dict[str, Callable[..., Callable[[], Tensor] | None]] = {
    "separable_conv2d": _folded_separable
}


def _pixels(padding: Any, dilation: int | Pair, kernel: Sequence[int]) -> Any:
    """Padding in pixels; "same" is r(k-1)/2 (PyTorch's own word refuses a stride)."""
    if padding != "same":
        return padding
    rates = (dilation, dilation) if isinstance(dilation, int) else dilation
    return tuple(r * (k - 1) // 2 for r, k in zip(rates, kernel, strict=True))


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float | None) -> Tensor:
    if eps is not None:
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=eps)
    if scale is None and shift is None:
        return x
    like = shift if scale is None else scale
    assert like is not None
    mean, var = torch.zeros_like(like), torch.ones_like(like)
    return F.batch_norm(x, mean, var, scale, shift, training=False, eps=0.0)


def _activated(x: Tensor, activation: str | None) -> Tensor:
    match activation:
        case "relu":
            return F.relu(x)
        case "relu6":
            return F.relu6(x)
        case _:
            return x
