"""Fused kernels for the context modules of semantic segmentation, on CPU and GPU."""

from segkernels.fused import (
    BackendUnavailableError,
    SegkernelsError,
    SegkernelsPerformanceWarning,
    UnsupportedInputError,
    explain,
)
from segkernels.ops import Moments, depthwise_conv2d, separable_conv2d

__all__ = [
    "BackendUnavailableError",
    "Moments",
    "SegkernelsError",
    "SegkernelsPerformanceWarning",
    "UnsupportedInputError",
    "depthwise_conv2d",
    "explain",
    "separable_conv2d",
]
