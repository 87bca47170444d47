"""Layers: one a file."""

from segkernels.nn.aspp import ASPP as ASPP
from segkernels.nn.deeplabv3plus_head import DeepLabV3PlusHead as DeepLabV3PlusHead
from segkernels.nn.depthwise_conv2d import DepthwiseConv2d as DepthwiseConv2d
from segkernels.nn.emau import EMAU as EMAU
from segkernels.nn.enc_module import EncModule as EncModule
from segkernels.nn.enc_module import semantic_encoding_loss as semantic_encoding_loss
from segkernels.nn.encoding import Encoding as Encoding
from segkernels.nn.fcn_head import FCNHead as FCNHead
from segkernels.nn.gcu import GCU as GCU
from segkernels.nn.graph_convolution import GraphConvolution as GraphConvolution
from segkernels.nn.graph_projection import GraphProjection as GraphProjection
from segkernels.nn.graph_reprojection import GraphReprojection as GraphReprojection
from segkernels.nn.separable_conv2d import SeparableConv2d as SeparableConv2d
