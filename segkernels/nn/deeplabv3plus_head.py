"""The DeepLabv3+ decoder with its ASPP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import Activation, check_positive
from segkernels.nn.aspp import ASPP, conv_norm_activation
from segkernels.nn.separable_conv2d import Norm, SeparableConv2d, Size


class DeepLabV3PlusHead(nn.Module):
    """ASPP on the deep features, upsampled to the low-level ones, concatenated with their
    projection, refined, classified.

    in_channels, low_level_channels: of the deep and the low-level (stride 4) features. num_classes:
    K. channels: of ASPP and decoder. low_level_width: of the low-level projection. rates,
    separable, dropout, norm, activation, backend: as :class:`ASPP`. refinements: number of 3x3
    (separable) convolutions.

    ``forward(low_level, features)``: [B, C₁, H₁, W₁], [B, C, H, W] to logits [B, K, H₁, W₁].
    Children: ``aspp``, ``project``, ``refine``, ``classify``.

    Source: Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, section 3.2
    and figure 2.
    """

    def __init__(
        self,
        in_channels: int,
        low_level_channels: int,
        num_classes: int,
        *,
        channels: int = 256,
        low_level_width: int = 48,
        rates: Sequence[Size] = (6, 12, 18),
        separable: bool = True,
        refinements: int = 2,
        dropout: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
        activation: Activation = "relu",
        align_corners: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive(
            "DeepLabV3PlusHead",
            in_channels=in_channels,
            low_level_channels=low_level_channels,
            num_classes=num_classes,
            channels=channels,
            low_level_width=low_level_width,
        )
        if refinements != 0:
            check_positive("DeepLabV3PlusHead", refinements=refinements)
        self.align_corners = align_corners
        self.aspp = ASPP(
            in_channels,
            channels,
            rates,
            separable=separable,
            dropout=dropout,
            norm=norm,
            activation=activation,
            backend=backend,
        )
        self.project = conv_norm_activation(
            low_level_channels, low_level_width, 1, norm=norm, activation=activation
        )

        def refinement(width: int) -> nn.Module:
            if not separable:
                return conv_norm_activation(width, channels, 3, norm=norm, activation=activation)
            return SeparableConv2d(
                width,
                channels,
                inner_norm=norm,
                inner_activation=activation,
                outer_norm=norm,
                outer_activation=activation,
                backend=backend,
            )

        widths = [channels + low_level_width] + [channels] * (refinements - 1)
        self.refine = nn.Sequential(*(refinement(width) for width in widths[:refinements]))
        self.classify = nn.Conv2d(channels if refinements else widths[0], num_classes, 1)

    def forward(self, low_level: Tensor, features: Tensor) -> Tensor:
        context = self.aspp(features)  # [B, D, H, W]
        context = F.interpolate(
            context, low_level.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )
        return self.classify(
            self.refine(torch.cat([context, self.project(low_level)], 1))
        )  # [B, K, H₁, W₁]
