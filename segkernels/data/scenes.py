"""Generated scenes for semantic segmentation, with a known ceiling.

A scene is a smooth background under a pile of shapes that hide one another, lit by a gradient and seen through noise.
Scene `i` of seed `s` is the same picture on every machine: its random numbers are the Philox stream of key (s, i), and
the picture is rounded to 8 bits.

What tells the classes apart. Colours are drawn from one distribution for every class and tell nothing. `fine` and
`broad` stripes, `checks`, `rings` and `speckle` are textures on any of three shapes (disc, square, bar): a few pixels
suffice. `disc` and `square` are plain: only the outline, up to 2·RADIUS[1] pixels away, tells one from the other.

The ceiling. Fine and broad stripes overlap on purpose. With t the position of the stripe period between its extremes
(period = PERIOD[0]·(PERIOD[1]/PERIOD[0])ᵗ),

    t | fine  ~ U(0, ½ + OVERLAP)          t | broad ~ U(½ − OVERLAP, 1)

and both classes are equally frequent, so for t in (½ − OVERLAP, ½ + OVERLAP) a picture is as likely to show the one as the
other. The Bayes rule is `fine` if t < ½, else `broad`. It errs on OVERLAP/(½ + OVERLAP) of the objects of either class,
and no function of the picture errs on fewer. `Scenes.oracle` is what this rule answers when it is given every outline
and every t exactly; its mIoU against `Scenes.labels` is the ceiling. With OVERLAP = 0.03 (5.7 % of the striped objects) the two
striped classes have an IoU of about 0.89 each, the others 1: a ceiling of 0.974 (`ceiling()` measures it). What a network
loses beyond that are outlines under noise and objects of which too little is left visible.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segkernels.metrics import confusion_matrix

CLASSES = ("background", "fine", "broad", "checks", "rings", "speckle", "disc", "bar")
BACKGROUND, FINE, BROAD, CHECKS, RINGS, SPECKLE, DISC, BAR = range(8)

# One colour per class for pictures of labels (distinct hues and lightness).
PALETTE = torch.tensor(
    [
        [38, 38, 46],
        [230, 120, 40],
        [250, 205, 70],
        [70, 150, 230],
        [40, 190, 150],
        [200, 90, 200],
        [225, 65, 75],
        [150, 205, 80],
    ],
    dtype=torch.uint8,
)

OBJECTS = 5  # shapes per scene; the later ones hide the earlier ones
RADIUS = (10.0, 18.0)  # pixels
PERIOD = (4.0, 16.0)  # pixels per stripe pair
HUE = np.array([0, 0.0, 0.0, 0.45, 0.57, 0.8, 0.22, 0.34])
HUE_SPREAD = 0.08
OVERLAP = 0.03  # see above
NOISE = 0.06  # standard deviation of the pixel noise, on a scale of 0 to 1


class Scenes(NamedTuple):
    """A batch of scenes."""

    images: Tensor  # [B, 3, H, W] float32 in [0, 1], multiples of 1/255
    labels: Tensor  # [B, H, W] int64, index into CLASSES
    oracle: Tensor  # [B, H, W] int64, the best answer that the picture allows


class _Objects(NamedTuple):
    """Parameters of the shapes of a batch, each [B, OBJECTS] (colour: [B, OBJECTS, 3])."""

    label: np.ndarray
    oracle: np.ndarray
    shape: np.ndarray  # 0 disc, 1 square, 2 bar
    row: np.ndarray
    column: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    period: np.ndarray
    phase: np.ndarray
    colour: np.ndarray


def _objects(u: np.ndarray, height: int, width: int) -> _Objects:
    """Uniform numbers u [B, OBJECTS, 9] to parameters."""
    label = 1 + np.floor(u[..., 0] * (len(CLASSES) - 1)).astype(np.int64)
    striped = (label == FINE) | (label == BROAD)
    t = u[..., 1] * np.where(striped, 0.5 + OVERLAP, 1.0)
    t = np.where(label == BROAD, 1.0 - t, t)
    hue = HUE[label] + HUE_SPREAD * (2 * u[..., 8] - 1)
    return _Objects(
        label=label,
        oracle=np.where(striped, np.where(t < 0.5, FINE, BROAD), label),
        shape=np.select([label == DISC, label == BAR], [0, 2], np.floor(u[..., 2] * 3)),
        row=(0.1 + 0.8 * u[..., 3]) * height,
        column=(0.1 + 0.8 * u[..., 4]) * width,
        radius=RADIUS[0] + u[..., 5] * (RADIUS[1] - RADIUS[0]),
        angle=u[..., 6] * np.pi,
        # Checks and rings keep to the middle periods: they are to be told by their form, not by their scale.
        period=PERIOD[0] * (PERIOD[1] / PERIOD[0]) ** np.where(striped, t, 0.3 + 0.4 * t),
        phase=u[..., 7] * 2 * np.pi,
        colour=0.55 + 0.35 * np.cos(2 * np.pi * (hue[..., None] + np.arange(3) / 3)),
    )


def _paint(o: _Objects, k: int, grain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outline [B, H, W] (bool) and brightness [B, H, W] of shape k of every scene. grain [B, H, W] is the speckle."""

    def of(name: str) -> np.ndarray:
        return getattr(o, name)[:, k, None, None]

    height, width = grain.shape[1:]
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None] - of("row").astype(np.float32)
    x = (np.arange(width, dtype=np.float32) + 0.5) - of("column").astype(np.float32)
    cos, sin = np.cos(of("angle")).astype(np.float32), np.sin(of("angle")).astype(np.float32)
    a, b = cos * x + sin * y, cos * y - sin * x  # along and across the shape
    r = np.sqrt(a * a + b * b)
    radius = of("radius").astype(np.float32)
    square = 0.85 * radius  # a square, and a bar of 3:1, of about the disc's size
    outside = np.select(
        [of("shape") == 0, of("shape") == 1],
        [r - radius, np.maximum(np.abs(a), np.abs(b)) - square],
        np.maximum(np.abs(a) / 1.3, np.abs(b) * 2.3) - square,
    )
    omega, phase = (2 * np.pi / of("period")).astype(np.float32), of("phase").astype(np.float32)
    label = of("label")
    wave = np.sin(omega * np.where(label == RINGS, r, a) + phase)
    wave *= np.where(label == CHECKS, np.sin(omega * b + phase), 1)
    wave = np.where(label == SPECKLE, grain, wave)
    plain = (label == DISC) | (label == BAR)
    return outside < 0, np.where(plain, 0.8, np.where(wave > 0, 1.0, 0.4)).astype(np.float32)


def _smooth(coarse: np.ndarray, height: int, width: int) -> np.ndarray:
    """coarse [B, 3, 4, 4] stretched bilinearly to [B, 3, H, W]."""

    def weights(n: int) -> np.ndarray:  # [n, 4]: linear interpolation between four knots
        position = np.linspace(0, 3, n)[:, None]
        return np.maximum(0, 1 - np.abs(position - np.arange(4))).astype(np.float32)

    return weights(height) @ coarse @ weights(width).T


def draw(indices: Iterable[int], size: int | tuple[int, int] = 64, seed: int = 0) -> Scenes:
    """Scenes number `indices` (each ≥ 0) of `seed` (≥ 0), `size` pixels square or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    index = [int(i) for i in indices]
    if height < 1 or width < 1 or seed < 0 or min(index, default=0) < 0:
        raise ValueError(f"scenes need size ≥ 1, seed ≥ 0 and indices ≥ 0, got size={size}, seed={seed}")
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in index]

    def uniform(*shape: int) -> np.ndarray:  # [B, *shape] in [0, 1)
        drawn = [s.random(shape, dtype=np.float32) for s in streams]
        return np.stack(drawn) if drawn else np.empty((0, *shape), np.float32)

    objects = _objects(uniform(OBJECTS, 9).astype(np.float64), height, width)
    image = 0.5 + 0.3 * (_smooth(uniform(3, 4, 4), height, width) - 0.5)
    grain = uniform(height, width) - 0.5
    labels = np.zeros((len(index), height, width), np.int64)
    oracle = labels.copy()
    for k in range(OBJECTS):
        inside, brightness = _paint(objects, k, grain)
        colour = objects.colour[:, k, :, None, None].astype(np.float32)
        image = np.where(inside[:, None], colour * brightness[:, None], image)
        labels = np.where(inside, objects.label[:, k, None, None], labels)
        oracle = np.where(inside, objects.oracle[:, k, None, None], oracle)
    light = 1 + 0.4 * (_smooth(uniform(1, 4, 4), height, width) - 0.5)
    noise = uniform(3, height, width) - uniform(3, height, width)  # triangular, variance 1/6
    image = np.clip(image * light + NOISE * 6**0.5 * noise, 0, 1)
    image = np.rint(image * 255).astype(np.float32) / 255
    return Scenes(torch.from_numpy(image), torch.from_numpy(labels), torch.from_numpy(oracle))


def ceiling(scenes: Scenes) -> Tensor:
    """Confusion matrix of the oracle on `scenes`: `scores(ceiling(scenes)).mean_iou` is the highest mIoU to expect there."""
    return confusion_matrix(scenes.oracle, scenes.labels, len(CLASSES))
