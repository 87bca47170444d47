"""EM attention of a map so large that a part of its sums is of more than one tile of pixels."""

from __future__ import annotations

import pytest
import torch

from segkernels import fused
from segkernels.ops.em_attention.cases import Case
from tests.contract import check, cotangents_like, usable


@pytest.fixture(params=fused.BACKENDS)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    return usable(request, "em_attention", device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("bases", [3, 40])
def test_several_tiles_to_a_part(bases: int, dtype: torch.dtype, backend: str, device: str) -> None:
    case = Case("parts", (1, 4, 65, 66), bases, iterations=2, temperature=1.3, assignment=True)
    inputs = case.inputs(dtype, device=device)
    check("em_attention", case, inputs, backend, cotangents_like("em_attention", inputs))
