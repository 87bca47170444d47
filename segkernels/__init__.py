"""Fused kernels for the context modules of semantic segmentation, on CPU and GPU."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from segkernels.fused import (
    BackendUnavailableError,
    SegkernelsError,
    SegkernelsPerformanceWarning,
    UnsupportedInputError,
    explain,
)
from segkernels.ops import (
    Moments,
    depthwise_conv2d,
    em_attention,
    encode,
    reproject,
    separable_conv2d,
    soft_assign,
)
from segkernels.patch import patch, unpatch

if TYPE_CHECKING:
    from segkernels import networks, nn

__all__ = [
    "BackendUnavailableError",
    "Moments",
    "SegkernelsError",
    "SegkernelsPerformanceWarning",
    "UnsupportedInputError",
    "depthwise_conv2d",
    "em_attention",
    "encode",
    "explain",
    "networks",
    "nn",
    "patch",
    "reproject",
    "separable_conv2d",
    "soft_assign",
    "unpatch",
]


def __getattr__(name: str) -> ModuleType:
    """The layers and networks, imported when they are first asked for."""
    if name in ("networks", "nn"):
        return importlib.import_module(f"segkernels.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
