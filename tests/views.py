"""The same numbers at other strides: what slices, transposes, concatenations and sums hand over."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from segkernels import fused


def _transposed(dy: Tensor) -> Tensor:
    return dy.transpose(2, 3).contiguous().transpose(2, 3)


def _other_format(dy: Tensor) -> Tensor:
    last = fused.memory_format(dy) == torch.channels_last
    return dy.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def _sliced(dy: Tensor) -> Tensor:
    wide = dy.new_full(
        (dy.shape[0], dy.shape[1] + 3, dy.shape[2] + 1, dy.shape[3] + 2), float("nan")
    )
    wide[:, 1:-2, 1:, 1:-1] = dy
    return wide[:, 1:-2, 1:, 1:-1]


def _channel_sliced(dy: Tensor, first: int = 8) -> Tensor:
    """What the backward of a concatenation hands over in channels_last."""
    wide = dy.new_full((dy.shape[0], dy.shape[1] + 8, *dy.shape[2:]), float("nan"))
    wide = wide.contiguous(memory_format=torch.channels_last)
    view = wide[:, first : first + dy.shape[1]]
    view.copy_(dy)
    return view


def _unaligned(dy: Tensor) -> Tensor:
    """The same, but for its address: no vector of channels lies on a multiple of its size."""
    return _channel_sliced(dy, first=1)


def _expanded(dy: Tensor) -> Tensor:
    return dy[:1, :1, :1, :1].expand(dy.shape)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__.strip("_"): f
    for f in (_transposed, _other_format, _sliced, _channel_sliced, _unaligned, _expanded)
}
