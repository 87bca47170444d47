"""What the Triton backend of EM attention launches: its launchers run on meta tensors, no kernel is
compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import machine_code
from segkernels.ops.em_attention.cases import PAPER

pytestmark = pytest.mark.skipif(
    not machine_code.triton_compiles(), reason="Triton is missing, or interpreted here"
)


def launches(layout: str = "channels_last", dtype: str = "bfloat16", **changes: Any) -> list[Any]:
    from benchmarks import ahead_of_time

    case = replace(PAPER[0], **changes)
    return ahead_of_time.launches(ahead_of_time.Call("em_attention", case, dtype, layout))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [("bfloat16", "channels_last"), ("float16", "nchw"), ("float32", "channels_last")],
)
def test_two_kernels_an_iteration(dtype: str, layout: str, iterations: int) -> None:
    names = [
        launch.kernel.__name__.removesuffix("_kernel").removeprefix("em_attention_")
        for launch in launches(layout, dtype, iterations=iterations, assignment=True)
    ]
    forward = 2 * iterations + 1
    assert names[:forward] == ["expectation", "bases"] * iterations + ["distribute"]
    assert names[forward:] == [
        *("assignment_softmax", "node_sums"),
        *(["bases_backward", "gradient"] * iterations),
        *("distribute", "bases_backward"),
    ]


@pytest.mark.parametrize(("dtype", "bases"), [("bfloat16", 65), ("float64", 8)])
def test_three_where_registers_do_not_suffice(dtype: str, bases: int) -> None:
    names = [launch.kernel.__name__ for launch in launches(dtype=dtype, bases=bases)]
    assert names[:3] == [
        "assignment_softmax_kernel",
        "node_sums_kernel",
        "em_attention_bases_kernel",
    ]
    assert not {"em_attention_expectation_kernel", "em_attention_gradient_kernel"} & set(names)


@pytest.mark.parametrize(("side", "shares"), [(1, 1), (33, 18), (65, 23), (97, 30), (256, 32)])
def test_few_shares_whatever_the_batch(side: int, shares: int) -> None:
    for batch in (1, 16):
        made = launches(shape=(batch, 512, side, side))
        sums = [launch.args[6] for launch in made if "expectation" in launch.kernel.__name__]
        assert [a.shape for a in sums] == [(batch, shares, 64, 512)] * len(sums)
