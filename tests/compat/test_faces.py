"""What the published classes do beside their numbers: parts used alone, conversions, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkernels.compat import encoding, torchvision, vainf
from segkernels.compat.deeplab_pytorch import deeplabv3
from segkernels.nn import chain, pair

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


def test_converted_convolutions_keep_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a head that names none."""
    seen: list[str | None] = []
    operator = pair.separable_conv2d

    def noted(*args: Any, backend: str | None, **options: Any) -> Any:
        seen.append(backend)
        return operator(*args, backend=backend, **options)

    monkeypatch.setattr(pair, "separable_conv2d", noted)
    aspp = vainf.convert_to_separable_conv(vainf.ASPP(4, (1, 2, 3)), backend="reference").eval()
    y: Tensor = aspp(torch.randn(1, 4, 9, 7))
    assert y.shape == (1, 256, 9, 7)
    assert set(seen) == {"reference"}
