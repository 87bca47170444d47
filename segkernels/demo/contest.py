"""Our layers against the same layers in plain PyTorch: the same weights, checked, then timed."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segkernels.nn import EMAU, GCU, DepthwiseConv2d, Encoding, SeparableConv2d
from segkernels.timing import interleave, memory_of
from segkernels.tolerance import verdict

FUSED, EAGER, LAST, COMPILED = "fused", "eager", "channels_last", "compiled"
RATE = 12
NODES = 32
CLEAR = 2e-6  # far above the rounding of a float32 near 1, seldom hit by 70 000 of them


@dataclass(frozen=True)
class Contest:
    """One row of the table: a layer of ours, its plain twin, and what is asked of both."""

    name: str
    ours: nn.Module
    plain: nn.Module
    x: Tensor  # [B, C, H, W]
    backward: bool  # training: forward and backward; else inference: the forward alone

    @property
    def work(self) -> str:
        _, channels, height, width = self.x.shape
        return f"{channels}x{height}x{width} {'training' if self.backward else 'inference'}"


@dataclass(frozen=True)
class Check:
    """Errors of ours against float64 and their limits; of the gradients, that nearest its limit."""

    name: str
    forward: float
    gradient: float | None  # None: not compared
    allowed: tuple[float, float | None]

    @property
    def holds(self) -> bool:
        pairs = ((self.forward, self.allowed[0]), (self.gradient, self.allowed[1]))
        return all(got <= limit for got, limit in pairs if got is not None and limit is not None)


@dataclass(frozen=True)
class Times:
    """Seconds and peak bytes of one call by contender; a contender that cannot run is left out."""

    name: str
    work: str
    seconds: dict[str, float]
    ratio: float  # the fastest of the others over ours, by pairs of one round
    peak: dict[str, int]


def contests(device: str, backend: str | None, small: bool) -> list[Contest]:
    """Depthwise and separable 3x3 at rate 12; graph convolution, encoding and EM attention (with
    the gradient of all its iterations) with 32 nodes; on the map of a DeepLab head or on a small
    one."""
    channels, side = (64, 33) if small else (256, 65)
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    rows = []
    for name, build in (
        (f"depthwise 3x3 rate {RATE}", _depthwise),
        (f"separable 3x3 rate {RATE}", _separable),
        (f"GCU, {NODES} nodes", _gcu),
        (f"Encoding, {NODES} codewords", _encoding),
        (f"EMAU, {NODES} bases", _emau),
    ):
        ours, plain = (m.to(device) for m in build(channels, backend))
        plain.load_state_dict(ours.state_dict())
        for backward in (False, True):
            rows.append(Contest(name, ours, plain, x, backward))
    return rows


def _depthwise(channels: int, backend: str | None) -> tuple[nn.Module, nn.Module]:
    ours = DepthwiseConv2d(channels, 3, dilation=RATE, bias=False, backend=backend)
    plain = nn.Conv2d(
        channels, channels, 3, padding=RATE, dilation=RATE, groups=channels, bias=False
    )
    return ours, plain


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


def _gcu(channels: int, backend: str | None) -> tuple[nn.Module, nn.Module]:
    """The twin differs where pixels meet nodes."""
    ours = GCU(channels, channels, (NODES,), merge="add", backend=backend)
    plain = copy.deepcopy(ours)
    plain.set_submodule("units.0.project", PlainProjection(plain.get_submodule("units.0.project")))
    plain.set_submodule("reproject", PlainReprojection())
    return ours, plain


def _encoding(channels: int, backend: str | None) -> tuple[nn.Module, nn.Module]:
    ours = Encoding(channels, NODES, backend=backend)
    return ours, PlainEncoding(ours)


def _emau(channels: int, backend: str | None) -> tuple[nn.Module, nn.Module]:
    ours = EMAU(channels, NODES, gradient="full", backend=backend)
    return ours, PlainEMAU(ours)


class PlainProjection(nn.Module):
    """Of a GCU, with the square multiplied out."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.anchor, self.sigma = (nn.Parameter(p.detach().clone()) for p in like.parameters())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t, w, s = x.flatten(2).mT, self.anchor, self.sigma.sigmoid()  # [B, N, C], [K, C]
        g = s**-2
        scores = t @ (w * g).T - t.square() @ (g / 2).T - (w.square() * g).sum(1) / 2
        q = scores.softmax(2)  # [B, N, K]
        mass = q.sum(1)[..., None]
        z = (q.mT @ t - mass * w) / s / (mass + 1e-9)
        return F.normalize(z, dim=2), q.mT.unflatten(2, x.shape[2:])


class PlainReprojection(nn.Module):
    def forward(self, nodes: Tensor, assignment: Tensor, residual: Tensor) -> Tensor:
        y = torch.baddbmm(residual.flatten(2).mT, assignment.flatten(2).mT, nodes)
        return y.mT.unflatten(2, assignment.shape[2:])


class PlainEncoding(nn.Module):
    """Of EncNet, with the square multiplied out."""

    def __init__(self, like: Encoding) -> None:
        super().__init__()
        self.codewords, self.scale = (nn.Parameter(p.detach().clone()) for p in like.parameters())

    def forward(self, x: Tensor) -> Tensor:
        t, c = x.flatten(2).mT, self.codewords  # [B, N, C], [K, C]
        squares = t.square().sum(2, keepdim=True) - 2 * t @ c.T + c.square().sum(1)
        q = (self.scale * squares).softmax(2)  # [B, N, K]
        return q.mT @ t - q.sum(1)[..., None] * c


class PlainEMAU(nn.Module):
    """Of EMANet, differentiated by PyTorch, with one division by both lengths for every base."""

    def __init__(self, like: EMAU) -> None:
        super().__init__()
        self.iterations = like.iterations
        self.project, self.restore, self.norm = map(
            copy.deepcopy, (like.project, like.restore, like.norm)
        )
        self.running = copy.deepcopy(like.running)
        self.rectify, self.activate = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        t = self.project(x).flatten(2).mT  # [B, N, C]
        mu = self.running.bases.T.clone().expand(len(x), -1, -1)  # [B, K, C]
        for _ in range(self.iterations):
            z = (t @ mu.mT).softmax(2)  # [B, N, K]
            a = z.mT @ t
            mu = a / (a.norm(dim=2) + 1e-6 * (1e-6 + z.sum(1)))[..., None]
        if self.training:
            with torch.no_grad():
                self.running.bases.lerp_(mu.mean(0).T, self.running.momentum)
        y = (z @ mu).mT.unflatten(2, x.shape[2:])
        return self.activate(self.norm(self.restore(self.rectify(y))) + x)


def check(contest: Contest) -> Check:
    """Ours and plain PyTorch in float32, result and gradients, against plain PyTorch in float64.

    Held to the law of tolerance (`segkernels.tolerance`); the longest sums, those of the weights'
    gradients, are over all pixels. A ReLU's gradient jumps at 0, where rounding decides the side:
    the input is one that stays clear of it.
    """
    twin = copy.deepcopy(contest.plain).double()
    x = next(x for x in _inputs(contest.x) if _clearance(twin, x) > CLEAR)
    cotangent = torch.randn_like(contest.plain.eval()(x))  # in training its bases would move
    results = [_results(m, x, cotangent) for m in (contest.ours, contest.plain)]
    truth = _results(twin, x.double(), cotangent.double())
    pixels = x.numel() // x.shape[1]
    verdicts = [
        verdict(got, plain, true, x.dtype, pixels)
        for got, plain, true in zip(*results, truth, strict=True)
    ]
    (forward, allowed), *gradients = verdicts
    gradient, allowed_gradient = max(gradients, key=lambda v: v[0] / v[1])
    return Check(contest.name, forward, gradient, (allowed, allowed_gradient))


def _inputs(like: Tensor) -> Iterator[Tensor]:
    """The contest's input, then others of its kind."""
    generator = torch.Generator().manual_seed(1)
    x = like
    while True:
        yield x
        x = torch.randn(like.shape, generator=generator).to(like.device)


def _clearance(twin: nn.Module, x: Tensor) -> float:
    """The smallest magnitude that enters a ReLU; infinite where there is none."""
    seen = [torch.tensor(torch.inf)]
    twin = copy.deepcopy(twin)  # whose state moves in training
    for part in twin.modules():
        if isinstance(part, nn.ReLU):
            part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().min()))
    with torch.no_grad():
        twin.train()(x.double())
    return float(torch.stack([s.cpu().double() for s in seen]).min())


def _results(module: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    """Output and gradients (input, then parameters) in training mode."""
    module.train()
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], cotangent)]


def times(contest: Contest, compiled: bool, budget: float) -> Times:
    """Time and peak memory of all contenders, in turns."""
    calls = dict(_calls(contest, compiled))
    run = interleave(calls, device=contest.x.device, budget=budget, rounds=(3, 100))
    others = [name for name in calls if name != FUSED]
    best = min(others, key=lambda name: run[name].median)
    return Times(
        contest.name,
        contest.work,
        {name: run[name].median for name in calls},
        run.ratio(best, FUSED).median,
        {name: memory_of(call, contest.x.device).peak for name, call in calls.items()},
    )


def _calls(contest: Contest, compiled: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    x, last = contest.x, contest.x.to(memory_format=torch.channels_last)
    plain_last = copy.deepcopy(contest.plain)
    plain_last.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    yield FUSED, _call(contest.ours, last, contest.backward)
    yield EAGER, _call(contest.plain, x, contest.backward)
    yield LAST, _call(plain_last, last, contest.backward)
    if compiled:
        os.environ.setdefault(
            "TORCHINDUCTOR_COMPILE_THREADS", "1"
        )  # no pool of processes for one graph
        call = _call(cast(nn.Module, torch.compile(plain_last)), last, contest.backward)
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
