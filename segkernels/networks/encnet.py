"""EncNet.

Source: Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from segkernels.networks.segmenter import Logits, Segmenter, Weighted, assemble
from segkernels.nn import EncModule
from segkernels.nn.arguments import NormClass, check_positive, check_weight
from segkernels.nn.aspp import conv_norm_activation
from segkernels.nn.laterals import with_laterals


class EncHead(nn.Module):
    """3x3 convolution, fused with earlier stages where there are any; context encoding; classifier.

    in_channels: of the stages, of which the last one is encoded and the others are lateral inputs.
    channels, codes: of the context encoding. presence: weight of the semantic encoding loss, the
    binary cross entropy of the classes' presence (the paper's: 0.2).

    ``forward(*laterals, deep)``: maps to logits [B, num_classes, H, W] of the last one's size; in
    training to :class:`Logits`, with those of the classes' presence. Children: ``reduce``,
    ``laterals``, ``fuse``, ``context``, ``dropout``, ``classify``.
    """

    def __init__(
        self,
        *in_channels: int,
        num_classes: int,
        channels: int = 512,
        codes: int = 32,
        presence: float = 0.2,
        dropout: float = 0.1,
        norm: NormClass = nn.BatchNorm2d,
        align_corners: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        *earlier, deep = in_channels
        widths = {f"in_channels[{i}]": c for i, c in enumerate(in_channels)}
        check_positive("EncHead", channels=channels, **widths)
        check_weight(presence=presence)
        self.presence = presence
        self.align_corners = align_corners

        def conv(width: int, kernel_size: int) -> nn.Module:
            return conv_norm_activation(width, channels, kernel_size, norm=norm, activation="relu")

        self.reduce = conv(deep, 3)
        self.laterals = nn.ModuleList(conv(width, 1) for width in earlier)
        self.fuse = conv(len(in_channels) * channels, 3) if earlier else None
        self.context = EncModule(channels, num_classes, codes=codes, norm=norm, backend=backend)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, *maps: Tensor) -> Tensor | Logits:
        *earlier, deep = maps
        x = self.reduce(deep)
        if self.fuse is not None:
            x = with_laterals(
                x, earlier, self.laterals, self.fuse, align_corners=self.align_corners
            )
        context = self.context(x)
        logits = self.classify(self.dropout(context.features))
        if not self.training:
            return logits
        return Logits(logits, presence=Weighted(context.presence, self.presence))


def encnet(
    num_classes: int,
    *,
    lateral: bool = False,
    output_stride: int = 8,
    auxiliary: float | None = 0.2,
    align_corners: bool = False,
    **options: Any,
) -> Segmenter:
    """A backbone and an :class:`EncHead`; in training, an auxiliary FCN head on the third stage.

    lateral: the second and the third stage are lateral inputs of the head (published: for PASCAL
    and PASCAL-Context, not for ADE20K). auxiliary: weight of the auxiliary head's loss; None: there
    is no such head. options: of :class:`EncHead`; the rest: as of
    :func:`segkernels.networks.segmenter.assemble`.

    The auxiliary head is that of the published code, zhanghang1989/PyTorch-Encoding, which trains
    with ``--aux`` and 0.2 (experiments/segmentation/train.py; mmsegmentation: 0.4). The paper has a
    second context encoding with its loss in its place.

    In training the network returns :class:`Logits`, whose losses and weights are added up by
    :func:`segkernels.train.training_loss`; in evaluation the pixels' logits.
    """
    return assemble(
        partial(EncHead, align_corners=align_corners),
        num_classes,
        stages=(1, 2, 3) if lateral else (3,),
        output_stride=output_stride,
        auxiliary=auxiliary,
        align_corners=align_corners,
        **options,
    )
