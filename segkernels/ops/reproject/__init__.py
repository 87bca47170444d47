r"""Nodes back to pixels: the re-projection of a graph convolutional unit.

.. math::
    y_i = r_i + \sum_k q_{ik} \, z_k

    dz_k = \sum_i q_{ik} \, dy_i \qquad dq_{ik} = \langle z_k, dy_i \rangle \qquad dr_i = dy_i

One pass writes y; one pass over dy makes dz and dq.

========  =====================  ===========================================================
symbol    argument               shape
========  =====================  ===========================================================
z         ``nodes``              [B, K, D]
q         ``assignment``         [B, K, H, W], pixels i
r         ``residual``           [B, D, H, W]
y         result                 [B, D, H, W]
========  =====================  ===========================================================

Source: Li and Gupta, "Beyond Grids: Learning Graph Representations for Visual Recognition", NeurIPS
2018, equation 4.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from segkernels import fused
from segkernels.fused import UnsupportedInputError
from segkernels.ops.arguments import check_tensors
from segkernels.ops.nodes import too_many_nodes
from segkernels.overrides import overridable

__all__ = ["reproject"]


@overridable
def reproject(
    nodes: Tensor,
    assignment: Tensor,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Give every pixel the mixture of nodes that it is assigned to, plus a residual.

    nodes: [B, K, D]. assignment: [B, K, H, W], any strides and floating type. residual: [B, D, H,
    W] in the type of the nodes. backend: "native", "triton", "reference" or None (automatic).

    Returns [B, D, H, W] in the type of the nodes and the memory format of the residual, or, where
    there is none, of the assignment. Raises UnsupportedInputError for arguments that do not fit and
    BackendUnavailableError when the backend asked for cannot run.
    """
    op = "reproject"
    residuals = {} if residual is None else {"residual": residual}
    check_tensors(op, {"assignment": assignment}, nodes=nodes, **residuals)
    if nodes.dim() != 3 or assignment.dim() != 4 or nodes.shape[:2] != assignment.shape[:2]:
        _refuse("nodes must be [B, K, D] and assignment [B, K, H, W]", nodes, assignment, residual)
    if 0 in nodes.shape[1:]:
        _refuse("no nodes, or nodes without channels", nodes, assignment, residual)
    expected = (nodes.shape[0], nodes.shape[2], *assignment.shape[2:])
    if residual is not None and residual.shape != expected:
        _refuse(f"residual must be {list(expected)}", nodes, assignment, residual)
    y: Tensor = _OPERATOR(nodes, assignment, residual, backend=backend)
    return y


def _refuse(why: str, nodes: Tensor, assignment: Tensor, residual: Tensor | None) -> NoReturn:
    given = {"nodes": nodes, "assignment": assignment, "residual": residual}
    listing = "".join(f"\n  {n}: {list(t.shape)}" for n, t in given.items() if t is not None)
    raise UnsupportedInputError(f"reproject: {why}{listing}")


def _shapes(z: Tensor, q: Tensor, r: Tensor | None) -> Tensor:
    y = z.new_empty(z.shape[0], z.shape[2], *q.shape[2:])
    return torch.empty_like(y, memory_format=fused.memory_format(q if r is None else r))


_OPERATOR = fused.declare(
    __name__,
    forward="(Tensor z, Tensor q, Tensor? r) -> Tensor y",
    backward="(Tensor dy, Tensor z, Tensor q, int[] need) -> (Tensor dz, Tensor dq)",
    shapes=_shapes,
    wide=("q",),
    added=("r",),
    limits=lambda z: too_many_nodes(z.shape[1]),
)
