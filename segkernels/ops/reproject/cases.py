"""Named sizes: from the papers, for benchmarks, and awkward ones, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from segkernels.fused import accumulation_dtype


@dataclass(frozen=True)
class Case:
    """One call of reproject, up to type, layout and device."""

    name: str
    shape: tuple[int, int, int, int]  # B, K, H, W
    channels: int  # D
    residual: bool = False

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        device: str = "cpu",
        seed: int = 0,
        kinks: bool = True,
    ) -> dict[str, Any]:
        """Arguments of the public function: maps and nodes in ``dtype``, the assignment wide.

        The function is smooth: there are no ``kinks`` to keep away from.
        """
        generator = torch.Generator().manual_seed(seed)
        b, k, h, w = self.shape

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        assignment = draw(*self.shape).softmax(1).to(accumulation_dtype(dtype))
        residual = draw(b, self.channels, h, w).to(dtype) if self.residual else None
        return {
            "nodes": draw(b, k, self.channels).to(dtype).to(device),
            "assignment": assignment.to(device).to(memory_format=memory_format),
            "residual": None
            if residual is None
            else residual.to(device).to(memory_format=memory_format),
        }

    @property
    def reduction(self) -> int:
        """The longest sum: the nodes in y, the channels in dq, an image in dz."""
        _, k, h, w = self.shape
        return max(k, self.channels, h * w)

    def cost(self, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """mode -> (operations, fewest bytes moved): every map once."""
        b, k, h, w = self.shape
        pixels, wide = b * h * w, accumulation_dtype(dtype).itemsize
        y, q = pixels * self.channels * dtype.itemsize, pixels * k * wide
        product = 2 * pixels * k * self.channels
        return {
            "forward": (product, y * (1 + self.residual) + q),
            "backward": (2 * product, y + 2 * q),
        }


PAPER = (
    Case("d256_65_k32", (1, 32, 65, 65), 256),
    Case("d512_65_k32", (1, 32, 65, 65), 512, residual=True),
    Case("d256_65_k8", (1, 8, 65, 65), 256),
)

AWKWARD = (
    Case("one_pixel", (1, 1, 1, 1), 1),
    Case("one_row", (2, 3, 1, 9), 5, residual=True),
    Case("odd_channels", (2, 5, 7, 9), 17, residual=True),
    Case("vectors", (2, 8, 7, 9), 16, residual=True),
    Case("one_node", (2, 1, 5, 6), 7),
    Case("one_channel", (2, 4, 6, 5), 1),
    Case("wide", (2, 32, 9, 10), 75, residual=True),
    Case("wide_vectors", (1, 16, 8, 16), 136),
    Case("most_nodes", (1, 256, 5, 7), 9),
    Case("deep", (1, 6, 3, 5), 515),
    Case("several_tiles", (2, 9, 15, 17), 24, residual=True),
    Case("empty_batch", (0, 3, 5, 5), 4, residual=True),
)
