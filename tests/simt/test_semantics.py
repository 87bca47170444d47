"""The executor does what a device does: one small kernel of toys/semantics a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import machine_code
from segkernels.build_plan import Tree
from tests.simt import executor
from tests.simt.toys import run
from tests.test_codegen import needs_nvcc

pytestmark = executor.needs_executor


def semantics(kernel: str, x: Tensor, n: int, **launch: int) -> Tensor:
    return run("semantics", kernel, x, n, **launch)


def drawn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def test_shuffles() -> None:
    x = torch.arange(64.0)
    xor, up, down, from_lane, halves = semantics("shuffles", x, 5 * 64, threads=64).view(5, 64)
    i = torch.arange(64)
    assert torch.equal(xor, x[i ^ 5])
    assert torch.equal(up, x[torch.where(i % 16 < 3, i, i - 3)])
    assert torch.equal(down, x[torch.where(i % 8 == 0, i + 7, i)])
    assert torch.equal(from_lane, x[i // 4 * 4 + 2])
    assert torch.equal(halves, x[torch.where(i % 32 < 16, i ^ 2, i ^ 1)])


@pytest.mark.parametrize(
    "x", [drawn(96), torch.ones(96), -torch.ones(96)], ids=["some", "all", "none"]
)
def test_votes(x: Tensor) -> None:
    votes = (x > 0).view(3, 32)
    ballot, any_, all_, count, or_, and_ = semantics("votes", x, 6 * 96, threads=96).view(6, 3, 32)
    bits = (votes[:, 8:24].int() << torch.arange(16)).sum(1, keepdim=True)
    assert torch.equal(ballot, bits.expand(3, 32).float())
    assert torch.equal(any_, votes.any(1, keepdim=True).expand(3, 32).float())
    assert torch.equal(all_, votes.all(1, keepdim=True).expand(3, 32).float())
    assert (
        (count == votes.sum()).all() and (or_ == votes.any()).all() and (and_ == votes.all()).all()
    )


def test_static_and_dynamic_shared_memory() -> None:
    x = drawn(3, 64)
    y = semantics("shared_memory", x, 3 * 64, blocks=3, threads=64, shared=256).view(3, 64)
    assert torch.equal(y, x.flip(1) + (x[:, -1:] + 1))


def test_memory_within_a_warp() -> None:
    x = drawn(128)
    assert torch.equal(semantics("warp_memory", x, 128, threads=128), x[torch.arange(128) ^ 1])


def test_atomics() -> None:
    x = torch.randint(-99, 99, (96,), generator=torch.Generator().manual_seed(0)).float()
    expected = torch.stack([x.sum(), x.max(), x.min(), torch.tensor(96.0)])
    assert torch.equal(semantics("atomics", x, 4, threads=96), expected)


def test_the_block_that_comes_last() -> None:
    x = torch.arange(5 * 32.0)
    assert semantics("last_block", x, 7, blocks=5, threads=32, zero=True)[0] == x.sum()


def test_a_cooperative_grid() -> None:
    x = drawn(4, 32)
    y = semantics("grid_barrier", x, 1 + 256, blocks=4, threads=32, cooperative=True, zero=True)
    assert torch.equal(y[129:].view(4, 32), x.roll(-1, 0))


def test_teams_of_blocks_that_count_themselves() -> None:
    x = drawn(4, 32)
    launch = {"blocks": 4, "threads": 32, "cooperative": True, "zero": True}
    y = semantics("counted_barrier", x, 2 + 4 * 128, **launch)[2 + 128 :].view(3, 4, 32)
    other = x[[1, 0, 3, 2]]
    assert torch.equal(y, torch.stack([other, x, other]))


def test_copies_in_flight() -> None:
    x = drawn(5 * 32)
    y = semantics("copies", x, 5 * 32, threads=32, shared=256)
    kept = torch.arange(4) < 2  # the last stage: half of four vectors, nothing of the others
    last = torch.cat([kept.repeat(4), torch.zeros(16, dtype=torch.bool)])
    assert torch.equal(y[:128], x[:128])
    assert torch.equal(y[128:], torch.where(last, x[128:], 0.0))


@pytest.mark.parametrize("size", [2, 4])
def test_clusters(size: int) -> None:
    x = drawn(2, size, 32)
    y = semantics("cluster", x, 2 * size * 32, blocks=2 * size, threads=32, cluster=size)
    assert torch.equal(y.view_as(x), x.roll(-1, 1) + 100.0 * torch.arange(size)[:, None])


def test_named_barriers() -> None:
    x = drawn(2, 1, 32)
    y = semantics("named_barriers", x, 128, threads=96).view(2, 2, 32)
    assert torch.equal(y, x * torch.tensor([1.0, 2.0])[:, None])


@pytest.mark.parametrize(
    ("kernel", "dtype", "k"),
    [
        ("product16_bf16", torch.bfloat16, 16),
        ("product16_half", torch.float16, 16),
        ("product8", None, 8),
    ],
)
def test_products_of_tensor_cores(kernel: str, dtype: torch.dtype | None, k: int) -> None:
    a, b = drawn(16, k), drawn(8, k).T.contiguous()
    y = semantics(kernel, torch.cat([a.flatten(), b.flatten()]), 128, threads=32).view(16, 8)
    short = [rounded_to_tf32(t) if dtype is None else t.to(dtype) for t in (a, b)]
    torch.testing.assert_close(y, (short[0].double() @ short[1].double()).float())


def rounded_to_tf32(x: Tensor) -> Tensor:
    """Ten bits of mantissa, to nearest, ties away from zero; infinities and NaN as they are."""
    bits = x.view(torch.int32)
    rounded = (torch.where(x.isfinite(), bits + 0x1000, bits) & ~0x1FFF).view(torch.float32)
    return torch.where(x.isnan(), x, rounded)


def test_roundings() -> None:
    """Every bfloat16 and what lies half-way beside it; subnormal, infinite, NaN."""
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0x0FFF, 0x3000], dtype=torch.int32)
    x = (high[:, None] + low).flatten().view(torch.float32)
    y = semantics("roundings", x, 3 * len(x), blocks=len(x) // 1024, threads=1024).view(3, -1)
    for got, expected in zip(
        y, (x.bfloat16().float(), x.half().float(), rounded_to_tf32(x)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_the_order_of_threads_changes_from_launch_to_launch() -> None:
    x = torch.arange(64.0)
    runs = {
        tuple(semantics("arrivals", x, 65, threads=64, zero=True)[1:].tolist()) for _ in range(3)
    }
    assert len(runs) == 3


@pytest.mark.build
@needs_nvcc
def test_the_toys_are_cuda(tmp_path: Path) -> None:
    """nvcc takes the same sources, with the hardware's definitions of csrc/common."""
    csrc = tmp_path / "csrc"
    shutil.copytree(executor.CSRC / "common", csrc / "common")
    shutil.copytree(executor.HERE / "toys", csrc, dirs_exist_ok=True)
    for source in csrc.glob("*/cuda.cu"):
        source.with_name("cpu.cpp").touch()  # an operator has both
    tree = Tree(Tree.here().package, csrc)
    kernels = machine_code.cuda_kernels("9.0a", tree)
    products = {name: figures.matrix for name, figures in kernels.items() if "product" in name}
    assert products == {
        "product16_kernel<bf16>": 1,
        "product16_kernel<fp16>": 1,
        "product8_kernel": 1,
    }
    assert {"copies_kernel", "cluster_kernel", "named_barriers_kernel", "no_fence_kernel"} <= set(
        kernels
    )
