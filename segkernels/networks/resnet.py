"""ResNet with atrous stages, under torchvision's parameter names.

Source: He et al., "Deep Residual Learning", CVPR 2016 (stride on the 3x3 of a bottleneck, as
torchvision); Chen et al., "Rethinking Atrous Convolution", 2017, section 3.1 (output stride,
multi-grid).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from segkernels.networks.features import Features
from segkernels.nn.arguments import NormClass, check_positive, norm_maker, unit_rates


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, rate: int, norm: NormClass
    ) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, width, stride, rate)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(width, width, 1, rate)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_channels, width, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, rate: int, norm: NormClass
    ) -> None:
        super().__init__()
        channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = _conv3x3(width, width, stride, rate)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


Block = type[BasicBlock] | type[Bottleneck]
RESNETS: dict[str, tuple[Block, tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """[B, in_channels, H, W] to the outputs of ``layer1`` (stride 4) to ``layer4``
    (output_stride).

    name: of RESNETS. output_stride: 8, 16 or 32; past it strides become rates (the first unit of a
    stage keeps the rate of the stage before, as torchvision does, unless there is a multigrid).
    multigrid: the unit rates of layer4's blocks. width: channels of the stem and of layer1 (64 as
    published), doubled by every stage. ``channels``: of the four outputs.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self,
        name: str,
        output_stride: int = 16,
        *,
        in_channels: int = 3,
        multigrid: Sequence[int] | None = None,
        width: int = 64,
        norm: NormClass = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        block, depths = RESNETS[name]
        if multigrid is not None:  # one unit rate for each block
            multigrid = unit_rates(name, depths[3], multigrid)
        check_positive(name, in_channels=in_channels, width=width)
        norm = norm_maker("norm", norm)
        self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels, stride, rate = width, 4, 1
        for i, depth in enumerate(depths, 1):
            grid = multigrid if i == 4 and multigrid is not None else [1] * depth
            step = 1 if i == 1 or stride >= output_stride else 2
            previous, rate = rate, rate if i == 1 else rate * 2 // step
            stride *= step
            blocks: list[nn.Module] = []
            for j, unit in enumerate(grid):
                at = previous if j == 0 and multigrid is None else rate
                blocks.append(block(channels, width << (i - 1), 1 if j else step, at * unit, norm))
                channels = (width << (i - 1)) * block.expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.channels = tuple((width << i) * block.expansion for i in range(4))
        self._initialise()

    def forward(self, x: Tensor) -> Features:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        low_level = self.layer1(x)
        second = self.layer2(low_level)
        third = self.layer3(second)
        return Features(low_level, second, third, self.layer4(third))

    def _initialise(self) -> None:
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


def _conv3x3(in_channels: int, out_channels: int, stride: int, rate: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, rate, rate, bias=False)


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm: NormClass
) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(conv, norm(out_channels))
