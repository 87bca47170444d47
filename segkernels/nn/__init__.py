"""Layers: one a file."""

from segkernels.nn.aspp import ASPP as ASPP
from segkernels.nn.deeplabv3plus_head import DeepLabV3PlusHead as DeepLabV3PlusHead
from segkernels.nn.depthwise_conv2d import DepthwiseConv2d as DepthwiseConv2d
from segkernels.nn.separable_conv2d import SeparableConv2d as SeparableConv2d
