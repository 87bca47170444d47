"""Named sizes: from the papers, for benchmarks, and awkward ones, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from segkernels.fused import accumulation_dtype


@dataclass(frozen=True)
class Case:
    """One call of encode, up to type, layout and device."""

    name: str
    shape: tuple[int, int, int, int]  # B, C, H, W
    nodes: int  # K
    scale: float | None = None  # the strongest; None: weak enough to share a pixel among codewords
    mixed: bool = False  # scales of both signs

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        device: str = "cpu",
        seed: int = 0,
        kinks: bool = True,
    ) -> dict[str, Any]:
        """Arguments of the public function: features after a ReLU in ``dtype``, codewords wide.

        The function is smooth: there are no ``kinks`` to keep away from.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = accumulation_dtype(dtype)
        channels = self.shape[1]
        features = torch.randn(self.shape, generator=generator).relu().to(dtype)
        codewords = torch.randn(self.nodes, channels, generator=generator) / 4
        strength = torch.rand(self.nodes, generator=generator)
        return {
            "features": features.to(device).to(memory_format=memory_format),
            "codewords": codewords.to(wide).to(device),
            "scale": (self._scale * (strength - (0.5 if self.mixed else 1))).to(wide).to(device),
        }

    @property
    def _scale(self) -> float:
        return 4 / self.shape[1] if self.scale is None else self.scale

    @property
    def reduction(self) -> int:
        """The longest sum: the maps in the gradients of the codewords. The rounding of a score of
        size L is one of its exponential by L of its own, and counts as a sum of L²."""
        b, c, h, w = self.shape
        return max(c, b * h * w, round((c * self._scale) ** 2))

    def cost(self, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """mode -> (operations, fewest bytes moved): x, q and dx once, necessary products."""
        b, c, h, w = self.shape
        pixels, wide = b * h * w, accumulation_dtype(dtype).itemsize
        x, q = pixels * c * dtype.itemsize, pixels * self.nodes * wide
        product = 2 * pixels * c * self.nodes
        return {"forward": (2 * product, x + q), "backward": (4 * product, 2 * x + q)}


PAPER = (
    Case("c512_65_k32", (1, 512, 65, 65), 32, 1.0),
    Case("c512_60_k32", (4, 512, 60, 60), 32, 1.0),
)

AWKWARD = (
    Case("one_pixel", (1, 1, 1, 1), 1),
    Case("one_row", (2, 5, 1, 9), 3),
    Case("odd_channels", (2, 17, 7, 9), 5),
    Case("vectors", (2, 16, 7, 9), 8),
    Case("one_node", (2, 7, 5, 6), 1),
    Case("one_channel", (2, 1, 6, 5), 4),
    Case("wide", (2, 75, 9, 10), 32),
    Case("wide_vectors", (1, 136, 8, 16), 16),
    Case("most_nodes", (1, 9, 5, 7), 256),
    Case("deep", (1, 515, 3, 5), 6),
    Case("several_tiles", (2, 24, 15, 17), 9),
    Case("mixed_signs", (2, 12, 6, 7), 4, mixed=True),
    Case("hard", (2, 12, 6, 7), 4, 30.0),
    Case("empty_batch", (0, 4, 5, 5), 3),
)
