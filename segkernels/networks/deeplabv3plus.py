"""DeepLabv3+.

Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from segkernels.networks.backbones import build_backbone
from segkernels.networks.segmenter import Segmenter
from segkernels.nn import DeepLabV3PlusHead
from segkernels.nn.arguments import NormClass


def deeplabv3plus(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    output_stride: int = 16,
    weights: str | Path | None = None,
    in_channels: int = 3,
    multigrid: Sequence[int] | None = None,
    width: int | None = None,
    channels: int = 256,
    low_level_width: int = 48,
    rates: Sequence[int] | None = None,
    separable: bool = True,
    dropout: float = 0.1,
    norm: NormClass = nn.BatchNorm2d,
    align_corners: bool = False,
    backend: str | None = None,
) -> Segmenter:
    """A backbone and a :class:`segkernels.nn.DeepLabV3PlusHead`.

    backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "xception65". output_stride: 8, 16
    or 32 (the rest of the backbone is atrous). weights: a local file (.pth or .safetensors) for the
    backbone; ResNets take torchvision's. multigrid: unit rates of the last stage, such as
    (1, 2, 4). width: channels of a ResNet's first stage (None: 64). rates: of the ASPP; None:
    (6, 12, 18) at stride 16, in proportion elsewhere. channels, low_level_width, separable,
    dropout, norm, align_corners, backend: as the head's.
    """
    trunk = build_backbone(
        backbone,
        output_stride=output_stride,
        in_channels=in_channels,
        multigrid=multigrid,
        width=width,
        weights=weights,
        norm=norm,
        backend=backend,
    )
    if rates is None:
        rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
    head = DeepLabV3PlusHead(
        trunk.channels,
        trunk.low_level_channels,
        num_classes,
        channels=channels,
        low_level_width=low_level_width,
        rates=rates,
        separable=separable,
        dropout=dropout,
        norm=norm,
        align_corners=align_corners,
        backend=backend,
    )
    return Segmenter(trunk, head, align_corners=align_corners)
