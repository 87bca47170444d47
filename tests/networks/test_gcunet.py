"""The network of graph convolutional units: any size, every parameter trained, its beginning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from segkernels import networks


def small(**options: Any) -> networks.Segmenter:
    torch.manual_seed(0)
    options = {"width": 4, "channels": 12, "graph_channels": 5, "nodes": (2, 3), **options}
    return networks.build("gcunet", 4, backbone="resnet18", **options)


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 5), (3, 2)])
def test_any_size(size: tuple[int, int]) -> None:
    network = small()
    assert network(torch.randn(2, 3, *size)).shape == (2, 4, *size)
    assert network.eval()(torch.randn(1, 3, *size)).shape == (1, 4, *size)


def test_a_step_reaches_every_parameter() -> None:
    network = small()
    network.head.init_from(network.backbone(torch.randn(2, 3, 33, 47)).deep)
    loss = F.cross_entropy(network(torch.randn(2, 3, 33, 47)), torch.randint(4, (2, 33, 47)))
    loss.backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_the_beginning_is_the_features_clusters() -> None:
    network = small()
    images = torch.randn(2, 3, 65, 65)
    before = {key: t.clone() for key, t in network.head.state_dict().items()}
    network.eval().head.init_from(network.backbone(images).deep, seed=1)
    moved = {key for key, t in network.head.state_dict().items() if not torch.equal(t, before[key])}
    units = ("gcu.units.0.project.", "gcu.units.1.project.")
    assert moved == {unit + name for unit in units for name in ("anchor", "sigma")}
    _, assignment = network.head.gcu.units[0].project(
        network.head.reduce(network.backbone(images).deep)
    )
    assert (assignment.sum((0, 2, 3)) > 1).all()  # no node is empty


def test_classifier_reads_the_map_and_every_graph() -> None:
    network = networks.build("gcunet", 4, backbone="resnet18", channels=12, width=4)
    assert network.head.classify.in_channels == 12 + 4 * 256
    assert [len(unit.project.anchor) for unit in network.head.gcu.units] == [2, 4, 8, 32]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nodes": 32}, ValueError, r"GCU: nodes must be a sequence.*\n.*32"),
        ({"nodes": (2, 0)}, ValueError, r"GCU: nodes\[1\] must be a positive int"),
        ({"channels": 0}, ValueError, "channels must be a positive int"),
        ({"graph_channels": 0}, ValueError, "out_channels must be a positive int"),
        ({"backbone": "vgg16"}, ValueError, "'vgg16'"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"num_classes": 2, "backbone": "resnet18", **options}
    with torch.device("meta"), pytest.raises(error, match=message):
        networks.build("gcunet", **options)


@pytest.mark.compile
def test_compiles_in_one_graph() -> None:
    network = small(backend="reference").eval()
    image = torch.randn(1, 3, 33, 47)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), network(image))
