"""Named sizes: from the papers, for benchmarks, and awkward ones, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from segkernels.fused import accumulation_dtype


@dataclass(frozen=True)
class Case:
    """One call of soft_assign, up to type, layout and device."""

    name: str
    shape: tuple[int, int, int, int]  # B, C, H, W
    nodes: int  # K
    scale: float | None = None  # a typical one; None: large enough to share a pixel among nodes
    average: bool = True
    normalise: bool = True

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        device: str = "cpu",
        seed: int = 0,
        kinks: bool = True,
    ) -> dict[str, Any]:
        """Arguments of the public function: features after a ReLU in ``dtype``, nodes wide.

        The function is smooth: there are no ``kinks`` to keep away from.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = accumulation_dtype(dtype)
        channels = self.shape[1]
        features = torch.randn(self.shape, generator=generator).relu().to(dtype)
        anchors = torch.randn(self.nodes, channels, generator=generator).abs() / 2
        spread = 0.6 + 0.8 * torch.rand(self.nodes, channels, generator=generator)
        return {
            "features": features.to(device).to(memory_format=memory_format),
            "anchors": anchors.to(wide).to(device),
            "scales": (self._scale * spread).to(wide).to(device),
            "average": self.average,
            "normalise": self.normalise,
        }

    @property
    def _scale(self) -> float:
        return math.sqrt(self.shape[1]) / 2 if self.scale is None else self.scale

    @property
    def reduction(self) -> int:
        """The longest sum: the maps in the gradients of the nodes. The rounding of a score of
        size L is one of its exponential by L of its own, and counts as a sum of L²."""
        b, c, h, w = self.shape
        return max(c, b * h * w, round((c / (2 * self._scale**2)) ** 2))

    def cost(self, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """mode -> (operations, fewest bytes moved): x, q and dx once, necessary products."""
        b, c, h, w = self.shape
        pixels, wide = b * h * w, accumulation_dtype(dtype).itemsize
        x, q = pixels * c * dtype.itemsize, pixels * self.nodes * wide
        product = 2 * pixels * c * self.nodes
        return {"forward": (3 * product, x + q), "backward": (6 * product, 2 * x + 2 * q)}


PAPER = (
    Case("c512_65_k2", (1, 512, 65, 65), 2, 0.5),
    Case("c512_65_k8", (1, 512, 65, 65), 8, 0.5),
    Case("c512_65_k32", (1, 512, 65, 65), 32, 0.5),
    Case("c2048_65_k32", (1, 2048, 65, 65), 32, 0.5),
    Case("c512_33_k4", (1, 512, 33, 33), 4, 0.5),
)

AWKWARD = (
    Case("one_pixel", (1, 1, 1, 1), 1),
    Case("one_row", (2, 5, 1, 9), 3),
    Case("odd_channels", (2, 17, 7, 9), 5),
    Case("vectors", (2, 16, 7, 9), 8),
    Case("one_node", (2, 7, 5, 6), 1),
    Case("two_nodes", (2, 33, 6, 7), 2),
    Case("one_channel", (2, 1, 6, 5), 4),
    Case("wide", (2, 75, 9, 10), 32),
    Case("wide_vectors", (1, 136, 8, 16), 16),
    Case("many_nodes", (1, 20, 9, 11), 67),
    Case("most_nodes", (1, 9, 5, 7), 256),
    Case("deep", (1, 515, 3, 5), 6),
    Case("several_tiles", (2, 24, 15, 17), 9),
    Case("sums", (2, 12, 6, 7), 4, average=False, normalise=False),
    Case("means", (2, 12, 6, 7), 4, normalise=False),
    Case("directions", (2, 12, 6, 7), 4, average=False),
    Case("hard", (2, 12, 6, 7), 4, 0.05),
    Case("empty_batch", (0, 4, 5, 5), 3),
)
