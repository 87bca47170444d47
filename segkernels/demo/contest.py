"""Our layers against the same layers in plain PyTorch: the same weights, checked, then timed."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segkernels.nn import DepthwiseConv2d, SeparableConv2d
from segkernels.timing import interleave, memory_of
from segkernels.tolerance import verdict

FUSED, EAGER, LAST, COMPILED = "fused", "eager", "eager channels_last", "torch.compile"
RATE = 12


@dataclass(frozen=True)
class Contest:
    """One row of the table: a layer of ours, its plain twin, and what is asked of both."""

    name: str
    ours: nn.Module
    plain: nn.Module
    x: Tensor  # [B, C, H, W]
    backward: bool  # forward and backward in training mode, or the forward alone for inference


@dataclass(frozen=True)
class Check:
    """Errors of ours against float64 (the gradient: the one nearest its limit), and what is allowed."""

    name: str
    forward: float
    gradient: float
    allowed: tuple[float, float]  # forward, gradient

    @property
    def holds(self) -> bool:
        return self.forward <= self.allowed[0] and self.gradient <= self.allowed[1]  # not for NaN


@dataclass(frozen=True)
class Times:
    """Seconds and peak bytes of one call by contender; a contender that cannot run is left out."""

    name: str
    seconds: dict[str, float]
    ratio: float  # the fastest of the others over ours, by pairs of one round
    peak: dict[str, int]


def contests(device: str, backend: str | None, small: bool) -> list[Contest]:
    """Depthwise and separable 3x3 at rate 12 on the map of a DeepLab context module (output stride 8)."""
    channels, side = (64, 33) if small else (256, 65)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, side, side, generator=generator).to(device)
    rows = []
    for kind, build in (("depthwise", _depthwise), ("separable", _separable)):
        ours, plain = (m.to(device) for m in build(channels, backend))
        plain.load_state_dict(ours.state_dict())
        for backward, work in ((False, "inference"), (True, "forward + backward")):
            name = f"{kind} 3x3, rate {RATE}, C {channels}, {side}x{side}: {work}"
            rows.append(Contest(name, ours, plain, x, backward))
    return rows


def _depthwise(channels: int, backend: str | None) -> tuple[nn.Module, nn.Module]:
    ours = DepthwiseConv2d(channels, 3, dilation=RATE, bias=False, backend=backend)
    options = {"padding": RATE, "dilation": RATE, "groups": channels, "bias": False}
    return ours, nn.Conv2d(channels, channels, 3, **options)


def _separable(channels: int, backend: str | None) -> tuple[nn.Module, nn.Module]:
    """Keys and order of the twin are those of our layer."""
    plain = OrderedDict(
        depthwise=_depthwise(channels, None)[1],
        inner_norm=nn.BatchNorm2d(channels),
        inner_activation=nn.ReLU(),
        pointwise=nn.Conv2d(channels, channels, 1, bias=False),
        outer_norm=nn.BatchNorm2d(channels),
        outer_activation=nn.ReLU(),
    )
    return SeparableConv2d(channels, channels, dilation=RATE, backend=backend), nn.Sequential(plain)


def check(contest: Contest) -> Check:
    """Result and gradients of ours and of plain PyTorch in float32, both against plain PyTorch in float64.

    Held to the law of tolerance (`segkernels.tolerance`); the longest sums, those of the weights' gradients, are over all
    pixels.
    """
    x = contest.x
    y = contest.plain(x)
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    twin = copy.deepcopy(contest.plain).double()
    results = [_results(m, x, cotangent) for m in (contest.ours, contest.plain)]
    truth = _results(twin, x.double(), cotangent.double())
    pixels = x.numel() // x.shape[1]
    verdicts = [verdict(*each, x.dtype, pixels) for each in zip(*results, truth, strict=True)]
    (forward, allowed), *gradients = verdicts
    gradient, allowed_gradient = max(gradients, key=lambda v: v[0] / v[1])
    name = contest.name.split(":")[0]
    return Check(name, forward, gradient, (allowed, allowed_gradient))


def _results(module: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients (input, then parameters) in training mode."""
    module.train()
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], cotangent)]


def times(contest: Contest, compiled: bool, budget: float) -> Times:
    """Time and peak memory of all contenders, in turns; the layouts are each one's own (ours: channels_last)."""
    calls = dict(_calls(contest, compiled))
    run = interleave(calls, device=contest.x.device, budget=budget, rounds=(3, 100))
    others = [name for name in calls if name != FUSED]
    best = min(others, key=lambda name: run[name].median)
    return Times(
        contest.name,
        {name: run[name].median for name in calls},
        run.ratio(best, FUSED).median,
        {name: memory_of(call, contest.x.device).peak for name, call in calls.items()},
    )


def _calls(contest: Contest, compiled: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    x, last = contest.x, contest.x.to(memory_format=torch.channels_last)
    plain_last = copy.deepcopy(contest.plain).to(memory_format=torch.channels_last)
    yield FUSED, _call(contest.ours, last, contest.backward)
    yield EAGER, _call(contest.plain, x, contest.backward)
    yield LAST, _call(plain_last, last, contest.backward)
    if compiled:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of processes for one graph
        call = _call(torch.compile(plain_last), last, contest.backward)
        try:
            call()
        except Exception:  # no C++ compiler, say: the row goes without
            return
        yield COMPILED, call


def _call(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:

        @torch.no_grad()
        def infer() -> Tensor:
            result: Tensor = module.eval()(x)
            return result

        return infer
    leaf = x.detach().requires_grad_()
    leaves: Sequence[Tensor] = [leaf, *module.parameters()]
    cotangent = torch.ones_like(module.train()(leaf))  # laid out as the output is
    return lambda: torch.autograd.grad(module.train()(leaf), leaves, cotangent)
