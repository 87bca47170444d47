"""Generated scenes: the same everywhere, every class seen, the ceiling as theory has it."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from segkernels.data import scenes
from segkernels.metrics import scores


def checksum(drawn: scenes.Scenes) -> int:
    pixels = (drawn.images * 255).round().byte().numpy().tobytes()
    return zlib.crc32(pixels + drawn.labels.byte().numpy().tobytes())


def test_shapes_types_and_range() -> None:
    drawn = scenes.draw([3, 1, 4], (40, 72), seed=5)
    assert drawn.images.shape == (3, 3, 40, 72) and drawn.images.dtype == torch.float32
    assert drawn.labels.shape == drawn.oracle.shape == (3, 40, 72)
    assert drawn.labels.dtype == drawn.oracle.dtype == torch.int64
    assert drawn.images.min() >= 0 and drawn.images.max() <= 1
    steps = drawn.images * 255
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)  # 8 bits
    assert drawn.labels.min() >= 0 and drawn.labels.max() < len(scenes.CLASSES)


def test_a_scene_is_its_index_and_its_seed() -> None:
    together = scenes.draw(range(4), 48, seed=2)
    for i in range(4):
        alone = scenes.draw([i], 48, seed=2)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[i])
    assert not torch.equal(together.images[0], together.images[1])
    assert not torch.equal(together.images[0], scenes.draw([0], 48, seed=3).images[0])


def test_the_same_picture_on_every_machine() -> None:
    assert checksum(scenes.draw([0, 7], 64, seed=1)) == 85414515


def test_global_random_states_are_neither_read_nor_changed() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    scenes.draw(range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_every_class_is_seen() -> None:
    labels = scenes.draw(range(64)).labels
    share = torch.bincount(labels.flatten(), minlength=len(scenes.CLASSES)) / labels.numel()
    assert 0.3 < share[0] < 0.7
    assert (share[1:] > 0.03).all(), share
    assert len(scenes.PALETTE) == len(scenes.HUE) == len(scenes.CLASSES)
    assert len(scenes.PALETTE.unique(dim=0)) == len(scenes.CLASSES)


def test_the_ceiling_is_the_overlap_of_the_stripes() -> None:
    """OVERLAP/(1/2 + OVERLAP) of the striped pixels, and nothing else, is beyond the oracle."""
    drawn = scenes.draw(range(512), 32, seed=9)
    n = scenes.ceiling(drawn)
    striped = [scenes.FINE, scenes.BROAD]
    wrong = n.sum() - n.diag().sum()
    assert wrong == n[striped][:, striped].sum() - n[striped, striped].sum()
    share = scenes.OVERLAP / (0.5 + scenes.OVERLAP)
    assert float(wrong / n[striped].sum()) == pytest.approx(share, rel=0.3)
    expected = (len(scenes.CLASSES) - 2 + 2 * (1 - share) / (1 + share)) / len(scenes.CLASSES)
    assert scores(n).mean_iou == pytest.approx(expected, abs=0.01)


def test_no_scenes() -> None:
    assert scenes.draw([]).images.shape == (0, 3, 64, 64)


@pytest.mark.parametrize("bad", [{"indices": [-1]}, {"seed": -1}, {"size": 0}, {"size": (4, 0)}])
def test_bad_input(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="size ≥ 1"):
        scenes.draw(**({"indices": [0]} | bad))  # type: ignore[arg-type]
