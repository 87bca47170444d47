"""EMANet.

Source: Li et al., "Expectation-Maximization Attention Networks for Semantic Segmentation", ICCV
2019.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from segkernels.fused import UnsupportedInputError
from segkernels.networks.segmenter import Segmenter, assemble
from segkernels.nn import EMAU
from segkernels.nn.arguments import NormClass, check_positive
from segkernels.nn.aspp import conv_norm_activation
from segkernels.ops.em_attention import Gradient

Layout = Literal["paper", "mmseg"]


class EMAHead(nn.Module):
    """3x3 convolution, EM attention unit, 3x3 convolution, classifier.

    in_channels, num_classes: C, number of classes. channels, refined_channels: of the unit, and of
    what the classifier sees. layout: "paper", or "mmseg": the last map is concatenated with the
    input and convolved once more, and the bases are brought to unit length as mmsegmentation does,
    their mean over the batch too. bases, iterations, temperature, learn_temperature, gradient,
    momentum: of :class:`segkernels.nn.EMAU`. dropout: of whole channels, before the classifier.

    Input: the deep features [B, C, H, W], logits [B, num_classes, H, W]. Children: ``reduce``,
    ``emau``, ``refine``, ``join`` (mmseg's), ``dropout``, ``classify``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 512,
        refined_channels: int = 256,
        layout: Layout = "paper",
        bases: int = 64,
        iterations: int = 3,
        temperature: float = 1.0,
        learn_temperature: bool = False,
        gradient: Gradient = "none",
        momentum: float = 0.1,
        dropout: float = 0.1,
        norm: NormClass = nn.BatchNorm2d,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("EMAHead", in_channels=in_channels, num_classes=num_classes)
        check_positive("EMAHead", channels=channels, refined_channels=refined_channels)
        if layout not in ("paper", "mmseg"):
            raise UnsupportedInputError(
                f"EMAHead: layout must be 'paper' or 'mmseg'\n  layout: {layout!r}"
            )
        joined = layout == "mmseg"

        def conv(in_channels: int, out_channels: int) -> nn.Module:
            return conv_norm_activation(in_channels, out_channels, 3, norm=norm, activation="relu")

        self.reduce = conv(in_channels, channels)
        self.emau = EMAU(
            channels,
            bases,
            iterations,
            temperature=temperature,
            learn_temperature=learn_temperature,
            gradient=gradient,
            norm="clamp" if joined else "additive",
            momentum=momentum,
            renormalise=joined,
            norm_layer=norm,
            backend=backend,
        )
        self.refine = conv(channels, refined_channels)
        self.join = conv(in_channels + refined_channels, refined_channels) if joined else None
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(refined_channels, num_classes, 1)

    def forward(self, deep: Tensor) -> Tensor:
        x = self.refine(self.emau(self.reduce(deep)))
        if self.join is not None:
            x = self.join(torch.cat([deep, x], 1))
        return self.classify(self.dropout(x))


def emanet(num_classes: int, *, output_stride: int = 8, **options: Any) -> Segmenter:
    """A backbone and an :class:`EMAHead`.

    options: of :class:`EMAHead`; the rest: as of :func:`segkernels.networks.segmenter.assemble`.
    The paper's is ``backbone="resnet101", multigrid=(1, 2, 4), align_corners=True``; the published
    code's norms have a momentum of 3e-4, ``norm=partial(nn.BatchNorm2d, momentum=3e-4)``.
    """
    return assemble(EMAHead, num_classes, stages=(3,), output_stride=output_stride, **options)
