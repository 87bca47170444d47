r"""Soft assignment of pixels to graph nodes by Gaussian distance: the projection of a graph
convolutional unit.

.. math::
    q_{ik} = \mathrm{softmax}_k \left( -\tfrac{1}{2} \| (x_i - w_k) / s_k \|^2 \right)
    \qquad m_k = \sum_i q_{ik} \qquad e_k = \sum_i q_{ik} \, (x_i - w_k)

    z'_k = \frac{e_k / s_k}{m_k + \varepsilon} \qquad z_k = z'_k / \|z'_k\|_2

No tensor over pixels, nodes and channels exists, forward or backward. The square is expanded about
the median node w̄, to which nothing in the equations is tied but rounding, and what all nodes share
is left out, since the softmax over nodes does not see it; with x̃ = x - w̄, w̃ = w - w̄:

.. math::
    \log q_{ik} = \langle p_k, \tilde x_i \rangle + \langle r_k, \tilde x_i^2 \rangle + b_k +
    \mathrm{const}_i \qquad
    p = \tilde w / s^2 \quad r = -\tfrac{1}{2} (1/s^2 - \min_k 1/s^2) \quad
    b = -\tfrac{1}{2} \Sigma_c \tilde w^2 / s^2

    e_k = \sum_i q_{ik} \tilde x_i - m_k \tilde w_k

The backward needs q, e and m: with h = de and t = dm - <h, w̃>,

.. math::
    dl_{ik} = q_{ik} (g_{ik} - \textstyle\sum_k q_{ik} g_{ik}) \quad
    g_{ik} = dq_{ik} + \langle h_k, \tilde x_i \rangle + t_k

    d\tilde x_i = \sum_k q_{ik} h_k + dl_{ik} \, (p_k + 2 r_k \tilde x_i) \qquad
    a_n = \sum_i dl_{ik} \, \tilde x_i^n

    dw_k = -m_k h_k + (a_1 - \tilde w a_0) / s^2 \qquad
    ds_k = -\frac{z' \, dz'}{s} + \frac{a_2 - 2 \tilde w a_1 + \tilde w^2 a_0}{s^3}

========  =====================  ===========================================================
symbol    argument               shape
========  =====================  ===========================================================
x         ``features``           [B, C, H, W], pixels i
w         ``anchors``            [K, C], nodes k
s         ``scales``             [K, C]
z         nodes                  [B, K, C]
q         assignment             [B, K, H, W]
e, m      residual sums, masses  [B, K, C], [B, K]
========  =====================  ===========================================================

Source: Li and Gupta, "Beyond Grids: Learning Graph Representations for Visual Recognition", NeurIPS
2018, equations 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from segkernels import fused
from segkernels.fused import UnsupportedInputError
from segkernels.ops.arguments import check_tensors
from segkernels.ops.nodes import check_nodes, too_many_nodes
from segkernels.overrides import overridable

__all__ = ["soft_assign"]


@overridable
def soft_assign(
    features: Tensor,
    anchors: Tensor,
    scales: Tensor,
    *,
    average: bool = True,
    normalise: bool = True,
    eps: float = 1e-9,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Assign every pixel softly to K nodes and average the standardised residuals of each node.

    features: [B, C, H, W], any strides. anchors, scales: [K, C], any floating type; a scale is a
    standard deviation per channel, not zero (a sign turns the nodes, not the assignment). average:
    divide the sum of residuals by the node's mass plus ``eps``. normalise: bring every node to unit
    length (one shorter than 1e-12 is divided by that). backend: "native", "triton", "reference" or
    None (automatic).

    Returns nodes [B, K, C] in the type of the features and the assignment [B, K, H, W] in float32
    (float64 for float64) and the features' memory format; it sums to one over K. Both are
    differentiable. Raises UnsupportedInputError for arguments that describe no assignment and
    BackendUnavailableError when the backend asked for cannot run.
    """
    op = "soft_assign"
    check_tensors(op, {"anchors": anchors, "scales": scales}, features=features)
    check_nodes(op, features, anchors=anchors)
    if scales.shape != anchors.shape:
        raise UnsupportedInputError(
            f"{op}: scales must have the shape of anchors"
            f"\n  anchors: {list(anchors.shape)}\n  scales: {list(scales.shape)}"
        )
    if not (isinstance(eps, int | float) and eps >= 0):
        raise UnsupportedInputError(f"{op}: eps must be a number, 0 or more\n  eps: {eps!r}")
    z, q, _, _ = _OPERATOR(
        features, anchors, scales, bool(average), bool(normalise), float(eps), backend=backend
    )
    return z, q


def _shapes(x: Tensor, w: Tensor, *_: object) -> tuple[Tensor, ...]:
    wide = fused.accumulation_dtype(x.dtype)
    shape = (x.shape[0], *w.shape)
    q = x.new_empty(x.shape[0], w.shape[0], *x.shape[2:], dtype=wide)
    return (
        x.new_empty(shape),
        torch.empty_like(q, memory_format=fused.memory_format(x)),
        x.new_empty(shape, dtype=wide),
        x.new_empty(shape[:2], dtype=wide),
    )


_OPERATOR = fused.declare(
    __name__,
    forward="(Tensor x, Tensor w, Tensor s, bool average, bool normalise, float eps)"
    " -> (Tensor z, Tensor q, Tensor e, Tensor m)",
    backward="(Tensor? dz, Tensor? dq, Tensor x, Tensor w, Tensor s, Tensor q, Tensor e, Tensor m,"
    " bool average, bool normalise, float eps, int[] need) -> (Tensor dx, Tensor dw, Tensor ds)",
    shapes=_shapes,
    wide=("w", "s"),
    limits=lambda w: too_many_nodes(w.shape[0]),
)
