"""Encoding and EncModule: against the paper's equations, written with their tensor of pixels,
codewords and channels.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import segkernels
from segkernels.nn import EncModule, Encoding, semantic_encoding_loss
from tests.nn.composition import close, scramble


def encoded(layer: Encoding, x: Tensor) -> Tensor:
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
    residuals = pixels[:, :, None] - layer.codewords  # [B, N, K, C]
    q = torch.softmax(layer.scale * residuals.square().sum(3), 2)
    return (q[..., None] * residuals).sum(1)


class Plain(nn.Module):
    def __init__(self, module: EncModule) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = self.module
        e = encoded(m.encoding, m.project(x))
        v = F.relu(m.norm(e.unsqueeze(3)).squeeze(3)).mean(1)
        gain = torch.sigmoid(F.linear(v, m.gate.weight, m.gate.bias))
        return F.relu(x + x * gain[:, :, None, None]), F.linear(
            v, m.classify.weight, m.classify.bias
        )


def image(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(size or (3, 6, 11, 9)), dtype=torch.float64, generator=generator) / 2


def test_encoding_equals_its_definition() -> None:
    torch.manual_seed(0)
    layer = Encoding(6, 5).double()
    x, y = image().requires_grad_(), image().requires_grad_()
    got, expected = layer(x), encoded(layer, y)
    close(got, expected, 1e-12)
    de = image(*got.shape)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, *layer.parameters()), de),
        torch.autograd.grad(expected, (y, *layer.parameters()), de),
        strict=True,
    ):
        close(ours, theirs, 1e-11)


def test_encoding_begins_as_published() -> None:
    torch.manual_seed(0)
    layer = Encoding(100, 64)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "codewords": (64, 100),
        "scale": (64,),
    }
    bound = (64 * 100) ** -0.5
    assert layer.codewords.abs().max() <= bound and layer.codewords.std() > bound / 2
    assert layer.scale.min() >= -1 and layer.scale.max() <= 0 and layer.scale.std() > 0.2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"codes": 7}, {"norm": partial(nn.GroupNorm, 1)}], ids=str)
def test_module_equals_its_definition(options: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    module = EncModule(6, 4, **{"codes": 5, **options}).double().train(training)
    scramble(module)
    plain = Plain(module)
    x, y = image().requires_grad_(), image().requires_grad_()
    got, expected = module(x), plain(y)
    cotangents = [image(*t.shape) for t in expected]
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs, 1e-11)
    gradients = [
        torch.autograd.grad(outputs, inputs, cotangents)
        for outputs, inputs in (
            (got, (x, *module.parameters())),
            (expected, (y, *plain.parameters())),
        )
    ]
    largest = max(t.abs().max().item() for t in gradients[1])
    for ours, theirs in zip(*gradients, strict=True):
        close(ours, theirs, 1e-10, floor=1e-3 * largest)
    for ours, theirs in zip(module.buffers(), plain.buffers(), strict=True):
        close(ours, theirs, 1e-11)


def test_parameter_names() -> None:
    assert {name.rpartition(".")[0] for name in EncModule(6, 4).state_dict()} == {
        "project.0",
        "project.1",
        "encoding",
        "norm",
        "gate",
        "classify",
    }


def test_the_loss_asks_which_classes_are_there() -> None:
    presence = torch.randn(2, 5, requires_grad=True)
    labels = torch.zeros(2, 4, 3, dtype=torch.long)
    labels[0, 1, 1], labels[0, 2], labels[1, 3] = 3, 255, 4
    target = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0, 1.0]])
    got = semantic_encoding_loss(presence, labels)
    expected = F.binary_cross_entropy_with_logits(presence, target)
    assert torch.equal(got, expected)
    labels[labels == 255] = -1
    assert torch.equal(semantic_encoding_loss(presence, labels, ignore_index=-1), expected)
    nothing = torch.full_like(labels, 255)
    zeros = F.binary_cross_entropy_with_logits(presence, torch.zeros(2, 5))
    assert torch.equal(semantic_encoding_loss(presence, nothing), zeros)


def test_the_backend_travels() -> None:
    for layer in (Encoding(6, 5, backend="cuda"), EncModule(6, 4, backend="cuda")):
        with pytest.raises(segkernels.UnsupportedInputError, match="no backend named 'cuda'"):
            layer.double()(image())
    layer = EncModule(6, 4, codes=5, backend="reference").double()
    assert layer.encoding.backend == "reference" and layer(image()).features.shape == (3, 6, 11, 9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Encoding(0, 5), ValueError, "Encoding: channels must be a positive int"),
        (lambda: Encoding(6, True), ValueError, "Encoding: codes must be a positive int"),
        (lambda: EncModule(6, 0), ValueError, "EncModule: num_classes must be a positive int"),
        (lambda: EncModule(6, 4, codes=2.0), ValueError, "EncModule: codes must be a positive int"),
        (lambda: EncModule(6, 4, norm=None), TypeError, "norm must make a norm"),
        (lambda: EncModule(6, 4, norm=nn.BatchNorm2d(6)), TypeError, "norm must make a norm"),
        (lambda: Encoding(6, 5)(torch.zeros(1, 4, 3, 3)), ValueError, "over the channels of"),
        (lambda: Encoding(6, 5)(torch.zeros(6, 3, 3)), ValueError, "4 dimensions"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_sixteen_bits() -> None:
    """As a bfloat16 module and under autocast: near the float64 result, with finite gradients."""
    torch.manual_seed(0)
    module = EncModule(6, 4, codes=5).eval()
    x = image().bfloat16()
    expected = copy.deepcopy(module).double()(x.double())
    half = copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = module(x.float())
    for got, layer in ((autocast, module), (half(x), half)):
        for ours, theirs in zip(got, expected, strict=True):
            close(ours, theirs, 0.05)
        sum(t.float().sum() for t in got).backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.compile
def test_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    module = EncModule(6, 4, codes=5).double()
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(image()), other(image())
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-12)
    for results in (ours, theirs):
        sum(t.sum() for t in results).backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        close(p.grad, q.grad, 1e-10)
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        close(a, b, 1e-12)
