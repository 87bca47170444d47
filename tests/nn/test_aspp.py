"""ASPP and DeepLabV3PlusHead: against their definition, and how often the operator is called."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import segkernels
from segkernels.nn import ASPP, DeepLabV3PlusHead, SeparableConv2d, chain, pair
from tests.nn.composition import agree, close, composed, scramble

SYNCHRONISED = nn.SyncBatchNorm.convert_sync_batchnorm


class Plain(nn.Module):
    """The definition: branches, image pooling, concatenation, projection."""

    def __init__(self, aspp: ASPP) -> None:
        super().__init__()
        copied = copy.deepcopy(aspp)
        self.branches = nn.ModuleList(
            composed(b) if isinstance(b, SeparableConv2d) else b for b in copied.branches
        )
        self.pool, self.project = copied.pool, copied.project

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        if self.pool is not None:
            maps.append(F.interpolate(self.pool(x), x.shape[-2:], mode="bilinear"))
        return self.project(torch.cat(maps, 1))


def image() -> Tensor:
    return torch.randn(3, 6, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rates of every call of the operators."""
    rates: list[int] = []
    for name in ("separable_conv2d", "depthwise_conv2d"):
        operator = getattr(pair, name)

        def counted(
            x: Tensor, w: Tensor, *args: Any, operator: Any = operator, **options: Any
        ) -> Any:
            rates.append(w.shape[0] if w.dim() == 5 else 1)
            return operator(x, w, *args, **options)

        monkeypatch.setattr(pair, name, counted)
    return rates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [3]),
        ({"rates": (1, (18, 15), (6, 3), (6, 21), 40)}, [5]),
        ({"separable": False}, []),
        ({"image_pooling": False}, [3]),
        ({"norm": None}, [3]),
        ({"activation": nn.SiLU}, [3]),
    ],
    ids=lambda value: str(value),
)
def test_aspp_equals_its_definition(
    options: dict[str, Any], expected: list[int], calls: list[int]
) -> None:
    torch.manual_seed(0)
    aspp = ASPP(6, 4, dropout=0.0, **options).double()
    scramble(aspp)
    agree(aspp, Plain(aspp), image())
    assert calls == expected * 3


def test_synchronised_norms_still_share_the_depthwise_call(calls: list[int]) -> None:
    torch.manual_seed(0)
    aspp = ASPP(6, 4, dropout=0.0).double()
    other = Plain(aspp)
    agree(SYNCHRONISED(aspp), other, image(), steps=1)
    assert calls == [3, 3]


def test_a_part_may_name_the_backend(calls: list[int], backends: list[str | None]) -> None:
    """A branch has its own backend, and then a call of its own; the others are the caller's."""
    aspp = ASPP(6, 4, rates=(1, 2, 3, 4), dropout=0.0).double()
    other = Plain(aspp)
    aspp.branches[2].backend = aspp.branches[4].depthwise.backend = "reference"
    agree(aspp, other, image(), steps=0)
    assert list(zip(calls, backends, strict=True)) == [
        (1, None), (1, "reference"), (1, None), (1, "reference")
    ]  # fmt: skip
    aspp.branches[2].backend = aspp.branches[4].depthwise.backend = None
    aspp.backend = "reference"
    agree(aspp, other, image(), steps=0)
    assert (calls[4:], backends[4:]) == ([4], ["reference"])


def test_two_backends_in_one_chain_are_refused() -> None:
    aspp = ASPP(6, 4, backend="native").double()
    aspp.branches[2].backend = "reference"
    message = r"SeparableConv2d: .*two backends\n  backend: 'reference', but 'native'"
    with pytest.raises(segkernels.UnsupportedInputError, match=message):
        aspp(image())
    layer = SeparableConv2d(6, 4, backend="native").double()
    layer.depthwise.backend = "reference"
    with pytest.raises(segkernels.UnsupportedInputError, match=r"DepthwiseConv2d: .*two backends"):
        layer(image())


def test_branches_of_different_kinds_do_not_share(calls: list[int]) -> None:
    torch.manual_seed(0)
    aspp = ASPP(6, 4, dropout=0.0).double()
    aspp.branches[2].inner_norm.eval()
    agree(aspp, Plain(aspp), image(), steps=1)
    assert calls == [1, 1, 1, 3]


def test_a_spectral_norm_moves_one_step_a_call() -> None:
    """Reading such a weight in training is a step of its power iteration."""
    torch.manual_seed(0)
    aspp = ASPP(6, 4, dropout=0.0).double()
    other = Plain(aspp)
    for ours, theirs in zip(list(aspp.branches)[1:], list(other.branches)[1:], strict=True):
        for conv, same in ((ours.depthwise, theirs[0]), (ours.pointwise, theirs[3])):
            spectral_norm(conv)
            spectral_norm(same)
            same.parametrizations.load_state_dict(conv.parametrizations.state_dict())
    agree(aspp, other, image())


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_an_activation_in_place_behind_a_shared_call(norm: Any, calls: list[int]) -> None:
    torch.manual_seed(0)
    activation = partial(nn.LeakyReLU, inplace=True)
    aspp = ASPP(6, 4, dropout=0.0, norm=norm, activation=activation).double()
    agree(aspp, Plain(aspp), image(), steps=1)
    assert set(calls) == {3}


def test_a_branch_with_a_forward_of_its_own_is_respected() -> None:
    class Twice(SeparableConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    once, twice = SeparableConv2d(6, 4).double(), Twice(6, 4).double()
    twice.load_state_dict(once.state_dict())
    close(chain.run(image(), [nn.Sequential(twice)]), 2 * once(image()), 1e-12)


def test_pads_by_hand() -> None:
    conv = nn.Conv2d(6, 6, 3, dilation=2, groups=6).double()
    both = chain.run(image(), [pair.Pad(2, 2), conv, nn.Identity()])
    close(
        both,
        F.conv2d(F.pad(image(), (2, 2, 2, 2)), conv.weight, conv.bias, dilation=2, groups=6),
        1e-12,
    )
    close(chain.run(image(), [pair.Pad(1, 2)]), F.pad(image(), (2, 2, 1, 1)), 0.0)


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("refinements", [0, 1, 2])
def test_head_shapes(separable: bool, refinements: int) -> None:
    head = DeepLabV3PlusHead(
        6, 5, 4, channels=8, low_level_width=3, separable=separable, refinements=refinements
    )
    logits = head(torch.randn(2, 5, 17, 13), torch.randn(2, 6, 5, 4))
    assert logits.shape == (2, 4, 17, 13)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rates": 6}, ValueError, r"ASPP: rates must be a sequence.*\n.*6"),
        ({"rates": "6"}, ValueError, "ASPP: rates must be a sequence"),
        ({"rates": (6, 1.5)}, ValueError, r"ASPP: rates must be an int or a pair.*\n.*1\.5"),
        ({"rates": (6, 0), "separable": False}, ValueError, "rates must be at least 1"),
        ({"norm": nn.BatchNorm2d(4)}, TypeError, r"^norm must make a norm"),
        ({"activation": nn.ReLU()}, TypeError, r"^activation must be one of"),
        ({"out_channels": 0}, ValueError, "ASPP: out_channels must be a positive int"),
    ],
    ids=str,
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ASPP(**{"in_channels": 6, "out_channels": 4, **options})


def test_bad_arguments_of_the_head() -> None:
    with pytest.raises(ValueError, match=r"DeepLabV3PlusHead: num_classes .*\n.*0"):
        DeepLabV3PlusHead(6, 5, 0)
    for refinements in (-1, 1.5):
        with pytest.raises(ValueError, match=rf"refinements must be .*\n.*{refinements}"):
            DeepLabV3PlusHead(6, 5, 4, refinements=refinements)


@pytest.mark.compile
def test_aspp_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    aspp = ASPP(6, 4, dropout=0.0).double()
    other = copy.deepcopy(aspp)
    compiled = torch.compile(aspp, backend="aot_eager", fullgraph=True)
    close(compiled(image()), other(image()), 1e-12)
    for a, b in zip(aspp.buffers(), other.buffers(), strict=True):
        close(a, b, 1e-12)
