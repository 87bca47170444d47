"""Every csrc/*/cuda.cu compiled with nvcc, without a GPU: no warning, no spilled register.

One architecture by default, so that it stays near a minute on two idle cores;
`SEGKERNELS_TEST_ARCHS="80 90a 100 120"` names others.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SOURCES = sorted(ROOT.glob("csrc/*/cuda.cu"))
ARCHS = os.environ.get("SEGKERNELS_TEST_ARCHS", "90a").split()

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed"),
]


def start(source: Path, arch: str, target: Path) -> subprocess.Popen:
    include = [ROOT / "csrc", Path(torch.__file__).parent / "include"]
    command = [
        *("nvcc", "-c", "-O3", "-std=c++17", f"-gencode=arch=compute_{arch},code=sm_{arch}"),
        *("-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xcompiler=-fPIC"),
        *("-Werror=all-warnings", "--resource-usage", str(source), "-o", str(target)),
        *(f"-I{path}" for path in include),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def spills(report: str) -> list[str]:
    """The kernels of a `--resource-usage` report that spill registers, with the bytes."""
    found, kernel = [], ""
    for line in report.splitlines():
        if name := re.search(r"Function properties for (\w+)|entry function '(\w+)'", line):
            kernel = name[1] or name[2]
        if (spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and (
            int(spill[1]) or int(spill[2])
        ):
            found.append(f"{kernel}: {spill[0]}")
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_source_compiles_without_spills(arch, tmp_path):
    assert SOURCES, "no csrc/*/cuda.cu"
    running = {s: start(s, arch, tmp_path / f"{s.parent.name}.o") for s in SOURCES}
    for source, process in running.items():
        report = process.communicate()[0]
        assert process.returncode == 0, (
            f"{source.relative_to(ROOT)} for sm_{arch}:\n{report[-6000:]}"
        )
        assert "registers" in report, "nvcc printed no resource usage"
        assert not spills(report), (
            f"{source.relative_to(ROOT)} for sm_{arch} spills:\n" + "\n".join(spills(report))
        )
