"""Convolution over the graph of an image's nodes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segkernels.nn.arguments import Activation, check_positive, make_activation, make_norm
from segkernels.nn.separable_conv2d import Norm


class GraphConvolution(nn.Module):
    """Z̃ = f(A Z W), A = Z Zᵀ: nodes that are alike exchange what they know.

    in_channels, out_channels: C, D. norm: called with D, sees the nodes as a map [B, D, K, 1], or
    None; activation: "relu", "relu6", a callable that makes a module, or None: together f.

    Input [B, K, C] (Z, a node a row), output [B, K, D]. Parameter ``weight`` [C, D] (W); children
    ``norm``, ``activation``.

    Source: Li and Gupta, "Beyond Grids", NeurIPS 2018, "graph convolution".
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm = None,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        check_positive("GraphConvolution", in_channels=in_channels, out_channels=out_channels)
        self.weight = nn.Parameter(torch.empty(in_channels, out_channels))
        self.norm = make_norm("norm", norm, out_channels)
        self.activation = make_activation("activation", activation)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, nodes: Tensor) -> Tensor:
        adjacency = nodes @ nodes.mT  # [B, K, K]
        y = adjacency @ (nodes @ self.weight)  # [B, K, D]
        if self.norm is not None:
            y = self.norm(y.mT[..., None])[..., 0].mT
        return y if self.activation is None else self.activation(y)

    def extra_repr(self) -> str:
        in_channels, out_channels = self.weight.shape
        return f"{in_channels}, {out_channels}"
