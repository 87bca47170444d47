"""Chains: the layers that a map passes through, with the depthwise → pointwise pairs fused.

    conv(groups=C) [BatchNorm] [ReLU] conv 1x1 [BatchNorm] [ReLU]    one ``separable_conv2d``
    conv(groups=C) and anything else                                 ``depthwise_conv2d``, module
    anything else                                                    the module

The layers are the user's own ``torch.nn`` modules, in whatever containers a published model keeps
them. A chain looks at them at every call, so what happens to a model later is respected: another
kind of norm (SyncBatchNorm, GroupNorm, a frozen BatchNorm class), a wrapped or parametrised
convolution, ``norm.eval()`` inside a training model, replaced children. What does not fit the
pattern runs as the module it is.

Backends: a chain runs on the backend that its caller or one of its parts names (``backend=None``
names none); two names in one chain are refused. A part that is called as a module chooses for
itself.

Hooks: a part with hooks of its own is called as a module, so its hooks run (and the pair is not
fused at that place). Only the hooks that PyTorch keeps globally for all modules do not see the
parts of a fused pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.fused import UnsupportedInputError
from segkernels.nn.depthwise_conv2d import DepthwiseConv2d
from segkernels.nn.pair import Pad, Pair, Stage, call, hooked, kind, match
from segkernels.overrides import overridable


@overridable
def run(x: Tensor, layers: Sequence[Stage | None], *, backend: str | None = None) -> Tensor:
    """x: [B, C, H, W] through the layers, pairs fused."""
    stages, backend = leaves(layers, backend)
    while stages:
        pair = match(stages) if _fusible(x) else None
        if pair is None:
            x, stages = _apply(stages[0], x), stages[1:]
        else:
            x, stages = call(x, [pair], backend), stages[pair.length :]
    return x


def side_by_side(
    x: Tensor, branches: Iterable[Sequence[Stage | None]], *, backend: str | None = None
) -> list[Tensor]:
    """x: [B, C, H, W] through every branch. Returns maps whose concatenation over channels is that
    of the branches' outputs.

    Neighbouring branches that begin with a pair of one kind (the rates of a separable ASPP) and run
    on one backend share one call, which reads x once.
    """
    chains = [leaves(branch, backend) for branch in branches]
    pairs = [match(stages) if _fusible(x) else None for stages, _ in chains]
    outputs: list[Tensor] = []
    at = 0
    while at < len(chains):
        stages, backend = chains[at]
        if pairs[at] is None:
            outputs.append(run(x, stages, backend=backend))
            at += 1
            continue
        together, rests = _neighbours(pairs, chains, at)
        y = call(x, together, backend)  # [B, R·D, H', W']
        if any(rests):
            parts = y.chunk(len(rests), 1)
            outputs += [
                run(part.clone() if _in_place(rest) else part, rest, backend=backend)
                for part, rest in zip(parts, rests, strict=True)
            ]
        else:
            outputs.append(y)
        at += len(together)
    return outputs


def _neighbours(
    pairs: list[Pair | None], chains: list[Chain], at: int
) -> tuple[list[Pair], list[list[Stage]]]:
    """The pairs from ``at`` on that share a call, and what is left of their chains behind them."""
    together: list[Pair] = []
    rests: list[list[Stage]] = []
    for pair, (stages, backend) in zip(pairs[at:], chains[at:], strict=True):
        if pair is None or backend != chains[at].backend:
            break
        if together and (kind(pair) is None or kind(pair) != kind(together[0])):
            break
        together.append(pair)
        rests.append(stages[pair.length :])
    return together, rests


class Chain(NamedTuple):
    """Layers one by one, and the backend that they run on."""

    stages: list[Stage]
    backend: str | None


def leaves(layers: Iterable[Stage | None], backend: str | None = None) -> Chain:
    """The layers one by one: containers opened (``nn.Sequential``, and modules with a method
    ``layers_in_order()``), identities dropped. ``backend``: the caller's.

    A container with hooks is not opened.
    """
    flat: list[Stage] = []
    for layer in layers:
        if layer is None or (type(layer) is nn.Identity and not hooked(layer)):
            continue
        inside = None
        if not isinstance(layer, Pad) and not hooked(layer):
            inside = _contents(layer)
            if inside is not None or isinstance(layer, DepthwiseConv2d):
                backend = _agreed(layer, backend)
        if inside is None:
            flat.append(layer)
        else:
            stages, backend = leaves(inside, backend)
            flat += stages
    return Chain(flat, backend)


def _agreed(layer: nn.Module, backend: str | None) -> str | None:
    """The backend of a chain once ``layer`` is in it."""
    own: str | None = getattr(layer, "backend", None)
    if own is not None and backend is not None and own != backend:
        raise UnsupportedInputError(
            f"{type(layer).__name__}: one chain of layers cannot run on two backends"
            f"\n  backend: {own!r}, but {backend!r} in the layer it is part of, or beside it"
            "\n  set one of them to None"
        )
    return own or backend


def _in_place(stages: list[Stage]) -> bool:
    """Whether the first layer writes to its input, which must then not be a part of another map."""
    return any(getattr(stage, "inplace", False) for stage in stages[:1])


def _fusible(x: Tensor) -> bool:
    """Batches with something in them; anything else goes through the modules."""
    return isinstance(x, Tensor) and x.dim() == 4 and x.numel() > 0


def _apply(stage: Stage, x: Tensor) -> Tensor:
    if isinstance(stage, Pad):
        return F.pad(x, (stage.columns, stage.columns, stage.rows, stage.rows))
    return stage(x)


def _contents(layer: nn.Module) -> list[Stage | None] | None:
    """What a container holds, in the order of its forward; None for a module that is not a known
    container.
    """
    if _orders_its_forward(layer):
        order: Callable[[], list[Stage | None]] = layer.layers_in_order  # type: ignore[assignment]
        return order()
    if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
        return list(layer)
    return None


def _orders_its_forward(layer: nn.Module) -> bool:
    """Whether ``layers_in_order`` describes the forward; a subclass may have one of its own."""
    if "layers_in_order" in layer.__dict__:  # a patched layer
        return True
    if not hasattr(type(layer), "layers_in_order"):  # of the module itself it is a slow question
        return False
    owner = next(kind for kind in type(layer).__mro__ if "forward" in kind.__dict__)
    return "layers_in_order" in owner.__dict__
