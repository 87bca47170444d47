"""Lloyd's algorithm, where its steps can be followed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from segkernels.nn import kmeans


def line(values: list[float]) -> Tensor:
    """Pixels of one channel: [1, 1, 1, N]."""
    return torch.tensor(values, dtype=torch.float64)[None, None, None]


@pytest.fixture
def begin_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pixels, by their places, to begin from."""

    def chosen(*places: int) -> None:
        monkeypatch.setattr(kmeans, "_seeds", lambda owner, points, *_: points[list(places)])

    return chosen


def test_centres_and_deviations(begin_at: Any) -> None:
    begin_at(0, 1)
    centres, deviations = kmeans.kmeans("test", line([1.0, 3.0, 11.0, 14.0, 17.0]), 2)
    assert centres.flatten().tolist() == pytest.approx([2.0, 14.0])
    assert deviations.flatten().tolist() == pytest.approx([1.0, 6**0.5])


def test_an_empty_cluster_begins_anew_at_the_farthest_pixel(begin_at: Any) -> None:
    """4 and 6 are one cluster about 5, until their neighbours' centres move nearer to each."""
    values = [2.9, *[3.4] * 10, 4.0, 6.0, *[6.1] * 10, 8.1]
    begin_at(0, 11, len(values) - 1)
    centres, _ = kmeans.kmeans("test", line(values), 3)
    expected = [(2.9 + 34 + 4) / 12, (6 + 61) / 11, 8.1]
    assert sorted(centres.flatten().tolist()) == pytest.approx(expected)


def test_seeds_are_distinct_pixels_far_from_one_another() -> None:
    """Of many equal pixels and three others, four seeds take one of each."""
    points = torch.zeros(50, 2)
    points[7, 0], points[21, 1], points[40] = 1.0, 1.0, -1.0
    for seed in range(20):
        seeds = kmeans._seeds("test", points, 4, seed)
        assert len(seeds.unique(dim=0)) == 4
