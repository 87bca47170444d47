"""Sliding windows: what stride, padding and dilation mean, checked once for every convolution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from segkernels.fused import UnsupportedInputError, memory_format

Pair = tuple[int, int]
Size = int | Sequence[int]
Padding = Literal["same"] | Size
Rates = Size | Sequence[Size]

# What the fused kernels take, which is what networks use. The reference has no limits.
LARGEST_KERNEL = 7
LARGEST_STRIDE = 2


def square(*rates: int) -> tuple[Pair, ...]:
    """Rates that are the same in rows and columns."""
    return tuple((r, r) for r in rates)


@dataclass(frozen=True)
class Window:
    """A k_h x k_w window at R rates; padding and dilation have one pair a rate."""

    kernel: Pair
    stride: Pair
    padding: tuple[Pair, ...]
    dilation: tuple[Pair, ...]

    def output_size(self, height: int, width: int) -> list[Pair]:
        """(H', W') of every rate: floor((H + 2p - r(k-1) - 1) / s) + 1."""

        def size(n: int, axis: int, rate: int) -> int:
            reach = self.dilation[rate][axis] * (self.kernel[axis] - 1) + 1
            return (n + 2 * self.padding[rate][axis] - reach) // self.stride[axis] + 1

        return [(size(height, 0, r), size(width, 1, r)) for r in range(len(self.dilation))]

    def output_map(self, x: Tensor, channels: int) -> Tensor:
        """An empty [B, channels, H', W'] in x's memory format."""
        y = x.new_empty(x.shape[0], channels, *self.output_size(x.shape[2], x.shape[3])[0])
        return torch.empty_like(y, memory_format=memory_format(x))

    def flat(self) -> tuple[list[int], list[int], list[int]]:
        """stride [2], padding [2R], dilation [2R]: the raw operators' arguments."""
        return (
            list(self.stride),
            [v for p in self.padding for v in p],
            [v for d in self.dilation for v in d],
        )


def unflatten(
    w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Window:
    """The Window of raw arguments; w: [R, C, k_h, k_w]."""

    def pairs(flat: Sequence[int]) -> tuple[Pair, ...]:
        return tuple(zip(flat[::2], flat[1::2], strict=True))

    return Window((w.shape[2], w.shape[3]), (stride[0], stride[1]), pairs(padding), pairs(dilation))


def window(op: str, weight: Tensor, stride: Size, padding: Padding, dilation: Rates) -> Window:
    """Read the public arguments of a depthwise convolution.

    weight: [C, 1, k_h, k_w] (``dilation`` is then an int or a pair), or [R, C, 1, k_h, k_w]
    (``dilation`` is a list of R ints or pairs, ``padding`` likewise or one int for all). Raises
    UnsupportedInputError naming ``op``.
    """
    arguments = (op, tuple(weight.shape), _frozen(stride), _frozen(padding), _frozen(dilation))
    return _window(*arguments) if torch.compiler.is_compiling() else _known_window(*arguments)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _window(
    op: str, weight: Sequence[int], stride: Size, padding: Padding, dilation: Rates
) -> Window:
    if len(weight) not in (4, 5):
        raise UnsupportedInputError(
            f"{op}: the depthwise weight must be [C, 1, k_h, k_w], or [R, C, 1, k_h, k_w]"
            f"\n  weight: {list(weight)}"
        )
    rates = weight[0] if len(weight) == 5 else None
    kernel = (weight[-2], weight[-1])
    if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise UnsupportedInputError(
            f"{op}: the kernel must have odd sides\n  weight: {list(weight)}\n"
            "  an even kernel has no centre; pad the weight with a zero row and column"
        )
    if rates is None:
        dilations: tuple[Pair, ...] = (pair(op, "dilation", dilation, 1),)
    else:
        if not isinstance(dilation, Sequence) or len(dilation) != rates:
            raise UnsupportedInputError(
                f"{op}: a weight with {rates} rates needs a list of {rates} dilations"
                f"\n  dilation: {dilation!r}"
            )
        dilations = tuple(pair(op, "dilation", d, 1) for d in dilation)
    if rates == 0:
        raise UnsupportedInputError(f"{op}: the weight has no rates\n  weight: {list(weight)}")
    if isinstance(padding, str):
        if padding != "same":
            raise UnsupportedInputError(
                f"{op}: padding is 'same', an int or a pair\n  padding: {padding!r}"
            )
        paddings = tuple((r_h * (kernel[0] // 2), r_w * (kernel[1] // 2)) for r_h, r_w in dilations)
    elif rates is None or isinstance(padding, int):
        paddings = (pair(op, "padding", padding, 0),) * len(dilations)
    else:
        if not isinstance(padding, Sequence) or len(padding) != rates:
            raise UnsupportedInputError(
                f"{op}: padding is 'same', an int or a list of {rates}\n  padding: {padding!r}"
            )
        paddings = tuple(pair(op, "padding", p, 0) for p in padding)
    return Window(kernel, pair(op, "stride", stride, 1), paddings, dilations)


_known_window = functools.lru_cache(maxsize=1024, typed=True)(_window)


def check_map(op: str, x: Tensor, weight: Tensor, shape: Window) -> None:
    """The common checks of x: [B, C, H, W] under depthwise windows [..., C, 1, k_h, k_w]."""
    if x.dim() != 4:
        raise UnsupportedInputError(
            f"{op}: x must have 4 dimensions [B, C, H, W]\n  x: {list(x.shape)}"
        )
    if weight.shape[-3] != 1 or weight.shape[-4] != x.shape[1]:
        raise UnsupportedInputError(
            f"{op}: the depthwise weight must have one window a channel of x"
            f"\n  x:      {list(x.shape)}"
            f"\n  weight: {list(weight.shape)}, expected [..., {x.shape[1]}, 1, k_h, k_w]"
        )
    sizes = shape.output_size(x.shape[2], x.shape[3])
    if any(size != sizes[0] for size in sizes):
        raise UnsupportedInputError(
            f"{op}: all rates must give one output size\n  sizes: {sizes}\n  use padding='same'"
        )
    if min(sizes[0]) < 1:
        raise UnsupportedInputError(
            f"{op}: the window does not fit the padded map"
            f"\n  x: {list(x.shape)}\n  output size: {list(sizes[0])}"
            "\n  use padding='same'"
        )


def beyond_the_kernels(w: Tensor, stride: Sequence[int]) -> str | None:
    """Why fused kernels cannot take windows w [R, C, k_h, k_w] at a stride; None if they can."""
    if max(w.shape[2], w.shape[3]) > LARGEST_KERNEL:
        size = f"{LARGEST_KERNEL}x{LARGEST_KERNEL}"
        return f"kernel {w.shape[2]}x{w.shape[3]} is larger than {size}"
    if max(stride) > LARGEST_STRIDE:
        return f"stride {tuple(stride)} is larger than {LARGEST_STRIDE}"
    return None


def one_per_channel(t: Tensor, rates: int, channels: int) -> bool:
    """Whether t is [R*C] or [R, C]; [C, R] would be another order of the same numbers."""
    return t.shape == (rates * channels,) or t.shape == (rates, channels)


def pair(op: str, what: str, value: object, least: int) -> Pair:
    """The pair of an int, or of a pair of ints; UnsupportedInputError naming ``op`` otherwise."""
    found = (
        (value, value)
        if isinstance(value, int)
        else tuple(value)
        if isinstance(value, Sequence)
        else ()
    )
    if len(found) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) for v in found):
        raise UnsupportedInputError(
            f"{op}: {what} must be an int or a pair (rows, columns) of ints\n  {what}: {value!r}"
        )
    if min(found) < least:
        raise UnsupportedInputError(f"{op}: {what} must be at least {least}\n  {what}: {value!r}")
    return found
