"""The law of tolerance itself: what counts as an error, and that nothing escapes it."""

from __future__ import annotations

import math

import pytest
import torch

from segkernels.tolerance import budget, error, verdict

INF, NAN = math.inf, math.nan


def test_the_error_is_relative_to_the_largest_true_value() -> None:
    truth = torch.tensor([1.0, -4.0])
    assert error(truth + 1, truth) == 0.25
    assert error(truth, truth) == 0


@pytest.mark.parametrize(
    ("got", "true"), [(INF, 1.0), (1.0, INF), (INF, -INF), (NAN, 1.0), (1.0, NAN), (NAN, INF)]
)
def test_numbers_that_are_not_finite_must_agree(got: float, true: float) -> None:
    assert error(torch.tensor([got, 1.0]), torch.tensor([true, 1.0])) == INF
    assert error(torch.tensor([true, 1.0]), torch.tensor([true, 1.0])) == 0


def test_another_shape_is_an_error() -> None:
    assert error(torch.ones(2), torch.ones(3)) == INF


def test_a_vanishing_gradient_is_measured_against_the_largest() -> None:
    truth = torch.tensor([1e-17])
    assert error(torch.tensor([1e-7]), truth) > 1e9
    assert error(torch.tensor([1e-7]), truth, largest=1.0) == pytest.approx(1e-7)


def test_ten_roundings_are_too_many() -> None:
    truth = torch.linspace(0.5, 1, 9, dtype=torch.float64)
    right = truth.float()
    for factor, holds in ((1, True), (10, False)):
        off = right * (1 + factor * torch.finfo(torch.float32).eps)
        got, allowed = verdict(off, right, truth, torch.float32, longest_sum=1)
        assert (got <= allowed) is holds
    assert budget(torch.bfloat16, 9) > budget(torch.float32, 9) > budget(torch.float64, 9)
