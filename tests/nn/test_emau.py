"""EMAU: against the paper's equations, written with their two normalisations; its running bases."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import segkernels
from segkernels.nn import EMAU, running_bases
from segkernels.ops.em_attention import GRADIENTS
from tests.nn.composition import agree, close, scramble, trained


def additive(x: Tensor, order: int, dim: int) -> Tensor:
    return x / (1e-6 + x.norm(order, dim, keepdim=True))


class Plain(nn.Module):
    """The unit in plain PyTorch: what is not differentiated runs under no_grad."""

    def __init__(self, layer: EMAU) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)

    def forward(self, x: Tensor) -> Tensor:
        u = self.layer
        t = u.project(x).flatten(2)  # [B, C, N]
        y, bases = self.reconstruct(t)
        if self.training:
            mean = bases.detach().mean(0)
            mean = F.normalize(mean, dim=0) if u.running.renormalise else mean
            a = u.running.momentum
            u.running.bases = (1 - a) * u.running.bases + a * mean
        return F.relu(u.norm(u.restore(F.relu(y.view_as(x)))) + x)

    def reconstruct(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, N], [B, C, K]."""
        u = self.layer
        divided = additive if u.norm_kind == "additive" else F.normalize
        mu = u.running.bases.expand(len(t), -1, -1)
        first = {"none": u.iterations, "last": u.iterations - 1, "last+bases": u.iterations - 1}
        for step in range(u.iterations):
            with torch.set_grad_enabled(step >= first.get(u.gradient, 0)):
                z = (u.temperature * (t.mT @ mu)).softmax(2)  # [B, N, K]
                with torch.set_grad_enabled(u.gradient != "last" and torch.is_grad_enabled()):
                    mu = divided(t @ divided(z, 1, 1), 2, 1)
        return mu @ z.mT, mu


def image(*size: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (3, 6, 11, 9)), dtype=torch.float64, generator=generator)


def unit(**options: Any) -> EMAU:
    torch.manual_seed(0)
    layer = EMAU(6, **{"bases": 4, "backend": "reference", **options}).double()
    scramble(layer)
    return layer


def gradients(layer: nn.Module, x: Tensor, run: Callable[..., Any]) -> list[Tensor]:
    """Of a loss of the layer's output, run(layer, x), by x and the parameters."""
    x = x.clone().requires_grad_()
    run(layer, x).square().sum().backward()
    found = [x.grad, *(p.grad for p in trained(layer))]
    assert all(g is not None for g in found)
    return found


# ---- its definition ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "clamp", "renormalise": True, "momentum": 0.3},
        {"iterations": 1, "bases": 7},
        {"temperature": 2.5, "norm_layer": partial(nn.GroupNorm, 2)},
        {"temperature": 1.5, "learn_temperature": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_it_equals_its_definition(gradient: str, options: dict[str, Any]) -> None:
    """Outputs, gradients and bases of two steps, and in evaluation after them."""
    if gradient == "none":
        options = {name: v for name, v in options.items() if name != "learn_temperature"}
    layer = unit(gradient=gradient, **options)
    plain = Plain(layer)
    agree(layer, plain, image())
    for model in (layer, plain.layer):
        untrained = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert untrained == ({"project.weight", "project.bias"} if gradient == "none" else set())


def test_as_published_the_iterations_have_no_gradient() -> None:
    """Not by x, which has the residual's alone and that of a constant, and not by the convolution,
    even one that wants it."""
    layer = unit().eval()
    layer.project.requires_grad_()
    x = image().requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, (y > 0).double())
    assert layer.project.weight.grad is None and layer.project.bias.grad is None
    assert layer.restore.weight.grad.any()


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_the_convolution_is_folded_where_it_is_one(folded: list[bool]) -> None:
    """Anything else in its place runs: a hook, another forward, another geometry."""
    layer, x = unit().eval(), image()
    expected = layer(x)
    layer.project.register_forward_hook(lambda module, inputs, output: 2 * output)
    twice = layer(x)
    assert not torch.allclose(twice, expected)
    state = layer.project.state_dict()
    for other in (Doubled(6, 6, 1), nn.Sequential(nn.Conv2d(6, 6, 1), Scale())):
        layer.project = other.double()
        (other if isinstance(other, Doubled) else other[0]).load_state_dict(state)
        close(layer(x), twice, 1e-12)
    for conv in (nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1, groups=2)):
        layer.project = conv.double()
        layer(x)
    assert folded == [True] + 5 * [False]
    unit(gradient="last")(x)
    assert not folded[-1]


def test_in_evaluation_the_norm_is_folded_into_the_convolution() -> None:
    layer = EMAU(6, 3).double().eval()
    scramble(layer)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    calls = []
    with torch.no_grad():
        folded = layer(x)
        layer.norm.register_forward_hook(lambda *_: calls.append("norm"))
        apart = layer(x)
    assert calls == ["norm"]
    close(folded, apart, 1e-12)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


# ---- running bases -------------------------------------------------------------------------------


def found(layer: EMAU, x: Tensor) -> Tensor:
    """The bases [B, C, K] that EM ends with."""
    _, bases = segkernels.em_attention(
        layer.project(x),
        layer.running.bases,
        layer.iterations,
        norm=layer.norm_kind,
        backend="reference",
    )
    return bases.detach()


@pytest.mark.parametrize("renormalise", [False, True])
def test_the_bases_move_by_the_share_of_the_new(renormalise: bool) -> None:
    layer = unit(momentum=0.3, renormalise=renormalise)
    before, x = layer.running.bases.clone(), image()
    mean = found(layer, x).mean(0)
    length = mean.norm(dim=0)
    assert (length < 1 - 1e-3).all()  # a mean of directions is shorter
    with torch.no_grad():
        layer(x)
    close(layer.running.bases, 0.7 * before + 0.3 * mean / (length if renormalise else 1), 1e-12)


def test_the_bases_rest_in_evaluation_and_for_no_image() -> None:
    layer = unit()
    before = layer.running.bases.clone()
    layer.norm.eval()
    layer(image(0, 6, 5, 4))
    layer.eval()(image())
    assert torch.equal(layer.running.bases, before)
    layer.train().running.eval()
    layer(image())
    assert torch.equal(layer.running.bases, before)


def test_an_update_from_outside() -> None:
    """As the official training script: after the forward, by what it returned."""
    one, other = unit(), unit(update="external")
    before = other.running.bases.clone()
    y, (features, bases) = one(image()), other(image())
    assert torch.equal(features, y) and torch.equal(other.running.bases, before)
    assert bases.shape == (3, 6, 4) and not bases.requires_grad
    other.update(bases)
    assert torch.equal(other.running.bases, one.running.bases)
    assert not torch.equal(other.running.bases, before)


def test_an_update_before_the_backward_changes_no_gradient() -> None:
    layer, other = (unit(update="external", gradient="full") for _ in range(2))

    def run(layer: EMAU, x: Tensor, moves: bool) -> Tensor:
        attended = layer(x)
        if moves:
            layer.update(attended.bases)
        return attended.features

    moved = gradients(layer, image(), partial(run, moves=True))
    for ours, theirs in zip(
        moved, gradients(other, image(), partial(run, moves=False)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_sixteen_bit_bases_move_by_a_mean_in_float32() -> None:
    layer = unit().bfloat16()
    wide = copy.deepcopy(layer).float()
    x = image().bfloat16()
    front = {"weight": layer.project.weight, "bias": layer.project.bias}
    _, bases = segkernels.em_attention(x, layer.running.bases, backend="reference", **front)
    assert bases.dtype == torch.float32
    layer(x)
    expected = torch.lerp(wide.running.bases, bases.mean(0), 0.1)
    assert torch.equal(layer.running.bases, expected.bfloat16())


# ---- activation checkpointing --------------------------------------------------------------------

CHECKPOINTED = pytest.mark.parametrize("reentrant", [False, True], ids=["whole", "reentrant"])


@CHECKPOINTED
@pytest.mark.parametrize("update", ["module", "external"])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_checkpointing(gradient: str, update: str, reentrant: bool) -> None:
    """The same gradients although the bases have moved meanwhile, and they move once."""
    layer = unit(gradient=gradient, update=update, momentum=0.5)
    other, start = copy.deepcopy(layer), layer.running.bases.clone()

    def run(layer: EMAU, x: Tensor, repeats: bool) -> Tensor:
        y = checkpoint(layer, x, use_reentrant=reentrant) if repeats else layer(x)
        if update == "module":
            return y
        layer.update(y[1])
        return y[0]

    ours = gradients(layer, image(), partial(run, repeats=True))
    for got, expected in zip(
        ours, gradients(other, image(), partial(run, repeats=False)), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(layer.running.bases, other.running.bases)
    assert not torch.equal(layer.running.bases, start)


@CHECKPOINTED
@pytest.mark.parametrize("order", ["one graph", "first in, first out", "last in, first out"])
def test_checkpointing_of_several_forwards(order: str, reentrant: bool) -> None:
    """Every repetition begins where its own forward did, in whichever order they come."""
    layer = unit(gradient="full", momentum=1.0)
    other = copy.deepcopy(layer)
    batches = [image(seed=seed) for seed in range(3)]

    def losses(layer: EMAU, repeats: bool) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in batches]
        outputs = [
            checkpoint(layer, x, use_reentrant=reentrant) if repeats else layer(x) for x in inputs
        ]
        found = [y.square().sum() for y in outputs]
        if order == "one graph":
            found = [torch.stack(found).sum()]
        for loss in found if order.startswith("first") else reversed(found):
            loss.backward()
        return [*(x.grad for x in inputs), *(p.grad for p in layer.parameters())]

    for got, expected in zip(losses(layer, True), losses(other, False), strict=True):
        close(got, expected, 1e-12)  # gradients of several graphs are summed in their order
    assert torch.equal(layer.running.bases, other.running.bases)


def test_the_past_is_bounded_and_not_part_of_the_layer() -> None:
    layer = unit()
    for _ in range(running_bases.RECENT + 3):
        layer(image(1, 6, 2, 2))
    recent = running_bases._BEGINNINGS[layer.running]
    assert len(recent) == running_bases.RECENT
    twin = copy.deepcopy(layer)
    assert twin.running not in running_bases._BEGINNINGS
    before = len(running_bases._BEGINNINGS)
    del layer, recent
    assert len(running_bases._BEGINNINGS) < before


# ---- a module among modules ----------------------------------------------------------------------


def test_names_and_first_values() -> None:
    torch.manual_seed(0)
    layer = EMAU(128, 16)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "project.weight": (128, 128, 1, 1),
        "project.bias": (128,),
        "running.bases": (128, 16),
        "restore.weight": (128, 128, 1, 1),
        **{f"norm.{name}": (128,) for name in ("weight", "bias", "running_mean", "running_var")},
        "norm.num_batches_tracked": (),
    }
    torch.testing.assert_close(layer.running.bases.norm(dim=0), torch.ones(16))
    for conv in (layer.project, layer.restore):
        assert conv.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    learned = EMAU(6, 4, gradient="last", temperature=2, learn_temperature=True)
    assert learned.state_dict()["temperature"].tolist() == [2.0]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_have_the_bases_and_move_by_themselves(way: str) -> None:
    layer = unit(gradient="last+bases", temperature=0.5, learn_temperature=True)
    layer(image())
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = unit(gradient="last+bases", learn_temperature=True)
        twin.load_state_dict(layer.state_dict(), strict=True)
    kept = layer.running.bases.clone()
    expected = twin(image(seed=3))
    assert torch.equal(layer.running.bases, kept)
    assert torch.equal(layer(image(seed=3)), expected)
    assert torch.equal(layer.running.bases, twin.running.bases)


def test_the_backend_travels() -> None:
    with pytest.raises(segkernels.UnsupportedInputError, match="no backend named 'cuda'"):
        unit(backend="cuda")(image())


def test_sixteen_bits() -> None:
    """As a bfloat16 module and under autocast: near the float64 result, with finite gradients."""
    module = unit(gradient="full").float().eval()
    x = image().bfloat16()
    expected = copy.deepcopy(module).double()(x.double())
    half = copy.deepcopy(module).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = module(x.float())
    for got, layer in ((autocast, module), (half(x), half)):
        close(got, expected, 0.05)
        got.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "channels": ({"channels": 0}, "EMAU: channels must be a positive int"),
    "bases": ({"bases": 2.0}, "EMAU: bases must be a positive int"),
    "iterations": ({"iterations": 0}, "EMAU: iterations must be a positive int"),
    "gradient": ({"gradient": "first"}, "gradient must be one of 'none', 'last', .*\n.*'first'"),
    "norm": ({"norm": "l2"}, "norm must be one of 'additive', 'clamp'\n.*'l2'"),
    "update": ({"update": "never"}, "update must be one of 'module', 'external'\n.*'never'"),
    "temperature": ({"temperature": 0}, "temperature must be a number above 0\n.*0"),
    "learned": ({"learn_temperature": True}, "no temperature can be learned"),
    "momentum": ({"momentum": 1.5}, "momentum must be a number above 0, at most 1\n.*1.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    options, message = BAD[name]
    with pytest.raises(segkernels.UnsupportedInputError, match=message):
        EMAU(**{"channels": 6, **options})


def test_a_norm_must_be_a_class() -> None:
    with pytest.raises(TypeError, match="norm_layer must make a norm"):
        EMAU(6, norm_layer=nn.BatchNorm2d(6))


@pytest.mark.compile
@pytest.mark.parametrize("gradient", ["none", "full"])
def test_compiles_in_one_graph(gradient: str) -> None:
    module = unit(gradient=gradient)
    other = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        ours, theirs = compiled(image()), other(image())
        close(ours, theirs, 1e-12)
        ours.sum().backward(), theirs.sum().backward()
    for p, q in zip(trained(module), trained(other), strict=True):
        close(p.grad, q.grad, 1e-10)
    for a, b in zip(module.buffers(), other.buffers(), strict=True):
        close(a, b, 1e-12)
