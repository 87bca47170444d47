"""What the contract cannot see of the CPU kernels over pixels and nodes: every instruction set that
one library holds, and the raw operators."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from segkernels import native
from tests import contract

OPERATORS = ("soft_assign", "encode", "reproject", "em_attention")


needs_native = pytest.mark.skipif(native.why_not("cpu") is not None, reason="no native library")


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
@pytest.mark.parametrize("op", OPERATORS)
def test_every_instruction_set(op: str, isa: str) -> None:
    """The law of tolerance holds on those that are not this machine's best as well."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, op],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"SEGKERNELS_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@needs_native
def test_no_nodes_are_refused() -> None:
    """By the raw operator too, which would divide by their number."""
    dy, z, q = torch.ones(1, 4, 2, 2), torch.ones(1, 0, 4), torch.ones(1, 0, 2, 2)
    with pytest.raises(RuntimeError, match="reproject"):
        torch.ops.segkernels.reproject_backward(dy, z, q, [1, 1])


if __name__ == "__main__":
    torch.set_num_threads(2)
    (op,) = sys.argv[1:]
    layouts = contract.LAYOUTS.values()
    for case, dtype, layout in product(contract.cases(op), contract.DTYPES, layouts):
        inputs = case.inputs(dtype, layout)
        contract.check(op, case, inputs, "native", contract.cotangents_like(op, inputs))
