"""Training and evaluation of segmentation networks: one loop for all that map images to logits.

A network that learns more than its pixels' classes returns ``Logits`` in training (EncNet; any
network with an auxiliary head): every loss is added with the weight that the network declares.

A run is decided by its seed: the order of the samples and their flips come from a generator of
their own, and PyTorch's generator (dropout) is seeded for the run and put back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from segkernels.metrics import confusion_matrix
from segkernels.networks import Logits
from segkernels.nn import semantic_encoding_loss

IGNORE = 255  # a pixel with this label has no loss and no score


@dataclass(frozen=True)
class Recipe:
    """How to train; the rate rises over `warmup` steps and falls as (1 − step/steps)^power, "poly".

    batch: images a step. flip: batches are mirrored and transposed at random, one of eight ways.
    """

    steps: int
    batch: int = 16
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    power: float = 0.9
    warmup: int = 20
    flip: bool = True
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step (0 ≤ step < steps)."""
        rise = min(1.0, (step + 1) / max(self.warmup, 1))
        return self.learning_rate * rise * (1 - step / self.steps) ** self.power

    def optimiser(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser; norms and biases (one-dimensional) do not decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, self.learning_rate)
        return torch.optim.SGD(groups, self.learning_rate, self.momentum, nesterov=True)


def train(
    model: nn.Module,
    data: Dataset[tuple[Tensor, ...]],
    recipe: Recipe,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Minimise `training_loss` of `model` on `data`, in place; returns the loss of every step.

    model: images [B, 3, H, W] to logits [B, K, H, W], or to `Logits`; it is left in training mode,
    where its parameters are. data: pairs of image [3, H, W] and label [H, W] (int64; 255 is
    ignored). report(step, loss) is called after every step.

    Raises:
        FloatingPointError: the loss is no longer a number; the model is what diverged.
    """
    device = next(model.parameters()).device
    optimiser, losses = recipe.optimiser(model), []
    model.train()
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(recipe.seed)
        for step, (images, labels) in enumerate(_batches(data, recipe)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            logits = model(images.to(device, memory_format=torch.channels_last))
            loss = training_loss(logits, labels.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"the loss became {losses[-1]} at step {step}\n"
                    f"  learning rate: {recipe.rate(step):.3g}; a lower one may help"
                )
            report(step, losses[-1])
    return losses


def training_loss(logits: Tensor | Logits, labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """What a network in training is to minimise: its pixels' cross entropy and, times the weights
    that come with them, the semantic encoding loss and the auxiliary head's cross entropy.

    logits: what the network returned. labels: [B, H, W], int64.
    """
    if not isinstance(logits, Logits):
        logits = Logits(logits)
    loss = F.cross_entropy(logits.pixels, labels, ignore_index=ignore_index)
    if logits.presence is not None:
        presence, weight = logits.presence
        loss = loss + weight * semantic_encoding_loss(presence, labels, ignore_index)
    if logits.auxiliary is not None:
        pixels, weight = logits.auxiliary
        loss = loss + weight * F.cross_entropy(pixels, labels, ignore_index=ignore_index)
    return loss


def _batches(data: Dataset[tuple[Tensor, ...]], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """`recipe.steps` batches: passes over the data in random order, mirrored at random."""
    generator = torch.Generator().manual_seed(recipe.seed)
    loader = DataLoader(data, recipe.batch, shuffle=True, drop_last=True, generator=generator)
    if len(loader) == 0:
        raise ValueError(f"a batch of {recipe.batch} needs at least as many samples")
    for step in range(recipe.steps):
        if step % len(loader) == 0:
            epoch = iter(loader)
        images, labels = next(epoch)
        if recipe.flip:
            ways = int(torch.randint(8, (), generator=generator))
            images, labels = _mirror(images, ways), _mirror(labels, ways)
        yield images, labels


def _mirror(maps: Tensor, ways: int) -> Tensor:
    """One of the eight symmetries of the square (four of a map that is not square)."""
    if ways & 1:
        maps = maps.flip(-1)
    if ways & 2:
        maps = maps.flip(-2)
    return maps.mT if ways & 4 and maps.shape[-1] == maps.shape[-2] else maps


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """Classes [B, H, W] of images [B, 3, H, W] in evaluation mode; every layer's mode is kept."""
    device = next(model.parameters()).device
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        classes = [
            model(part.to(device, memory_format=torch.channels_last)).argmax(1).cpu()
            for part in images.split(batch)
        ]
    finally:
        for module, mode in training:
            module.training = mode
    return torch.cat(classes)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Confusion matrix [K, K] of a model on images and labels, for `segkernels.metrics.scores`."""
    return confusion_matrix(predict(model, images), labels, num_classes, IGNORE)
