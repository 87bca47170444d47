"""Constructor arguments of the published classes that no golden case has: what they compute is
stated in plain torch modules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from segkernels.compat import emanet, encoding, jfzhang, mgl, mmcv, mmseg, vainf
from segkernels.compat.deeplab_pytorch import deeplabv2, deeplabv3
from segkernels.compat.mmcv import ConvModule, DepthwiseSeparableConvModule

BN = {"type": "BN"}
CIRCULAR = {"type": "Conv2d", "padding_mode": "circular"}


def _map(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kernel_size", [2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 3])
def test_jfzhang_pads_an_even_kernel_by_one_more_behind(kernel_size: int, dilation: int) -> None:
    layer = jfzhang.SeparableConv2d(3, 5, kernel_size, dilation=dilation).double().eval()
    x = _map(2, 3, 9, 7)
    reach = dilation * (kernel_size - 1)
    before, after = reach // 2, reach - reach // 2
    expected = layer.pointwise(layer.bn(layer.conv1(F.pad(x, (before, after, before, after)))))
    assert expected.shape == (2, 5, 9, 7)
    torch.testing.assert_close(layer(x), expected)


def test_mmcv_conv_module_tells_its_geometry() -> None:
    layer = ConvModule(4, 6, 3, 2, 1, (1, 2), groups=2, norm_cfg=BN, padding_mode="reflect")
    told = {
        "in_channels": 4,
        "out_channels": 6,
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": 1,
        "dilation": (1, 2),
        "groups": 2,
        "transposed": False,
        "output_padding": (0, 0),
        "with_bias": False,
        "with_spectral_norm": False,
        "inplace": True,
        "conv_cfg": None,
        "norm_cfg": BN,
        "act_cfg": {"type": "ReLU"},
    }
    assert {name: getattr(layer, name) for name in told} == told


def test_mmcv_efficient_conv_bn_eval_changes_no_result() -> None:
    torch.manual_seed(0)
    one, other = (
        DepthwiseSeparableConvModule(4, 6, 3, norm_cfg=BN, efficient_conv_bn_eval=efficient)
        for efficient in (False, True)
    )
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 4, 9, 7)
    torch.testing.assert_close(other.eval()(x), one.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "padded"),
    [
        ({"padding": (1, 2), "padding_mode": "circular"}, {"pad": (2, 2, 1, 1)}),
        (
            {"padding": (1, 2, 0, 3), "padding_mode": "replicate"},
            {"pad": (1, 2, 0, 3), "mode": "replicate"},
        ),
        ({"padding": 2, "conv_cfg": CIRCULAR}, {"pad": (2, 2, 2, 2), "mode": "circular"}),
    ],
    ids=["circular is zeros", "four sides", "option of conv_cfg"],
)
def test_mmcv_padding(arguments: dict[str, Any], padded: dict[str, Any]) -> None:
    layer = ConvModule(4, 6, 3, act_cfg=None, **arguments).double()
    x = _map(2, 4, 9, 7)
    expected = F.conv2d(F.pad(x, **padded), layer.conv.weight, layer.conv.bias)
    torch.testing.assert_close(layer(x), expected)


def test_mmcv_types_are_names_or_classes() -> None:
    class BatchFree(nn.Identity):
        def __init__(self, channels: int, eps: float) -> None:
            super().__init__()

    class Convolution(nn.Conv2d):
        pass

    classes = {"conv_cfg": Convolution, "norm_cfg": BatchFree, "act_cfg": nn.Hardswish}
    configs: dict[str, Any] = {name: {"type": kind} for name, kind in classes.items()}
    layer = ConvModule(4, 6, 1, **configs)
    assert (type(layer.conv), type(layer.norm)) == (Convolution, BatchFree)
    assert layer.norm_name == "bn"  # by the name of the class
    assert isinstance(layer.activate, nn.Hardswish) and layer.activate.inplace
    line = ConvModule(
        4, 6, 3, conv_cfg={"type": "Conv1d"}, norm_cfg={"type": nn.GroupNorm, "num_groups": 2}
    )
    assert (line.norm_name, line(torch.randn(2, 4, 9)).shape) == ("gn", (2, 6, 7))


def test_mmcv_hard_sigmoid_of_another_slope() -> None:
    layer = ConvModule(4, 6, 1, act_cfg={"type": "HSigmoid", "bias": 1.0, "divisor": 2.0}).double()
    x = _map(2, 4, 9, 7)
    torch.testing.assert_close(layer(x), ((layer.conv(x) + 1) / 2).clamp(0, 1))


def test_mmcv_init_weights_begins_again() -> None:
    layer = ConvModule(64, 64, 3, bias=True, norm_cfg=BN, act_cfg={"type": "LeakyReLU"})
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 7.0)
    layer.init_weights()
    gain = nn.init.calculate_gain("leaky_relu", 0.01)
    std = layer.conv.weight.std().item()
    assert std == pytest.approx(gain / (64 * 9) ** 0.5, rel=0.05)
    for values, value in ((layer.conv.bias, 0), (layer.bn.weight, 1), (layer.bn.bias, 0)):
        assert (values == value).all()


def test_mmseg_conv_cfg_is_not_for_the_separable_convolutions() -> None:
    head = mmseg.DepthwiseSeparableASPPHead(
        3, 2, in_channels=4, channels=4, num_classes=2, dilations=(1, 2), conv_cfg=CIRCULAR
    )
    modes = {
        name: part.padding_mode for name, part in head.named_modules() if type(part) is nn.Conv2d
    }
    modes.pop("conv_seg")
    assert {name for name, mode in modes.items() if mode == "zeros"} == {
        f"{layer}.{part}.conv"
        for layer in ("aspp_modules.1", "sep_bottleneck.0", "sep_bottleneck.1")
        for part in ("depthwise_conv", "pointwise_conv")
    }


def test_mmseg_heads_in_parts() -> None:
    """Of several inputs, with the methods that heads derived from these call."""
    head = mmseg.ASPPHead(
        in_channels=(3, 5),
        in_index=(0, 2),
        input_transform="resize_concat",
        channels=4,
        num_classes=6,
        out_channels=1,
        dropout_ratio=0.0,
    )
    head.double()
    assert (head.in_channels, head.out_channels, head.dropout_ratio) == (8, 1, 0.0)
    inputs = [_map(2, 3, 9, 7), _map(2, 1, 1, 1), _map(2, 5, 5, 4)]
    large = F.interpolate(inputs[2], (9, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(head._transform_inputs(inputs), torch.cat([inputs[0], large], 1))
    feature = head._forward_feature(inputs)
    assert feature.shape == (2, 4, 9, 7)
    torch.testing.assert_close(head.cls_seg(feature), head.conv_seg(feature))
    torch.testing.assert_close(head(inputs), head.conv_seg(feature))


@pytest.mark.parametrize(
    ("norm_cfg", "kinds"),
    [
        (BN, [mmseg.Encoding, nn.BatchNorm1d, nn.ReLU]),
        ({"type": "BN2d"}, [mmseg.Encoding, nn.BatchNorm1d, nn.ReLU]),
        ({"type": "SyncBN"}, [mmseg.Encoding, nn.SyncBatchNorm, nn.ReLU]),
        ({"type": "GN", "num_groups": 1}, [mmseg.Encoding, nn.GroupNorm, nn.ReLU]),
        (None, [mmseg.Encoding, nn.ReLU]),
    ],
    ids=str,
)
def test_mmseg_norm_of_the_encoding(norm_cfg: Any, kinds: list[type]) -> None:
    """The one for lines, [B, K, C], that belongs to the norm for maps."""
    module = mmseg.EncModule(4, 3, None, norm_cfg, None)
    assert [type(part) for part in module.encoding] == kinds


def test_mmseg_enc_head_in_parts() -> None:
    sizes = {"in_channels": (3, 5), "in_index": (0, 2), "channels": 4, "num_classes": 6}
    options = {"num_codes": 2, "use_se_loss": False, "add_lateral": True, "dropout_ratio": 0.0}
    head = mmseg.EncHead(**options, **sizes).double()
    inputs = [_map(2, 3, 9, 7), _map(2, 1, 1, 1), _map(2, 5, 5, 4)]
    chosen = head._transform_inputs(inputs)
    assert chosen[0] is inputs[0] and chosen[1] is inputs[2] and head.in_channels == (3, 5)
    feature = head.bottleneck(inputs[2])
    lateral = F.interpolate(head.lateral_convs[0](inputs[0]), (5, 4), mode="bilinear")
    feature = head.fusion(torch.cat([feature, lateral], 1))
    encoded, weighted = head.enc_module(feature)
    gain = head.enc_module.fc(encoded)[:, :, None, None]
    torch.testing.assert_close(weighted, (feature + feature * gain).relu())
    torch.testing.assert_close(head(inputs), head.conv_seg(weighted))
    with pytest.raises(ValueError, match="input_transform is 'multiple_select' for this head"):
        mmseg.BaseDecodeHead.__init__(head, **sizes)


@pytest.mark.parametrize("concat_input", [True, False])
def test_mmseg_ema_head_in_parts(concat_input: bool) -> None:
    """Of several inputs; the middle convolution folded or, where somebody listens, run."""
    torch.manual_seed(0)
    head = mmseg.EMAHead(
        ema_channels=8,
        num_bases=3,
        num_stages=2,
        concat_input=concat_input,
        in_channels=(3, 5),
        in_index=(0, 2),
        input_transform="resize_concat",
        channels=4,
        num_classes=6,
        norm_cfg=BN,
        dropout_ratio=0.0,
        backend="reference",
    )
    head.double().eval()
    inputs = [_map(2, 3, 9, 7), _map(2, 1, 1, 1), _map(2, 5, 5, 4)]
    x = head._transform_inputs(inputs)
    feats = head.ema_in_conv(x)
    y = head.ema_module(head.ema_mid_conv(feats))
    y = head.bottleneck((feats + head.ema_out_conv(y.relu())).relu())
    expected = head.conv_seg(head.conv_cat(torch.cat([x, y], 1)) if concat_input else y)
    torch.testing.assert_close(head(inputs), expected)
    heard: list[str] = []
    for part in (head.ema_mid_conv, head.ema_module):
        handle = part.register_forward_hook(lambda m, *args: heard.append(type(m).__name__))
        torch.testing.assert_close(head(inputs), expected)
        handle.remove()
    assert heard == ["ConvModule", "EMAModule"]
    assert hasattr(head, "conv_cat") == concat_input
    untrained = {name for name, p in head.named_parameters() if not p.requires_grad}
    assert untrained == {"ema_mid_conv.conv.weight", "ema_mid_conv.conv.bias"}


def test_emanet_norm_does_not_count() -> None:
    torch.manual_seed(0)
    unit = emanet.EMAU(6, 4, backend="reference").double()
    conv, norm = unit.conv2
    plain = nn.BatchNorm2d(6, momentum=3e-4).double()
    x = _map(2, 6, 9, 7)
    seen: list[Tensor] = []
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    unit(x)
    plain(seen[0])
    assert norm.num_batches_tracked == 0 and plain.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_var, plain.running_var)
    assert not torch.equal(norm.running_mean, torch.zeros(6).double())


def test_emanet_bases_are_moved_by_the_script() -> None:
    """In place, before the backward, as published; which changes no gradient, even repeated."""
    torch.manual_seed(0)
    unit = emanet.EMAU(6, 4, backend="reference").double()
    gradients = []
    for moved in (False, True):
        x, before = _map(2, 6, 9, 7).requires_grad_(), unit.mu.clone()
        y, mu = checkpoint(unit, x, use_reentrant=False)
        assert torch.equal(unit.mu, before) and not mu.requires_grad
        if moved:
            unit.mu.mul_(0.1).add_(mu.mean(0, keepdim=True), alpha=0.9)
        y.square().sum().backward()
        gradients.append((x.grad, unit.conv2[0].weight.grad.clone()))
        unit.zero_grad()
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


def test_encoding_module_without_and_with_presence() -> None:
    one = encoding.EncModule(4, 6, ncodes=3, se_loss=False).double().eval()
    two = encoding.EncModule(4, 6, ncodes=3).double().eval()
    one.load_state_dict({k: t for k, t in two.state_dict().items() if "selayer" not in k})
    x = _map(2, 4, 9, 7)
    (y,), (z, presence) = one(x), two(x)
    torch.testing.assert_close(y, z)
    v = two.encoding[3](two.encoding[:3](x))  # [B, K, C]
    v = two.encoding[4](v[..., None])[..., 0].relu().mean(1)
    torch.testing.assert_close(presence, two.selayer(v))
    torch.testing.assert_close(y, (x + x * two.fc(v)[:, :, None, None]).relu())


def test_mgl_sixteen_bits_stay_sixteen() -> None:
    x = _map(2, 4, 5, 3).bfloat16()
    nodes, assignment = mgl.GraphNet(3, 4).bfloat16()(x)
    assert nodes.dtype == assignment.dtype == torch.bfloat16
    assert (nodes.shape, assignment.shape) == ((2, 4, 3), (2, 3, 15))


BAD_INPUTS: dict[str, dict[str, Any]] = {
    "two channels": {"in_channels": (3, 5)},
    "two indices": {"in_channels": 8, "in_index": (0, 1)},
    "one channel": {"in_channels": 8, "in_index": (0, 1), "input_transform": "resize_concat"},
    "lengths": {"in_channels": (3, 5), "in_index": (0,), "input_transform": "resize_concat"},
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_mmseg_inputs_that_do_not_go_together(name: str) -> None:
    with pytest.raises(ValueError, match=r"in_channels and in_index are .*\n.*in_channels: "):
        mmseg.ASPPHead(channels=4, num_classes=2, **BAD_INPUTS[name])


def test_unknown_types_are_named() -> None:
    for name in ("conv_cfg", "norm_cfg", "act_cfg"):
        config: dict[str, Any] = {name: {"type": "Nothing"}}
        with pytest.raises(ValueError, match=rf"{name}: type is one of .*\n  {name}: .*Nothing"):
            mmcv.ConvModule(4, 6, 1, **config)


def test_vainf_activations_work_in_place() -> None:
    for head in (vainf.DeepLabHead(4, 2), vainf.DeepLabHeadV3Plus(4, 3, 2)):
        activations = [part for part in head.modules() if isinstance(part, nn.ReLU)]
        assert activations and all(part.inplace for part in activations)


def test_deeplab_pytorch_momentum_to_the_last_bit() -> None:
    norms = [part for part in deeplabv3._ASPP(4, 2, (3,)).modules() if hasattr(part, "momentum")]
    assert len(norms) == 3 and {norm.momentum for norm in norms} == {1 - 0.999}


def test_a_seed_gives_the_published_weights() -> None:
    """Drawn in the published order: deeplabv2 after all branches are made, jfzhang's branches once
    each and then with the rest.
    """
    torch.manual_seed(0)
    sums = deeplabv2._ASPP(4, 2, (1, 2))
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 2, 3) for _ in range(2)]
    for conv, branch in zip(convs, sums.children(), strict=True):
        assert torch.equal(branch.weight, nn.init.normal_(conv.weight, std=0.01))

    torch.manual_seed(0)
    aspp = jfzhang.ASPP("mobilenet", 16, nn.BatchNorm2d)
    torch.manual_seed(0)
    for kernel_size in (1, 3, 3, 3):
        conv = nn.Conv2d(320, 256, kernel_size, bias=False)
        nn.init.kaiming_normal_(conv.weight)
    convs = [nn.Conv2d(channels, 256, 1, bias=False) for channels in (320, 5 * 256)]
    ours = [part for part in aspp.modules() if isinstance(part, nn.Conv2d)]
    assert len(ours) == 6
    for conv in ours:
        assert torch.equal(conv.weight, nn.init.kaiming_normal_(torch.empty_like(conv.weight)))
