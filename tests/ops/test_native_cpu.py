"""The native CPU library: what the contract tests cannot see from one process.

The instruction sets of one binary agree, and addresses past 2³¹ elements are right.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkernels import native

SCRIPT = """
import sys, torch
from segkernels import native
assert native.why_not("cpu") is None
torch.manual_seed(0)
ops, results = torch.ops.segkernels, []
cases = [(40, 9, 21, 3, 3, 1, (2, 3)), (5, 7, 40, 5, 5, 2, (1, 1)), (64, 12, 12, 3, 5, 1, (20, 4))]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        for C, H, W, kh, kw, s, (rh, rw) in cases:
            x = torch.randn(2, C, H, W, dtype=torch.float64).to(dtype)
            x = x.contiguous(memory_format=layout)
            w = torch.randn(1, C, kh, kw, dtype=torch.float64).to(dtype)
            b = torch.randn(1, C, dtype=torch.float64).to(dtype)
            where = [s, s], [rh * (kh // 2), rw * (kw // 2)], [rh, rw]
            y = ops.depthwise_conv2d(x, w, b, *where)
            dy = torch.randn(y.shape, dtype=torch.float64).to(dtype)
            results += [y, *ops.depthwise_conv2d_backward(dy, x, w, *where, [1, 1, 1])]
torch.save(results, sys.argv[1])
"""


def _run(isa: str, path: Path) -> list[torch.Tensor]:
    environment = dict(os.environ, SEGKERNELS_ISA=isa, OMP_NUM_THREADS="2")
    subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True, env=environment)
    return torch.load(path)


WHY_NOT = native.why_not("cpu")
needs_native = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@needs_native
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_instruction_sets_agree(isa: str, tmp_path: Path) -> None:
    """One binary, three instruction sets: they differ in the order of sums and in rounding only."""
    baseline = _run("baseline", tmp_path / "baseline.pt")
    for expected, got in zip(baseline, _run(isa, tmp_path / f"{isa}.pt"), strict=True):
        eps = torch.finfo(got.dtype).eps
        accumulation = torch.finfo(
            torch.float64 if got.dtype == torch.float64 else torch.float32
        ).eps
        # The result's rounding, and that of sums of at most 2·12·12 products, each below 16.
        bound = eps * expected.double().abs() + 288 * 16 * accumulation
        assert ((expected.double() - got.double()).abs() <= bound).all()


@needs_native
def test_addresses_past_two_to_the_31() -> None:
    """Two images that lie more than 2³¹ elements apart."""
    H, W, C, far = 3, 4, 32, 2**31 + 64
    storage = torch.empty(far + H * W * C, dtype=torch.float16)  # mostly never touched
    x = storage.as_strided((2, C, H, W), (far, 1, W * C, C))
    small = torch.randn(2, C, H, W).half().contiguous(memory_format=torch.channels_last)
    x.copy_(small)
    w = torch.randn(1, C, 3, 3).half()
    where = [1, 1], [1, 1], [1, 1]
    ops = torch.ops.segkernels
    y = ops.depthwise_conv2d(small, w, None, *where)
    assert torch.equal(ops.depthwise_conv2d(x, w, None, *where), y)
    dy = torch.randn(2, C, H, W).half().contiguous(memory_format=torch.channels_last)
    near = ops.depthwise_conv2d_backward(dy, small, w, *where, [1, 1, 0])
    apart = ops.depthwise_conv2d_backward(dy, x, w, *where, [1, 1, 0])
    for got, expected in zip(apart, near, strict=True):
        assert torch.equal(got, expected)
