"""patch and unpatch, on tiny classes that stand for the published ones under their names."""

from __future__ import annotations

import copy
import io
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkernels.nn import pair
from segkernels.patch import CONTAINERS, LAYERS, Run, _difference, patch, unpatch
from tests.published import (
    ASPP,
    EMAU,
    PLACES,
    DepthwiseSeparableConvModule,
    EMAHead,
    EMAModule,
    Encoding,
    GraphNet,
)


@pytest.fixture(autouse=True)
def _published_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake modules under the published names hold the tiny classes (pickle looks there)."""
    for place, kinds in PLACES.items():
        parts = place.split(".")
        for i in range(1, len(parts) + 1):
            fake = ModuleType(".".join(parts[:i]))
            monkeypatch.setitem(sys.modules, fake.__name__, fake)
        for kind in kinds:
            monkeypatch.setattr(kind, "__module__", place)
            setattr(fake, kind.__name__, kind)
    yield


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rates of every call of the fused operator."""
    seen: list[int] = []
    operator = pair.separable_conv2d

    def counted(x: Tensor, w: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(w.shape[0] if w.dim() == 5 else 1)
        return operator(x, w, *args, **options)

    monkeypatch.setattr(pair, "separable_conv2d", counted)
    return seen


def model() -> nn.Sequential:
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 6, 1), ASPP(6, 4), DepthwiseSeparableConvModule(4, 5), ASPP(5, 4, False)]
    return nn.Sequential(*stages).double()


def image() -> Tensor:
    return torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_report_and_numbers(rates: list[int]) -> None:
    net = model()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    report = patch(net, image())
    # the three separable branches in one call, the mmcv layer in one
    assert rates == [3, 1]
    assert [entry.name for entry in report.replaced] == [
        "1",
        "1.convs.1.0",
        "1.convs.2.0",
        "1.convs.3.0",
        "2",
    ]
    assert [(e.name, e.note) for e in report.skipped] == [("3", "no depthwise convolution in it")]
    assert report.difference is not None and set(report.difference) == {
        "output",
        "gradient",
        "buffer",
    }
    assert max(report.difference.values()) < 1e-10
    assert "5 layers replaced, 1 skipped" in str(report) and "largest relative" in str(report)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_same_results_and_back(training: bool, rates: list[int]) -> None:
    net, other = model().train(training), model().train(training)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    patch(net)
    patch(net)  # once more changes nothing
    assert type(net[1]) is ASPP
    for step in range(2):
        got, expected = net(image()), other(image())
        assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
        got.sum().backward()
        expected.sum().backward()
        for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-8, atol=1e-9), name
        for p, q in zip(net.buffers(), other.buffers(), strict=True):
            assert torch.allclose(p, q)
        if step == 0:
            assert unpatch(net) > 0 and unpatch(net) == 0
    assert rates == [3, 1]
    assert all("forward" not in m.__dict__ for m in net.modules())
    assert set(map(id, optimiser.param_groups[0]["params"])) == set(map(id, net.parameters()))


def test_layers_over_nodes() -> None:
    torch.manual_seed(0)
    for layer in (Encoding(3, 5), GraphNet(5, 3)):
        net = nn.Sequential(nn.Conv2d(3, 3, 1), layer).double()
        report = patch(net, image(), backend="reference")
        assert [entry.name for entry in report.replaced] == ["1"] and not report.skipped
        assert report.difference is not None and max(report.difference.values()) < 1e-10
        assert unpatch(net) == 1
    (entry,) = patch(Encoding(3, 257)).skipped
    assert entry.note == "the kernels take up to 256 nodes, not 257"


class Inputs(nn.Module):
    """A list of maps, as mmseg's heads take it."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x[:1], x]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1), EMAU(4, 3)), ["1"]),
        (lambda: nn.Sequential(EMAModule(3, 5), nn.Conv2d(3, 2, 1)), ["0"]),
        (lambda: nn.Sequential(Inputs(), EMAHead(3, 5)), ["1", "1.ema_module"]),
    ],
    ids=["EMAU", "EMAModule", "EMAHead"],
)
def test_layers_of_em_attention(
    make: Any, names: list[str], training: bool, folded: list[bool]
) -> None:
    torch.manual_seed(0)
    net = make().double().train(training)
    report = patch(net, image(), backend="reference")
    assert [entry.name for entry in report.replaced] == names and not report.skipped
    assert report.difference is not None and max(report.difference.values()) < 1e-10
    assert folded == ["0" not in names]
    assert unpatch(net) >= len(names) and unpatch(net) == 0


def test_hooks_of_a_part_that_is_folded_run(folded: list[bool]) -> None:
    net = nn.Sequential(Inputs(), EMAHead(3, 5)).double()
    seen: list[str] = []
    net[1].ema_module.register_forward_hook(lambda *args: seen.append("module"))
    patch(net, backend="reference")
    net(image())
    assert seen == ["module"] and folded == [False]


def test_em_attention_with_too_many_bases() -> None:
    for layer in (EMAU(2, 257), EMAModule(2, 257), EMAHead(2, 257)):
        for entry in patch(layer).skipped:
            assert entry.note == "the kernels take up to 256 nodes, not 257"
        assert not patch(layer).replaced


def test_hooks_still_run(rates: list[int]) -> None:
    net = model()
    seen: list[str] = []
    net[1].register_forward_hook(lambda *args: seen.append("layer"))
    net[1].convs[2].register_forward_hook(lambda *args: seen.append("branch"))
    net[2].pointwise_conv.bn.register_forward_hook(lambda *args: seen.append("norm"))
    patch(net)
    net(image())
    assert sorted(seen) == ["branch", "layer", "norm"]


def test_dry_run_and_strict() -> None:
    net = model()
    assert len(patch(net, dry_run=True).replaced) == 5
    with pytest.raises(ValueError, match="nothing changed"):
        patch(net, strict=True)
    assert unpatch(net) == 0


def test_other_versions_are_left_alone() -> None:
    net = model()
    del net[1].project
    net[2].forward = lambda x: x
    reasons = {entry.name: entry.note for entry in patch(net).skipped}
    assert reasons["1"] == "another version: no project"
    assert reasons["2"] == "its forward was rebound by something else"


def test_another_signature_and_subclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ASPP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = nn.Sequential(Mine(3, 4), DepthwiseSeparableConvModule(4, 5))
    monkeypatch.setattr(DepthwiseSeparableConvModule, "forward", lambda self, x, scale: x)
    reasons = [entry.note for entry in patch(net).skipped]
    assert any("Mine is a subclass" in reason for reason in reasons)
    assert any("forward('x', 'scale')" in reason for reason in reasons)
    monkeypatch.setattr(DepthwiseSeparableConvModule, "forward", lambda self, *x: x)
    assert any("forward('*x',)" in entry.note for entry in patch(net).skipped)


def test_copies_and_files_stay_patched(rates: list[int]) -> None:
    net = model().eval()
    expected = net(image())
    patch(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        with torch.no_grad():
            for p in net[1].parameters():
                p.zero_()
        assert torch.allclose(other(image()), expected)  # its own weights, not the original's
    assert rates == [3, 1] * 2


@pytest.mark.compile
def test_a_patched_model_compiles() -> None:
    net, other = model(), model()
    patch(net)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(image()), other(image()))


NORMS = {"norm_cfg": {"type": "BN"}}
HEAD = {"in_channels": 4, "channels": 4, "num_classes": 2, **NORMS}
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "mmcv.ConvModule": {"in_channels": 4, "out_channels": 4, "kernel_size": 1, **NORMS},
    "mmcv.DepthwiseSeparableConvModule": {"in_channels": 4, "out_channels": 4, "kernel_size": 3},
    "mmseg.ASPPHead": HEAD,
    "mmseg.DepthwiseSeparableASPPHead": {"c1_in_channels": 3, "c1_channels": 2, **HEAD},
    "smp.SeparableConv2d": {"in_channels": 4, "out_channels": 4, "kernel_size": 3},
    "smp.ASPP": {"in_channels": 4, "out_channels": 4, "atrous_rates": (1, 2, 3)},
    "smp.DeepLabV3PlusDecoder": {
        "encoder_channels": (3, 4, 4, 4, 4, 4),
        "encoder_depth": 5,
        "out_channels": 4,
        "atrous_rates": (1, 2, 3),
        "output_stride": 16,
        "aspp_separable": True,
        "aspp_dropout": 0.5,
    },
    "torchvision.ASPP": {"in_channels": 4, "atrous_rates": (1, 2, 3)},
    "vainf.AtrousSeparableConvolution": {"in_channels": 4, "out_channels": 4, "kernel_size": 3},
    "vainf.ASPP": {"in_channels": 4, "atrous_rates": (1, 2, 3)},
    "vainf.DeepLabHead": {"in_channels": 4, "num_classes": 2},
    "vainf.DeepLabHeadV3Plus": {"in_channels": 4, "low_level_channels": 3, "num_classes": 2},
    "jfzhang.SeparableConv2d": {"inplanes": 4, "planes": 4},
    "mmseg.Encoding": {"channels": 4, "num_codes": 3},
    "encoding.Encoding": {"D": 4, "K": 3},
    "mgl.GraphNet": {"node_num": 3, "dim": 4},
    "emanet.EMAU": {"c": 4, "k": 3},
    "mmseg.EMAModule": {"channels": 4, "num_bases": 3, "num_stages": 2, "momentum": 0.1},
    "mmseg.EMAHead": {"ema_channels": 4, "num_bases": 3, "num_stages": 2, **HEAD},
}


@pytest.mark.parametrize("name", [*LAYERS, *CONTAINERS])
def test_every_entry_has_its_face(name: str) -> None:
    """The face has the children that the entry asks of the published class."""
    layer = (LAYERS | CONTAINERS)[name]
    face = layer.load()
    assert face.__name__ == name.rpartition(".")[2]
    with torch.device("meta"):
        module = face(**CONSTRUCTORS[layer.face])
    assert all(hasattr(module, child) for child in layer.children)
    assert layer.limit(module) is None


@pytest.mark.parametrize("model", [3, None, [nn.ReLU()], nn.ReLU], ids=str)
def test_what_is_no_model(model: Any) -> None:
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=rf"{function.__name__}: model must be .*Module\n"):
            function(model)


def test_a_backend_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match=r"patch: no backend named 'cuda'\n.*native"):
        patch(nn.ReLU(), backend="cuda")


def test_a_difference_that_is_no_number_is_shown() -> None:
    right, wrong = torch.ones(2), torch.tensor([1.0, torch.nan])
    before = Run({"a": right, "b": right}, {}, {})
    assert math.isnan(_difference(before, Run({"a": right, "b": wrong}, {}, {}))["output"])
