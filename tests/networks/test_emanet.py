"""EMANet: any size, both layouts of its head, every gradient, what moves its bases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from segkernels import networks
from segkernels.compat import emanet, mmseg
from segkernels.networks.emanet import EMAHead
from segkernels.ops.em_attention import GRADIENTS
from segkernels.train import Recipe, predict, train

LAYOUT = pytest.mark.parametrize("layout", ["paper", "mmseg"])


def small(**options: Any) -> networks.Segmenter:
    torch.manual_seed(0)
    options = {"channels": 12, "bases": 5, "backend": "reference", **options}
    return networks.build("emanet", 4, backbone="resnet18", width=4, **options)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 5), (3, 2)])
@LAYOUT
def test_any_size(layout: str, size: tuple[int, int]) -> None:
    network = small(layout=layout)
    assert network(torch.randn(2, 3, *size)).shape == (2, 4, *size)
    assert network.eval()(torch.randn(1, 3, *size)).shape == (1, 4, *size)


@pytest.mark.parametrize("gradient", GRADIENTS)
@LAYOUT
def test_a_step_reaches_every_parameter_that_learns(layout: str, gradient: str) -> None:
    network = small(layout=layout, gradient=gradient, learn_temperature=gradient != "none")
    loss = F.cross_entropy(network(torch.randn(2, 3, 33, 47)), torch.randint(4, (2, 33, 47)))
    loss.backward()
    for name, p in network.named_parameters():
        if gradient == "none" and name.startswith("head.emau.project."):
            assert not p.requires_grad and p.grad is None
        else:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def conv(theirs: str) -> dict[str, str]:
    """The names of a convolution and its norm in mmseg, by ours."""
    return {"0": f"{theirs}.conv", "1": f"{theirs}.bn"}


NAMES_IN_MMSEG = {
    "reduce": conv("ema_in_conv"),
    "refine": conv("bottleneck"),
    "join": conv("conv_cat"),
    "emau": {
        "project": "ema_mid_conv.conv",
        "running": "ema_module",
        "restore": "ema_out_conv.conv",
        "norm": "ema_out_conv.bn",
    },
}


@pytest.mark.parametrize("training", [True, False])
def test_the_head_in_the_layout_of_mmseg(training: bool) -> None:
    """mmseg's, whose numbers the golden cases hold, under other names: logits and moved bases."""
    torch.manual_seed(0)
    sizes = {"in_channels": 14, "num_classes": 4}
    options = {"momentum": 0.3, "backend": "reference"}
    ours = EMAHead(
        *sizes.values(),
        channels=8,
        refined_channels=6,
        layout="mmseg",
        bases=5,
        iterations=2,
        dropout=0.0,
        **options,
    )
    theirs = mmseg.EMAHead(
        8, 5, 2, **sizes, **options, channels=6, dropout_ratio=0.0, norm_cfg={"type": "BN"}
    )
    ours.double().train(training), theirs.double().train(training)

    def renamed() -> dict[str, torch.Tensor]:
        state = {}
        for key, value in ours.state_dict().items():
            part, _, rest = key.partition(".")
            child, _, name = rest.rpartition(".")
            where = NAMES_IN_MMSEG[part][child] if part in NAMES_IN_MMSEG else "conv_seg"
            state[f"{where}.{name}"] = value[None] if name == "bases" else value
        return state

    theirs.load_state_dict(renamed(), strict=True)
    x = torch.randn(2, 14, 9, 7).double()
    torch.testing.assert_close(ours(x), theirs([x]))
    for key, value in renamed().items():
        torch.testing.assert_close(theirs.state_dict()[key], value)


def test_the_head_in_the_layout_of_the_paper() -> None:
    """3x3 convolution, the official unit, 3x3 convolution, classifier."""
    torch.manual_seed(0)
    head = EMAHead(14, 4, channels=8, bases=5, backend="reference").double().eval()
    unit = emanet.EMAU(8, 5, backend="reference").double().eval()
    names = {"mu": "running.bases", "conv1": "project", "conv2.0": "restore", "conv2.1": "norm"}
    ours = head.emau.state_dict()
    for key, value in unit.state_dict().items():
        module, _, name = key.rpartition(".")
        value.copy_(ours[f"{names[module]}.{name}" if module else names[name]])
    x = torch.randn(2, 14, 9, 7).double()
    expected = head.classify(head.refine(unit(head.reduce(x))[0]))
    torch.testing.assert_close(head(x), expected)
    assert isinstance(head.dropout, nn.Dropout2d) and head.dropout.p == 0.1
    assert head.classify.in_channels == 256


def test_training_moves_the_bases_and_prediction_does_not() -> None:
    images, labels = torch.randn(4, 3, 33, 33), torch.randint(4, (4, 33, 33))
    network = small(auxiliary=0.4)
    bases = network.head.emau.running.bases
    before = bases.clone()
    train(network, TensorDataset(images, labels), Recipe(steps=2, batch=2, flip=False))
    after = bases.clone()
    assert not torch.equal(before, after)
    assert predict(network, images).shape == (4, 33, 33)
    assert torch.equal(bases, after)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bases": 0}, ValueError, "EMAU: bases must be a positive int"),
        ({"channels": 0}, ValueError, "EMAHead: channels must be a positive int"),
        ({"refined_channels": 0}, ValueError, "refined_channels must be a positive int"),
        ({"layout": "paddle"}, ValueError, "layout must be 'paper' or 'mmseg'\n.*'paddle'"),
        ({"gradient": "some"}, ValueError, "gradient must be one of"),
        ({"norm": None}, TypeError, "norm must make a norm"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"num_classes": 2, "backbone": "resnet18", **options}
    with torch.device("meta"), pytest.raises(error, match=message):
        networks.build("emanet", **options)


@pytest.mark.compile
@LAYOUT
def test_compiles_in_one_graph(layout: str) -> None:
    network = small(layout=layout).eval()
    image = torch.randn(1, 3, 33, 47)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), network(image))
