"""Each deliberate fault of toys/faults is reported with its kind, kernel, block and thread."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.simt import executor
from tests.simt.toys import run

pytestmark = executor.needs_executor

THREAD = r"block \d+, thread \d+: "
ELEMENT = r"a (read|write) of 4 bytes at "
# kernel, how it is launched, the report's kind and its end
FAULTS = [
    ("unwritten_shared", {}, "unwritten", THREAD + r"a read of 4 bytes at values\+0xa0"),
    ("unwritten_global", {}, "unwritten", THREAD + r"a read of 4 bytes at tensor\+0x"),
    (
        "beyond_tensor",
        {},
        "out of bounds",
        "block 0, thread 63: .*, 0 bytes after a tensor's last element",
    ),
    (
        "before_tensor",
        {},
        "out of bounds",
        "block 0, thread 0: .*, 4 bytes before a tensor's first",
    ),
    (
        "beyond_dynamic",
        {"shared": 256},
        "out of bounds",
        r"block 0, thread 63: .*shared\+0x100 of 256 bytes",
    ),
    ("beyond_static", {}, "out of bounds", "block 0, thread 63: .*in none of"),
    ("index", {"threads": 32}, "out of bounds", THREAD + "an index outside its array"),
    ("overflow", {}, "undefined", THREAD + r"an overflow of \*"),
    ("input_written", {}, "read only", THREAD + r"a write of 4 bytes at tensor\+0x"),
    ("misaligned", {"threads": 31}, "misaligned", THREAD + "an access through a pointer"),
    (
        "early_return",
        {},
        "barrier",
        "block 0: .*48-63 have returned; .*0-47 wait for __syncthreads",
    ),
    ("divergent_barrier", {}, "barrier", "block 0: .*32-63 have returned; .*0-31 wait for __sync"),
    ("absent_lane", {}, "barrier", "block 0: threads 7, 39 have returned; .* wait for __shfl_xor"),
    ("short_warp", {"threads": 16}, "barrier", THREAD + "__shfl_xor_sync asks for lane"),
    ("atomics_of_blocks", {"blocks": 2, "zero": True}, "race", THREAD + "a .*of block"),
    ("foreign_mask", {}, "barrier", THREAD + "its lane is not in the mask"),
    (
        "different_exchanges",
        {},
        "barrier",
        THREAD + "its lane is at __.*, others of the mask are at",
    ),
    ("too_few_for_a_named_barrier", {}, "barrier", "block 0: .*0-63 wait for a named barrier"),
    ("endless", {}, "barrier", THREAD + "spins on an atomic that nobody changes"),
    (
        "race_shared",
        {},
        "race",
        THREAD + ELEMENT + r"values\+0x.*, not ordered after a .* by thread",
    ),
    ("race_in_warp", {}, "race|unwritten", THREAD + r"a read of 4 bytes at values\+0x"),
    ("race_of_blocks", {"blocks": 2}, "race", THREAD + r"a write .*by thread \d+ of block \d"),
    ("race_of_reader", {"blocks": 2}, "race|unwritten", THREAD + ELEMENT + r"tensor\+0x"),
    ("race_with_atomic", {}, "race", THREAD + ".*count.*, not ordered after"),
    ("no_fence", {"blocks": 4, "threads": 1, "zero": True}, "race", THREAD + "a read .*of block"),
    (
        "counted_without_fence",
        {"blocks": 2, "threads": 1, "zero": True, "cooperative": True},
        "race",
        "block 1, thread 0: a read .*of block 0",
    ),
    ("copy_not_waited_for", {}, "unwritten", THREAD + r"a read of 4 bytes at values\+0x"),
    ("copy_without_barrier", {}, "race|unwritten", THREAD + ELEMENT + r"values\+0x"),
    (
        "ended_block",
        {"blocks": 2, "cluster": 2},
        "out of bounds",
        "block 0, .*that block has ended",
    ),
    ("race_in_cluster", {"blocks": 2, "cluster": 2}, "race|unwritten", r".*mine\+0x.* of block"),
]


@pytest.mark.parametrize(("kernel", "launch", "kind", "words"), FAULTS, ids=[f[0] for f in FAULTS])
def test_a_fault_is_reported(kernel: str, launch: dict[str, int], kind: str, words: str) -> None:
    x = torch.arange(64.0)
    with pytest.raises(RuntimeError, match=rf"simt: ({kind}): {kernel}_kernel, {words}"):
        run("faults", kernel, x, 128, **{"threads": 64, **launch})


@pytest.mark.parametrize(
    "launch",
    [
        {"threads": 1025},
        {"shared": 48 * 1024 + 1},
        {"blocks": 3, "cluster": 2},
        {"blocks": 0},
        {"blocks": 2 * 132 + 1, "threads": 1024, "cooperative": True},
    ],
    ids=str,
)
def test_a_launch_that_a_device_refuses(launch: dict[str, int]) -> None:
    with pytest.raises(RuntimeError, match="launch refused"):
        run("faults", "race_of_blocks", torch.zeros(64), 64, **launch)


def test_the_address_sanitizer_is_there_and_names_the_place() -> None:
    library = executor.build("address", executor.HERE / "toys")
    code = (
        f"import torch; torch.ops.load_library({str(library)!r}); "
        "torch.ops.segkernels_toys.faults('beyond_tensor', torch.ones(64), 64, 1, 64, 0, 1, 0, 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=executor.environment("address"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "heap-buffer-overflow" in done.stderr
    assert "simt: out of bounds: beyond_tensor_kernel, block 0, thread 63" in done.stderr


def test_after_a_fault_the_next_launch_runs() -> None:
    x = torch.arange(64.0)
    with pytest.raises(RuntimeError, match="race"):
        run("faults", "race_of_blocks", x, 64, blocks=2, threads=64)
    assert torch.equal(run("faults", "race_of_blocks", x, 64, blocks=1, threads=64), x)
