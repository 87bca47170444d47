"""The layers under what PyTorch wraps around modules: torch.fx, checkpointing, DDP, FSDP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import segkernels
from segkernels import networks
from segkernels.compat import jfzhang, mmcv
from segkernels.nn import ASPP, DeepLabV3PlusHead, DepthwiseConv2d, SeparableConv2d
from tests.nn.composition import close


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).double()


LAYERS: dict[str, tuple[Any, list[tuple[int, ...]], set[str]]] = {
    "DepthwiseConv2d": (lambda: DepthwiseConv2d(6), [(2, 6, 9, 7)], {"depthwise_conv2d"}),
    "SeparableConv2d": (lambda: SeparableConv2d(6, 4), [(2, 6, 9, 7)], {"run"}),
    "ASPP": (lambda: ASPP(6, 4, dropout=0.0), [(2, 6, 9, 7)], {"pyramid"}),
    "DeepLabV3PlusHead": (
        lambda: DeepLabV3PlusHead(6, 5, 3, channels=8, dropout=0.0),
        [(2, 5, 17, 13), (2, 6, 5, 4)],
        {"pyramid", "run"},
    ),
    "a network": (
        lambda: networks.build(
            "deeplabv3plus", num_classes=3, backbone="resnet18", width=4, channels=8, dropout=0.0
        ),
        [(2, 3, 33, 47)],
        {"pyramid", "run"},
    ),
    "padded by hand": (lambda: jfzhang.SeparableConv2d(6, 4), [(2, 6, 9, 7)], {"run"}),
    "mmcv": (
        lambda: mmcv.DepthwiseSeparableConvModule(6, 4, 3, padding=1, norm_cfg={"type": "BN"}),
        [(2, 6, 9, 7)],
        {"run"},
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_symbolic_trace_keeps_the_fused_calls(name: str) -> None:
    """One node a call; the traced module trains as the layer does."""
    make, shapes, calls = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    traced = fx.symbolic_trace(copy.deepcopy(layer))
    traced.graph.lint()
    named = {getattr(n.target, "__name__", "") for n in traced.graph.nodes}
    assert named & {"run", "pyramid", "depthwise_conv2d"} == calls
    inputs = [image(*shape) for shape in shapes]
    for _ in range(2):  # a training step, then in eval with the statistics of that step
        got, expected = traced(*inputs), layer(*inputs)
        close(got, expected, 1e-12)
        got.sum().backward()
        expected.sum().backward()
        gradients = {key: p.grad for key, p in traced.named_parameters()}
        for key, p in layer.named_parameters():
            close(gradients[key], p.grad, 1e-12)
        traced.eval(), layer.eval()


def test_symbolic_trace_of_the_functions() -> None:
    w, v = image(4, 1, 3, 3), image(3, 4, 1, 1)

    def f(x: Tensor) -> Tensor:
        d = segkernels.depthwise_conv2d(x, w, dilation=2)
        return segkernels.separable_conv2d(x=d, depthwise_weight=w, pointwise_weight=v)

    x = image(2, 4, 9, 7)
    assert torch.equal(fx.symbolic_trace(f)(x), f(x))
