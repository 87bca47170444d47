"""The pattern of the separable operator in a row of layers, and the call that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from segkernels.nn.batch_norm import Affine, affine, track, uses_batch_moments
from segkernels.nn.depthwise_conv2d import DepthwiseConv2d
from segkernels.ops.depthwise_conv2d import depthwise_conv2d
from segkernels.ops.geometry import LARGEST_KERNEL, LARGEST_STRIDE
from segkernels.ops.separable_conv2d import separable_conv2d

Activation = Literal["relu", "relu6"] | None
Padding = Literal["same"] | tuple[int, int]
Rates = Sequence[int] | Sequence[Sequence[int]]


class Pad(NamedTuple):
    """Zero rows and columns on both sides, for models that pad by hand in front of a convolution
    without padding.
    """

    rows: int
    columns: int


Stage = nn.Module | Pad


class Pair(NamedTuple):
    """The stages of ``separable_conv2d`` found in a chain; without ``pointwise``, those of
    ``depthwise_conv2d``.
    """

    depthwise: nn.Conv2d
    padding: tuple[int, int]
    inner_norm: nn.BatchNorm2d | None
    inner_activation: Activation
    pointwise: nn.Conv2d | None
    outer_norm: nn.BatchNorm2d | None
    outer_activation: Activation
    length: int


def match(stages: Sequence[Stage]) -> Pair | None:
    """The longest pair that the chain begins with, or None."""
    at = 0
    by_hand = Pad(0, 0)
    if stages and isinstance(stages[0], Pad):
        by_hand, at = stages[0], 1
    depthwise = stages[at] if at < len(stages) else None
    if not isinstance(depthwise, nn.Conv2d) or depthwise_obstacle(depthwise) is not None:
        return None
    padding = _padding(depthwise, by_hand)
    alone = Pair(depthwise, padding, None, None, None, None, None, at + 1)
    inner_norm, inner_activation, at = _norm_and_activation(stages, at + 1)
    pointwise = stages[at] if at < len(stages) else None
    if not isinstance(pointwise, nn.Conv2d) or pointwise_obstacle(pointwise) is not None:
        return alone
    outer_norm, outer_activation, at = _norm_and_activation(stages, at + 1)
    return Pair(
        depthwise,
        padding,
        inner_norm,
        inner_activation,
        pointwise,
        outer_norm,
        outer_activation,
        at,
    )


def depthwise_obstacle(conv: nn.Module) -> str | None:
    """Why a module cannot be the depthwise stage; None if it can."""
    if (why := _obstacle(conv, nn.Conv2d, "forward", "_conv_forward")) is not None:
        return why
    assert isinstance(conv, nn.Conv2d)
    if not conv.in_channels == conv.out_channels == conv.groups:
        channels = f"{conv.in_channels} to {conv.out_channels} channels"
        return f"not depthwise: {channels} in {conv.groups} groups"
    if any(k % 2 == 0 or k > LARGEST_KERNEL for k in conv.kernel_size):
        return f"kernel {conv.kernel_size} is not odd and at most {LARGEST_KERNEL}"
    if max(conv.stride) > LARGEST_STRIDE:
        return f"stride {conv.stride} is more than {LARGEST_STRIDE}"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    return None


def pointwise_obstacle(conv: nn.Module) -> str | None:
    """Why a module cannot be the pointwise stage; None if it can."""
    if (why := _obstacle(conv, nn.Conv2d, "forward", "_conv_forward")) is not None:
        return why
    assert isinstance(conv, nn.Conv2d)
    if (
        conv.kernel_size != (1, 1)
        or conv.stride != (1, 1)
        or conv.groups != 1
        or conv.padding not in ((0, 0), "same", "valid")
    ):
        return "not a plain 1x1 convolution"
    return None


def norm_obstacle(norm: nn.Module) -> str | None:
    """Why a module cannot be the norm of a stage; None if it can."""
    return _obstacle(norm, nn.BatchNorm2d, "forward", "_check_input_dim")


def _norm_and_activation(
    stages: Sequence[Stage], at: int
) -> tuple[nn.BatchNorm2d | None, Activation, int]:
    """An optional norm and an optional activation from ``at`` on, and where they end."""
    norm: nn.BatchNorm2d | None = None
    if (
        at < len(stages)
        and isinstance(stage := stages[at], nn.BatchNorm2d)
        and norm_obstacle(stage) is None
    ):
        norm, at = stage, at + 1
    activation: Activation = None
    if at < len(stages) and not isinstance(stage := stages[at], Pad) and not hooked(stage):
        activation = {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(stage))  # type: ignore[assignment]
        at += activation is not None
    return norm, activation, at


def kind(pair: Pair) -> tuple[object, ...] | None:
    """What pairs over one input have in common that share a call; None for one that runs alone."""
    if pair.padding != _same(pair.depthwise):
        return None
    parts = pair.depthwise, pair.inner_norm, pair.pointwise, pair.outer_norm
    if any(part is not None and is_parametrized(part) for part in parts):
        return None  # to look at such a weight is to compute it: a spectral norm moves on by a step

    def norm_kind(norm: nn.BatchNorm2d | None) -> tuple[object, ...] | None:
        if norm is None:
            return None
        return uses_batch_moments(norm), norm.eps, norm.weight is None, norm.bias is None

    d, p = pair.depthwise, pair.pointwise
    return (
        (
            d.kernel_size,
            d.stride,
            d.bias is None,
            d.weight.dtype,
            norm_kind(pair.inner_norm),
            pair.inner_activation,
        ),
        p
        and (
            p.out_channels,
            p.bias is None,
            p.weight.dtype,
            norm_kind(pair.outer_norm),
            pair.outer_activation,
        ),
    )


def call(x: Tensor, pairs: Sequence[Pair], backend: str | None) -> Tensor:
    """R pairs of one kind over x: [B, C, H, W] as one operator: [B, R·D, H', W']."""
    first = pairs[0]
    stride = first.depthwise.stride
    padding, dilation = _windows(pairs)
    w = _stacked([pair.depthwise.weight for pair in pairs])  # [R, C, 1, k_h, k_w]
    b = _stacked_or_none([pair.depthwise.bias for pair in pairs])  # [R, C]
    if first.pointwise is None:
        return depthwise_conv2d(x, w, b, stride, padding, dilation, backend=backend)
    pointwise = [pair.pointwise for pair in pairs if pair.pointwise is not None]
    v = _stacked([conv.weight for conv in pointwise])  # [R, D, C, 1, 1]
    c = _stacked_or_none([conv.bias for conv in pointwise])  # [R, D]
    inner_norms = [pair.inner_norm for pair in pairs]
    outer_norms = [pair.outer_norm for pair in pairs]
    inner, inner_bias = _standardised(affine(inner_norms), b)
    outer, outer_bias = _standardised(affine(outer_norms), c)
    y, moments = separable_conv2d(
        x,
        w,
        v,
        inner_bias,
        outer_bias,
        stride,
        padding,
        dilation,
        inner_scale=inner.scale,
        inner_shift=inner.shift,
        inner_activation=first.inner_activation,
        inner_eps=inner.eps,
        outer_scale=outer.scale,
        outer_shift=outer.shift,
        outer_activation=first.outer_activation,
        outer_eps=outer.eps,
        return_moments=True,
        backend=backend,
    )
    if inner.eps is not None:
        track(inner_norms, _moved(moments.inner_mean, b), moments.inner_var, y.shape)
    if outer.eps is not None:
        track(outer_norms, _moved(moments.outer_mean, c), moments.outer_var, y.shape)
    return y


def _windows(pairs: Sequence[Pair]) -> tuple[Padding, Rates]:
    """padding and dilation of one rate, or of several (whose padding is "same": see ``kind``)."""
    if len(pairs) == 1:
        return pairs[0].padding, pairs[0].depthwise.dilation
    return "same", [pair.depthwise.dilation for pair in pairs]


def _standardised(stage: Affine, bias: Tensor | None) -> tuple[Affine, Tensor | None]:
    """The stage, and the convolution's bias as far as the operator still needs it.

    Under batch standardisation a bias moves the mean and nothing else. It stays in the graph all
    the same: its gradient is zero, not absent, as optimisers and DDP see it with torch's layers.
    """
    if stage.eps is None or bias is None:
        return stage, bias
    nothing = 0 * bias.reshape(-1)
    return stage._replace(shift=nothing if stage.shift is None else stage.shift + nothing), None


def _moved(mean: Tensor, bias: Tensor | None) -> Tensor:
    """The mean of d + b from that of d."""
    return mean if bias is None else mean + bias.detach().reshape(-1)


def _obstacle(module: nn.Module, kind: type[nn.Module], *methods: str) -> str | None:
    """Why a module does not compute what the class ``kind`` computes, or must be called as a
    module.
    """
    name = type(module).__name__
    if not isinstance(module, kind):
        return f"{name} is not a {kind.__name__}"
    kind = DepthwiseConv2d if isinstance(module, DepthwiseConv2d) else kind
    if any(getattr(type(module), method) is not getattr(kind, method) for method in methods):
        return f"{name} has a forward of its own"
    return f"{name} has hooks" if hooked(module) else None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward that somebody
    else rebound.
    """
    rebound = "forward" in module.__dict__ and "layers_in_order" not in module.__dict__
    return rebound or has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _same(conv: nn.Conv2d) -> tuple[int, int]:
    (k_h, k_w), (d_h, d_w) = conv.kernel_size, conv.dilation
    return d_h * (k_h // 2), d_w * (k_w // 2)


def _padding(conv: nn.Conv2d, by_hand: Pad) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        padding = _same(conv) if conv.padding == "same" else (0, 0)
    else:
        padding = (conv.padding[0], conv.padding[1])
    return padding[0] + by_hand.rows, padding[1] + by_hand.columns


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts))


def _stacked_or_none(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return _stacked(present) if present else None
