"""`python -m segkernels demo`: train a small network on generated scenes, check it, time it.

The stages, in order: what runs here and why; training of a small DeepLabv3+ whose atrous separable
convolutions are ours (mIoU before and after); the same with EM attention, without and with the
gradient of its iterations; our results against plain PyTorch's; time and memory; the report. The
exit status is 0 only if the networks learned enough and every result is as right as rounding
allows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from segkernels import fused
from segkernels.console import print_table
from segkernels.data import scenes
from segkernels.demo import contest, network, report
from segkernels.metrics import Scores, scores
from segkernels.progress import Progress
from segkernels.train import Recipe, evaluate, predict, train

SIZE = 64  # pixels of a training scene
SEEDS = 2**62  # twice a seed is one too: of the scenes held out
PICTURE = (96, 128)  # pixels of the scenes in the picture


@dataclass(frozen=True)
class Plan:
    """How much is drawn, how it is trained, and what share of the ceiling must come of it."""

    scenes: int
    tests: int
    recipe: Recipe
    floor: float
    attention_steps: int  # of each network with EM attention


FULL = Plan(1024, 128, Recipe(steps=800, learning_rate=0.2), floor=0.80, attention_steps=120)
QUICK = Plan(128, 32, Recipe(steps=60, learning_rate=0.2), floor=0.30, attention_steps=20)


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 when all held, 1 when something did not, 130 after Ctrl-C."""
    options = _options(arguments)
    found = report.Report(out=options.out)
    try:
        return _run(options, found)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted after {found.seconds():.0f} s; done so far: {found.done()}",
            file=sys.stderr,
        )
        return 130
    except (fused.SegkernelsError, _UsageError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class _UsageError(Exception):
    """The user asked for what cannot be done; the message says what to do instead."""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m segkernels demo",
        description="Train a small network on generated scenes, check it against PyTorch, time it."
        " About a minute on two cores.",
        epilog="example: python -m segkernels demo --image street.jpg",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds of training, small timings"
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE", help="segment a picture of your own too"
    )
    parser.add_argument(
        "--backend", choices=fused.BACKENDS, help="default: the best that runs here"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of scenes, weights and order (default 0)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the report")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < SEEDS:
        parser.error(f"--seed must be at least 0 and below {SEEDS}, not {options.seed}")
    return options


def _run(options: argparse.Namespace, found: report.Report) -> int:
    picture = _user_picture(options.image) if options.image else None
    try:  # like the picture: at once, not after a minute
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _UsageError(f"--out cannot be written to\n  {error}") from None
    warnings.simplefilter(
        "ignore", fused.SegkernelsPerformanceWarning
    )  # said below, with the reason
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _environment(found, device, options.backend)
    lesson = _lesson(options)
    model = _train(found, lesson, options, device)
    _attention(found, lesson, options, device)
    _checks(found, options, device, model)
    _times(found, options, device)
    _pictures(found, options, model, picture)
    return _verdict(found)


def _user_picture(path: Path) -> Tensor:
    """Read before anything is computed, so that a wrong name costs no minute."""
    try:
        from segkernels.demo.picture import read
    except ImportError:
        raise _UsageError("--image needs pillow\n  pip install pillow") from None
    try:
        return read(path)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise _UsageError(f"--image cannot be read\n  file: {path}\n  {what}") from None


def _environment(found: report.Report, device: str, backend: str | None) -> None:
    found.environment = report.environment(device)
    for name, value in found.environment.items():
        print(f"{name:<12}{value}")
    asked = backend or os.environ.get("SEGKERNELS_BACKEND", "auto")
    rows = []
    for op in fused.OPERATORS:
        reasons = fused.explain(op)
        if asked in reasons:
            taken, why = asked, "asked for"
        else:
            taken = next(name for name, reason in reasons.items() if reason is None)
            before = list(reasons)[: list(reasons).index(taken)]
            why = "; ".join(f"{name}: {reasons[name]}" for name in before) or "the first choice"
        rows.append((op, taken, why))
        found.backends[op] = {"taken": taken, "why": why, "reasons": reasons}
    print_table("Backends", ("operator", "runs on", "why"), rows)
    found.stages.append("environment")


@dataclass(frozen=True)
class Lesson:
    """What is learned from what, and the scenes held out."""

    plan: Plan
    recipe: Recipe
    data: TensorDataset
    held_out: scenes.Scenes

    def score(self, model: torch.nn.Module) -> Scores:
        images = network.normalise(self.held_out.images)
        return scores(evaluate(model, images, self.held_out.labels, len(scenes.CLASSES)))


def _lesson(options: argparse.Namespace) -> Lesson:
    plan = QUICK if options.quick else FULL
    drawn = scenes.draw(range(plan.scenes), SIZE, seed=2 * options.seed)
    held_out = scenes.draw(range(plan.tests), SIZE, seed=2 * options.seed + 1)
    data = TensorDataset(network.normalise(drawn.images), drawn.labels)
    return Lesson(plan, dataclasses.replace(plan.recipe, seed=options.seed), data, held_out)


def _train(
    found: report.Report, lesson: Lesson, options: argparse.Namespace, device: str
) -> torch.nn.Module:
    plan, recipe = lesson.plan, lesson.recipe
    model = network.build(options.seed, options.backend).to(device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    what = f"{plan.scenes} scenes of {SIZE}x{SIZE}, {len(scenes.CLASSES)} classes"
    print(f"DeepLabv3+ with graphs, {size:.2f} M parameters; {what}")

    found.before = lesson.score(model)
    found.ceiling = scores(scenes.ceiling(lesson.held_out))
    found.floor = plan.floor * found.ceiling.mean_iou
    started = time.monotonic()
    with Progress("training", recipe.steps) as progress:

        def advance(step: int, loss: float) -> None:
            progress.advance(note=f"loss {loss:.3f}")
            found.training = f"{step + 1} of {recipe.steps} training steps (loss {loss:.3f})"

        found.losses = train(model, lesson.data, recipe, advance)
    found.training_seconds = time.monotonic() - started
    found.after = lesson.score(model)
    print(
        f"mIoU {found.before.mean_iou:.3f} before, {found.after.mean_iou:.3f} after "
        f"{recipe.steps} steps ({found.training_seconds:.0f} s); "
        f"needed {found.floor:.3f}, ceiling {found.ceiling.mean_iou:.3f}"
    )
    found.stages.append("training")
    return model


def _attention(
    found: report.Report, lesson: Lesson, options: argparse.Namespace, device: str
) -> None:
    """The same network with EM attention in the graphs' place, as published and with the gradient
    of all iterations: equal weights at first, equal batches."""
    recipe = dataclasses.replace(lesson.recipe, steps=lesson.plan.attention_steps)
    found.attention_steps = recipe.steps
    with Progress("attention", len(report.COMPARED) * recipe.steps) as progress:
        for gradient in report.COMPARED:
            model = network.build(options.seed, options.backend, gradient).to(device)

            def advance(step: int, loss: float, gradient: str = gradient) -> None:
                progress.advance(note=f"{gradient}: loss {loss:.3f}")

            train(model, lesson.data, recipe, advance)
            found.attention[gradient] = lesson.score(model).mean_iou
    print(found.attention_line())
    found.stages.append("EM attention")


def _checks(
    found: report.Report, options: argparse.Namespace, device: str, model: torch.nn.Module
) -> None:
    rows = [row for row in contest.contests(device, options.backend, small=True) if row.backward]
    with Progress("checking", len(rows) + 1) as progress:
        for row in rows:
            found.checks.append(contest.check(row))
            progress.advance(note=row.name)
        sample = scenes.draw(range(8), SIZE, seed=2 * options.seed + 1)
        found.checks.append(network.check(model, sample.images.to(device)))
    print_table(report.CHECKS, *report.check_table(found.checks))
    found.stages.append("checks")


def _times(found: report.Report, options: argparse.Namespace, device: str) -> None:
    rows = contest.contests(device, options.backend, options.quick)
    right = {check.name for check in found.checks if check.holds}
    with Progress("timing", len(rows)) as progress:
        for row in rows:
            if row.name in right:  # what is wrong has no time
                found.times.append(
                    contest.times(row, not options.quick, 0.1 if options.quick else 0.5)
                )
            progress.advance(note=row.name)
    print_table(report.TIMES, *report.time_table(found.times))
    found.stages.append("timing")


def _pictures(
    found: report.Report,
    options: argparse.Namespace,
    model: torch.nn.Module,
    picture: Tensor | None,
) -> None:
    try:
        from segkernels.demo.picture import gallery
    except ImportError:
        print("no picture: it needs pillow (pip install pillow)")
        return
    legend = (scenes.CLASSES, scenes.PALETTE)
    shown = scenes.draw(range(1000, 1006), PICTURE, seed=2 * options.seed + 1)
    said = predict(model, network.normalise(shown.images))
    tiles = list(zip(shown.images, shown.labels, said, strict=True))
    gallery(
        options.out / "picture.png", tiles, ("image", "truth", "prediction"), *legend, columns=2
    )
    found.files.append("picture.png")
    if picture is not None:
        said = predict(model, network.normalise(picture))
        gallery(
            options.out / "image.png", [(picture[0], said[0])], ("image", "prediction"), *legend
        )
        found.files.append("image.png")
    found.stages.append("pictures")


def _verdict(found: report.Report) -> int:
    found.write()
    print(f"written: {', '.join(str(found.out / name) for name in found.files)}")
    failures = found.failures()
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    print(f"{'all held' if not failures else f'{len(failures)} failed'}, {found.seconds():.0f} s")
    return int(bool(failures))
