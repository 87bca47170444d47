"""What the contract cannot see of the CPU kernels: every instruction set that one library holds,
and maps that are cut into several tiles of pixels and chunks of channels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkernels import native
from segkernels.ops.separable_conv2d.cases import Case
from tests import contract

OP = "separable_conv2d"
CUT = [
    Case("several chunks, ragged tiles", (2, 273, 9, 33), 35, rates=((2, 3),)),
    Case("rates and moments", (2, 20, 13, 30), 7, rates=((1, 1), (6, 2)), eps=(1e-3, 1e-3)),
    Case("rows longer than a tile", (1, 5, 4, 301), 3, stride=(1, 2), eps=(1e-3, None)),
    Case("many outputs", (1, 9, 6, 25), 260, activation=("relu6", None), eps=(None, 1e-3)),
]


@pytest.mark.skipif(native.why_not("cpu") is not None, reason="no native library")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", None])
def test_every_instruction_set(isa: str | None) -> None:
    """The law of tolerance holds on each; without a wish (None) on the best that there is."""
    environment = {k: v for k, v in os.environ.items() if k != "SEGKERNELS_ISA"}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[2],
        env=environment | ({"SEGKERNELS_ISA": isa} if isa else {}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def check(case: Case, dtype: torch.dtype, layout: torch.memory_format) -> None:
    inputs = case.inputs(dtype, layout, "cpu", kinks=dtype.itemsize > 2)
    dy = contract.cotangents_like(OP, inputs)
    truth = contract.with_gradients(OP, contract.widened(inputs), "reference", dy)
    yardstick = contract.with_gradients(OP, inputs, "reference", dy)
    got = contract.with_gradients(OP, inputs, "native", dy)
    contract.assert_lawful(got, yardstick, truth, case, dtype)


if __name__ == "__main__":
    torch.set_num_threads(2)
    for case in (*CUT, *contract.cases(OP)):
        for dtype in contract.DTYPES:
            for layout in contract.LAYOUTS.values():
                check(case, dtype, layout)
