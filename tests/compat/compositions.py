"""Golden cases of several published classes in a chain: the same chain of our classes."""

from __future__ import annotations

from torch import Tensor, nn

import segkernels
from segkernels.compat.mgl import CascadeGCNet, GraphNet
from segkernels.compat.mmcv import ConvModule


class MutualNetBranch(nn.Module):
    """MGL's graph convolutional unit: projection, graph convolutions, re-projection, 1x1
    convolution, residual.
    """

    def __init__(self, node_num: int, dim: int, loop: int, backend: str | None = None) -> None:
        super().__init__()
        self.proj0 = GraphNet(node_num, dim, backend=backend)
        self.gcn = CascadeGCNet(dim, loop)
        self.conv0 = nn.Sequential(ConvModule(dim, dim, 1, norm_cfg={"type": "BN"}))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        nodes, assignment = self.proj0(x)  # [B, C, K], [B, K, N]
        assignment = assignment.unflatten(2, x.shape[2:])
        y = segkernels.reproject(self.gcn(nodes).mT, assignment, backend=self.backend)
        return x + self.conv0(y)


COMPOSITIONS = {"model.basicnet.{GraphNet,CascadeGCNet,BasicConv2d}": MutualNetBranch}
