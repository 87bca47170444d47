"""Named sizes: from the papers, for benchmarks, and awkward ones, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from segkernels.ops.geometry import Padding, Pair, square


@dataclass(frozen=True)
class Case:
    """One call of depthwise_conv2d, up to type, layout and device."""

    name: str
    shape: tuple[int, int, int, int]  # B, C, H, W
    rates: tuple[Pair, ...] = ((1, 1),)
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Padding = "same"
    bias: bool = False

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        device: str = "cpu",
        seed: int = 0,
        kinks: bool = True,
    ) -> dict[str, Any]:
        """Arguments of the public function, drawn in ``dtype``: normal, weights of unit gain.

        The function is smooth: there are no ``kinks`` to keep away from.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(dtype).to(device)

        channels, several = self.shape[1], len(self.rates) > 1
        lead = (len(self.rates), channels) if several else (channels,)
        return {
            "x": draw(*self.shape).to(memory_format=memory_format),
            "weight": draw(*lead, 1, *self.kernel) / math.sqrt(math.prod(self.kernel)),
            "bias": draw(*lead) if self.bias else None,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": list(self.rates) if several else self.rates[0],
        }

    @property
    def reduction(self) -> int:
        """The longest sum: a window in the forward, the map in the weight gradient."""
        b, _, h, w = self.shape
        return max(math.prod(self.kernel), b * h * w)

    def cost(self, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """mode -> (operations, fewest bytes moved): each map read or written once.
        The papers' cases pad to the same size."""
        b, c, h, w = self.shape
        maps = b * c * h * w
        out = len(self.rates) * b * c * -(-h // self.stride[0]) * -(-w // self.stride[1])
        taps = 2 * math.prod(self.kernel) * out
        return {
            "forward": (taps, (maps + out) * dtype.itemsize),
            "backward": (2 * taps, (2 * maps + out) * dtype.itemsize),
        }


PAPER = (
    Case("c256_65_r1", (1, 256, 65, 65)),
    Case("c256_65_r6", (1, 256, 65, 65), square(6)),
    Case("c256_65_r12", (1, 256, 65, 65), square(12)),
    Case("c256_65_r24", (1, 256, 65, 65), square(24)),
    Case("c256_65_r36", (1, 256, 65, 65), square(36)),
    Case("c2048_33_r12", (1, 2048, 33, 33), square(12)),
    Case("c2048_33_aspp", (1, 2048, 33, 33), square(6, 12, 18)),
    Case("c304_129_r1", (1, 304, 129, 129)),
    Case("c256_65_dpc", (1, 256, 65, 65), ((18, 15),)),
    Case("c256_65_k5", (1, 256, 65, 65), square(2), kernel=(5, 5)),
    Case("c728_33_r2", (1, 728, 33, 33), square(2)),
    Case("c128_129_s2", (1, 128, 129, 129), stride=(2, 2)),
)

AWKWARD = (
    Case("one_pixel", (1, 1, 1, 1)),
    Case("one_row", (2, 5, 1, 9), square(2), bias=True),
    Case("odd_channels", (2, 17, 7, 9), square(2), bias=True),
    Case("vectors", (2, 16, 7, 9), bias=True),
    Case("wide", (2, 75, 9, 10), bias=True),
    Case("wide_vectors", (1, 72, 3, 3)),
    Case("wide_dilated", (2, 45, 11, 10), ((3, 2),)),
    Case("wide_one_row_tap", (2, 45, 3, 10), ((3, 2),)),
    Case("wide_5x3", (2, 45, 11, 10), ((3, 2),), kernel=(5, 3)),
    Case("wide_map", (1, 8, 3, 140)),
    Case("tall_map", (1, 2, 140, 3)),
    Case("rate_beyond_map", (1, 8, 5, 6), ((7, 3),)),
    Case("anisotropic", (2, 6, 15, 25), ((6, 21),)),
    Case("several_rates", (2, 9, 11, 8), ((1, 1), (3, 2), (12, 5)), bias=True),
    Case("several_rates_vectors", (1, 8, 9, 7), ((1, 1), (2, 3), (9, 2))),
    Case("several_rates_stride_2", (1, 8, 9, 8), ((2, 1), (1, 2)), stride=(2, 2)),
    Case("kernel_1", (2, 4, 5, 5), kernel=(1, 1), bias=True),
    Case("kernel_1x7", (1, 8, 5, 9), kernel=(1, 7)),
    Case("kernel_5", (1, 8, 9, 8), ((2, 1),), kernel=(5, 5)),
    Case("kernel_5_stride_2", (2, 33, 13, 11), kernel=(5, 5), stride=(2, 2), bias=True),
    Case("kernel_3x7", (1, 3, 9, 10), ((2, 1),), kernel=(3, 7)),
    Case("kernel_7", (1, 16, 8, 7), kernel=(7, 7)),
    Case("tall_dilated", (1, 5, 41, 11), ((3, 2),), kernel=(5, 5)),
    Case("wide_stride_2", (2, 3, 19, 70), stride=(2, 2)),
    Case("dilated_stride_2", (1, 8, 21, 37), ((2, 3),), stride=(2, 2)),
    Case("stride_1x2", (1, 20, 6, 9), square(3), stride=(1, 2)),
    Case("no_padding", (2, 33, 9, 12), ((2, 3),), padding=0),
    Case("padding_beyond", (2, 40, 6, 7), ((2, 1),), padding=(4, 3)),
    Case("padded_stride_2", (1, 5, 9, 10), stride=(2, 2), padding=(0, 2)),
    Case("empty_batch", (0, 4, 5, 5), bias=True),
)
