"""DeepLabv3+.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from segkernels.networks.segmenter import Segmenter, assemble
from segkernels.nn import DeepLabV3PlusHead


def deeplabv3plus(
    num_classes: int,
    *,
    output_stride: int = 16,
    rates: Sequence[int] | None = None,
    align_corners: bool = False,
    **options: Any,
) -> Segmenter:
    """A backbone and a :class:`segkernels.nn.DeepLabV3PlusHead`.

    rates: of the ASPP; None: (6, 12, 18) at output stride 16, in proportion elsewhere. options: of
    the head; the rest: as of :func:`segkernels.networks.segmenter.assemble`.
    """

    def head(low_level_channels: int, in_channels: int, **options: Any) -> nn.Module:
        return DeepLabV3PlusHead(
            in_channels,
            low_level_channels,
            rates=[rate * 16 // output_stride for rate in (6, 12, 18)] if rates is None else rates,
            align_corners=align_corners,
            **options,
        )

    return assemble(
        head,
        num_classes,
        stages=(0, 3),
        output_stride=output_stride,
        align_corners=align_corners,
        **options,
    )
