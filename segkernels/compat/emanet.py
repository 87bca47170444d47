"""XiaLiPKU/EMANet, network: ``EMAU``.

As published, the running bases are moved by the training script, from what ``forward`` returned.

Source: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV
2019.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import check_positive
from segkernels.nn.emau import attend
from segkernels.nn.running_bases import unit_bases

NORM_MOMENTUM = 3e-4


class Norm(nn.BatchNorm2d):
    """BatchNorm that does not count its batches (``num_batches_tracked``)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )


class EMAU(nn.Module):
    """x [B, c, H, W] to a map of that size and the bases [B, c, k] of every image. Keys: ``mu``
    [1, c, k], ``conv1``, ``conv2.0``, ``conv2.1``.

    ``conv1`` is folded into the bases and does not run; it gets no gradient.
    """

    backend: str | None = None
    mu: Tensor

    def __init__(self, c: int, k: int, stage_num: int = 3, *, backend: str | None = None) -> None:
        super().__init__()
        check_positive("emanet.EMAU", c=c, k=k, stage_num=stage_num)
        self.stage_num, self.backend = stage_num, backend
        self.register_buffer("mu", unit_bases(c, k)[None])
        self.conv1 = nn.Conv2d(c, c, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), Norm(c, momentum=NORM_MOMENTUM))
        for conv in (self.conv1, self.conv2[0]):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / c))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, mu = attend(
            x, self, self.mu, self.conv1, iterations=self.stage_num, backend=self.backend
        )
        return (self.conv2(y.relu_()) + x).relu_(), mu

    def extra_repr(self) -> str:
        return f"stage_num={self.stage_num}, backend={self.backend!r}"
