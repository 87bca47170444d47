"""What operators over pixels and nodes share: checks of arguments, limits of kernels, a centre."""

from __future__ import annotations

from torch import Tensor

from segkernels.fused import UnsupportedInputError

# What the fused kernels take, which is what networks use. The reference has no limit.
LARGEST = 256


# The median of so many nodes tells where most of all of them are.
SAMPLE = 16


def centre_of(nodes: Tensor) -> Tensor:
    """Among most of the nodes [K, C], channel by channel: the (lower) median of some of them.

    The point about which squares are expanded. No result depends on it but for rounding, which
    grows with what lies far from it; one node far from all others does not move it, as it would
    move the mean.
    """
    sample = nodes.detach()[:: -(-len(nodes) // SAMPLE)]
    return sample.median(0).values


def check_nodes(op: str, features: Tensor, **nodes: Tensor) -> None:
    """Raise UnsupportedInputError unless ``features`` is a map and ``nodes`` is [K, C] over it."""
    ((name, w),) = nodes.items()
    if features.dim() != 4:
        raise UnsupportedInputError(
            f"{op}: features must have 4 dimensions [B, C, H, W]"
            f"\n  features: {list(features.shape)}"
        )
    if w.dim() != 2 or 0 in w.shape or w.shape[1] != features.shape[1]:
        raise UnsupportedInputError(
            f"{op}: {name} must be [K, C], one row a node, over the channels of features"
            f"\n  {name}: {list(w.shape)}\n  features: {list(features.shape)}"
        )


def too_many_nodes(number: int) -> str | None:
    """Why the fused kernels cannot take so many nodes, or None."""
    return f"the kernels take up to {LARGEST} nodes, not {number}" if number > LARGEST else None
