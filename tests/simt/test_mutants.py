"""Deliberate bugs in copies of the real kernels and of their launch code: the executor, or the
contract on it, catches each and says where.

A bug is a line of MUTANTS: an operator, a file of csrc, what stands there once and what stands
there instead, the build that catches it and what that one says. To compile in seconds the copies
know bfloat16 alone, which takes every path that a kernel has for types.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests import test_contract
from tests.simt import executor
from tests.views import VIEWS

DTYPE = torch.bfloat16
DEPTHWISE, SEPARABLE, EM = "depthwise_conv2d", "separable_conv2d", "em_attention"
OTHER_TYPES = re.compile(r" *case ScalarType::(?:Double|Float|Half):\n *return f\(.*\);\n")

PROCESSES = multiprocessing.get_context("forkserver")  # each has PyTorch imported already
PROCESSES.set_forkserver_preload([__name__])

pytestmark = executor.needs_executor


class Mutant(NamedTuple):
    op: str
    file: str
    old: str
    new: str
    flavour: str
    says: str  # a regular expression


# what the contract says of a wrong result
WRONG = r"error \S+ > \S+ allowed"
PLACE = r".*, block \d+, thread \d+: "

MUTANTS = {
    "a store to shared memory left out": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/kernels.cuh",
        "  strand[threadIdx.x] = sum;\n",
        "  if (warp != 1) strand[threadIdx.x] = sum;\n",
        "watch",
        "unwritten: depthwise_conv2d_finish_kernel" + PLACE + "a read of 4 bytes at strand",
    ),
    "a stage read before it is made": Mutant(
        SEPARABLE,
        "separable_conv2d/kernels.cuh",
        "  stage_parameters(stage, 0, inner, rate, 0, shape.inner);\n",
        "",
        "watch",
        "unwritten: separable_conv2d_kernel" + PLACE + "a read of 4 bytes at shared",
    ),
    "a row beyond the border": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/kernels.cuh",
        "if (row < 0 || row >= k.rows) continue;",
        "if (row < 0 || row > k.rows) continue;",
        "watch",
        "out of bounds: depthwise_conv2d_gather_kernel" + PLACE + "a read of .*last element",
    ),
    "a column beyond the border": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/kernels.cuh",
        "column + f * apart < k.columns;",
        "column + f * apart <= k.columns;",
        "watch",
        "out of bounds: depthwise_conv2d_walk_kernel" + PLACE + "a read of .*last element",
    ),
    "a channel beyond the last": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/kernels.cuh",
        "if (at.c >= k.channels || pixel >= int64_t(k.rows) * k.columns) return;",
        "if (pixel >= int64_t(k.rows) * k.columns) return;",
        "watch",
        "out of bounds: depthwise_conv2d_gather_dx_kernel" + PLACE,
    ),
    "too little shared memory for sums": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/cuda.cu",
        "column_sums(tiling, (K * K + 1) * V, sizeof(A))",
        "column_sums(tiling, K * K * V, sizeof(A))",
        "watch",
        "out of bounds: depthwise_conv2d_walk_backward_kernel" + PLACE + "a write of .* at shared",
    ),
    "too little shared memory for a stage": Mutant(
        SEPARABLE,
        "separable_conv2d/cuda.cu",
        "Stage::THREADS, Stage::bytes(g.kh * g.kw), inner",
        "Stage::THREADS, sizeof(Stage), inner",
        "watch",
        "out of bounds: separable_conv2d_kernel" + PLACE + "a write of .* at shared",
    ),
    "threads return before a barrier": Mutant(
        SEPARABLE,
        "separable_conv2d/affine.cuh",
        "  if (at.c < channels) {\n    const Slope",
        "  if (at.c >= channels) return;\n  {\n    const Slope",
        "plain",
        r"barrier: affine_sums_kernel.*, block \d+: .*have returned.*wait for __shfl_xor_sync",
    ),
    "a barrier in a branch": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/kernels.cuh",
        "  __syncthreads();\n  if (warp != 0 || c >= channels) return;",
        "  if (warp == 0) __syncthreads();\n  if (warp != 0 || c >= channels) return;",
        "plain",
        r"barrier: depthwise_conv2d_finish_kernel.*, block \d+: .*have returned.*wait for __sync",
    ),
    "no barrier between two sums": Mutant(
        DEPTHWISE,
        "common/device.cuh",
        "    write(e / lanes, e % lanes, total);\n  }\n  __syncthreads();\n",
        "    write(e / lanes, e % lanes, total);\n  }\n",
        "watch",
        "race: depthwise_conv2d_gather_dw_kernel" + PLACE + ".*, not ordered after",
    ),
    "no barrier before room is used again": Mutant(
        SEPARABLE,
        "separable_conv2d/kernels.cuh",
        "  __syncthreads();  // the stages make room\n",
        "",
        "watch",
        "race: separable_conv2d_kernel" + PLACE + ".*, not ordered after",
    ),
    "a sum of the wrong lanes": Mutant(
        DEPTHWISE,
        "common/device.cuh",
        "__shfl_xor_sync(ALL_LANES, value[n], step)",
        "__shfl_xor_sync(ALL_LANES, value[n], step / 2)",
        "plain",
        WRONG,
    ),
    "a sum in the order of arrival": Mutant(
        SEPARABLE,
        "separable_conv2d/affine.cuh",
        "  strand[threadIdx.x] = sum;\n  __syncthreads();\n"
        "  if (warp != 0 || e >= elements) return;\n"
        "  for (int k = 1; k < warps; ++k) sum += strand[k * WARP + lane];\n",
        "  strand[threadIdx.x] = 0;\n  __syncthreads();\n  atomicAdd(&strand[lane], sum);\n"
        "  __syncthreads();\n  if (warp != 0 || e >= elements) return;\n  sum = strand[lane];\n",
        "plain",
        r"in test_bitwise_reproducible\n(.*\n)*.* with \d threads",
    ),
    "rows and columns of a fragment exchanged": Mutant(
        SEPARABLE,
        "common/product.cuh",
        "PITCH<T> + k + 2 * t + 8 * e)",
        "PITCH<T> + k + 2 * t + 8 * (1 - e))",
        "plain",
        WRONG,
    ),
    "a grid one tile short": Mutant(
        DEPTHWISE,
        "common/cuda.h",
        "int(ceil_div(items, int64_t(BLOCK / t.lanes) * turns))",
        "std::max(1, int(items / (int64_t(BLOCK / t.lanes) * turns)))",
        "plain",
        WRONG,
    ),
    "the strides of another map": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/cuda.cu",
        "mutable_data<T>(y), strides_of(y), k, tiling,\n",
        "mutable_data<T>(y), strides_of(x), k, tiling,\n",
        "watch",
        "out of bounds: depthwise_conv2d_gather_kernel" + PLACE + "a write of",
    ),
    "vectors at any address": Mutant(
        DEPTHWISE,
        "common/cuda.h",
        "reinterpret_cast<uintptr_t>(t->const_data_ptr()) % (width * t->element_size())",
        "false",
        "watch",
        "misaligned: depthwise_conv2d_walk_kernel" + PLACE,
    ),
    "taps in the wrong order": Mutant(
        DEPTHWISE,
        "depthwise_conv2d/kernels.cuh",
        "reversed ? K * K - 1 - e : e",
        "e",
        "plain",
        WRONG,
    ),
    "a stage written while it is read": Mutant(
        EM,
        "em_attention/pass.cuh",
        "    __syncthreads();  // the stage before has been used\n    x.put(from_x, tile.x);\n",
        "    x.put(from_x, tile.x);\n",
        "watch",
        "race: em_attention_iterations_kernel" + PLACE + ".*, not ordered after",
    ),
    "sums added up before all are there": Mutant(
        EM,
        "em_attention/iterations.cuh",
        "      team.barrier();\n      make_bases",
        "      make_bases",
        "watch",
        "(race|unwritten): em_attention_iterations_kernel" + PLACE + "a read of 4 bytes at tensor",
    ),
    "bases read before they are made": Mutant(
        EM,
        "em_attention/iterations.cuh",
        "      team.barrier();\n    }\n",
        "    }\n",
        "watch",
        "race: em_attention_iterations_kernel" + PLACE + ".*, not ordered after",
    ),
    "no temperature in a backward": Mutant(
        EM,
        "em_attention/pass.cuh",
        "[&](A a, int) { return lam * a; }",
        "[&](A a, int) { return a; }",
        "plain",
        WRONG,
    ),
    "a gradient along the bases' length": Mutant(
        EM,
        "em_attention/kernels.cuh",
        "A(dmu[c] / d - share * mu[c])",
        "A(dmu[c] / d)",
        "plain",
        WRONG,
    ),
}


def caught(mutant: Mutant, folder: Path) -> tuple[int, str]:
    """Plant the bug in a copy of csrc, compile the operators that it needs, run their contract:
    the exit status of that and what it said."""
    csrc = folder / "csrc"
    shutil.copytree(executor.CSRC, csrc)
    whole = csrc / "common" / "cuda.h"
    text, others = OTHER_TYPES.subn("", whole.read_text())
    assert others == 3
    whole.write_text(text)
    file = csrc / mutant.file
    text = file.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} has changed: {mutant.old}"
    file.write_text(text.replace(mutant.old, mutant.new))
    needed = {path.parent for path in executor.included([csrc / mutant.op / "cuda.cu"], csrc)}
    for source in csrc.glob("*/cuda.cu"):
        if source.parent not in needed:
            source.unlink()
    library = executor.build(mutant.flavour, csrc)
    process = PROCESSES.Process(target=hold, args=(mutant.op, library, folder / "said"))
    process.start()
    process.join(300)
    process.kill()  # one that hangs
    process.join()
    return int(process.exitcode or 0), (folder / "said").read_text()


def hold(op: str, library: Path, said: Path) -> None:
    """The part of the contract that is about kernels, in bfloat16, in a process of its own."""
    with said.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    executor.replace_native(library)
    torch.set_num_threads(1)
    where = "native", "cpu"
    for layout in test_contract.LAYOUTS:
        for view in VIEWS:
            test_contract.test_strided_inputs(op, "vectors", DTYPE, view, layout, *where)
        for case in test_contract.cases(op):
            test_contract.test_no_worse_than_the_reference(op, case, DTYPE, layout, *where)
            test_contract.test_bitwise_reproducible(op, case, DTYPE, layout, *where)


Runs = dict[str, "Future[tuple[int, str]]"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("mutants")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            name: pool.submit(caught, mutant, folder / str(i))
            for i, (name, mutant) in enumerate(MUTANTS.items())
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", MUTANTS)
def test_is_caught(name: str, runs: Runs) -> None:
    status, said = runs[name].result()
    assert status, "nobody noticed"
    assert re.search(MUTANTS[name].says, said), said
