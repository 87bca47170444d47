"""EncNet.

Source: Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from segkernels.networks.backbones import build_backbone
from segkernels.networks.segmenter import Logits, Segmenter
from segkernels.nn import EncModule
from segkernels.nn.arguments import NormClass, check_positive
from segkernels.nn.aspp import conv_norm_activation


class EncHead(nn.Module):
    """3x3 convolution, context encoding, classifier.

    Arguments: as of :func:`encnet`. ``forward(low_level, deep)``: the deep features [B, C, H, W] to
    logits [B, num_classes, H, W]; in training to :class:`Logits`, with those of the classes'
    presence. Children: ``reduce``, ``context``, ``dropout``, ``classify``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        codes: int = 32,
        dropout: float = 0.1,
        norm: NormClass = nn.BatchNorm2d,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("EncHead", in_channels=in_channels, channels=channels)
        self.reduce = conv_norm_activation(in_channels, channels, 3, norm=norm, activation="relu")
        self.context = EncModule(channels, num_classes, codes=codes, norm=norm, backend=backend)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, low_level: Tensor, deep: Tensor) -> Tensor | Logits:
        context = self.context(self.reduce(deep))
        logits = self.classify(self.dropout(context.features))
        return Logits(logits, context.presence) if self.training else logits


def encnet(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    output_stride: int = 8,
    weights: str | Path | None = None,
    in_channels: int = 3,
    multigrid: Sequence[int] | None = None,
    width: int | None = None,
    channels: int = 512,
    codes: int = 32,
    dropout: float = 0.1,
    norm: NormClass = nn.BatchNorm2d,
    align_corners: bool = False,
    backend: str | None = None,
) -> Segmenter:
    """A backbone and an :class:`EncHead`.

    channels, codes: of the context encoding. The rest: as of :func:`deeplabv3plus`.

    In training the network returns ``Logits(pixels, presence)``, and its loss is the pixels' cross
    entropy and 0.2 times the semantic encoding loss, the binary cross entropy of the presence:

        pixels, presence = network(images)
        loss = F.cross_entropy(pixels, labels, ignore_index=255)
        loss = loss + 0.2 * segkernels.nn.semantic_encoding_loss(presence, labels)

    which is what :func:`segkernels.train.train` does. In evaluation it returns the pixels' logits.
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
    head = EncHead(
        trunk.channels,
        num_classes,
        channels=channels,
        codes=codes,
        dropout=dropout,
        norm=norm,
        backend=backend,
    )
    return Segmenter(trunk, head, align_corners=align_corners)
