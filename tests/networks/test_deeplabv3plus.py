"""DeepLabv3+: any size, train and eval, published parameter names, the numbers of published
networks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from segkernels import networks
from segkernels.compat import smp
from segkernels.networks.backbones import NAMES, build_backbone
from segkernels.networks.resnet import ResNet
from segkernels.networks.xception import Xception65
from segkernels.nn import SeparableConv2d
from tests.compat.golden import COMMITTED, FULL, load_tensors, manifest, state


def small(**options: Any) -> networks.Segmenter:
    torch.manual_seed(0)
    return networks.build(
        "deeplabv3plus", num_classes=4, backbone="resnet18", channels=16, **options
    )


@pytest.mark.parametrize("size", [(33, 47), (64, 64), (7, 5), (3, 2)])
def test_any_size(size: tuple[int, int]) -> None:
    network = small()
    assert network(torch.randn(2, 3, *size)).shape == (2, 4, *size)
    assert network.eval()(torch.randn(1, 3, *size)).shape == (1, 4, *size)


def test_a_step_reaches_every_parameter() -> None:
    network = small()
    loss = F.cross_entropy(network(torch.randn(2, 3, 33, 47)), torch.randint(4, (2, 33, 47)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("name", NAMES)
def test_strides_and_widths(name: str, output_stride: int) -> None:
    with FakeTensorMode():
        backbone = build_backbone(name, output_stride=output_stride)
        maps = backbone(torch.empty(1, 3, 65, 97))
    for x, channels, stride in zip(maps, backbone.channels, (4, 8, 16, 32), strict=True):
        at = min(stride, output_stride)
        assert x.shape == (1, channels, *(-(-n // at) for n in (65, 97)))


def test_rates_of_the_atrous_stages() -> None:
    def rates(backbone: nn.Module, stage: str) -> list[int]:
        blocks = backbone.get_submodule(stage).modules()
        convs = [m for m in blocks if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        return [conv.dilation[0] for conv in convs]

    with torch.device("meta"):
        resnet = ResNet("resnet50", 8)
        grid = ResNet("resnet50", 16, multigrid=(1, 2, 4))
        sixteen, eight = Xception65(16, multigrid=(1, 2, 4)), Xception65(8)
    assert rates(resnet, "layer3") == [1, 2, 2, 2, 2, 2]
    assert rates(resnet, "layer4") == [2, 4, 4]
    assert rates(grid, "layer4") == [2, 4, 8]
    assert rates(sixteen, "middle") == [1] * 48
    assert rates(sixteen, "exit") == [1, 1, 1, 2, 4, 8]
    assert rates(eight, "middle") == [2] * 48
    assert rates(eight, "exit") == [2, 2, 2, 4, 4, 4]


def test_xception65_is_separable_throughout() -> None:
    with torch.device("meta"):
        backbone = Xception65()
    assert sum(isinstance(m, SeparableConv2d) for m in backbone.modules()) == 3 * (3 + 16 + 2)
    full = [m for m in backbone.modules() if type(m) is nn.Conv2d and m.kernel_size != (1, 1)]
    assert len(full) == 2  # the stem


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_from_a_file(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(1)
    source = ResNet("resnet18").state_dict() | {"fc.weight": torch.zeros(10, 512)}
    path = tmp_path / f"resnet18{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": t for key, t in source.items()}}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(source, path)
    loaded = small(weights=path).backbone.state_dict()
    assert all(torch.equal(loaded[key], source[key]) for key in loaded)


def test_a_backbone_of_a_trained_network(tmp_path: Path) -> None:
    """What is beside it, under whatever names, stays where it is."""
    torch.manual_seed(1)
    trained = networks.build("deeplabv3plus", num_classes=2, backbone="resnet18", channels=8)
    path = tmp_path / "trained.pth"
    torch.save({f"module.{key}": t for key, t in trained.state_dict().items()}, path)
    loaded = small(weights=path).backbone.state_dict()
    assert all(torch.equal(t, loaded[k]) for k, t in trained.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("hello world"), "not a file of tensors"),
        (lambda path: path.write_bytes(b""), "not a file of tensors"),
        (lambda path: torch.save(nn.Linear(1, 1), path), "(?s)not a file of tensors.*weights_only"),
        (lambda path: torch.save(torch.zeros(1), path), "(?s)no state_dict.*it holds: Tensor"),
        (lambda path: torch.save({1: torch.zeros(1)}, path), "(?s)no state_dict.*it holds: dict"),
    ],
    ids=["text", "nothing", "a module", "a tensor", "numbered"],
)
def test_a_file_without_weights(tmp_path: Path, write: Any, message: str) -> None:
    write(tmp_path / "other.pth")
    with pytest.raises(RuntimeError, match=message) as error:
        small(weights=tmp_path / "other.pth")
    assert "other.pth" in str(error.value)


def test_wrong_weights_are_an_error(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "partial.pth")
    with pytest.raises(RuntimeError, match="Missing key"):
        small(weights=tmp_path / "partial.pth")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backbone": "vgg16"}, ValueError, "'vgg16'"),
        ({"output_stride": 4}, ValueError, "output_stride"),
        ({"output_stride": "16"}, ValueError, "output_stride: '16'"),
        ({"output_stride": 16.0}, ValueError, "output_stride: 16.0"),
        ({"multigrid": (1, 2, 4)}, ValueError, "multigrid must be a sequence of 2"),
        ({"multigrid": 2}, ValueError, "multigrid must be a sequence of 2"),
        ({"multigrid": (1, 0)}, ValueError, r"multigrid\[1\] must be a positive int"),
        ({"multigrid": (1.0, 2)}, ValueError, r"multigrid\[0\] must be a positive int"),
        ({"backbone": "xception65", "multigrid": 2}, ValueError, "multigrid must be a sequence of"),
        ({"rates": 6}, ValueError, "rates must be a sequence"),
        ({"width": 0}, ValueError, "width must be a positive int"),
        ({"width": "64"}, ValueError, "width must be a positive int"),
        ({"num_classes": "2"}, ValueError, "num_classes must be a positive int"),
        ({"norm": nn.BatchNorm2d(4)}, TypeError, "norm must make a norm"),
        ({"backbone": "xception65", "norm": None}, TypeError, "norm must make a norm"),
        ({"weights": "imagenet"}, FileNotFoundError, r"weights must be the path.*\n.*'imagenet'"),
        ({"weights": True}, FileNotFoundError, "weights must be the path"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"num_classes": 2, "backbone": "resnet18", "width": 4, **options}
    if options["backbone"] != "resnet18":
        del options["width"]
    with torch.device("meta"), pytest.raises(error, match=message):
        networks.build("deeplabv3plus", **options)


@pytest.mark.parametrize("name", ["deeplabv9", ["deeplabv3plus"], 3], ids=str)
def test_unknown_network(name: Any) -> None:
    with pytest.raises(ValueError, match="known: deeplabv3plus"):
        networks.build(name, num_classes=2)


def test_parameter_names_are_torchvisions() -> None:
    schemas = manifest(FULL)["state_dict_schemas"] or manifest(COMMITTED)["state_dict_schemas"]
    schema = schemas.get("torchvision.deeplabv3_resnet50(aux)")
    if schema is None:
        pytest.skip("needs the full golden folder")
    published = [key[9:] for key in schema["state_dict"] if key.startswith("backbone.")]
    with torch.device("meta"):
        assert list(ResNet("resnet50", 8).state_dict()) == published


@pytest.mark.parametrize("name", ["DeepLabV3Plus.eval", "DeepLabV3Plus.train", "DeepLabV3"])
def test_whole_published_network(name: str) -> None:
    """SMP's networks over ResNet-18, rebuilt from our backbone and decoder: their numbers."""
    case = manifest(FULL)["cases"].get(f"full.smp.{name}")
    if case is None:
        pytest.skip("needs the full golden folder")
    tensors = load_tensors(FULL, case)
    network = nn.Module()
    with torch.device("meta"):
        if "Plus" in name:
            network.encoder = ResNet("resnet18", 16, multigrid=(1, 1))
            widths = (3, 64, 64, 128, 256, 512)
            network.decoder = smp.DeepLabV3PlusDecoder(widths, 5, 256, (12, 24, 36), 16, True, 0.0)
        else:
            network.encoder = ResNet("resnet18", 8, multigrid=(1, 1))
            network.decoder = smp.DeepLabV3Decoder(512, 256, (12, 24, 36), False, 0.0)
        network.segmentation_head = nn.Sequential(nn.Conv2d(256, 2, 1))
    weights = state(case, tensors, network)
    network.double().to_empty(device="cpu").train(case["mode"] == "train")
    network.load_state_dict(weights, strict=True)
    x = tensors["input.0"].double()
    low_level, _, _, deep = network.encoder(x)
    logits = network.segmentation_head(network.decoder([x, x, low_level, deep]))
    got = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=True)
    expected = tensors["output.0"].double()
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()
    after = {key[13:]: t for key, t in tensors.items() if key.startswith("buffer_after.")}
    buffers = dict(network.named_buffers())
    assert all(torch.allclose(buffers[k].double(), t.double(), rtol=1e-6) for k, t in after.items())
