"""Backbone, head, upsampling: what every network here is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.networks.backbones import build_backbone
from segkernels.nn import FCNHead
from segkernels.nn.arguments import NormClass, check_weight

THIRD = 2  # the stage under the auxiliary head, as in PSPNet


class Weighted(NamedTuple):
    """Logits, and the weight of their loss beside that of the pixels."""

    logits: Tensor
    weight: float


class Logits(NamedTuple):
    """What a network returns in training that learns more than the classes of its pixels."""

    pixels: Tensor  # [B, num_classes, H, W]
    presence: Weighted | None = None  # [B, num_classes]: is the class somewhere in the image?
    auxiliary: Weighted | None = None  # [B, num_classes, H, W]: the pixels, by the auxiliary head


class Segmenter(nn.Module):
    """Logits at the size of the image: [B, 3, H, W] to [B, num_classes, H, W], any H, W.

    backbone: image to :class:`~segkernels.networks.features.Features`. head: the maps of ``stages``
    (indices of what the backbone returns) to logits of any size, which are interpolated bilinearly,
    or, in training, to :class:`Logits` with such pixels. auxiliary: a head on the third stage that
    runs in training only, where its logits and ``auxiliary_weight`` stand in the :class:`Logits`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        *,
        stages: Sequence[int] = (0, -1),
        auxiliary: nn.Module | None = None,
        auxiliary_weight: float = 0.0,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.stages = tuple(stages)
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight
        self.align_corners = align_corners

    def forward(self, image: Tensor) -> Tensor | Logits:
        maps = self.backbone(image)
        found = self.head(*(maps[i] for i in self.stages))
        logits = found if isinstance(found, Logits) else Logits(found)
        logits = logits._replace(pixels=self._enlarged(logits.pixels, image))
        if self.training and self.auxiliary is not None:
            early = self._enlarged(self.auxiliary(maps[THIRD]), image)
            logits = logits._replace(auxiliary=Weighted(early, self.auxiliary_weight))
        alone = logits.presence is None and logits.auxiliary is None
        return logits.pixels if alone else logits

    def _enlarged(self, logits: Tensor, image: Tensor) -> Tensor:
        return F.interpolate(
            logits, image.shape[-2:], mode="bilinear", align_corners=self.align_corners
        )


def assemble(
    head: Callable[..., nn.Module],
    num_classes: int,
    *,
    stages: Sequence[int],
    output_stride: int,
    backbone: str = "resnet50",
    weights: str | Path | None = None,
    in_channels: int = 3,
    multigrid: Sequence[int] | None = None,
    width: int | None = None,
    auxiliary: float | None = None,
    norm: NormClass = nn.BatchNorm2d,
    align_corners: bool = False,
    backend: str | None = None,
    **options: Any,
) -> Segmenter:
    """A network of a backbone and a head: what every network here can be told.

    head, stages, options: what is the network's own: the head is made by
    ``head(*channels, num_classes=, norm=, backend=, **options)`` with the channels of the stages
    that it reads.

    backbone: "resnet18", "resnet34", "resnet50", "resnet101" or "xception65". output_stride: 8, 16
    or 32 (the rest of the backbone is atrous). weights: a local file (.pth or .safetensors) for the
    backbone; ResNets take torchvision's. in_channels: of the image. multigrid: unit rates of the
    last stage, such as (1, 2, 4). width: channels of a ResNet's first stage (None: 64). auxiliary:
    weight, in training, of the loss of a :class:`segkernels.nn.FCNHead` on the third stage (0.4 in
    Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017); None: there is no such head. norm:
    called with a number of channels. align_corners: of every interpolation. backend: "native",
    "triton", "reference" or None.
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
    channels = [trunk.channels[i] for i in stages]
    decode = head(*channels, num_classes=num_classes, norm=norm, backend=backend, **options)
    early = None
    if auxiliary is not None:
        check_weight(auxiliary=auxiliary)
        early = FCNHead(trunk.channels[THIRD], num_classes, norm=norm)
    return Segmenter(
        trunk,
        decode,
        stages=stages,
        auxiliary=early,
        auxiliary_weight=auxiliary or 0.0,
        align_corners=align_corners,
    )
