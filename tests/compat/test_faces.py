"""What the published classes do beside their numbers: parts used alone, conversions, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkernels.compat import emanet, encoding, jfzhang, mgl, mmcv, mmseg, smp, torchvision, vainf
from segkernels.compat.deeplab_pytorch import deeplabv2, deeplabv3
from segkernels.nn import chain

POOLS = {
    "torchvision.ASPPPooling": lambda: torchvision.ASPPPooling(4, 3),
    "encoding.AsppPooling": lambda: encoding.AsppPooling(4, 3, nn.BatchNorm2d, None),
    "deeplabv3._ImagePool": lambda: deeplabv3._ImagePool(4, 3),
}


@pytest.mark.parametrize("name", POOLS)
def test_the_image_pool_alone_returns_a_map(name: str) -> None:
    """Called, or in a chain, which opens what it knows: constant over the size of its input."""
    torch.manual_seed(0)
    pool = POOLS[name]().eval()
    x = torch.randn(2, 4, 9, 7)
    for y in (pool(x), chain.run(x, [nn.Sequential(pool, nn.Identity())])):
        assert y.shape == (2, 3, 9, 7)
        torch.testing.assert_close(y, y[:, :, :1, :1].expand_as(y))


def test_converted_convolutions_keep_their_backend(backends: list[str | None]) -> None:
    """In a head that names none."""
    aspp = vainf.convert_to_separable_conv(vainf.ASPP(4, (1, 2, 3)), backend="reference").eval()
    y: Tensor = aspp(torch.randn(1, 4, 9, 7))
    assert y.shape == (1, 256, 9, 7)
    assert set(backends) == {"reference"}


NORM = nn.BatchNorm2d(4)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "torchvision rates": (lambda: torchvision.ASPP(4, 6), ValueError, r"atrous_rates must .*\n.*6"),
    "smp rates": (lambda: smp.ASPP(4, 4, 6), ValueError, "atrous_rates must be a sequence of 3"),
    "smp two rates": (lambda: smp.ASPP(4, 4, (6, 12)), ValueError, r"sequence of 3\n.*\(6, 12\)"),
    "vainf rates": (lambda: vainf.ASPP(4, (6, 12)), ValueError, "atrous_rates must be a sequence"),
    "encoding rates": (lambda: encoding.ASPP_Module(16, 6), ValueError, "atrous_rates must be"),
    "mmseg dilations": (
        lambda: mmseg.ASPPHead(6, in_channels=4, channels=4, num_classes=2),
        ValueError,
        "dilations must be a sequence",
    ),
    "deeplabv2 rates": (lambda: deeplabv2._ASPP(4, 4, 6), ValueError, "rates must be a sequence"),
    "deeplabv3 rates": (lambda: deeplabv3._ASPP(4, 4, 6), ValueError, "rates must be a sequence"),
    "encoding norm": (
        lambda: encoding.ASPP_Module(16, (6, 12, 18), NORM),
        TypeError,
        "norm_layer must make a norm",
    ),
    "jfzhang norm": (lambda: jfzhang.ASPP("drn", 16, NORM), TypeError, "BatchNorm must make a"),
    "jfzhang conv's": (
        lambda: jfzhang.SeparableConv2d(4, 4, BatchNorm=NORM),
        TypeError,
        "BatchNorm must make a norm",
    ),
    "mmcv norm": (
        lambda: mmcv.ConvModule(4, 4, 1, norm_cfg="BN"),
        TypeError,
        r"norm_cfg.*\n.*'BN'",
    ),
    "mmcv norm, no type": (lambda: mmcv.ConvModule(4, 4, 1, norm_cfg={}), TypeError, "norm_cfg"),
    "mmcv groups": (
        lambda: mmcv.ConvModule(4, 4, 1, norm_cfg={"type": "GN"}),
        ValueError,
        "norm_cfg: GN needs num_groups",
    ),
    "mmcv activation": (
        lambda: mmcv.ConvModule(4, 4, 1, act_cfg="ReLU"),
        TypeError,
        "act_cfg must",
    ),
    "mmcv padding": (
        lambda: mmcv.ConvModule(4, 4, 1, padding_mode="reflection"),
        ValueError,
        r"padding_mode is .*replicate\n.*'reflection'",
    ),
    "mmseg transform": (
        lambda: mmseg.ASPPHead(
            in_channels=4, channels=4, num_classes=2, input_transform="multiple_select"
        ),
        ValueError,
        r"input_transform is None or 'resize_concat'.*\n.*'multiple_select'",
    ),
    "mgl loops": (lambda: mgl.CascadeGCNet(4, 4), ValueError, r"loop is 1, 2 or 3\n.*4"),
    "emanet bases": (lambda: emanet.EMAU(4, 0), ValueError, "EMAU: k must be a positive int"),
    "mmseg bases": (
        lambda: mmseg.EMAModule(4, 3, 0, 0.1),
        ValueError,
        "EMAModule: num_stages must be a positive int",
    ),
    "encoding codes": (lambda: encoding.Encoding(4, 0), ValueError, "codes must be a positive int"),
    "mmcv depthwise norm": (
        lambda: mmcv.DepthwiseSeparableConvModule(4, 4, 3, dw_norm_cfg="BN"),
        TypeError,
        "norm_cfg must be a dict",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
