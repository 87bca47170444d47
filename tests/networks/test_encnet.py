"""EncNet: any size, with and without laterals, what it returns in training, its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from segkernels import networks
from segkernels.compat import mmseg
from segkernels.networks.encnet import EncHead
from segkernels.train import IGNORE, Recipe, predict, train, training_loss

LATERAL = pytest.mark.parametrize("lateral", [False, True], ids=["plain", "lateral"])


def small(**options: Any) -> networks.Segmenter:
    torch.manual_seed(0)
    options = {"width": 4, "channels": 12, "codes": 5, **options}
    return networks.build("encnet", 4, backbone="resnet18", **options)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 5), (3, 2)])
@pytest.mark.parametrize("output_stride", [8, 32])
@LATERAL
def test_any_size(lateral: bool, output_stride: int, size: tuple[int, int]) -> None:
    network = small(lateral=lateral, output_stride=output_stride)
    logits = network(torch.randn(2, 3, *size))
    assert isinstance(logits, networks.Logits)
    assert logits.pixels.shape == (2, 4, *size) and logits.presence.logits.shape == (2, 4)
    assert network.eval()(torch.randn(1, 3, *size)).shape == (1, 4, *size)


@LATERAL
def test_a_step_reaches_every_parameter(lateral: bool) -> None:
    network = small(lateral=lateral, output_stride=16)
    labels = torch.randint(4, (2, 65, 47))
    training_loss(network(torch.randn(2, 3, 65, 47)), labels).backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


NAMES_IN_MMSEG = {
    "reduce.0": "bottleneck.conv",
    "reduce.1": "bottleneck.bn",
    "laterals.0.0": "lateral_convs.0.conv",
    "laterals.0.1": "lateral_convs.0.bn",
    "laterals.1.0": "lateral_convs.1.conv",
    "laterals.1.1": "lateral_convs.1.bn",
    "fuse.0": "fusion.conv",
    "fuse.1": "fusion.bn",
    "context.project.0": "enc_module.encoding_project.conv",
    "context.project.1": "enc_module.encoding_project.bn",
    "context.encoding": "enc_module.encoding.0",
    "context.norm": "enc_module.encoding.1",
    "context.gate": "enc_module.fc.0",
    "context.classify": "se_layer",
    "classify": "conv_seg",
}


@pytest.mark.parametrize("align_corners", [False, True])
@LATERAL
def test_the_head_is_the_published_one(lateral: bool, align_corners: bool) -> None:
    """mmseg's, whose numbers the golden cases hold, under other names."""
    channels = (6, 10, 14) if lateral else (14,)
    options = {"num_classes": 4, "channels": 8, "align_corners": align_corners}
    torch.manual_seed(0)
    ours = EncHead(*channels, codes=5, dropout=0.0, **options).double()
    theirs = mmseg.EncHead(
        in_channels=channels,
        in_index=range(len(channels)),
        num_codes=5,
        add_lateral=lateral,
        dropout_ratio=0.0,
        norm_cfg={"type": "BN"},
        **options,
    ).double()
    state = {}
    for key, value in ours.state_dict().items():
        module, _, name = key.rpartition(".")
        state[f"{NAMES_IN_MMSEG[module]}.{name}"] = value
    theirs.load_state_dict(state, strict=True)
    maps = [torch.randn(2, c, 17 - 4 * i, 11 - 2 * i).double() for i, c in enumerate(channels)]
    found, (pixels, presence) = ours(*maps), theirs(maps)
    torch.testing.assert_close(found.pixels, pixels)
    torch.testing.assert_close(found.presence.logits, presence)
    torch.testing.assert_close(ours.eval()(*maps), theirs.eval()(maps)[0])


@pytest.mark.parametrize("align_corners", [False, True])
def test_laterals_are_the_second_and_the_third_stage(align_corners: bool) -> None:
    """Joined with the last one at its size, in their order, by the fusion."""
    network = small(lateral=True, output_stride=32, align_corners=align_corners).eval()
    image, head = torch.randn(2, 3, 97, 65), network.head

    def resized(x: Tensor, *size: int) -> Tensor:
        return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)

    _, second, third, deep = network.backbone(image)
    x, (project2, project3) = head.reduce(deep), head.laterals
    sides = [resized(y, *x.shape[-2:]) for y in (project2(second), project3(third))]
    context = head.context(head.fuse(torch.cat([x, *sides], 1)))
    expected = resized(head.classify(context.features), 97, 65)
    torch.testing.assert_close(network(image), expected)


def test_training_adds_every_loss_by_its_weight() -> None:
    """0.2 of the semantic encoding loss and 0.2 of the auxiliary head's, as published."""
    images = torch.randn(2, 3, 33, 33)
    labels = torch.randint(3, (2, 33, 33))
    labels[:, :5] = IGNORE
    network, other = (small(lateral=True, dropout=0.0) for _ in range(2))
    network.auxiliary.dropout.p = other.auxiliary.dropout.p = 0.0
    recipe = Recipe(steps=1, batch=2, flip=False)
    (loss,) = train(network, TensorDataset(images, labels), recipe)
    pixels, presence, auxiliary = other(images.contiguous(memory_format=torch.channels_last))
    present = torch.tensor([[1.0, 1.0, 1.0, 0.0]] * 2)  # no pixel has the fourth class
    expected = F.cross_entropy(pixels, labels, ignore_index=IGNORE)
    expected += 0.2 * F.binary_cross_entropy_with_logits(presence.logits, present)
    expected += 0.2 * F.cross_entropy(auxiliary.logits, labels, ignore_index=IGNORE)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert predict(network, images).shape == (2, 33, 33)


def test_the_weight_of_the_semantic_encoding_loss_is_an_option() -> None:
    labels = torch.randint(4, (2, 33, 47))
    found = small(presence=0.7, auxiliary=None)(torch.randn(2, 3, 33, 47))
    without = training_loss(found._replace(presence=None), labels)
    twice = found.presence._replace(weight=1.4)
    once, doubled = (training_loss(x, labels) for x in (found, found._replace(presence=twice)))
    assert found.presence.weight == 0.7 and once > without
    torch.testing.assert_close(doubled - without, 2 * (once - without))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codes": 0}, ValueError, "codes must be a positive int"),
        ({"channels": 0}, ValueError, "EncHead: channels must be a positive int"),
        ({"num_classes": "2"}, ValueError, "num_classes must be a positive int"),
        ({"presence": -0.2}, ValueError, "presence is the weight of a loss.*\n.*-0.2"),
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
    options = {"dropout": 0.0, "lateral": True, "backend": "reference"}
    network, other = small(**options), small(**options)
    network.auxiliary.dropout.p = other.auxiliary.dropout.p = 0.0
    image = torch.randn(2, 3, 33, 47)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    found, expected = compiled(image), other(image)
    assert isinstance(found, networks.Logits)
    torch.testing.assert_close(found.pixels, expected.pixels)
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        assert got.weight == wanted.weight
        torch.testing.assert_close(got.logits, wanted.logits)
