"""Chains: the layers that a map passes through, with every depthwise → pointwise pair in them run as one operator.

    conv(groups=C) → [BatchNorm] → [ReLU] → conv 1x1 → [BatchNorm] → [ReLU]      one call of ``separable_conv2d``
    conv(groups=C) → anything else                                              ``depthwise_conv2d``, then the module
    anything else                                                               the module itself

The layers are the user's own ``torch.nn`` modules, in whatever containers a published model keeps them. A chain looks at them at every
call, so what happens to a model later is respected: another kind of norm (SyncBatchNorm, GroupNorm, a frozen BatchNorm class), a wrapped or
parametrised convolution, ``norm.eval()`` inside a training model, replaced children. What does not fit the pattern runs as the module it is.

Hooks: a part with hooks of its own is called as a module, so its hooks run (and the pair is not fused at that place). Only the hooks that PyTorch keeps
globally for all modules do not see the parts of a fused pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.batch_norm import Affine, affine, track, uses_batch_moments
from segkernels.nn.depthwise_conv2d import DepthwiseConv2d
from segkernels.ops.depthwise_conv2d import depthwise_conv2d
from segkernels.ops.separable_conv2d import Activation, separable_conv2d

LARGEST_KERNEL = 7
LARGEST_STRIDE = 2


class Pad(NamedTuple):
    """Zero rows and columns on both sides, for models that pad by hand in front of a convolution without padding."""

    rows: int
    columns: int


Stage = nn.Module | Pad


class Pair(NamedTuple):
    """The stages of ``separable_conv2d`` found in a chain; without ``pointwise``, those of ``depthwise_conv2d``."""

    depthwise: nn.Conv2d
    padding: tuple[int, int]
    inner_norm: nn.BatchNorm2d | None
    inner_activation: Activation
    pointwise: nn.Conv2d | None
    outer_norm: nn.BatchNorm2d | None
    outer_activation: Activation
    length: int


def run(x: Tensor, layers: Iterable[Stage | None], *, backend: str | None = None) -> Tensor:
    """x: [B, C, H, W] through the layers, pairs fused."""
    stages = leaves(layers)
    while stages:
        pair = match(stages) if _fusible(x) else None
        if pair is None:
            x, stages = _apply(stages[0], x), stages[1:]
        else:
            x, stages = _call(x, [pair], backend), stages[pair.length :]
    return x


def side_by_side(x: Tensor, branches: Iterable[Iterable[Stage | None]], *, backend: str | None = None) -> list[Tensor]:
    """x: [B, C, H, W] through every branch. Returns maps whose concatenation over channels is that of the branches' outputs.

    Neighbouring branches that begin with a pair of one kind (the rates of a separable ASPP) share one call, which reads x once.
    """
    chains = [leaves(branch) for branch in branches]
    pairs = [match(chain) if _fusible(x) else None for chain in chains]
    outputs: list[Tensor] = []
    for kind, group in groupby(range(len(chains)), key=lambda i: _kind(pairs[i]) or (i,)):
        members = list(group)
        together = [pair for i in members if (pair := pairs[i]) is not None]
        if not together:
            outputs += [run(x, chains[i], backend=backend) for i in members]
            continue
        y = _call(x, together, backend)  # [B, R·D, H', W']
        rests = [chains[i][pair.length :] for i, pair in zip(members, together, strict=True)]
        if any(rests):
            outputs += [run(part, rest, backend=backend) for part, rest in zip(y.chunk(len(rests), 1), rests, strict=True)]
        else:
            outputs.append(y)
    return outputs


def leaves(layers: Iterable[Stage | None]) -> list[Stage]:
    """The layers one by one: containers opened (``nn.Sequential``, and modules with a method ``layers_in_order()``), identities dropped.

    A container with hooks is not opened.
    """
    flat: list[Stage] = []
    for layer in layers:
        if layer is None or type(layer) is nn.Identity and not _hooked(layer):
            continue
        inside = None if isinstance(layer, Pad) or _hooked(layer) else _contents(layer)
        flat += [layer] if inside is None else leaves(inside)
    return flat


def match(stages: Sequence[Stage]) -> Pair | None:
    """The longest pair that the chain begins with, or None."""
    at = 0
    by_hand = (0, 0)
    if stages and isinstance(stages[0], Pad):
        by_hand, at = tuple(stages[0]), 1
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
    return Pair(depthwise, padding, inner_norm, inner_activation, pointwise, outer_norm, outer_activation, at)


def depthwise_obstacle(conv: nn.Module) -> str | None:
    """Why a module cannot be the depthwise stage; None if it can."""
    if (why := _obstacle(conv, nn.Conv2d, "forward", "_conv_forward")) is not None:
        return why
    assert isinstance(conv, nn.Conv2d)
    if not conv.in_channels == conv.out_channels == conv.groups:
        return f"not depthwise: {conv.in_channels} to {conv.out_channels} channels in {conv.groups} groups"
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
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1 or conv.padding not in ((0, 0), "same", "valid"):
        return "not a plain 1x1 convolution"
    return None


def norm_obstacle(norm: nn.Module) -> str | None:
    """Why a module cannot be the norm of a stage; None if it can."""
    return _obstacle(norm, nn.BatchNorm2d, "forward", "_check_input_dim")


def _norm_and_activation(stages: Sequence[Stage], at: int) -> tuple[nn.BatchNorm2d | None, Activation, int]:
    """An optional norm and an optional activation from ``at`` on, and where they end."""
    norm: nn.BatchNorm2d | None = None
    if at < len(stages) and isinstance(stage := stages[at], nn.BatchNorm2d) and norm_obstacle(stage) is None:
        norm, at = stage, at + 1
    activation: Activation = None
    if at < len(stages) and not isinstance(stage := stages[at], Pad) and not _hooked(stage):
        activation = {nn.ReLU: "relu", nn.ReLU6: "relu6"}.get(type(stage))  # type: ignore[assignment]
        at += activation is not None
    return norm, activation, at


def _kind(pair: Pair | None) -> tuple[object, ...] | None:
    """What pairs over one input must have in common to share a call; None for a pair that runs alone."""
    if pair is None or pair.padding != _same(pair.depthwise):
        return None

    def norm_kind(norm: nn.BatchNorm2d | None) -> tuple[object, ...] | None:
        if norm is None:
            return None
        moments = uses_batch_moments(norm)
        return moments, moments and norm.eps, norm.weight is None, norm.bias is None

    d, p = pair.depthwise, pair.pointwise
    return (
        (d.kernel_size, d.stride, d.bias is None, d.weight.dtype, norm_kind(pair.inner_norm), pair.inner_activation),
        p and (p.out_channels, p.bias is None, p.weight.dtype, norm_kind(pair.outer_norm), pair.outer_activation),
    )


def _call(x: Tensor, pairs: Sequence[Pair], backend: str | None) -> Tensor:
    """R pairs of one kind over x: [B, C, H, W] as one operator: [B, R·D, H', W']."""
    first = pairs[0]
    one = len(pairs) == 1
    where = {
        "stride": first.depthwise.stride,
        "padding": first.padding if one else "same",
        "dilation": first.depthwise.dilation if one else [pair.depthwise.dilation for pair in pairs],
    }
    w = _stacked([pair.depthwise.weight for pair in pairs])  # [R, C, 1, k_h, k_w]
    b = _stacked([pair.depthwise.bias for pair in pairs])  # [R, C]
    if first.pointwise is None:
        return depthwise_conv2d(x, w, b, **where, backend=backend)  # type: ignore[arg-type]
    v = _stacked([pair.pointwise.weight for pair in pairs if pair.pointwise])  # [R, D, C, 1, 1]
    c = _stacked([pair.pointwise.bias for pair in pairs if pair.pointwise])  # [R, D]
    inner_norms, outer_norms = [pair.inner_norm for pair in pairs], [pair.outer_norm for pair in pairs]
    inner, inner_bias, inner_offset = _standardised(affine(inner_norms), b)
    outer, outer_bias, outer_offset = _standardised(affine(outer_norms), c)
    y, moments = separable_conv2d(
        x,
        w,
        v,
        inner_bias,
        outer_bias,
        **where,  # type: ignore[arg-type]
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
        track(inner_norms, moments.inner_mean + inner_offset, moments.inner_var, y.shape)
    if outer.eps is not None:
        track(outer_norms, moments.outer_mean + outer_offset, moments.outer_var, y.shape)
    return y


def _standardised(stage: Affine, bias: Tensor | None) -> tuple[Affine, Tensor | None, Tensor | float]:
    """A convolution's bias in front of batch standardisation moves the mean and nothing else.

    Returns the stage, the bias that is left for the operator, and what to add to the measured mean. The bias stays in the graph (its gradient is
    zero, not absent: optimisers and DDP see it as they do with torch's layers).
    """
    if stage.eps is None or bias is None:
        return stage, bias, 0.0
    bias = bias.reshape(-1)
    shift = 0 * bias if stage.shift is None else stage.shift + 0 * bias
    return stage._replace(shift=shift), None, bias.detach()


def _fusible(x: Tensor) -> bool:
    """Batches with something in them; an unbatched or empty map goes through the modules."""
    return x.dim() == 4 and x.numel() > 0


def _apply(stage: Stage, x: Tensor) -> Tensor:
    if isinstance(stage, Pad):
        return F.pad(x, (stage.columns, stage.columns, stage.rows, stage.rows))
    return stage(x)


def _contents(layer: nn.Module) -> list[Stage | None] | None:
    """What a container holds, in the order of its forward; None for a module that is not a known container."""
    order: Callable[[], list[Stage | None] | None] | None = getattr(layer, "layers_in_order", None)
    if order is not None:
        return order()
    if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
        return list(layer)
    return None


def _obstacle(module: nn.Module, kind: type[nn.Module], *methods: str) -> str | None:
    """Why a module does not compute what the class ``kind`` computes, or must be called as a module."""
    name = type(module).__name__
    if not isinstance(module, kind):
        return f"{name} is not a {kind.__name__}"
    ours = isinstance(module, DepthwiseConv2d)
    if not ours and any(getattr(type(module), method) is not getattr(kind, method) for method in methods):
        return f"{name} has a forward of its own"
    return f"{name} has hooks" if _hooked(module) else None


def _hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward that somebody else rebound."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and "layers_in_order" not in module.__dict__)
    )


def _same(conv: nn.Conv2d) -> tuple[int, int]:
    (k_h, k_w), (d_h, d_w) = conv.kernel_size, conv.dilation
    return d_h * (k_h // 2), d_w * (k_w // 2)


def _padding(conv: nn.Conv2d, by_hand: tuple[int, int]) -> tuple[int, int]:
    if isinstance(conv.padding, str):
        padding = _same(conv) if conv.padding == "same" else (0, 0)
    else:
        padding = (conv.padding[0], conv.padding[1])
    return padding[0] + by_hand[0], padding[1] + by_hand[1]


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    if len(parts) == 1:
        return parts[0]
    present = [part for part in parts if part is not None]
    return torch.stack(present) if present else None
