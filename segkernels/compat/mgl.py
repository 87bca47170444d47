"""fanyang587/MGL, model.basicnet: ``GraphNet``, ``GraphConvNet``, ``CascadeGCNet``.

Beside the paper (and :class:`segkernels.nn.GCU`), as published: nodes of one image are divided by
the length of them all, K^½, after each has unit length; they are returned as [B, C, K] by reading
the memory of [B, K, C], which is not a transpose; the adjacency goes through a softmax.

Source: Li and Gupta, "Beyond Grids", NeurIPS 2018; Zhai et al., "Mutual Graph Learning for
Camouflaged Object Detection", CVPR 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.ops.soft_assign import soft_assign


class GraphNet(nn.Module):
    """Projection: x [B, C, H, W] to nodes [B, C, K] and assignment [B, K, H·W].

    Keys: ``anchor``, ``sigma`` (before its sigmoid), each [node_num, dim].
    """

    backend: str | None

    def __init__(
        self,
        node_num: int,
        dim: int,
        normalize_input: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.node_num, self.dim, self.normalize_input = node_num, dim, normalize_input
        self.anchor = nn.Parameter(torch.rand(node_num, dim))
        self.sigma = nn.Parameter(torch.rand(node_num, dim))
        self.backend = backend

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalize_input:
            x = F.normalize(x, dim=1)
        nodes, assignment = soft_assign(x, self.anchor, self.sigma.sigmoid(), backend=self.backend)
        batch, number, channels = nodes.shape
        nodes = F.normalize(nodes.flatten(1), dim=1).view(batch, channels, number)
        return nodes, assignment.flatten(2).to(nodes.dtype)

    def extra_repr(self) -> str:
        return f"{self.node_num}, {self.dim}, {self.normalize_input}, backend={self.backend!r}"


class GraphConvNet(nn.Module):
    """x [B, in_features, K] and adj [B, K, K] to [B, out_features, K]. Keys: ``weight``, ``bias``.

    The bias, [1, 1, out_features], is added along the nodes, of which there must be as many.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        bound = 1 / math.sqrt(out_features)
        self.weight = nn.Parameter(torch.empty(in_features, out_features).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(1, 1, out_features).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        nodes = adj.softmax(2) @ (x.mT @ self.weight)  # [B, K, out_features]
        return nodes.mT if self.bias is None else nodes.mT + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class CascadeGCNet(nn.Module):
    """``loop`` graph convolutions, each over its own input's adjacency, and a ReLU: [B, C, K] to
    [B, C, K].

    ``gcn1``, ``gcn2``, ``gcn3`` are there whether or not they are used.
    """

    def __init__(self, dim: int, loop: int) -> None:
        super().__init__()
        if loop not in (1, 2, 3):
            raise ValueError(f"mgl.CascadeGCNet: loop is 1, 2 or 3\n  loop: {loop!r}")
        self.loop = loop
        self.gcn1, self.gcn2, self.gcn3 = (GraphConvNet(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for convolve in (self.gcn1, self.gcn2, self.gcn3)[: self.loop]:
            x = convolve(x, x.mT @ x)
        return x.relu()

    def extra_repr(self) -> str:
        return f"loop={self.loop}"
