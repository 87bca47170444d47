"""Xception-65 against its definition, in plain torch functions over the same weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segkernels.networks.xception import Xception65
from tests.nn.composition import close, scramble

# Blocks of figure 4: widths of the three convolutions, stride, shortcut.
BLOCKS = {
    "entry.0": ((128, 128, 128), 2, "conv"),
    "entry.1": ((256, 256, 256), 2, "conv"),
    "entry.2": ((728, 728, 728), 2, "conv"),
    **{f"middle.{i}": ((728, 728, 728), 1, "sum") for i in range(16)},
    "exit.0": ((728, 1024, 1024), 2, "conv"),
    "exit.1": ((1536, 1536, 2048), 1, "none"),
}


def strides_and_rates(output_stride: int) -> Iterator[tuple[int, int]]:
    """Of every block: each stride beyond the output stride becomes a rate of the blocks behind."""
    at, rate = 2, 1
    for _, stride, _ in BLOCKS.values():
        if at < output_stride:
            yield stride, 1
            at *= stride
        else:
            yield 1, rate
            rate *= stride


def defined(weights: Mapping[str, Tensor], x: Tensor, output_stride: int) -> list[Tensor]:
    """The features of the four stages, of frozen statistics."""

    def conv_norm(
        x: Tensor, conv: str, norm: str, stride: int = 1, rate: int = 1, groups: int = 1
    ) -> Tensor:
        w = weights[f"{conv}.weight"]
        y = F.conv2d(x, w, None, stride, rate * (w.shape[-1] // 2), rate, groups)
        m, v, g, b = (
            weights[f"{norm}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(y, m, v, g, b, eps=1e-3)

    x = conv_norm(x, "stem.0", "stem.1", stride=2).relu()
    x = conv_norm(x, "stem.3", "stem.4").relu()
    stages = []
    blocks = zip(BLOCKS.items(), strides_and_rates(output_stride), strict=True)
    for (name, (widths, _, shortcut)), (stride, rate) in blocks:
        last = shortcut == "none"  # its ReLUs stand behind every convolution, else before each pair
        y = x
        for i, width in enumerate(widths):
            conv = f"{name}.convs.{i}"
            y = y if last else y.relu()
            step = stride if i == 2 else 1
            y = conv_norm(y, f"{conv}.depthwise", f"{conv}.inner_norm", step, rate, y.shape[1])
            y = y.relu() if last else y
            y = conv_norm(y, f"{conv}.pointwise", f"{conv}.outer_norm")
            y = y.relu() if last else y
            assert y.shape[1] == width
            if (name, i) == ("entry.1", 1):
                stages.append(y)
        if shortcut == "conv":
            y = y + conv_norm(x, f"{name}.shortcut.0", f"{name}.shortcut.1", stride)
        x = y + x if shortcut == "sum" else y
        if name in ("entry.1", "middle.15", "exit.1"):
            stages.append(x)
    return stages


@pytest.mark.parametrize("output_stride", [8, 16])
def test_equals_its_definition(output_stride: int) -> None:
    torch.manual_seed(0)
    network = Xception65(output_stride).double().eval()
    scramble(network)
    x = 2 * torch.rand(1, 3, 33, 30, dtype=torch.float64) - 1
    with torch.no_grad():
        expected = defined(network.state_dict(), x, output_stride)
        got = network(x)
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs, 1e-10)
