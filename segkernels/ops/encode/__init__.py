r"""Residual encoding of a map by learned codewords: the encoding layer of EncNet.

.. math::
    q_{ik} = \mathrm{softmax}_k \left( s_k \| x_i - c_k \|^2 \right) \qquad
    e_k = \sum_i q_{ik} \, (x_i - c_k)

No tensor over pixels, codewords and channels exists, forward or backward. The square is expanded
about the median codeword c̄, to which nothing in the equations is tied but rounding, and what all
codewords share is left out; with x̃ = x - c̄, c̃ = c - c̄, m_k = Σ_i q_ik:

.. math::
    \log q_{ik} = (s_k - s_0) \| \tilde x_i \|^2 - 2 s_k \langle \tilde c_k, \tilde x_i \rangle +
    s_k \| \tilde c_k \|^2 + \mathrm{const}_i \qquad
    e_k = \sum_i q_{ik} \tilde x_i - m_k \tilde c_k

s_0 is the scale nearest to zero where all have one sign, else zero. The backward needs q and m:

.. math::
    dl_{ik} = q_{ik} (g_{ik} - \textstyle\sum_k q_{ik} g_{ik}) \quad
    g_{ik} = \langle de_k, \tilde x_i - \tilde c_k \rangle \qquad
    a_n = \sum_i dl_{ik} \, \tilde x_i^n \quad a_2 = \sum_i dl_{ik} \, \| \tilde x_i \|^2

    d\tilde x_i = \sum_k q_{ik} \, de_k + 2 \, dl_{ik} \, ((s_k - s_0) \, \tilde x_i - s_k \tilde
    c_k)

    dc_k = -m_k \, de_k - 2 s_k (a_1 - \tilde c_k a_0) \qquad
    ds_k = a_2 - 2 \langle \tilde c_k, a_1 \rangle + \| \tilde c_k \|^2 a_0

========  =====================  ===========================================================
symbol    argument               shape
========  =====================  ===========================================================
x         ``features``           [B, C, H, W], pixels i
c         ``codewords``          [K, C]
s         ``scale``              [K], the sign lives in it (negative: near codewords win)
e         result                 [B, K, C]
q, m      assignment, masses     [B, K, H, W], [B, K]
========  =====================  ===========================================================

Source: Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018, section 2.1; Zhang,
Xue and Dana, "Deep TEN: Texture Encoding Network", CVPR 2017, equations 1 and 2. (The scale carries
its sign, as in the published code.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from segkernels import fused
from segkernels.fused import UnsupportedInputError
from segkernels.ops.arguments import check_tensors
from segkernels.ops.nodes import check_nodes, too_many_nodes
from segkernels.overrides import overridable

__all__ = ["encode"]


@overridable
def encode(
    features: Tensor, codewords: Tensor, scale: Tensor, *, backend: str | None = None
) -> Tensor:
    """Sum the residuals of every pixel to K codewords, weighted by soft assignment.

    features: [B, C, H, W], any strides. codewords: [K, C]; scale: [K]; any floating type. backend:
    "native", "triton", "reference" or None (automatic).

    Returns [B, K, C] in the type of the features. Raises UnsupportedInputError for arguments that
    describe no encoding and BackendUnavailableError when the backend asked for cannot run.
    """
    check_tensors("encode", {"codewords": codewords, "scale": scale}, features=features)
    check_nodes("encode", features, codewords=codewords)
    if scale.shape != codewords.shape[:1]:
        raise UnsupportedInputError(
            "encode: scale must have one value a codeword"
            f"\n  scale: {list(scale.shape)}\n  codewords: {list(codewords.shape)}"
        )
    e: Tensor = _OPERATOR(features, codewords, scale, backend=backend)[0]
    return e


def _shapes(x: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    wide = fused.accumulation_dtype(x.dtype)
    q = x.new_empty(x.shape[0], c.shape[0], *x.shape[2:], dtype=wide)
    return (
        x.new_empty(x.shape[0], *c.shape),
        torch.empty_like(q, memory_format=fused.memory_format(x)),
        x.new_empty(x.shape[0], c.shape[0], dtype=wide),
    )


_OPERATOR = fused.declare(
    __name__,
    forward="(Tensor x, Tensor c, Tensor s) -> (Tensor e, Tensor q, Tensor m)",
    backward="(Tensor de, Tensor x, Tensor c, Tensor s, Tensor q, Tensor m, int[] need)"
    " -> (Tensor dx, Tensor dc, Tensor ds)",
    shapes=_shapes,
    wide=("c", "s"),
    limits=lambda c: too_many_nodes(c.shape[0]),
)
