"""vidit98/graphconv, graphLayer: ``GCU``, its exact projection alone.

Beside the paper (and :class:`segkernels.nn.GCU`), as published: features come channels last; the
scales have no sigmoid; a node is divided by the square of its length. The published ``forward``
reads memory that nothing was written to, so there is nothing to reproduce: there is none here.

Source: Li and Gupta, "Beyond Grids", NeurIPS 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segkernels.ops.soft_assign import soft_assign


class GCU(nn.Module):
    """Keys: ``W``, ``variance`` [d, V], ``weight`` [d, outfeatures]."""

    def __init__(
        self,
        batch: int = 16,
        h: int = 64,
        w: int = 64,
        d: int = 2048,
        V: int = 32,
        outfeatures: int = 256,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.batch, self.h, self.w, self.d, self.V = batch, h, w, d, V
        self.outfeatures = outfeatures
        self.W = nn.Parameter(nn.init.xavier_normal_(torch.empty(d, V)))
        self.variance = nn.Parameter(nn.init.xavier_normal_(torch.empty(d, V)))
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(d, outfeatures)))
        self.backend = backend

    def GraphProject(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X [B, h, w, d] to assignment [B, h·w, V], nodes [B, d, V] and adjacency [B, V, V]."""
        nodes, assignment = soft_assign(
            X.movedim(3, 1),
            self.W.mT,
            self.variance.mT,
            normalise=False,
            eps=0.0,
            backend=self.backend,
        )
        z = (nodes / nodes.square().sum(2, keepdim=True)).mT  # [B, d, V]
        return assignment.flatten(2).mT.to(z.dtype), z, z.mT @ z

    def extra_repr(self) -> str:
        return f"d={self.d}, V={self.V}, backend={self.backend!r}"
