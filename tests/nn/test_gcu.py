"""GCU and its parts: against the paper's equations, written with their tensor of pixels, nodes and
channels.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segkernels
from segkernels.nn import GCU, GraphConvolution, GraphProjection, GraphReprojection
from tests.nn.composition import agree, close, scramble


class Plain(nn.Module):
    """The definition, node by node."""

    def __init__(self, gcu: GCU) -> None:
        super().__init__()
        self.gcu = copy.deepcopy(gcu)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.graph(unit, x) for unit in self.gcu.units]
        return sum(maps, x) if self.gcu.merge == "add" else torch.cat([x, *maps], 1)

    def graph(self, unit: Any, x: Tensor) -> Tensor:
        z, q = projection(unit.project, x)
        adjacency = torch.einsum("bkc,bjc->bkj", z, z)
        y = torch.einsum("bkj,bjc,cd->bkd", adjacency, z, unit.convolve.weight)
        if unit.convolve.norm is not None:
            y = unit.convolve.norm(y.permute(0, 2, 1)[..., None])[..., 0].permute(0, 2, 1)
        return torch.einsum("bnk,bkd->bdn", q, y.relu()).view(len(x), -1, *x.shape[2:])


def projection(project: GraphProjection, x: Tensor) -> tuple[Tensor, Tensor]:
    """z: [B, K, C], q: [B, N, K]."""
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, C]
    scales = 1 / (1 + torch.exp(-project.sigma))
    residuals = (pixels[:, :, None] - project.anchor) / scales  # [B, N, K, C]
    q = torch.softmax(-residuals.square().sum(3) / 2, 2)
    z = (q[..., None] * residuals).sum(1) / q.sum(1)[..., None]
    return z / z.norm(dim=2, keepdim=True), q


def image(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(size or (3, 6, 11, 9)), dtype=torch.float64, generator=generator) / 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nodes": (1,)},
        {"nodes": [5, 5]},
        {"norm": nn.BatchNorm2d},
        {"norm": partial(nn.GroupNorm, 2)},
        {"out_channels": 6, "merge": "add"},
        {"out_channels": 6, "merge": "add", "norm": nn.BatchNorm2d, "nodes": (3,)},
    ],
    ids=str,
)
def test_gcu_equals_its_definition(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    gcu = GCU(6, **{"out_channels": 4, "nodes": (2, 3, 7), **options}).double()
    scramble(gcu)
    y = gcu(image())
    assert y.shape == (3, gcu.out_channels, 11, 9)
    agree(gcu, Plain(gcu), image())


def test_activations_of_the_nodes() -> None:
    torch.manual_seed(0)
    relu, none, other = (
        GraphConvolution(6, 4, activation=kind).double() for kind in ("relu", None, nn.Tanh)
    )
    none.load_state_dict(relu.state_dict())
    other.load_state_dict(relu.state_dict())
    nodes = image(2, 5, 6)
    assert (none(nodes) < 0).any()
    close(relu(nodes), none(nodes).relu(), 1e-14)
    close(other(nodes), none(nodes).tanh(), 1e-14)


def test_projection_returns_unit_nodes_and_the_assignment() -> None:
    torch.manual_seed(0)
    project = GraphProjection(6, 5).double()
    nodes, assignment = project(image())
    z, q = projection(project, image())
    close(nodes, z, 1e-12)
    close(assignment, q.mT.unflatten(2, (11, 9)), 1e-12)
    close(nodes.norm(dim=2), torch.ones(3, 5), 1e-12)
    close(assignment.sum(1), torch.ones(3, 11, 9), 1e-12)


def test_reprojection_with_a_residual() -> None:
    nodes, assignment, x = image(2, 5, 6), image(2, 5, 4, 3).softmax(1), image(2, 6, 4, 3)
    expected = torch.einsum("bkd,bkhw->bdhw", nodes, assignment)
    close(GraphReprojection()(nodes, assignment), expected, 1e-13)
    close(GraphReprojection()(nodes, assignment, x), expected + x, 1e-13)


def test_parameter_names() -> None:
    names = ("project.anchor", "project.sigma", "convolve.weight")
    gcu = GCU(6, 4, (2, 3))
    assert list(gcu.state_dict()) == [f"units.{i}.{name}" for i in (0, 1) for name in names]
    assert gcu.units[1].project.anchor.shape == gcu.units[1].project.sigma.shape == (3, 6)
    assert gcu.units[1].convolve.weight.shape == (6, 4)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The backend of every call of the operators over nodes."""
    from segkernels.nn import graph_projection, graph_reprojection

    seen: list[str | None] = []
    for module, name in ((graph_projection, "soft_assign"), (graph_reprojection, "reproject")):
        operator = getattr(module, name)

        def noted(*args: Any, operator: Any = operator, backend: str | None, **options: Any) -> Any:
            seen.append(backend)
            return operator(*args, backend=backend, **options)

        monkeypatch.setattr(module, name, noted)
    return seen


def test_the_backend_travels(backends: list[str | None]) -> None:
    GCU(6, 6, (2, 3), merge="add", backend="reference").double()(image())
    assert backends == ["reference"] * 3  # two projections, one re-projection
    with pytest.raises(segkernels.UnsupportedInputError, match="no backend named 'cuda'"):
        GCU(6, 4, (2,), backend="cuda").double()(image())


def blobs(spread: float = 0.1) -> tuple[Tensor, Tensor]:
    """A map [2, 3, 16, 16] of pixels about four centres [4, 3], by quarters of the map."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.eye(4, 3) + torch.tensor([0.0, 0.0, 1.0])
    quarter = (torch.arange(16) >= 8).long()
    where = 2 * quarter[:, None] + quarter
    noise = spread * torch.randn(2, 16, 16, 3, generator=generator)
    return (centres[where] + noise).movedim(3, 1), centres


def test_init_from_finds_the_clusters() -> None:
    features, centres = blobs()
    project = GraphProjection(3, 4)
    for seed in range(5):
        project.init_from(features, seed=seed)
        order = torch.cdist(centres, project.anchor).argmin(1)
        assert sorted(order.tolist()) == [0, 1, 2, 3]
        close(project.anchor[order], centres, 0.02)
        close(project.sigma.sigmoid(), torch.full((4, 3), 0.1), 0.2)
    _, assignment = project(features)
    assert assignment.max(1).values.min() > 0.99
    assert assignment.argmax(1)[:, ::15, ::15].flatten(1).unique(dim=1).shape == (2, 4)


def test_init_from_is_decided_by_its_seed() -> None:
    features = torch.rand(2, 6, 9, 7, generator=torch.Generator().manual_seed(3))
    states = []
    for seed in (1, 1, 2):
        gcu = GCU(6, 4, (2, 5))
        torch.rand(seed)  # the global generator has no part in it
        gcu.init_from(features, seed=seed)
        states.append([unit.project.anchor for unit in gcu.units])
    assert all(map(torch.equal, states[0], states[1]))
    assert not all(map(torch.equal, states[0], states[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_init_from_features_of_another_type(dtype: torch.dtype) -> None:
    features, centres = blobs()
    project = GraphProjection(3, 4)
    project.init_from(features.to(dtype).requires_grad_())
    assert project.anchor.dtype == torch.float32 and project.anchor.requires_grad
    close(torch.cdist(centres, project.anchor).amin(1), torch.zeros(4), 0.03, floor=1.0)


def test_scales_of_init_from_stay_within_the_sigmoid() -> None:
    """A cluster of one pixel has no deviation, one of large features has more than one."""
    project = GraphProjection(3, 4)
    project.init_from(torch.eye(4, 3)[None].mT[..., None])
    close(project.sigma.sigmoid(), torch.full((4, 3), 0.01), 1e-3)
    project.init_from(blobs(100.0)[0])
    close(project.sigma.sigmoid(), torch.full((4, 3), 0.99), 1e-3)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.rand(1, 6, 1, 3), r"as many distinct pixels as nodes\n  nodes: 4\n.*3 of 3"),
        (torch.zeros(2, 6, 9, 9), r"distinct pixels: 1 of 162"),
        (torch.rand(0, 6, 9, 9), r"distinct pixels: 0 of 0"),
        (torch.full((1, 6, 9, 9), torch.nan), "finite features"),
        (torch.rand(1, 5, 9, 9), r"over the channels of features\n.*\[4, 6\]"),
        (torch.rand(6, 9, 9), r"4 dimensions"),
    ],
    ids=["three pixels", "one colour", "no image", "nan", "channels", "rank 3"],
)
def test_init_from_bad_features(features: Tensor, message: str) -> None:
    project = GraphProjection(6, 4)
    before = project.anchor.clone()
    with pytest.raises(
        segkernels.UnsupportedInputError, match=rf"(?s)^GraphProjection: .*{message}"
    ):
        project.init_from(features)
    assert torch.equal(project.anchor, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "channels must be a positive int"),
        ({"out_channels": 1.5}, "out_channels must be a positive int"),
        ({"nodes": 32}, r"nodes must be a sequence.*\n.*32"),
        ({"nodes": ()}, "graphs must be a positive int"),
        ({"nodes": (2, -1)}, r"nodes\[1\] must be a positive int\n.*-1"),
        ({"merge": "sum"}, r"merge must be 'concatenate' or 'add'\n.*'sum'"),
        ({"merge": "add"}, r"channels of the map\n.*6\n.*4"),
        ({"activation": "gelu"}, r"activation must be one of"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(segkernels.UnsupportedInputError, match=message):
        GCU(**{"in_channels": 6, "out_channels": 4, "nodes": (2, 3), **options})


def test_a_map_of_other_channels_is_refused() -> None:
    with pytest.raises(segkernels.UnsupportedInputError, match="over the channels of features"):
        GCU(6, 4)(torch.zeros(1, 5, 3, 3))


@pytest.mark.parametrize("merge", ["concatenate", "add"])
def test_sixteen_bits(merge: Any) -> None:
    """As a bfloat16 module and under autocast: near the float64 result, with finite gradients."""
    torch.manual_seed(0)
    gcu = GCU(6, 6, (2, 3), merge=merge, norm=nn.BatchNorm2d).eval()
    x = image().bfloat16()
    expected = copy.deepcopy(gcu).double()(x.double())
    half = copy.deepcopy(gcu).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = gcu(x.float())
    for got, module in ((autocast, gcu), (half(x), half)):
        close(got, expected, 0.05)
        got.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.compile
def test_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    gcu = GCU(6, 4, (2, 3), norm=nn.BatchNorm2d).double()
    other = copy.deepcopy(gcu)
    compiled = torch.compile(gcu, backend="aot_eager", fullgraph=True)
    ours, theirs = compiled(image()), other(image())
    close(ours, theirs, 1e-12)
    ours.sum().backward()
    theirs.sum().backward()
    for p, q in zip(gcu.parameters(), other.parameters(), strict=True):
        close(p.grad, q.grad, 1e-10)


def test_a_pixel_on_its_anchor() -> None:
    """Its node has no direction; whatever rounding makes of that, everything is finite."""
    project = GraphProjection(3, 2).double()
    x = project.anchor.detach()[0][None, :, None, None].clone().requires_grad_()  # on the anchor
    nodes, _ = project(x)
    assert nodes.isfinite().all() and nodes.norm(dim=2).max() <= 1 + 1e-12
    nodes.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *project.parameters()))
