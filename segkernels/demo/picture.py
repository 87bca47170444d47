"""Pictures of what a network sees and says. Needs pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ZOOM = 2  # screen pixels per image pixel
GAP = 6
INK, PAPER = (235, 235, 240), (24, 24, 28)


def read(path: Path, longest: int = 256) -> Tensor:
    """A picture file as [1, 3, H, W] float32 in [0, 1], shrunk to at most `longest` pixels a side."""
    with Image.open(path) as file:
        picture = file.convert("RGB")
    picture.thumbnail((longest, longest))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).permute(0, 3, 1, 2) / 255


def gallery(
    path: Path,
    scenes: Sequence[Sequence[Tensor]],
    headings: Sequence[str],
    classes: Sequence[str],
    palette: Tensor,
    columns: int = 1,
) -> None:
    """Write a PNG: `columns` scenes a row, each its tiles side by side under `headings`, and a legend.

    A tile is an image [3, H, W] in [0, 1] or a map of labels [H, W], painted in the palette [K, 3] (uint8). All tiles
    have one size.
    """
    font = ImageFont.load_default(13)
    height, width = (ZOOM * side for side in scenes[0][0].shape[-2:])
    across = columns * len(headings)
    rows = -(-len(scenes) // columns)
    top = 22
    legend = top + rows * (height + GAP)
    size = (across * (width + GAP) + GAP, legend + 28)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, heading in enumerate(headings * columns):
        pen.text((GAP + place * (width + GAP), 4), heading, INK, font)
    for number, scene in enumerate(scenes):
        row, column = divmod(number, columns)
        for place, tile in enumerate(scene, column * len(headings)):
            corner = (GAP + place * (width + GAP), top + row * (height + GAP))
            sheet.paste(_tile(tile, palette).resize((width, height), Image.Resampling.NEAREST), corner)
    step = (size[0] - GAP) / len(classes)
    for number, name in enumerate(classes):
        x = round(GAP + number * step)
        colour = tuple(palette[number].tolist())
        pen.rectangle((x, legend + 5, x + 13, legend + 18), colour, INK)
        pen.text((x + 19, legend + 4), name, INK, font)
    sheet.save(path, optimize=True)


def _tile(tile: Tensor, palette: Tensor) -> Image.Image:
    if tile.is_floating_point():
        pixels = (tile * 255).round().byte().permute(1, 2, 0)
    else:
        pixels = palette[tile]
    return Image.fromarray(pixels.contiguous().numpy(), "RGB")
