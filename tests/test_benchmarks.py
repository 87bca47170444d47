"""The benchmarks: rows, goals and reports, and the rule that a wrong result has no time."""

import json
import platform
from dataclasses import replace
from functools import partial

import pytest
import torch

import segkernels
from benchmarks import __main__ as command
from benchmarks import baselines, compare, report
from benchmarks.goals import EVERY, GOALS, Goal, Verdict, judge
from benchmarks.layers import SeparableStep
from benchmarks.measure import COPY, PRODUCTS, Row, Settings, measure
from benchmarks.work import (
    BEST_RIVAL,
    COMPILED,
    COMPILED_OTHER,
    DTYPES,
    EAGER,
    EXPANDED,
    LAYOUTS,
    MODES,
    OTHER_FORMAT,
    OURS,
    Work,
    as_tuple,
    cases,
    cotangents,
    operators,
)
from segkernels import tolerance

QUICK = Settings(budget=0.0, rounds=(2, 2), threads=1, compiled=())


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
        assert (PRODUCTS in row.seconds) == (row.op in baselines.PRODUCTS)
        assert row.best_rival == "" and row.ratio(BEST_RIVAL) is None
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


RIVALS = (EAGER, OTHER_FORMAT, COMPILED, COMPILED_OTHER)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_best_rival_is_the_fastest_of_eager_and_compiled_in_both_formats(monkeypatch, layout):
    formats = []  # whether a compiled call's features have the layout of the row

    def compiled(features, **others):
        formats.append(features.is_contiguous(memory_format=LAYOUTS[layout]))
        return baselines.em_attention(features, **others)

    monkeypatch.setattr(Work, "compiled", lambda work: compiled)
    work = toy("em_attention", layout=layout)
    for row in measure(work, MODES, replace(QUICK, compiled=(COMPILED, COMPILED_OTHER))):
        fastest = min(RIVALS, key=lambda name: row.seconds[name]["median"])
        assert row.best_rival == fastest and row.ratio(BEST_RIVAL) == row.ratios[fastest]
        assert report.cells(row)[report.HEADER.index("× best rival")].endswith(f") {fastest}")
    assert {*formats} == {True, False}


def test_without_the_compiler_there_is_no_best_rival(monkeypatch):
    def fails(**arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Work, "compiled", lambda work: fails)
    both = replace(QUICK, compiled=(COMPILED, COMPILED_OTHER))
    (row,) = measure(toy("em_attention"), ("forward",), both)
    assert row.timed and row.note == "torch.compile failed: RuntimeError"
    goal = Goal(row.op, "toy", row.dtype, row.layout, row.mode, 0.0, BEST_RIVAL)
    assert judge([row], [goal])[0].outcome == "not measured"


def test_goals_name_the_forms_that_are_compiled():
    """In a run for goals and in a full one, and only there."""
    case = next(c for c in cases("em_attention") if c.name == "c512_65_k64")
    held = Work("em_attention", case, "float32", "nchw", "reference", "cpu")
    goals = replace(QUICK, goals=True)
    assert command._compiled(held, goals) == (COMPILED, COMPILED_OTHER)
    assert command._compiled(held, QUICK) == command._compiled(toy(), goals) == ()
    full = replace(goals, compiled=(COMPILED,))
    assert command._compiled(toy(), full) == (COMPILED,)
    assert command._compiled(held, full) == (COMPILED, COMPILED_OTHER)


def test_what_has_no_gradient_costs_nothing():
    """With gradient="last" neither the bases that come out nor those that go in have one."""
    case = replace(toy("em_attention").case, gradient="last")
    work = replace(toy("em_attention"), case=case)
    way = work.ways(work.arguments(), True, {})[EAGER]
    dx, dmu = way.call("forward+backward", cotangents(way.results()))()
    assert dx.any() and not dmu.any()
    assert all(row.timed for row in measure(work, MODES, QUICK))


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


def test_a_goal_against_the_best_rival_tells_which_that_was(rows):
    row = next(r for r in rows if r.op == "em_attention")
    times = row.ratios | {COMPILED: dict.fromkeys(row.ratios[EAGER], 1.25)}
    row = replace(row, ratios=times, seconds=row.seconds | {COMPILED: row.seconds[EAGER]})
    goal = Goal(row.op, "toy", row.dtype, row.layout, row.mode, 1.5, BEST_RIVAL)
    (verdict,) = judge([replace(row, best_rival=COMPILED)], [goal])
    assert (verdict.outcome, verdict.median, verdict.rival) == ("missed", 1.25, COMPILED)
    assert report.goal_cells(verdict)[2] == "≥ 1.5× best rival (compile)"
    assert report.goals_in_short([verdict])[1][2] == "**1.25 < 1.5 (compile)**"
    assert judge([row], [goal])[0].outcome == "not measured"


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
