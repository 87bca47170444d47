"""The auxiliary head, which every network may have: in training alone, on the third stage, with the
weight that the network was given.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from segkernels import networks
from segkernels.networks.backbones import NAMES
from segkernels.nn import FCNHead
from segkernels.train import Recipe, train, training_loss

EVERY_NETWORK = pytest.mark.parametrize("name", networks.NETWORKS)
WEIGHT = 0.3


def small(name: str, seed: int = 0, **options: Any) -> networks.Segmenter:
    torch.manual_seed(seed)
    options = {"width": 4, "channels": 12, "dropout": 0.0, "auxiliary": WEIGHT, **options}
    network = networks.build(name, 4, backbone="resnet18", **options)
    if network.auxiliary is not None:
        network.auxiliary.dropout.p = 0.0
    return network


def images(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *size, generator=generator).contiguous(
        memory_format=torch.channels_last
    )


@EVERY_NETWORK
def test_in_training_alone(name: str) -> None:
    network, called = small(name), []
    network.auxiliary.register_forward_hook(lambda *_: called.append(1))
    found = network(images(33, 47))
    assert found.pixels.shape == found.auxiliary.logits.shape == (2, 4, 33, 47)
    assert found.auxiliary.weight == WEIGHT
    logits = network.eval()(images(33, 47))
    assert isinstance(logits, Tensor) and len(called) == 1
    network.auxiliary = None
    assert torch.equal(network(images(33, 47)), logits)


@pytest.mark.parametrize("backbone", ["resnet18", "xception65"])
def test_it_reads_the_third_stage(backbone: str) -> None:
    torch.manual_seed(0)
    network = networks.build("encnet", 4, backbone=backbone, channels=12, auxiliary=WEIGHT)
    network.auxiliary.eval()
    for norm in network.modules():  # the running statistics of a second pass would be others
        if isinstance(norm, nn.BatchNorm2d):
            norm.eval()
    with torch.no_grad():
        found = network(images(33, 47)).auxiliary.logits
        third = network.backbone(images(33, 47)).third
        expected = F.interpolate(network.auxiliary(third), (33, 47), mode="bilinear")
    torch.testing.assert_close(found, expected)
    assert network.auxiliary.reduce[0].out_channels == third.shape[1] // 4


@EVERY_NETWORK
def test_its_gradient_reaches_the_stages_below(name: str) -> None:
    network = small(name)
    found = network(images(65, 47)).auxiliary.logits
    F.cross_entropy(found, torch.randint(4, (2, 65, 47))).backward()
    for key, p in network.named_parameters():
        if key.startswith(("head.", "backbone.layer4.")):
            assert p.grad is None, key
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), key


@EVERY_NETWORK
def test_training_adds_its_loss(name: str) -> None:
    labels = torch.randint(4, (2, 33, 33))
    data, recipe = TensorDataset(images(33, 33), labels), Recipe(steps=1, batch=2, flip=False)
    network, other = small(name), small(name)
    (loss,) = train(network, data, recipe)
    found = other(images(33, 33))
    without = training_loss(found._replace(auxiliary=None), labels)
    its_own = F.cross_entropy(found.auxiliary.logits, labels)
    assert loss == pytest.approx((without + WEIGHT * its_own).item(), rel=1e-5)
    before = other.auxiliary.state_dict()
    after = network.auxiliary.state_dict()
    assert not torch.equal(after["classify.weight"], before["classify.weight"])


@EVERY_NETWORK
def test_state_dict_round_trip(name: str) -> None:
    network, other = small(name), small(name, seed=1)
    state = network.state_dict()
    assert {k.split(".")[1] for k in state if k.startswith("auxiliary.")} == {"reduce", "classify"}
    other.load_state_dict(state, strict=True)
    found, again = (x(images(33, 47)).auxiliary.logits for x in (network, other))
    assert torch.equal(found, again)
    bare = small(name, auxiliary=None).state_dict()
    assert set(bare) == {key for key in state if not key.startswith("auxiliary.")}


def test_who_has_one_by_default() -> None:
    """The published EncNet; DeepLabv3+ and GCU are published without."""
    with torch.device("meta"):
        found = {name: networks.build(name, 4).auxiliary for name in networks.NETWORKS}
        assert networks.build("encnet", 4).auxiliary_weight == 0.2
    assert {name for name, head in found.items() if head is not None} == {"encnet"}


@pytest.mark.parametrize("backbone", NAMES)
def test_on_every_backbone(backbone: str) -> None:
    with torch.device("meta"):
        network = networks.build("deeplabv3plus", 4, backbone=backbone, auxiliary=WEIGHT)
    assert network.auxiliary.reduce[0].in_channels == network.backbone.channels[2]


@pytest.mark.parametrize("weight", [0, -0.4, True, "0.4", float("nan"), float("inf")], ids=str)
def test_bad_weights(weight: Any) -> None:
    message = "auxiliary is the weight of a loss, a positive number\n"
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        networks.build("gcunet", 4, backbone="resnet18", auxiliary=weight)


def test_fcn_head() -> None:
    """The published layers: 3x3 to a quarter of the channels, norm, ReLU, dropout, 1x1."""
    torch.manual_seed(0)
    head = FCNHead(12, 4, dropout=0.5)
    plain = nn.Sequential(
        nn.Conv2d(12, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(3, 4, 1),
    )
    plain.load_state_dict(
        dict(zip(plain.state_dict(), head.state_dict().values(), strict=True)), strict=True
    )
    x = torch.randn(2, 12, 9, 7)
    results = []
    for module in (head, plain):
        torch.manual_seed(1)
        results.append(module(x))
    torch.testing.assert_close(*results)
    with pytest.raises(ValueError, match="FCNHead: channels must be a positive int"):
        FCNHead(3, 4)
