"""A network with graph convolutional units.

Source: Li and Gupta, "Beyond Grids: Learning Graph Representations for Visual Recognition", NeurIPS
2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from segkernels.networks.segmenter import Segmenter, assemble
from segkernels.nn import GCU
from segkernels.nn.arguments import NormClass, check_positive
from segkernels.nn.aspp import conv_norm_activation


class GCUHead(nn.Module):
    """3x3 convolution, graphs side by side concatenated with their input, classifier.

    in_channels, num_classes: C, number of classes. channels: of the features that the graphs stand
    over. graph_channels, nodes: channels and number of nodes of each graph.

    Input: the deep features [B, C, H, W], logits [B, num_classes, H, W]. Children: ``reduce``,
    ``gcu``, ``dropout``, ``classify``.
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

    def forward(self, deep: Tensor) -> Tensor:
        return self.classify(self.dropout(self.gcu(self.reduce(deep))))

    @torch.no_grad()
    def init_from(self, deep: Tensor, *, seed: int = 0) -> None:
        """The graphs' anchors and scales from the features of some images; see
        :meth:`segkernels.nn.GraphProjection.init_from`.
        """
        self.gcu.init_from(self.reduce(deep), seed=seed)


def gcunet(num_classes: int, *, output_stride: int = 8, **options: Any) -> Segmenter:
    """A backbone and a :class:`GCUHead`.

    options: of :class:`GCUHead`; the rest: as of :func:`segkernels.networks.segmenter.assemble`.
    The paper begins from clusters of the features of a backbone that is already trained, once:
    ``network.head.init_from(network.backbone(images).deep)``.
    """
    return assemble(GCUHead, num_classes, stages=(3,), output_stride=output_stride, **options)
