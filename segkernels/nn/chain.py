"""Chains: the layers that a map passes through, with the depthwise → pointwise pairs fused.

    conv(groups=C) [BatchNorm] [ReLU] conv 1x1 [BatchNorm] [ReLU]    one ``separable_conv2d``
    conv(groups=C) and anything else                                 ``depthwise_conv2d``, module
    anything else                                                    the module

The layers are the user's own ``torch.nn`` modules, in whatever containers a published model keeps
them. A chain looks at them at every call, so what happens to a model later is respected: another
kind of norm (SyncBatchNorm, GroupNorm, a frozen BatchNorm class), a wrapped or parametrised
convolution, ``norm.eval()`` inside a training model, replaced children. What does not fit the
pattern runs as the module it is.

Hooks: a part with hooks of its own is called as a module, so its hooks run (and the pair is not
fused at that place). Only the hooks that PyTorch keeps globally for all modules do not see the
parts of a fused pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.pair import Pad, Pair, Stage, call, hooked, kind, match


def run(x: Tensor, layers: Iterable[Stage | None], *, backend: str | None = None) -> Tensor:
    """x: [B, C, H, W] through the layers, pairs fused."""
    stages = leaves(layers)
    while stages:
        pair = match(stages) if _fusible(x) else None
        if pair is None:
            x, stages = _apply(stages[0], x), stages[1:]
        else:
            x, stages = call(x, [pair], backend), stages[pair.length :]
    return x


def side_by_side(
    x: Tensor, branches: Iterable[Iterable[Stage | None]], *, backend: str | None = None
) -> list[Tensor]:
    """x: [B, C, H, W] through every branch. Returns maps whose concatenation over channels is that
    of the branches' outputs.

    Neighbouring branches that begin with a pair of one kind (the rates of a separable ASPP) share
    one call, which reads x once.
    """
    chains = [leaves(branch) for branch in branches]
    pairs = [match(stages) if _fusible(x) else None for stages in chains]
    outputs: list[Tensor] = []
    at = 0
    while at < len(chains):
        if pairs[at] is None:
            outputs.append(run(x, chains[at], backend=backend))
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
    pairs: list[Pair | None], chains: list[list[Stage]], at: int
) -> tuple[list[Pair], list[list[Stage]]]:
    """The pairs from ``at`` on that share a call, and what is left of their chains behind them."""
    together: list[Pair] = []
    rests: list[list[Stage]] = []
    for pair, stages in zip(pairs[at:], chains[at:], strict=True):
        if pair is None or (together and (kind(pair) is None or kind(pair) != kind(together[0]))):
            break
        together.append(pair)
        rests.append(stages[pair.length :])
    return together, rests


def leaves(layers: Iterable[Stage | None]) -> list[Stage]:
    """The layers one by one: containers opened (``nn.Sequential``, and modules with a method
    ``layers_in_order()``), identities dropped.

    A container with hooks is not opened.
    """
    flat: list[Stage] = []
    for layer in layers:
        if layer is None or (type(layer) is nn.Identity and not hooked(layer)):
            continue
        inside = None if isinstance(layer, Pad) or hooked(layer) else _contents(layer)
        flat += [layer] if inside is None else leaves(inside)
    return flat


def _in_place(stages: list[Stage]) -> bool:
    """Whether the first layer writes to its input, which must then not be a part of another map."""
    return any(getattr(stage, "inplace", False) for stage in stages[:1])


def _fusible(x: Tensor) -> bool:
    """Batches with something in them; an unbatched or empty map goes through the modules."""
    return x.dim() == 4 and x.numel() > 0


def _apply(stage: Stage, x: Tensor) -> Tensor:
    if isinstance(stage, Pad):
        return F.pad(x, (stage.columns, stage.columns, stage.rows, stage.rows))
    return stage(x)


def _contents(layer: nn.Module) -> list[Stage | None] | None:
    """What a container holds, in the order of its forward; None for a module that is not a known
    container.
    """
    order: Callable[[], list[Stage | None] | None] | None = getattr(layer, "layers_in_order", None)
    if order is not None and _orders_its_forward(layer):
        return order()
    if isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward:
        return list(layer)
    return None


def _orders_its_forward(layer: nn.Module) -> bool:
    """Whether ``layers_in_order`` describes the forward; a subclass may have one of its own."""
    if "layers_in_order" in layer.__dict__:  # a patched layer
        return True
    owner = next(kind for kind in type(layer).__mro__ if "forward" in kind.__dict__)
    return "layers_in_order" in owner.__dict__
