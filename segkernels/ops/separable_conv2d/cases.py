"""Named sizes: from the papers, for benchmarks, and awkward ones, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from segkernels.fused import accumulation_dtype
from segkernels.ops.geometry import Padding, Pair, square


@dataclass(frozen=True)
class Case:
    """One call of separable_conv2d, up to type, layout and device."""

    name: str
    shape: tuple[int, int, int, int]  # B, C, H, W
    outputs: int  # D
    rates: tuple[Pair, ...] = ((1, 1),)
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Padding = "same"
    affine: tuple[bool, bool] = (True, True)
    activation: tuple[str | None, str | None] = ("relu", "relu")
    eps: tuple[float | None, float | None] = (None, None)

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        device: str = "cpu",
        seed: int = 0,
        kinks: bool = True,
    ) -> dict[str, Any]:
        """Arguments of the public function: maps and weights in ``dtype``, affine terms wide.

        ``kinks=False`` shifts every channel well inside one branch of its activation, so that a
        16-bit rounding cannot move a value across the kink and flip a gradient. Where the outer
        stage alone standardises, it makes the inner one linear instead: such shifts would be the
        mean that it takes away, and their rounding many times that of what is left.
        """
        inner, outer = self.activation
        if not kinks and self.eps[1] and not self.eps[0]:
            inner = None
        generator = torch.Generator().manual_seed(seed)
        wide = accumulation_dtype(dtype)

        def draw(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(dtype).to(device)

        channels, several = self.shape[1], len(self.rates) > 1
        lead = (len(self.rates),) if several else ()
        made: dict[str, Any] = {
            "x": draw(*self.shape).to(memory_format=memory_format),
            "depthwise_weight": draw(*lead, channels, 1, *self.kernel)
            / math.sqrt(math.prod(self.kernel)),
            "pointwise_weight": draw(*lead, self.outputs, channels, 1, 1) / math.sqrt(channels),
            "stride": self.stride,
            "padding": self.padding,
            "dilation": list(self.rates) if several else self.rates[0],
        }
        stages = (("inner", channels, inner), ("outer", self.outputs, outer))
        for i, (stage, width, activation) in enumerate(stages):
            if self.affine[i]:
                made[f"{stage}_scale"] = 1 + draw(len(self.rates) * width, dtype=wide) / 4
                made[f"{stage}_shift"] = draw(len(self.rates) * width, dtype=wide) / 4
            if not kinks and activation:
                # without a standardisation the deviation is not 1; relu6 has room for no more
                spread = 1 if self.eps[i] or activation == "relu6" else 2
                shift = _branches(len(self.rates) * width, i, wide)
                made[f"{stage}_shift"] = (spread * shift).to(device)
            made[f"{stage}_activation"] = activation
            made[f"{stage}_eps"] = self.eps[i]
        return made

    @property
    def reduction(self) -> int:
        """The longest sum: channels in the forward, the map in weight gradients and moments."""
        b, c, h, w = self.shape
        return max(c, self.outputs, b * h * w)

    def cost(self, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """mode -> (operations, fewest bytes moved): x and y once; d and h never.
        The papers' cases pad to the same size."""
        b, c, h, w = self.shape
        pixels = len(self.rates) * b * -(-h // self.stride[0]) * -(-w // self.stride[1])
        work = 2 * pixels * c * (math.prod(self.kernel) + self.outputs)
        x, y = b * c * h * w * dtype.itemsize, pixels * self.outputs * dtype.itemsize
        return {"forward": (work, x + y), "backward": (2 * work, 2 * x + y)}


def _branches(width: int, stage: int, dtype: torch.dtype) -> torch.Tensor:
    """Shifts of alternating sign, several deviations of a standardised stage's input."""
    sign = 1 - 2 * (torch.arange(width) % 2)
    return (sign * (4, 20)[stage]).to(dtype)


_TRAIN = (1e-5, 1e-5)

PAPER = (
    Case("c256_65_r1", (1, 256, 65, 65), 256),
    Case("c256_65_r12", (1, 256, 65, 65), 256, square(12)),
    Case("c256_65_r24", (1, 256, 65, 65), 256, square(24)),
    Case("c256_65_r36", (1, 256, 65, 65), 256, square(36)),
    Case("c256_65_r12_train", (1, 256, 65, 65), 256, square(12), eps=_TRAIN),
    Case("c304_129_r1", (1, 304, 129, 129), 256),
    Case("c2048_33_aspp", (1, 2048, 33, 33), 256, square(6, 12, 18)),
    Case("c728_33_r2", (1, 728, 33, 33), 728, square(2)),
    Case("c256_65_dpc", (1, 256, 65, 65), 256, ((18, 15),)),
)

AWKWARD = (
    Case("one_pixel", (1, 1, 1, 1), 1),
    Case("odd_channels", (2, 17, 7, 9), 5, square(2)),
    Case("vectors", (2, 16, 7, 9), 24),
    Case("wide", (2, 75, 9, 10), 45),
    Case("wide_vectors", (1, 72, 3, 5), 136),
    Case("wide_vectors_train", (1, 72, 3, 5), 136, eps=_TRAIN),
    Case("wide_dilated_train", (2, 45, 11, 10), 70, ((3, 2),), eps=_TRAIN),
    Case("plain", (2, 6, 5, 7), 9, affine=(False, False), activation=(None, None)),
    Case("relu6_rate_beyond_map", (1, 8, 5, 6), 33, ((7, 3),), activation=("relu6", "relu6")),
    Case("several_rates", (2, 9, 11, 8), 4, ((1, 1), (3, 2), (12, 5))),
    Case("several_rates_train", (2, 9, 11, 8), 4, ((1, 1), (3, 2), (12, 5)), eps=_TRAIN),
    Case("kernel_5_stride_2", (2, 33, 13, 11), 20, kernel=(5, 5), stride=(2, 2)),
    Case("several_rates_vectors", (1, 8, 9, 7), 16, ((1, 1), (2, 3), (9, 2))),
    Case("kernel_5_stride_2_train", (2, 32, 13, 11), 24, kernel=(5, 5), stride=(2, 2), eps=_TRAIN),
    Case(
        "inner_norm_only", (2, 6, 9, 7), 10, square(2), eps=(1e-3, None), activation=("relu", None)
    ),
    Case("outer_norm_only", (2, 7, 9, 7), 9, affine=(False, True), eps=(None, 1e-5)),
    Case(
        "norm_without_affine",
        (3, 5, 6, 6),
        7,
        affine=(False, False),
        activation=(None, "relu6"),
        eps=_TRAIN,
    ),
    Case("kernel_1", (2, 4, 5, 5), 3, kernel=(1, 1)),
    Case("several_tiles", (2, 5, 15, 17), 6, ((12, 2),)),
    Case("several_tiles_1x3", (2, 8, 11, 13), 8, kernel=(1, 3), eps=(None, 1e-3)),
    Case("no_padding_train", (2, 33, 9, 12), 7, ((2, 3),), padding=0, eps=_TRAIN),
    Case("padding_beyond", (1, 6, 7, 8), 5, padding=(4, 1)),
    Case("empty_batch", (0, 4, 5, 5), 6),
)
