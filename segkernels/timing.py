"""The one timer: how long calls take against each other, and what they keep in memory.

Speed is a comparison, so the calls that are compared run in turns (A B C, B C A, ...) in one
process with one pinned thread count: a slow second of the machine falls on all of them, and a ratio
is taken round by round before its median is. On the CPU a short call is made once untimed at the
start of its turn, so that it finds its own data in the caches and not its predecessor's.

    run = interleave({"ours": lambda: f(x), "eager": lambda: g(x), "copy": copy_of(nbytes)})
    run["ours"].median              # seconds per call
    run.ratio("eager", "ours")      # how many times faster ours is: median, 20 % and 80 % quantile

On the CPU a turn is timed by the wall clock. On a GPU it is timed by events around the replay of a
CUDA graph (or around plain launches, where a call cannot be captured), with no host synchronisation
inside a turn; several variants of one call over different inputs defeat the L2 cache.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[], float]

LOW, HIGH = 0.2, 0.8  # the quantiles that stand for the spread
TURN = 2e-3  # seconds of work in one turn; shorter calls are repeated within it
WARMED = 20e-3  # seconds; a call shorter than this is made once untimed at the start of a turn
MAX_CALLS = 1000  # calls in one turn


@dataclass(frozen=True)
class Spread:
    """Median with its 20 % and 80 % quantiles, and the minimum of the samples."""

    median: float
    low: float
    high: float
    minimum: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        return Spread(
            _quantile(samples, 0.5), _quantile(samples, LOW), _quantile(samples, HIGH), min(samples)
        )


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round; a sample is the mean over `calls` calls."""

    samples: tuple[float, ...]
    calls: int

    @property
    def spread(self) -> Spread:
        return Spread.of(self.samples)

    @property
    def median(self) -> float:
        return self.spread.median

    @property
    def minimum(self) -> float:
        return min(self.samples)


@dataclass(frozen=True)
class Run:
    """What one interleaved run measured: a Timing per name, and under which conditions."""

    timings: dict[str, Timing]
    clock: str  # "wall", "graph" (CUDA graph replay) or "events" (CUDA launches)
    threads: int

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def ratio(self, other: str, ours: str) -> Spread:
        """How many times longer `other` takes than `ours`, by pairs of the same round."""
        pairs = zip(self[other].samples, self[ours].samples, strict=True)
        return Spread.of([theirs / mine for theirs, mine in pairs])


@dataclass(frozen=True)
class Memory:
    """Bytes of one call: the most it held at once above the state before, and what it returned."""

    peak: int
    result: int

    @property
    def extra(self) -> int:
        """Peak beyond inputs and results: the workspace."""
        return max(self.peak - self.result, 0)


def interleave(
    calls: Mapping[str, Call | Sequence[Call]],
    *,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    budget: float = 1.0,
    rounds: tuple[int, int] = (7, 400),
    precision: float = 0.01,
    clock: Clock = time.perf_counter,
) -> Run:
    """Time several calls in turns.

    Rounds are repeated, at least `rounds[0]` (three, where one takes longer than the budget) and at
    most `rounds[1]` of them, until every median is known to `precision` (half the width of its 95 %
    interval, relative) or `budget` seconds are spent after the warm-up. A call given as a sequence
    is a set of variants (the same work on other inputs) taken in turn. `threads` pins PyTorch's
    intra-op threads for the duration.
    """
    variants = {name: [call] if callable(call) else list(call) for name, call in calls.items()}
    with _pinned(threads) as pinned, _collector_paused(), side_stream(device):
        turns, kind = _turns(variants, torch.device(device), clock)
        samples: dict[str, list[float]] = {name: [] for name in turns}
        start = clock()
        least = rounds[0]
        for done in range(1, rounds[1] + 1):
            for name in _rotated(list(turns), done):
                samples[name].append(turns[name].seconds())
            if done == 1 and clock() - start > budget:
                least = min(least, 3)
            settled = done >= least and all(_half_width(s) <= precision for s in samples.values())
            if done >= least and (settled or clock() - start >= budget):
                break
    timings = {name: Timing(tuple(samples[name]), len(turns[name].sequence)) for name in turns}
    return Run(timings, kind, pinned)


def copy_of(nbytes: int, device: torch.device | str = "cpu") -> Call:
    """A call that moves `nbytes` through memory (half read, half written): the yardstick."""
    source = torch.zeros(max(nbytes // 8, 1), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def memory_of(call: Call, device: torch.device | str = "cpu") -> Memory:
    """Peak memory of a call above what was alive before it, exact in every byte PyTorch allocates.

    On the CPU the allocator's own reports are added up; memory that a kernel takes from elsewhere
    (malloc: a few blocks a thread) is not seen. On a GPU it is the caching allocator's counter.
    """
    call()  # what is made once (weights packed, code compiled, handles) is not the call's
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return Memory(torch.cuda.max_memory_allocated(device) - before, _bytes(_tensors(result)))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it announces itself on stderr
    profile = torch.autograd.profiler.profile(profile_memory=True, use_kineto=False)
    with profile as profiler:
        result = call()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Memory(peak, _bytes(_tensors(result)))


def saved_bytes(forward: Call, exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages that `forward` saves for its backward, parameters excluded.

    A view counts as the whole storage it keeps alive. Storages of the tensors in `exclude` (the
    parameters) are not counted: they live on in any case.
    """
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.detach())  # kept, so that no address is used twice
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    known = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    counted = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    del result
    return _bytes(counted)


@contextlib.contextmanager
def side_stream(device: torch.device | str) -> Iterator[None]:
    """Where to prepare the calls: a backward runs on the stream of its forward, and a graph
    cannot be captured on the default stream. Nothing on the CPU."""
    if torch.device(device).type != "cuda":
        yield
        return
    stream = _stream(torch.device(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


class _WallTurn:
    """One turn of a call: its sequence of calls under the wall clock."""

    def __init__(self, sequence: list[Call], clock: Clock, warm: bool) -> None:
        self.sequence, self.clock, self.warm = sequence, clock, warm

    def seconds(self) -> float:
        if self.warm:
            self.sequence[-1]()
        start = self.clock()
        for call in self.sequence:
            call()
        return (self.clock() - start) / len(self.sequence)


class _CudaTurn:
    """One turn of a call on a GPU: events around its launches, or around one graph of them all."""

    def __init__(self, sequence: list[Call], graph: torch.cuda.CUDAGraph | None) -> None:
        self.sequence, self.graph = sequence, graph
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self) -> float:
        self.start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.sequence:
                call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1e-3 / len(self.sequence)


def _turns(
    variants: Mapping[str, list[Call]], device: torch.device, clock: Clock
) -> tuple[dict[str, Any], str]:
    """Warm every call up, choose how often each is repeated in a turn; capture where possible."""
    cuda = device.type == "cuda"
    sequences, seconds = {}, {}
    for name, calls in variants.items():
        for call in calls:
            call()
        once = _CudaTurn(calls, None) if cuda else _WallTurn(calls, clock, warm=False)
        seconds[name] = _estimate(once, clock)
        repeats = math.ceil(TURN / max(seconds[name] * len(calls), 1e-9))
        sequences[name] = calls * max(1, min(repeats, MAX_CALLS // len(calls)))
    if not cuda:
        return {n: _WallTurn(s, clock, seconds[n] < WARMED) for n, s in sequences.items()}, "wall"
    try:
        graphs = {name: _captured(s, device) for name, s in sequences.items()}
    except RuntimeError:  # one that cannot be captured: all are launched, or the ratio is not fair
        torch.cuda.synchronize(device)
        return {name: _CudaTurn(s, None) for name, s in sequences.items()}, "events"
    return {name: _CudaTurn(s, graphs[name]) for name, s in sequences.items()}, "graph"


def _estimate(turn: _WallTurn | _CudaTurn, clock: Clock) -> float:
    """Seconds of a call: the fastest of three, of one where three take long."""
    start, fastest = clock(), math.inf
    for _ in range(3):
        fastest = min(fastest, turn.seconds())
        if clock() - start > 10 * TURN:
            break
    return fastest


def _rotated(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def _captured(sequence: list[Call], device: torch.device) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream(device)):
        for call in sequence:
            call()
    graph.replay()
    return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _pinned(threads: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    pinned = before if threads is None else threads
    torch.set_num_threads(pinned)
    try:
        yield pinned
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _half_width(samples: Sequence[float]) -> float:
    """Half the 95 % interval of the median (order statistics n/2 ± 0.98 √n), relative to it."""
    ordered, n = sorted(samples), len(samples)
    reach = 0.98 * math.sqrt(n)
    low = ordered[max(math.floor(n / 2 - reach), 0)]
    high = ordered[min(math.ceil(n / 2 + reach), n - 1)]
    return (high - low) / 2 / _quantile(ordered, 0.5)


def _tensors(result: object) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
