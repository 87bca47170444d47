"""Backbone, head, upsampling: what every network here is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Features(NamedTuple):
    """What a backbone returns."""

    low_level: Tensor  # [B, C₁, ~H/4, ~W/4]
    deep: Tensor  # [B, C, ~H/os, ~W/os]


class Segmenter(nn.Module):
    """Logits at the size of the image: [B, 3, H, W] to [B, num_classes, H, W], any H, W.

    backbone: image to :class:`Features`. head: ``head(low_level, deep)`` to logits of any size,
    which are interpolated bilinearly.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.align_corners = align_corners

    def forward(self, image: Tensor) -> Tensor:
        logits = self.head(*self.backbone(image))
        return F.interpolate(
            logits, image.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )
