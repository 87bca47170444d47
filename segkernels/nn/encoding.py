"""Residual encoding of a map by learned codewords."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segkernels.nn.arguments import check_positive
from segkernels.ops.encode import encode


class Encoding(nn.Module):
    """e_k = Σ_i q_ik (x_i - c_k), q_ik = softmax_k(s_k ‖x_i - c_k‖²).

    channels, codes: C, K. backend: "native", "triton", "reference" or None.

    Input [B, C, H, W], output [B, K, C]. Parameters: ``codewords`` c [K, C], uniform within
    ±1/√(K·C) at first, and ``scale`` s [K], uniform in [-1, 0).

    Source: Zhang et al., "Context Encoding for Semantic Segmentation", CVPR 2018, section 2.1.
    """

    def __init__(self, channels: int, codes: int = 32, *, backend: str | None = None) -> None:
        super().__init__()
        check_positive("Encoding", channels=channels, codes=codes)
        bound = 1 / math.sqrt(codes * channels)
        self.codewords = nn.Parameter(torch.empty(codes, channels).uniform_(-bound, bound))
        self.scale = nn.Parameter(torch.empty(codes).uniform_(-1, 0))
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return encode(x, self.codewords, self.scale, backend=self.backend)

    def extra_repr(self) -> str:
        codes, channels = self.codewords.shape
        return f"{channels}, {codes}, backend={self.backend!r}"
