"""SeparableConv2d and DepthwiseConv2d against the same layers composed of torch's modules."""

from __future__ import annotations

import copy
import io
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from segkernels.nn import DepthwiseConv2d, SeparableConv2d, pair
from tests.nn.composition import agree, close, composed, plain, scramble

group_norm = partial(nn.GroupNorm, 2)

LAYERS: dict[str, dict[str, Any]] = {
    "paper": {},
    "xception": {"inner_activation": None, "outer_activation": None},
    "relu6": {"inner_activation": "relu6", "outer_activation": "relu6"},
    "nothing between": {"inner_norm": None, "inner_activation": None},
    "no norms": {"inner_norm": None, "outer_norm": None},
    "bias before norms": {"bias": True},
    "inner group norm": {"inner_norm": group_norm},
    "outer group norm": {"outer_norm": group_norm},
    "gelu": {"inner_activation": nn.GELU},
    "leaky": {"outer_activation": nn.LeakyReLU},
    "stride 2, 5x5": {"stride": 2, "kernel_size": 5},
    "anisotropic": {"dilation": (6, 2), "kernel_size": (3, 5)},
    "valid padding": {"padding": 0},
    "cumulative average": {"inner_norm": partial(nn.BatchNorm2d, momentum=None)},
    "no running statistics": {"outer_norm": partial(nn.BatchNorm2d, track_running_stats=False)},
    "not affine": {"inner_norm": partial(nn.BatchNorm2d, affine=False), "bias": True},
    "momentum, eps": {"outer_norm": partial(nn.BatchNorm2d, momentum=0.7, eps=1e-2)},
}


def make(**options: Any) -> SeparableConv2d:
    torch.manual_seed(0)
    layer = SeparableConv2d(6, 8, **options).double()
    scramble(layer)
    return layer


def image(batch: int = 2) -> Tensor:
    return torch.randn(
        batch, 6, 11, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_composition(name: str) -> None:
    layer = make(**LAYERS[name])
    agree(layer, composed(layer), image())


@pytest.mark.parametrize("frozen", ["inner_norm", "outer_norm"])
def test_a_norm_in_eval_mode_inside_a_training_layer(frozen: str) -> None:
    layer = make()
    getattr(layer, frozen).eval()
    other = composed(layer)
    before = {name: b.clone() for name, b in getattr(layer, frozen).named_buffers()}
    agree(layer, other, image(), steps=1)
    assert all(torch.equal(before[n], b) for n, b in getattr(layer, frozen).named_buffers())


@pytest.mark.parametrize("part", ["depthwise", "inner_norm", "pointwise", "outer_activation"])
def test_hooks_on_parts_run(part: str) -> None:
    layer = make()
    other = composed(layer)
    seen: list[Tensor] = []
    getattr(layer, part).register_forward_hook(lambda module, args, out: seen.append(out))
    agree(layer, other, image(), steps=1)
    assert len(seen) == 2  # one training step, one evaluation


def test_sync_batch_norm_conversion() -> None:
    layer = make()
    other = composed(layer)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert converted is layer and isinstance(layer.inner_norm, nn.SyncBatchNorm)
    agree(layer, other, image())


def test_parametrised_convolution() -> None:
    layer = make()
    torch.nn.utils.parametrizations.weight_norm(layer.pointwise)
    layer(image()).sum().backward()
    assert layer.pointwise.parametrizations.weight.original1.grad is not None


def test_a_depthwise_forward_of_its_own_is_respected() -> None:
    class Twice(DepthwiseConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer, other = make(), make()
    layer.depthwise.__class__ = Twice
    with torch.no_grad():
        other.depthwise.weight.mul_(2)
    close(layer(image()), other(image()), 1e-12)


def test_one_value_per_channel() -> None:
    layer = make(stride=2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(1, 6, 1, 1, dtype=torch.float64))
    layer.eval()(torch.randn(1, 6, 1, 1, dtype=torch.float64))


def test_cumulative_average_without_a_count() -> None:
    """As torch: the running statistics rest."""
    layer = make(inner_norm=partial(nn.BatchNorm2d, momentum=None))
    layer.inner_norm.num_batches_tracked = None
    other = composed(layer)
    before = layer.inner_norm.running_mean.clone()
    agree(layer, other, image())
    assert torch.equal(layer.inner_norm.running_mean, before)


def test_empty_batch() -> None:
    layer = make().eval()
    assert layer(image()[:0]).shape == (0, 8, 11, 9)


def test_channels_last_stays() -> None:
    y = make()(image().to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_copies_and_checkpoints() -> None:
    layer = make().eval()
    expected = layer(image())
    close(copy.deepcopy(layer)(image()), expected, 1e-15)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    close(torch.load(file, weights_only=False)(image()), expected, 1e-15)
    fresh = SeparableConv2d(6, 8).double().eval()
    fresh.load_state_dict(layer.state_dict(), strict=True)
    close(fresh(image()), expected, 1e-15)


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(6, 8).train(training)
    other = composed(layer)
    x = image().float()
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = layer(x), other(x)
    assert got.dtype == torch.bfloat16
    close(got, expected, 3e-2)
    got.float().sum().backward()
    assert layer.inner_norm.running_mean.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_model(dtype: torch.dtype) -> None:
    layer = make().to(dtype)
    other = composed(layer)
    tolerance = 30 * torch.finfo(dtype).eps
    for _ in range(2):  # training, then eval
        close(layer(image().to(dtype)), other(image().to(dtype)), tolerance)
        for a, b in zip(layer.buffers(), other.buffers(), strict=True):
            assert a.dtype == b.dtype
            close(a, b, tolerance)
        layer.eval(), other.eval()


@pytest.mark.compile
def test_exports_with_any_size() -> None:
    layer = make().eval()
    auto = torch.export.Dim.AUTO
    program = torch.export.export(layer, (image(),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    x = torch.randn(3, 6, 17, 23, dtype=torch.float64)
    close(program.module()(x), layer(x), 1e-15)


@pytest.mark.compile
@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph_and_once(training: bool) -> None:
    layer = make().train(training)
    other = copy.deepcopy(layer)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(3):
        x = image().requires_grad_()
        got, expected = compiled(x), other(image())
        close(got, expected, 1e-12)
        got.sum().backward()
        for a, b in zip(layer.buffers(), other.buffers(), strict=True):
            close(a, b, 1e-12)
    assert counter.frame_count == 1


def test_backend_travels_and_is_shown() -> None:
    layer = make(backend="reference")
    assert "backend='reference'" in repr(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an explicit reference is no fallback
        layer(image())


@pytest.mark.parametrize("kernel_size", [1, 3, (5, 3), 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_equals_conv2d(kernel_size: Any, stride: int) -> None:
    torch.manual_seed(0)
    layer = DepthwiseConv2d(6, kernel_size, stride, dilation=(2, 3)).double()
    assert isinstance(layer, nn.Conv2d)
    agree(layer, plain(layer), image(), steps=1)
    assert set(layer.state_dict()) == {"weight", "bias"}


NORM = nn.BatchNorm2d(4)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "even kernel": (lambda: DepthwiseConv2d(4, 2), ValueError, "odd sides"),
    "kernel of one side": (lambda: DepthwiseConv2d(4, (3,)), ValueError, r"kernel_size .*\(3,\)"),
    "kernel 3.0": (lambda: DepthwiseConv2d(4, 3.0), ValueError, r"kernel_size .*\n.*3\.0"),
    "three rates": (lambda: DepthwiseConv2d(4, dilation=(6, 12, 18)), ValueError, "dilation must"),
    "rate 0": (lambda: DepthwiseConv2d(4, dilation=0), ValueError, "dilation must be at least 1"),
    "stride 0": (lambda: DepthwiseConv2d(4, stride=0), ValueError, "stride must be at least 1"),
    "stride '2'": (lambda: DepthwiseConv2d(4, stride="2"), ValueError, r"stride must .*'2'"),
    "padding -1": (lambda: DepthwiseConv2d(4, padding=-1), ValueError, "padding must be at least"),
    "padding full": (lambda: DepthwiseConv2d(4, padding="full"), ValueError, "padding is"),
    "no channels": (lambda: DepthwiseConv2d(0), ValueError, r"channels must be a positive int.*0"),
    "channels '4'": (lambda: SeparableConv2d("4", 4), ValueError, r"in_channels must .*'4'"),
    "no outputs": (lambda: SeparableConv2d(4, 0), ValueError, "out_channels must be a positive"),
    "no such activation": (
        lambda: SeparableConv2d(4, 4, inner_activation="swish"),
        ValueError,
        "inner_activation must be one of 'relu', 'relu6', None.*'swish'",
    ),
    "activation made": (
        lambda: SeparableConv2d(4, 4, outer_activation=nn.ReLU()),
        TypeError,
        r"outer_activation must .*ReLU\(\)",
    ),
    "activation function": (
        lambda: SeparableConv2d(4, 4, inner_activation=nn.functional.relu),
        TypeError,
        "inner_activation must .*function relu",
    ),
    "norm made": (
        lambda: SeparableConv2d(4, 4, inner_norm=NORM),
        TypeError,
        r"inner_norm must make a norm.*BatchNorm2d\(4",
    ),
    "norm by name": (lambda: SeparableConv2d(4, 4, outer_norm="bn"), TypeError, "outer_norm must"),
    "norm False": (lambda: SeparableConv2d(4, 4, inner_norm=False), TypeError, "inner_norm must"),
    "norm of more": (
        lambda: SeparableConv2d(4, 4, inner_norm=nn.GroupNorm),
        TypeError,
        "inner_norm must make a norm from the number of channels",
    ),
    "norm of none": (
        lambda: SeparableConv2d(4, 4, inner_norm=lambda channels: None),
        TypeError,
        "inner_norm must",
    ),
    "an array": (lambda: SeparableConv2d(4, 4)(image().numpy()), ValueError, "x must be a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_what_cannot_be_fused_says_why() -> None:
    assert (
        pair.depthwise_obstacle(nn.Conv2d(4, 4, 3, groups=2))
        == "not depthwise: 4 to 4 channels in 2 groups"
    )
    assert "odd" in (pair.depthwise_obstacle(nn.Conv2d(4, 4, 2, groups=4)) or "")
    assert "reflect" in (
        pair.depthwise_obstacle(nn.Conv2d(4, 4, 3, groups=4, padding_mode="reflect")) or ""
    )
    assert pair.pointwise_obstacle(nn.Conv2d(4, 4, 1, stride=2)) == "not a plain 1x1 convolution"
    assert pair.norm_obstacle(nn.SyncBatchNorm(4)) == "SyncBatchNorm is not a BatchNorm2d"
    assert pair.depthwise_obstacle(nn.Conv2d(4, 4, 3, groups=4)) is None
