"""Constructor arguments of the published classes that no golden case has: what they compute is
stated in plain torch modules.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segkernels.compat import jfzhang


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
