"""The operators: one line each."""

from segkernels.ops.depthwise_conv2d import depthwise_conv2d as depthwise_conv2d
from segkernels.ops.em_attention import em_attention as em_attention
from segkernels.ops.encode import encode as encode
from segkernels.ops.reproject import reproject as reproject
from segkernels.ops.separable_conv2d import Moments as Moments
from segkernels.ops.separable_conv2d import separable_conv2d as separable_conv2d
from segkernels.ops.soft_assign import soft_assign as soft_assign
