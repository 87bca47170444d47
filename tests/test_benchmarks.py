"""The timer, what it says of memory, and the rule that a wrong result has no time."""

import json
import platform
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import segkernels
from benchmarks import __main__ as command
from benchmarks import baselines, compare, report
from benchmarks.goals import EVERY, GOALS, Goal, Verdict, judge
from benchmarks.layers import SeparableStep
from benchmarks.measure import COPY, PRODUCTS, Row, Settings, measure
from benchmarks.work import (
    DTYPES,
    EAGER,
    EXPANDED,
    LAYOUTS,
    MODES,
    OURS,
    Work,
    as_tuple,
    cases,
    operators,
)
from segkernels import tolerance
from segkernels.timing import copy_of, interleave, memory_of, saved_bytes

QUICK = Settings(budget=0.0, rounds=(2, 2), threads=1, compile=False)


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


# ---- rows ----------------------------------------------------------------------------------------


def toy(op="depthwise_conv2d", eps=None, **changes):
    """A small work on the backend that is always there."""
    case = cases(op)[0]
    small = {"shape": (1, 8, 9, 7), "rates": ((2, 2),), "outputs": 6, "eps": eps or (None, None)}
    case = replace(case, name="toy", **{k: v for k, v in small.items() if hasattr(case, k)})
    fields = {"dtype": "float32", "layout": "channels_last", "backend": "reference"}
    return Work(op, case, device="cpu", **(fields | changes))


@pytest.fixture(scope="module")
def rows():
    made = [row for op in operators() for row in measure(toy(op), MODES, QUICK)]
    step = SeparableStep(**vars(toy("separable_conv2d", eps=(1e-5, 1e-5))))
    return [*made, *measure(step, step.modes, QUICK)]


def test_a_row_has_every_number(rows):
    for row in rows:
        assert row.correct and row.timed and row.rounds == 2 and row.clock == "wall"
        assert {OURS, EAGER, COPY} <= set(row.seconds) and row.best_eager in row.seconds
        assert row.bytes > 0 and row.bandwidth > 0 and row.copy_share > 0
        assert set(row.memory) == {OURS, EAGER, EXPANDED} & set(row.seconds)
        assert (PRODUCTS in row.seconds) == (EXPANDED in row.seconds)
        assert set(row.saved) == (
            set() if row.mode == "forward" else {OURS, EAGER, EXPANDED} & set(row.seconds)
        )
        assert row.error_used <= 1 and row.errors[OURS] < 1e-4
        assert len(report.cells(row)) == len(report.HEADER)


@pytest.mark.parametrize(
    "spoil", [lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y[:, :1]]
)
def test_a_wrong_result_has_no_time(monkeypatch, spoil):
    true = segkernels.depthwise_conv2d

    def wrong(*args, backend=None, **kwargs):
        y = true(*args, backend="reference", **kwargs)
        return spoil(y) if backend == "native" else y

    monkeypatch.setattr(segkernels, "depthwise_conv2d", wrong)
    row, *_ = measure(toy(backend="native"), ("forward",), QUICK)
    assert not row.correct and not row.timed and "wrong result" in row.note
    assert not any("0." in cell for cell in report.cells(row)[6:13])
    goal = Goal(row.op, "toy", row.dtype, row.layout, row.mode, 1.0)
    assert judge([row], [goal])[0].outcome == "wrong results"


def test_a_wrong_gradient_has_no_time(monkeypatch):
    true = segkernels.depthwise_conv2d

    def wrong(x, weight, *args, backend=None, **kwargs):
        y = true(x, weight, *args, backend="reference", **kwargs)
        return y + 1e-2 * (x - x.detach()) if backend == "native" else y

    monkeypatch.setattr(segkernels, "depthwise_conv2d", wrong)
    for row in measure(toy(backend="native"), MODES, QUICK):
        assert not row.timed and "wrong gradient" in row.note


def test_a_failure_is_a_row_that_says_so(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of luck\nand more")

    monkeypatch.setattr(segkernels, "depthwise_conv2d", fails)
    rows = list(command._rows(toy(), MODES, QUICK))
    assert [row.note for row in rows] == ["RuntimeError: out of luck"] * len(MODES)


@pytest.mark.parametrize("op", operators())
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_baselines_compute_the_operator(op, dtype):
    if dtype == "bfloat16" and op in baselines.EXPANDED:
        pytest.skip("sums of squares in 16 bits: neither form is right")
    bound = 20 * torch.finfo(DTYPES[dtype]).eps
    for case in cases(op):
        few = {"outputs": 5} if op == "separable_conv2d" else {}
        small = replace(case, shape=(1, 6, 8, 7), **few)
        arguments = small.inputs(DTYPES[dtype], LAYOUTS["channels_last"], "cpu")
        wide = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
        truth = as_tuple(getattr(segkernels, op)(**wide, backend="reference"))
        forms = [partial(getattr(baselines, op), **arguments)]
        forms += [partial(f, **arguments) for o, f in baselines.EXPANDED.items() if o == op]
        folded = baselines.FOLDED.get(op, lambda **_: None)(**arguments)
        for form in (*forms, *([folded] if folded else [])):
            for got, true in zip(as_tuple(form()), truth, strict=True):
                assert tolerance.error(got, true) < bound


# ---- goals, report, comparison -------------------------------------------------------------------


def test_every_goal_names_a_case_and_a_row_that_exist():
    for goal in GOALS:
        assert goal.op in operators() and goal.mode in MODES
        assert goal.dtype in DTYPES and goal.layout in LAYOUTS
        assert goal.case == EVERY or goal.case in {case.name for case in cases(goal.op)}


def test_goals_are_judged_by_the_worst_row(rows):
    row = rows[0]
    ratio = row.ratios[EAGER]["median"]
    goal = Goal(row.op, EVERY, row.dtype, row.layout, row.mode, ratio)
    slower = replace(
        row, case="slower", ratios={EAGER: dict.fromkeys(row.ratios[EAGER], ratio / 2)}
    )
    assert judge([row], [goal])[0].outcome == "met"
    verdict = judge([row, slower], [goal])[0]
    assert (verdict.outcome, verdict.case) == ("missed", "slower")
    assert judge([], [goal])[0].outcome == "not measured"


def test_goals_in_short_say_what_is_met_and_what_is_missed():
    goals = [Goal("encode", "toy", "float32", "nchw", "forward", r, a) for r, a in
             ((2, EAGER), (3, EXPANDED))]  # fmt: skip
    goals.append(Goal("encode", "toy", "float32", "nchw", "forward+backward", 2.5, EXPANDED))
    found = [Verdict(goals[0], "met", "toy", 2.04), Verdict(goals[1], "missed", "toy", 2.999)]
    found += [Verdict(goals[2], "met", "toy", 123.4), Verdict(goals[2], "not measured")]
    assert report.goals_in_short(found) == [
        ("case", "mode", f"× {EAGER}", f"× {EXPANDED}"),
        ("encode toy float32 nchw", "forward", "2.04 ≥ 2", "**2.99 < 3**"),
        ("encode toy float32 nchw", "forward+backward", "", "123.40 ≥ 2.5"),
    ]
    assert report.goals_in_short([]) == [("case", "mode")]


def test_the_report_is_read_back_and_names_no_host(rows, tmp_path):
    environment = command.environment("cpu", 1)
    numbers, text = report.write(tmp_path, "day", rows, judge(rows), environment)
    assert numbers.parent.name == environment["machine"]
    content = json.loads(numbers.read_text())
    assert set(content) == {"schema", "environment", "rows", "goals"}
    for key in ("cpu", "cores", "threads", "isa", "torch", "commit", "date"):
        assert content["environment"][key] not in ("", None)
    assert report.read(numbers) == (environment, rows)
    assert len(platform.node()) < 4 or platform.node() not in numbers.read_text() + text.read_text()
    assert all(header in text.read_text() for header in report.HEADER)
    with pytest.raises(ValueError, match="schema"):
        (tmp_path / "other.json").write_text("{}")
        report.read(tmp_path / "other.json")


def scaled(row: Row, factor: float) -> Row:
    """The row with our time multiplied."""
    ours = {k: v * factor for k, v in row.seconds[OURS].items()}
    ratios = {n: {k: v / factor for k, v in r.items()} for n, r in row.ratios.items()}
    return replace(row, seconds=row.seconds | {OURS: ours}, ratios=ratios)


def test_compare_marks_what_became_slower(rows, tmp_path, capsys):
    def written(name, rows, **changes):
        environment = command.environment("cpu", 1) | changes
        return report.write(tmp_path / name, "day", rows, [], environment)[0]

    old = written("old", rows)
    assert compare.main(old, written("same", rows), 0.1) == 0
    assert compare.main(old, written("slower", [scaled(rows[0], 1.5), *rows[1:]]), 0.1) == 1
    assert capsys.readouterr().out.count("REGRESSED") == 1
    wrong = replace(rows[0], seconds={}, ratios={}, correct=False, note="error 1e+00")
    assert compare.main(old, written("wrong", [wrong, *rows[1:]]), 0.1) == 1
    assert compare.main(old, written("elsewhere", rows, machine="another"), 0.1) == 2
    assert compare.main(old, tmp_path / "missing.json", 0.1) == 2


def test_the_command_measures_writes_and_tells(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "cases", lambda op: [toy(op).case])
    arguments = ["--quick", "--backend", "reference", "--mode", "forward", "--case", "toy"]
    arguments += ["--device", "cpu"]
    assert command.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(op in out for op in operators()) and "toy" in out
    assert len(list(tmp_path.glob("*/*.json"))) == len(list(tmp_path.glob("*/*.md"))) == 1
    assert command.main(["--case", "nothing", "--device", "cpu"]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "foo"], "no device 'foo' here, only cpu"),
        (["--device", "cuda:99"], "no device 'cuda:99' here, only cpu"),
        (["--threads", "0"], "--threads: a positive int, not '0'"),
        (["--threads", "two"], "--threads: a positive int, not 'two'"),
        (["--budget", "-1"], "--budget: a positive float, not '-1'"),
        (["--limit", "nan"], "--limit: a positive float, not 'nan'"),
    ],
)
def test_bad_options(arguments, words, capsys):
    with pytest.raises(SystemExit) as left:
        command.main([*arguments, "--list"])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path):
    def interrupted(work, modes, settings):
        yield from measure(work, modes[:1], QUICK)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "cases", lambda op: [toy(op).case])
    monkeypatch.setattr(command, "measure", interrupted)
    arguments = ["--backend", "reference", "--device", "cpu", "--threads", "1"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 130
    assert len(report.read(next(tmp_path.glob("*/*.json")))[1]) == 1
