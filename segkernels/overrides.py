"""Functions that others may take over: ``torch.fx``, which records a call instead of making it, and
tensors with a ``__torch_function__`` of their own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.overrides import handle_torch_function, has_torch_function_unary

P = ParamSpec("P")
R = TypeVar("R")


def overridable(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, whose first argument is a tensor, as one node of an ``fx.Graph``."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        x = args[0] if args else kwargs.get(first)
        if has_torch_function_unary(x):
            taken: R = handle_torch_function(call, (x,), *args, **kwargs)
            return taken
        return function(*args, **kwargs)

    return call
