"""What the backbones and the heads agree on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """What a backbone returns: the maps of its four stages, no smaller than H/os x W/os."""

    low_level: Tensor  # [B, C₁, ~H/4, ~W/4]
    second: Tensor  # [B, C₂, ~H/8, ~W/8]
    third: Tensor  # [B, C₃, ~H/16, ~W/16]
    deep: Tensor  # [B, C₄, ~H/32, ~W/32]
