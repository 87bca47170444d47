"""Atrous depthwise convolution as a layer."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from segkernels.fused import UnsupportedInputError
from segkernels.nn.arguments import check_positive
from segkernels.ops.depthwise_conv2d import depthwise_conv2d
from segkernels.ops.geometry import pair

Size = int | tuple[int, int]


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` with one k_h x k_w window a channel, at any rate. Keys: ``weight`` [C, 1, k_h,
    k_w], ``bias`` [C].

    channels: C. kernel_size: odd. stride, dilation: int or (rows, columns). padding: "same"
    (dilation·(k-1)/2, for every stride), an int or a pair. backend: "native", "triton", "reference"
    or None (automatic).

    Input [B, C, H, W], output [B, C, H', W'] in the input's memory format. Raises
    UnsupportedInputError for an even kernel.

    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section
    3.1.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Literal["same"] | Size = "same",
        dilation: Size = 1,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        name = "DepthwiseConv2d"
        check_positive(name, channels=channels)
        kernel, rate = (
            pair(name, "kernel_size", kernel_size, 1),
            pair(name, "dilation", dilation, 1),
        )
        if kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
            raise UnsupportedInputError(
                f"{name}: the kernel must have odd sides\n  kernel_size: {kernel_size!r}"
            )
        if padding == "same":
            padding = (rate[0] * (kernel[0] // 2), rate[1] * (kernel[1] // 2))
        elif isinstance(padding, str):
            raise UnsupportedInputError(
                f"{name}: padding is 'same', an int or a pair\n  padding: {padding!r}"
            )
        else:
            padding = pair(name, "padding", padding, 0)
        steps = pair(name, "stride", stride, 1)
        super().__init__(
            channels, channels, kernel, steps, padding, rate, groups=channels, bias=bias
        )
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.dilation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        base: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{base}, backend={self.backend!r}"
