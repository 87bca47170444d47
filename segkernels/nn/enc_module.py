"""The context encoding module and its semantic encoding loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn.arguments import NormClass, check_positive, norm_maker
from segkernels.nn.aspp import conv_norm_activation
from segkernels.nn.encoding import Encoding


class Context(NamedTuple):
    """What a context encoding module returns."""

    features: Tensor  # [B, C, H, W]
    presence: Tensor  # [B, num_classes], logits: is the class somewhere in the image?


def emphasised(x: Tensor, gamma: Tensor) -> Tensor:
    """ReLU(x + γ x), a gain for every channel: x [B, C, H, W], γ [B, C]."""
    return (x * (1 + gamma)[:, :, None, None]).relu_()


class EncModule(nn.Module):
    """A map, its channels weighted by the whole image's encoding, and which classes are in it.

        e = Encoding(φ(N(x W)))        v = mean_k φ(N(e_k))        y = φ(x + σ(v W_γ + b_γ) x)

    channels, num_classes: C, number of classes. codes: K. norm: called with a number of channels,
    C or K (it sees the encoding as a map [B, K, C, 1]). backend: "native", "triton", "reference" or
    None.

    Input [B, C, H, W]; returns ``Context(features, presence)``: the map [B, C, H, W] and a logit
    [B, num_classes] for every class's presence, for :func:`semantic_encoding_loss`. Children:
    ``project``, ``encoding``, ``norm``, ``gate``, ``classify``.

    Source: Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018, section 2.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        codes: int = 32,
        norm: NormClass = nn.BatchNorm2d,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("EncModule", channels=channels, num_classes=num_classes, codes=codes)
        self.project = conv_norm_activation(channels, channels, 1, norm=norm, activation="relu")
        self.encoding = Encoding(channels, codes, backend=backend)
        self.norm = norm_maker("norm", norm)(codes)
        self.gate = nn.Linear(channels, channels)
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Context:
        e = self.encoding(self.project(x))  # [B, K, C]
        v = self.norm(e[..., None])[..., 0].relu().mean(1)  # [B, C]
        return Context(emphasised(x, self.gate(v).sigmoid()), self.classify(v))


def semantic_encoding_loss(presence: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Binary cross entropy of the classes' presence; the paper adds 0.2 of it to the pixels' loss.

    presence: logits [B, num_classes]. labels: [B, H, W], int64; a class is present where one pixel
    has it.

    Source: Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018, section 2.2.
    """
    batch, classes = presence.shape
    seen = labels.flatten(1)
    seen = torch.where(seen == ignore_index, classes, seen)  # to a column that is cut off
    present = presence.new_zeros(batch, classes + 1).scatter_(1, seen, 1.0)[:, :classes]
    return F.binary_cross_entropy_with_logits(presence, present)
