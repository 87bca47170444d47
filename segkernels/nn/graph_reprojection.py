"""Nodes of a graph back to pixels."""

from __future__ import annotations

from torch import Tensor, nn

from segkernels.ops.reproject import reproject


class GraphReprojection(nn.Module):
    """y_i = Σ_k q_ik z_k, plus a residual: every pixel gets back the nodes it was assigned to.

    backend: "native", "triton", "reference" or None. It has no parameters.

    ``forward(nodes, assignment, residual=None)``: [B, K, D], [B, K, H, W], [B, D, H, W] to
    [B, D, H, W]; see :func:`segkernels.reproject`.

    Source: Li and Gupta, "Beyond Grids", NeurIPS 2018, "graph re-projection".
    """

    def __init__(self, *, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, nodes: Tensor, assignment: Tensor, residual: Tensor | None = None) -> Tensor:
        return reproject(nodes, assignment, residual, backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"
