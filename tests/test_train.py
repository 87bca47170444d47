"""The trainer: it learns, repeats itself, ignores what it should, and says when it diverges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from segkernels.metrics import scores
from segkernels.train import IGNORE, Recipe, evaluate, predict, train


def bright_or_dark(n: int = 32) -> TensorDataset:
    """Images whose every pixel says its class by its sign."""
    images = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, (images.sum(1) > 0).long())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_learns(optimizer: str) -> None:
    data, model = bright_or_dark(), net()
    rate = {"sgd": 0.3, "adamw": 0.03}[optimizer]
    before = scores(evaluate(model, *data.tensors, 2)).mean_iou
    losses = train(model, data, Recipe(60, 8, optimizer, rate, warmup=5))  # type: ignore[arg-type]
    assert len(losses) == 60 and losses[-1] < losses[0]
    assert scores(evaluate(model, *data.tensors, 2)).mean_iou > max(before, 0.9)


def test_a_seed_decides_the_run() -> None:
    def run(seed: int, noise: int) -> tuple[list[float], Tensor]:
        model = net()
        torch.manual_seed(noise)  # the caller's generator has no say
        losses = train(model, bright_or_dark(), Recipe(5, 4, seed=seed))
        return losses, torch.rand(1)

    (first, after), (again, after_again) = run(1, 10), run(1, 11)
    assert first == again != run(2, 10)[0]
    assert after != after_again  # and is put back
    torch.manual_seed(10)
    assert torch.equal(after, torch.rand(1))


def test_ignored_pixels_have_no_loss() -> None:
    images, labels = bright_or_dark().tensors
    spoiled = labels.clone()
    spoiled[:, ::2] = IGNORE
    kept, model = labels[:, 1::2], net().eval()
    prediction = predict(model, images)
    n = evaluate(model, images, spoiled, 2)
    assert n.sum() == kept.numel() and n.diag().sum() == (prediction[:, 1::2] == kept).sum()
    assert all(
        torch.isfinite(torch.tensor(train(net(), TensorDataset(images, spoiled), Recipe(3))))
    )


def test_schedule() -> None:
    recipe = Recipe(100, learning_rate=1.0, power=0.9, warmup=10)
    assert recipe.rate(0) == pytest.approx(0.1)
    assert recipe.rate(50) == pytest.approx(0.5**0.9)
    assert 0 < recipe.rate(99) < 0.02


def test_report_and_modes() -> None:
    seen: list[int] = []
    model = net()
    train(model, bright_or_dark(), Recipe(4), lambda step, loss: seen.append(step))
    assert seen == [0, 1, 2, 3] and model.training
    frozen = next(module for module in model.modules() if module is not model)
    frozen.eval()
    predict(model, torch.zeros(1, 3, 4, 4))
    assert model.training and not frozen.training


def test_divergence_is_an_error() -> None:
    with pytest.raises(FloatingPointError, match="a lower one may help"):
        train(net(), bright_or_dark(), Recipe(50, learning_rate=1e30, warmup=1))


def test_too_few_samples() -> None:
    with pytest.raises(ValueError, match="batch of 16"):
        train(net(), bright_or_dark(4), Recipe(1))
