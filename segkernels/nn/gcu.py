"""Graph convolutional units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from segkernels.fused import UnsupportedInputError
from segkernels.nn.arguments import Activation, check_positive, several
from segkernels.nn.graph_convolution import GraphConvolution
from segkernels.nn.graph_projection import GraphProjection
from segkernels.nn.graph_reprojection import GraphReprojection
from segkernels.nn.separable_conv2d import Norm

Merge = Literal["concatenate", "add"]


class GraphUnit(nn.Module):
    """The nodes of one graph over a map, convolved, and the assignment of the pixels to them.

    Arguments, and children ``project``, ``convolve``: as of :class:`GCU`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        nodes: int,
        *,
        norm: Norm,
        activation: Activation,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.project = GraphProjection(in_channels, nodes, backend=backend)
        self.convolve = GraphConvolution(
            in_channels, out_channels, norm=norm, activation=activation
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        nodes, assignment = self.project(x)
        return self.convolve(nodes), assignment  # [B, K, D], [B, K, H, W]


class GCU(nn.Module):
    """Several graphs over a map, side by side: projection of the pixels to nodes, convolution over
    the nodes, re-projection, merged with the map.

    in_channels, out_channels: C, D (of every graph). nodes: number of nodes of each graph, such as
    (2, 4, 8, 32). merge: "concatenate", as the paper: [x, x̃₁, x̃₂, …], or "add": x + Σ_v x̃_v, where
    D must be C and one re-projection serves all graphs. norm, activation: of the convolution over
    nodes (see :class:`GraphConvolution`). backend: "native", "triton", "reference" or None.

    Input [B, C, H, W], output [B, C + D·len(nodes), H, W], or [B, C, H, W] for "add"; the attribute
    ``out_channels`` says how many. Children: ``units`` (``project``, ``convolve``), ``reproject``.
    Give it features to begin from: :meth:`init_from`.

    Source: Li and Gupta, "Beyond Grids: Learning Graph Representations for Visual Recognition",
    NeurIPS 2018.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        nodes: Sequence[int] = (2, 4, 8, 32),
        *,
        merge: Merge = "concatenate",
        norm: Norm = None,
        activation: Activation = "relu",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        numbers = several("GCU", nodes=nodes)
        check_positive("GCU", graphs=len(numbers))
        check_positive("GCU", **{f"nodes[{i}]": number for i, number in enumerate(numbers)})
        if merge not in ("concatenate", "add"):
            raise UnsupportedInputError(
                f"GCU: merge must be 'concatenate' or 'add'\n  merge: {merge!r}"
            )
        if merge == "add" and out_channels != in_channels:
            raise UnsupportedInputError(
                "GCU: to be added, the graphs must have the channels of the map"
                f"\n  in_channels: {in_channels}\n  out_channels: {out_channels}"
            )
        self.merge = merge
        self.backend = backend
        self.units = nn.ModuleList(
            GraphUnit(
                in_channels,
                out_channels,
                number,
                norm=norm,
                activation=activation,
                backend=backend,
            )
            for number in numbers
        )
        self.reproject = GraphReprojection(backend=backend)
        added = merge == "add"
        self.out_channels = in_channels + (0 if added else out_channels * len(numbers))

    def forward(self, x: Tensor) -> Tensor:
        graphs = [unit(x) for unit in self.units]
        if self.merge == "add":  # one graph of all nodes: Σ_v Σ_k q_vik z_vk
            nodes, assignments = (torch.cat(parts, 1) for parts in zip(*graphs, strict=True))
            return self.reproject(nodes, assignments, x)
        return torch.cat([x, *(self.reproject(*graph) for graph in graphs)], 1)

    def init_from(self, features: Tensor, *, seed: int = 0) -> None:
        """Anchors and scales of every graph from the clusters of the features' pixels; see
        :meth:`GraphProjection.init_from`.
        """
        for unit in self.units:
            assert isinstance(unit, GraphUnit)
            unit.project.init_from(features, seed=seed)

    def extra_repr(self) -> str:
        return f"merge={self.merge!r}, backend={self.backend!r}"
