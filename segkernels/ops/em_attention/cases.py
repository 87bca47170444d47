"""Named sizes: from the papers, for benchmarks, and awkward ones, for tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from segkernels.fused import accumulation_dtype


@dataclass(frozen=True)
class Case:
    """One call of em_attention, up to type, layout and device."""

    name: str
    shape: tuple[int, int, int, int]  # B, C, H, W
    bases: int  # K
    iterations: int = 3
    gradient: str = "full"
    norm: str = "additive"
    own: bool = False  # each image has bases of its own
    temperature: float | None = None  # None: 1, and no tensor
    assignment: bool = False
    length: float = 4.0  # of a pixel's features: at 4 it is shared among bases

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
        device: str = "cpu",
        seed: int = 0,
        kinks: bool = True,
    ) -> dict[str, Any]:
        """Arguments of the public function: features of both signs in ``dtype``, bases wide.

        The function is smooth: there are no ``kinks`` to keep away from.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = accumulation_dtype(dtype)
        b, c, *_ = self.shape
        features = torch.randn(self.shape, generator=generator) * (self.length / math.sqrt(c))
        bases = torch.randn(*((b,) if self.own else ()), c, self.bases, generator=generator)
        arguments: dict[str, Any] = {
            "features": features.to(device, dtype).to(memory_format=memory_format),
            "bases": F.normalize(bases, dim=-2).to(wide).to(device),
            "iterations": self.iterations,
            "gradient": self.gradient,
            "norm": self.norm,
            "return_assignment": self.assignment,
        }
        if self.temperature is not None:
            arguments["temperature"] = torch.tensor(self.temperature, dtype=wide, device=device)
        return arguments

    @property
    def truncated(self) -> bool:
        """Whether some of what the bases go through is not differentiated."""
        return self.gradient == "last" or (self.gradient == "last+bases" and self.iterations > 1)

    @property
    def reduction(self) -> int:
        """The longest sum: the channels of a score, the pixels of a base, all of those of λ's. The
        rounding of a score of size L is one of its exponential by L of its own, and counts as a
        sum of L². There are 2T + 1 such sums in a row, each of what those before it rounded."""
        b, c, h, w = self.shape
        heat = 1.0 if self.temperature is None else self.temperature
        lam = 0 if self.temperature is None else b * h * w * self.bases
        longest = max(c, h * w, lam, round((heat * self.length) ** 2))
        return (2 * self.iterations + 1) * longest

    def cost(self, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """mode -> (operations, fewest bytes moved): every map once, the products of all pixels
        with all bases; of the backward those of the iterations that it passes."""
        b, c, h, w = self.shape
        pixels, t = b * h * w, self.iterations
        depth = min(1, t) if self.gradient == "last+bases" else t
        x, product = pixels * c * dtype.itemsize, 2 * pixels * c * self.bases
        return {
            "forward": ((2 * t + 1) * product, 2 * x),
            "backward": ((3 if self.gradient == "last" else 5 * depth + 2) * product, 3 * x),
        }


PAPER = (
    Case("c512_65_k64", (1, 512, 65, 65), 64),
    Case("c512_33_k64", (1, 512, 33, 33), 64),
    Case("c512_97_k64", (1, 512, 97, 97), 64),
    Case("c512_65_k64_last", (1, 512, 65, 65), 64, gradient="last", norm="clamp"),
)

AWKWARD = (
    Case("one_pixel", (1, 3, 1, 1), 2),
    Case("one_row", (2, 5, 1, 9), 3, norm="clamp"),
    Case("odd_channels", (2, 17, 7, 9), 5, assignment=True),
    Case("vectors", (2, 16, 7, 9), 8, iterations=2, assignment=True),
    Case("one_base", (2, 7, 5, 6), 1, temperature=0.5),
    Case("two_bases", (2, 33, 6, 7), 2, gradient="last+bases"),
    Case("one_channel", (2, 1, 6, 5), 4),
    Case("wide", (2, 75, 9, 10), 40, iterations=1),
    Case("wide_vectors", (1, 136, 8, 16), 16, gradient="last+bases", temperature=2.0),
    Case("many_bases", (1, 20, 9, 11), 67, iterations=2),
    Case("most_bases", (1, 9, 5, 7), 256, iterations=2, norm="clamp"),
    Case("deep", (1, 515, 3, 5), 6, own=True),
    Case(
        "several_tiles",
        (2, 24, 15, 17),
        9,
        norm="clamp",
        own=True,
        temperature=1.5,
        assignment=True,
    ),
    Case("ten_tiles", (1, 8, 34, 34), 3, iterations=2, gradient="last+bases"),
    Case("no_iteration", (2, 12, 6, 7), 4, iterations=0, assignment=True),
    Case("many_iterations", (2, 12, 6, 7), 4, iterations=7),
    Case("hard", (2, 12, 6, 7), 4, iterations=1, length=30),
    Case("empty_batch", (0, 4, 5, 5), 3),
)
