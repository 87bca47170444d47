"""The demo's network, small enough for two cores and forty seconds: a DeepLabv3+ whose ASPP sees
the deep features together with what two graphs over them say, or after EM attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segkernels.data.scenes import CLASSES
from segkernels.demo.contest import Check
from segkernels.networks import Segmenter
from segkernels.networks.backbones import build_backbone
from segkernels.nn import EMAU, GCU, DeepLabV3PlusHead
from segkernels.ops.em_attention import Gradient
from segkernels.tolerance import verdict

LONGEST_SUM = 9 * 128  # of the convolutions of the last stage: 3x3 over 128 channels


class Head(nn.Module):
    """A context module over the deep features, then the decoder of DeepLabv3+."""

    def __init__(self, context: nn.Module, decode: DeepLabV3PlusHead) -> None:
        super().__init__()
        self.context = context
        self.decode = decode

    def forward(self, low_level: Tensor, deep: Tensor) -> Tensor:
        logits: Tensor = self.decode(low_level, self.context(deep))
        return logits


def build(seed: int, backend: str | None, attention: Gradient | None = None) -> nn.Module:
    """Images [B, 3, H, W] to logits [B, K, H, W]; the ASPP's rates fit the 4x4 map of a scene.

    attention: an EM attention unit with this gradient in the place of the graphs.
    """
    torch.manual_seed(seed)
    trunk = build_backbone("resnet18", output_stride=16, width=16, backend=backend)
    low_level, *_, deep = trunk.channels
    if attention is None:
        context: nn.Module = GCU(deep, 32, nodes=(2, 4), norm=nn.BatchNorm2d, backend=backend)
    else:
        context = EMAU(deep, len(CLASSES), gradient=attention, backend=backend)
    decode = DeepLabV3PlusHead(
        context.out_channels if isinstance(context, GCU) else deep,
        low_level,
        len(CLASSES),
        channels=64,
        low_level_width=24,
        rates=(1, 2, 3),
        dropout=0.1,
        backend=backend,
    )
    model = Segmenter(trunk, Head(context, decode))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] to the network's range."""
    return 4 * images - 2


@torch.no_grad()
def check(model: nn.Module, images: Tensor) -> Check:
    """Logits of the trained network against its copy on the reference, in float32 and float64.

    The forward only: hundreds of thousands of ReLUs and maxima decide by rounding which way a
    gradient goes, in plain PyTorch as well. Gradients are compared layer by layer
    (`contest.check`).
    """
    plain = build(0, "reference").to(images.device)
    plain.load_state_dict(model.state_dict())
    x = normalise(images).contiguous(memory_format=torch.channels_last)
    logits, yardstick = model.eval()(x), plain.eval()(x)
    truth = plain.double()(x.double())
    got, allowed = verdict(logits, yardstick, truth, x.dtype, LONGEST_SUM)
    return Check("the trained network", got, None, (allowed, None))
