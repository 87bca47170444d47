"""Pixels to the nodes of a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segkernels.nn.arguments import check_positive
from segkernels.nn.kmeans import kmeans
from segkernels.ops.nodes import check_nodes
from segkernels.ops.soft_assign import soft_assign

SMALLEST_SCALE = (
    0.01  # of init_from, and one minus the largest: the sigmoid still has a slope there
)


class GraphProjection(nn.Module):
    """q_ik = softmax_k(-½‖(x_i - w_k) / σ_k‖²), z_k = the direction of Σ_i q_ik (x_i - w_k) / σ_k.

    channels, nodes: C, K. backend: "native", "triton", "reference" or None.

    Input [B, C, H, W]; returns the nodes z [B, K, C], of unit length, and the assignment q
    [B, K, H, W], which sums to one over K (see :func:`segkernels.soft_assign`). Parameters:
    ``anchor`` w [K, C] and ``sigma`` [K, C]; the scales σ are its sigmoid, and so lie in (0, 1).
    Both begin uniform in [0, 1); the paper's beginning is :meth:`init_from`.

    Source: Li and Gupta, "Beyond Grids: Learning Graph Representations for Visual Recognition",
    NeurIPS 2018, "graph projection".
    """

    def __init__(self, channels: int, nodes: int, *, backend: str | None = None) -> None:
        super().__init__()
        check_positive("GraphProjection", channels=channels, nodes=nodes)
        self.anchor = nn.Parameter(torch.rand(nodes, channels))
        self.sigma = nn.Parameter(torch.rand(nodes, channels))
        self.backend = backend

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return soft_assign(x, self.anchor, self.sigma.sigmoid(), backend=self.backend)

    @torch.no_grad()
    def init_from(self, features: Tensor, *, seed: int = 0) -> None:
        """Anchors and scales from the clusters of the features' pixels: centres and standard
        deviations (kept between 0.01 and 0.99), by k-means from ``seed``.

        features: [B, C, H, W], of several images. Raises UnsupportedInputError unless as many
        pixels are distinct as there are nodes.
        """
        check_nodes("GraphProjection", features, anchor=self.anchor)
        found = kmeans("GraphProjection", features, len(self.anchor), seed=seed)
        self.anchor.copy_(found.centres)
        self.sigma.copy_(found.deviations.logit(SMALLEST_SCALE))

    def extra_repr(self) -> str:
        nodes, channels = self.anchor.shape
        return f"{channels}, {nodes}, backend={self.backend!r}"
