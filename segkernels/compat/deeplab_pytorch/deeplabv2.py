"""libs.models.deeplabv2: ``_ASPP``.

Source: Chen et al., "DeepLab", TPAMI 2018, section 3.2 (ASPP as a sum of classifiers).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from segkernels.nn.arguments import several


class _ASPP(nn.Module):
    """Sum of 3x3 atrous classifiers: [B, in_ch, H, W] to [B, out_ch, H, W]. Keys ``c{i}``."""

    def __init__(
        self, in_ch: int, out_ch: int, rates: Sequence[int], *, backend: str | None = None
    ) -> None:
        super().__init__()
        self.backend = backend
        for i, rate in enumerate(several("deeplabv2._ASPP", rates=rates)):
            self.add_module(f"c{i}", nn.Conv2d(in_ch, out_ch, 3, padding=rate, dilation=rate))
        for branch in self.children():
            nn.init.normal_(branch.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(branch.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (branch(x) for branch in self.children())
        return sum(others, first)
