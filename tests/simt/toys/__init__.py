"""Small kernels for the tests of the executor itself, launched by name."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.simt import executor


@cache
def _operators() -> torch._ops._OpNamespace:
    torch.ops.load_library(str(executor.build("watch", executor.HERE / "toys")))
    return torch.ops.segkernels_toys


def run(
    table: str,
    kernel: str,
    x: Tensor,
    n: int,
    *,
    blocks: int = 1,
    threads: int = 32,
    shared: int = 0,
    cluster: int = 1,
    cooperative: bool = False,
    zero: bool = False,
) -> Tensor:
    """y [n] of one launch of a kernel of toys/<table>/cuda.cu on x."""
    operator = getattr(_operators(), table)
    y: Tensor = operator(kernel, x, n, blocks, threads, shared, cluster, cooperative, zero)
    return y
