"""Runs the CUDA kernels without a GPU: csrc/*/cuda.cu on the host executor, sanitized.

The sanitizers' libraries must be loaded before anything else; hence the subprocess.
"""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.simt.executor import HERE, ROOT, build

SUITES = sorted(HERE.glob("kernels_*.py"))

needs_executor = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64",
    reason="the host executor needs g++ on x86-64",
)


def library_path(name: str) -> str:
    return subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()


@pytest.fixture(scope="module")
def environment():
    preload = [library_path(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    build(sanitize=True)
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }


@needs_executor
@pytest.mark.parametrize("part", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("suite", SUITES, ids=lambda p: p.stem.removeprefix("kernels_"))
def test_kernels(suite, part, environment):
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", part]
    command = [sys.executable, "-m", "pytest", *options, str(suite)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
