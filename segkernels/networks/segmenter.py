"""Backbone, head, upsampling: what every network here is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F


class Features(NamedTuple):
    """What a backbone returns."""

    low_level: Tensor  # [B, C₁, ~H/4, ~W/4]
    deep: Tensor  # [B, C, ~H/os, ~W/os]


class Logits(NamedTuple):
    """What a network returns in training that also learns which classes an image has."""

    pixels: Tensor  # [B, num_classes, H, W]
    presence: Tensor  # [B, num_classes]


class Segmenter(nn.Module):
    """Logits at the size of the image: [B, 3, H, W] to [B, num_classes, H, W], any H, W.

    backbone: image to :class:`Features`. head: ``head(low_level, deep)`` to logits of any size,
    which are interpolated bilinearly, or, in training, to :class:`Logits` with such pixels.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.align_corners = align_corners

    def forward(self, image: Tensor) -> Tensor | Logits:
        logits = self.head(*self.backbone(image))
        if isinstance(logits, Logits):
            return logits._replace(pixels=self._enlarged(logits.pixels, image))
        return self._enlarged(logits, image)

    def _enlarged(self, logits: Tensor, image: Tensor) -> Tensor:
        return F.interpolate(
            logits, image.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )
