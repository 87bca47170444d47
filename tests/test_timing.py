"""The timer, and what it says of memory."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from segkernels.timing import copy_of, interleave, memory_of, saved_bytes


class Machine:
    """A clock that only its own work moves on; `pace` is how slow the machine is at the moment."""

    def __init__(self):
        self.now, self.pace, self.log = 0.0, 1.0, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.now += seconds * self.pace
            self.log.append(name)

        return call


# ---- the timer -----------------------------------------------------------------------------------


def test_calls_take_turns():
    machine = Machine()
    calls = {name: machine.work(name, 0.1) for name in "abc"}
    run = interleave(calls, clock=machine, rounds=(4, 4))
    assert "".join(machine.log[-12:]) == "bcacababcbca"
    assert {name: len(t.samples) for name, t in run.timings.items()} == dict.fromkeys("abc", 4)


def test_a_known_ratio_is_found_in_seconds_of_one_call():
    machine = Machine()
    run = interleave(
        {"slow": machine.work("s", 3e-4), "fast": machine.work("f", 1e-4)}, clock=machine
    )
    assert run["fast"].calls == 20 and run["slow"].calls == 7  # a turn is two milliseconds of work
    assert run["fast"].median == pytest.approx(1e-4)
    assert run.ratio("slow", "fast").median == pytest.approx(3.0)


def test_a_slow_phase_of_the_machine_leaves_the_ratio_alone():
    machine = Machine()

    def uneven(name, seconds):
        work = machine.work(name, seconds)

        def call():
            machine.pace = 5.0 if (len(machine.log) // 2) % 3 == 0 else 1.0
            work()

        return call

    calls = {"other": uneven("o", 0.2), "ours": uneven("u", 0.1)}
    run = interleave(calls, clock=machine, rounds=(30, 30))
    assert run["ours"].spread.high > 4 * run["ours"].spread.low
    assert run.ratio("other", "ours").median == pytest.approx(2.0)


def test_it_stops_when_the_median_is_known_or_the_budget_is_spent():
    machine = Machine()
    steady = interleave({"a": machine.work("a", 0.1)}, clock=machine, rounds=(7, 400), budget=9e9)
    assert len(steady["a"].samples) == 7
    spans = iter(range(1, 10_000))

    def erratic():
        machine.now += 0.1 * (1 + next(spans) % 7)

    limited = interleave({"a": erratic}, clock=machine, rounds=(7, 400), budget=5.0)
    assert 7 < len(limited["a"].samples) < 30


def test_threads_are_pinned_recorded_and_given_back():
    before, seen = torch.get_num_threads(), set()
    run = interleave(
        {"a": lambda: seen.add(torch.get_num_threads())}, threads=1, rounds=(2, 2), budget=0.0
    )
    assert (run.threads, seen, torch.get_num_threads()) == (1, {1}, before)


def test_variants_take_turns_within_a_turn():
    machine = Machine()
    interleave(
        {"a": [machine.work("x", 1e-3), machine.work("y", 1e-3)]}, clock=machine, rounds=(2, 2)
    )
    assert "".join(machine.log[-2:]) == "xy"


class Cuda:
    """As much of torch.cuda as the timer uses, on the clock of a Machine."""

    def __init__(self, machine, captures=True):
        self.machine, self.captures, self.captured = machine, captures, []

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.machine.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def CUDAGraph(self):
        return SimpleNamespace(seconds=0.0, replay=lambda: None)

    @contextmanager
    def graph(self, graph, stream):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        start = self.machine.now
        yield
        graph.seconds = self.machine.now - start
        graph.replay = lambda: setattr(self.machine, "now", self.machine.now + graph.seconds)

    def Stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def stream(self, stream):
        return nullcontext()

    def synchronize(self, device=None):
        pass


@pytest.mark.parametrize(("captures", "clock"), [(True, "graph"), (False, "events")])
def test_a_gpu_is_timed_by_events_around_graphs(monkeypatch, captures, clock):
    machine = Machine()
    monkeypatch.setattr(torch, "cuda", Cuda(machine, captures))
    calls = {"slow": machine.work("s", 3e-4), "fast": [machine.work("f", 1e-4)] * 4}
    run = interleave(calls, device="cuda", clock=machine, rounds=(3, 3))
    assert run.clock == clock and run["fast"].calls in (20, 24)  # whole passes over the four
    assert run["fast"].median == pytest.approx(1e-4)
    assert run.ratio("slow", "fast").median == pytest.approx(3.0)


# ---- memory --------------------------------------------------------------------------------------


def test_peak_memory_is_exact():
    a = torch.ones(100, 100)

    def two_steps():
        b = a.mul(a)
        c = b.mul(b)
        return c[:50]

    memory = memory_of(two_steps)
    assert (memory.peak, memory.result, memory.extra) == (80_000, 40_000, 40_000)
    assert memory_of(lambda: a.mul_(1.0)).peak in range(0, 64)  # a scalar at most


def test_saved_bytes_are_exact():
    a, p = (torch.ones(100, 100, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: a @ p, exclude=[p]) == 40_000
    assert saved_bytes(lambda: (a @ p).relu(), exclude=[p]) == 80_000
    assert saved_bytes(lambda: a * a) == 40_000  # one storage, saved twice
    assert saved_bytes(lambda: a[:1] * 2.0 * a[1:2]) == 40_400  # a view keeps its whole storage


def test_copy_moves_the_bytes_it_is_asked_for():
    assert copy_of(80_000)().nbytes == 40_000
