"""What constructors are given: errors that name the argument, what it must be and what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

from torch import nn

from segkernels.fused import UnsupportedInputError

NormClass = Callable[[int], nn.Module]
Activation = str | Callable[[], nn.Module] | None

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}


def check_positive(owner: str, **given: Any) -> None:
    """Numbers of channels, classes, layers."""
    for name, value in given.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise UnsupportedInputError(
                f"{owner}: {name} must be a positive int\n  {name}: {value!r}"
            )


def is_positive(value: Any, most: float = math.inf) -> bool:
    """A finite number above 0, at most ``most``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf and value <= most


def check_weight(**given: Any) -> None:
    """Weights of losses."""
    for name, value in given.items():
        if not is_positive(value):
            raise UnsupportedInputError(
                f"{name} is the weight of a loss, a positive number\n  {name}: {value!r}"
            )


def several(owner: str, count: int | None = None, **given: Any) -> tuple[Any, ...]:
    """The rates of the branches: any number of them, or ``count``."""
    ((name, value),) = given.items()
    values = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if values is None or len(values) != (count or len(values)):
        wanted = f"a sequence of {count}" if count else "a sequence, such as (6, 12, 18) or (6,)"
        raise UnsupportedInputError(f"{owner}: {name} must be {wanted}\n  {name}: {value!r}")
    return values


def unit_rates(owner: str, count: int, multigrid: Any) -> tuple[int, ...]:
    """A multi-grid: the unit rates of ``count`` blocks."""
    units = several(owner, count, multigrid=multigrid)
    check_positive(owner, **{f"multigrid[{i}]": unit for i, unit in enumerate(units)})
    return units


def norm_maker(name: str, norm: Any) -> NormClass:
    """``norm`` as a function of the number of channels that makes a module or raises TypeError."""
    expected = (
        f"{name} must make a norm from the number of channels"
        f"\n  {name}: {norm!r}"
        "\n  such as nn.BatchNorm2d (the class, not a module) or functools.partial(nn.GroupNorm, 8)"
    )
    return lambda channels: _made(expected, norm, channels)


def make_norm(name: str, norm: Any, channels: int) -> nn.Module | None:
    """The norm, where there is one."""
    return None if norm is None else norm_maker(name, norm)(channels)


def make_activation(name: str, activation: Activation) -> nn.Module | None:
    """The module of "relu" or "relu6", of a class or function that makes one, or None."""
    if activation is None:
        return None
    expected = (
        f"{name} must be one of {', '.join(map(repr, ACTIVATIONS))}, None, or make a module"
        f"\n  {name}: {activation!r}"
        "\n  such as nn.SiLU (the class, not a module or a function of a tensor)"
    )
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise UnsupportedInputError(expected)
        activation = ACTIVATIONS[activation]
    return _made(expected, activation)


def _made(expected: str, maker: Any, *args: int) -> nn.Module:
    if isinstance(maker, nn.Module) or not callable(maker):
        raise TypeError(expected)
    try:
        module = maker(*args)
    except TypeError as error:
        raise TypeError(expected) from error
    if not isinstance(module, nn.Module):
        raise TypeError(expected)
    return module
