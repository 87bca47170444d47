"""Every Triton kernel compiled ahead of time, without a device: sm_80, sm_90 and gfx942, real configurations.

The launchers run on meta tensors of real shapes while `JITFunction.run` only takes notes, so what is compiled here is
what a GPU would be given: the same signature, specialisation, block shapes and warps. A kernel is found by its decorator
(`kernels`), a new one without a configuration fails `test_every_kernel_is_compiled`.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)


