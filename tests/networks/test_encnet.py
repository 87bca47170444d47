"""EncNet: any size, two results in training, the loss that the training code makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from segkernels import networks, nn
from segkernels.train import IGNORE, Recipe, predict, train


def small(**options: Any) -> networks.Segmenter:
    torch.manual_seed(0)
    options = {"width": 4, "channels": 12, "codes": 5, **options}
    return networks.build("encnet", 4, backbone="resnet18", **options)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 5), (3, 2)])
def test_any_size(size: tuple[int, int]) -> None:
    network = small()
    logits = network(torch.randn(2, 3, *size))
    assert isinstance(logits, networks.Logits)
    assert logits.pixels.shape == (2, 4, *size) and logits.presence.shape == (2, 4)
    assert network.eval()(torch.randn(1, 3, *size)).shape == (1, 4, *size)


def test_a_step_reaches_every_parameter() -> None:
    network = small()
    labels = torch.randint(4, (2, 33, 47))
    logits = network(torch.randn(2, 3, 33, 47))
    loss = F.cross_entropy(logits.pixels, labels)
    (loss + 0.2 * nn.semantic_encoding_loss(logits.presence, labels)).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_training_adds_a_fifth_of_the_semantic_encoding_loss() -> None:
    images = torch.randn(2, 3, 33, 33)
    labels = torch.randint(3, (2, 33, 33))
    labels[:, :5] = IGNORE
    network, other = small(dropout=0.0), small(dropout=0.0)
    recipe = Recipe(steps=1, batch=2, flip=False)
    (loss,) = train(network, TensorDataset(images, labels), recipe)
    pixels, presence = other(images.contiguous(memory_format=torch.channels_last))
    present = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)  # no pixel has the fourth class
    expected = F.cross_entropy(pixels, labels, ignore_index=IGNORE)
    expected = expected + 0.2 * F.binary_cross_entropy_with_logits(presence, present)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert predict(network, images).shape == (2, 33, 33)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codes": 0}, ValueError, "codes must be a positive int"),
        ({"channels": 0}, ValueError, "EncHead: channels must be a positive int"),
        ({"num_classes": "2"}, ValueError, "num_classes must be a positive int"),
        ({"norm": None}, TypeError, "norm must make a norm"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"num_classes": 2, "backbone": "resnet18", **options}
    with torch.device("meta"), pytest.raises(error, match=message):
        networks.build("encnet", **options)


@pytest.mark.compile
def test_compiles_in_one_graph() -> None:
    network = small(dropout=0.0, backend="reference")
    other = small(dropout=0.0, backend="reference")
    image = torch.randn(2, 3, 33, 47)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(image), other(image), strict=True):
        torch.testing.assert_close(got, expected)
