"""A network with graph convolutional units.

Source: Li and Gupta, "Beyond Grids: Learning Graph Representations for Visual Recognition", NeurIPS
2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from segkernels.networks.backbones import build_backbone
from segkernels.networks.segmenter import Segmenter
from segkernels.nn import GCU
from segkernels.nn.arguments import NormClass, check_positive
from segkernels.nn.aspp import conv_norm_activation


class GCUHead(nn.Module):
    """3x3 convolution, graphs side by side concatenated with their input, classifier.

    Arguments: as of :func:`gcunet`. ``forward(low_level, deep)``: the deep features [B, C, H, W] to
    logits [B, num_classes, H, W]. Children: ``reduce``, ``gcu``, ``dropout``, ``classify``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        graph_channels: int = 256,
        nodes: Sequence[int] = (2, 4, 8, 32),
        dropout: float = 0.1,
        norm: NormClass = nn.BatchNorm2d,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            "GCUHead", in_channels=in_channels, num_classes=num_classes, channels=channels
        )
        self.reduce = conv_norm_activation(in_channels, channels, 3, norm=norm, activation="relu")
        self.gcu = GCU(channels, graph_channels, nodes, norm=norm, backend=backend)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(self.gcu.out_channels, num_classes, 1)

    def forward(self, low_level: Tensor, deep: Tensor) -> Tensor:
        return self.classify(self.dropout(self.gcu(self.reduce(deep))))

    @torch.no_grad()
    def init_from(self, low_level: Tensor, deep: Tensor, *, seed: int = 0) -> None:
        """The graphs' anchors and scales from the features of some images; see
        :meth:`segkernels.nn.GraphProjection.init_from`.
        """
        self.gcu.init_from(self.reduce(deep), seed=seed)


def gcunet(
    num_classes: int,
    *,
    backbone: str = "resnet50",
    output_stride: int = 8,
    weights: str | Path | None = None,
    in_channels: int = 3,
    multigrid: Sequence[int] | None = None,
    width: int | None = None,
    channels: int = 512,
    graph_channels: int = 256,
    nodes: Sequence[int] = (2, 4, 8, 32),
    dropout: float = 0.1,
    norm: NormClass = nn.BatchNorm2d,
    align_corners: bool = False,
    backend: str | None = None,
) -> Segmenter:
    """A backbone and a :class:`GCUHead`.

    channels: of the features that the graphs stand over. graph_channels, nodes: channels and number
    of nodes of each graph. The rest: as of :func:`deeplabv3plus`. The paper begins from clusters of
    the features of a backbone that is already trained, once:
    ``network.head.init_from(*network.backbone(images))``.
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
    head = GCUHead(
        trunk.channels,
        num_classes,
        channels=channels,
        graph_channels=graph_channels,
        nodes=nodes,
        dropout=dropout,
        norm=norm,
        backend=backend,
    )
    return Segmenter(trunk, head, align_corners=align_corners)
