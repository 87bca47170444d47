"""The head of a fully convolutional network."""

from __future__ import annotations

from torch import Tensor, nn

from segkernels.nn.arguments import Activation, check_positive
from segkernels.nn.aspp import conv_norm_activation
from segkernels.nn.separable_conv2d import Norm


class FCNHead(nn.Module):
    """3x3 convolution, classifier: a network's head, or an auxiliary one on an earlier stage.

    in_channels, num_classes: C, number of classes. channels: of the convolution (None: C/4, as
    published). dropout: before the classifier. norm, activation: as :class:`SeparableConv2d`.

    Input [B, C, H, W], logits [B, num_classes, H, W]. Children: ``reduce``, ``dropout``,
    ``classify``.

    Source: Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, in the
    form of torchvision and PyTorch-Encoding.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int | None = None,
        dropout: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_positive("FCNHead", in_channels=in_channels, num_classes=num_classes)
        channels = in_channels // 4 if channels is None else channels
        check_positive("FCNHead", channels=channels)
        self.reduce = conv_norm_activation(
            in_channels, channels, 3, norm=norm, activation=activation
        )
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.dropout(self.reduce(x)))
