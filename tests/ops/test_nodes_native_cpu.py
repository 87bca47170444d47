"""What the contract cannot see of the CPU kernels over pixels and nodes: every instruction set that
one library holds."""

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

OPERATORS = ("soft_assign", "encode", "reproject")


@pytest.mark.skipif(native.why_not("cpu") is not None, reason="no native library")
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


if __name__ == "__main__":
    torch.set_num_threads(2)
    (op,) = sys.argv[1:]
    layouts = contract.LAYOUTS.values()
    for case, dtype, layout in product(contract.cases(op), contract.DTYPES, layouts):
        inputs = case.inputs(dtype, layout)
        contract.check(op, case, inputs, "native", contract.cotangents_like(op, inputs))
