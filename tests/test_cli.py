"""The command line: exit statuses, the reports as JSON and as text, Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from segkernels import __main__ as command_line
from segkernels import console, doctor, fused, native

ROOT = Path(__file__).resolve().parent.parent


class TestFront:
    def test_help_shows_every_command_with_examples(self, capsys) -> None:
        assert command_line.main([]) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text for name in command_line.COMMANDS)
        assert "python -m segkernels doctor --json" in text

    @pytest.mark.parametrize("name", list(command_line.COMMANDS))
    def test_every_command_exists(self, name) -> None:
        command = command_line.COMMANDS[name]
        assert importlib.util.find_spec(command.module)
        module = importlib.import_module(command.module)
        assert callable(getattr(module, command.function))

    @pytest.mark.parametrize("name", list(command_line.COMMANDS))
    def test_every_command_has_help_with_an_example(self, name, capsys) -> None:
        with pytest.raises(SystemExit) as left:
            command_line.main([name, "--help"])
        assert left.value.code == 0
        assert "python -m " in capsys.readouterr().out

    def test_an_unknown_command(self, capsys) -> None:
        assert command_line.main(["trian"]) == 2
        assert "no command 'trian'" in capsys.readouterr().err

    def test_its_version(self, capsys) -> None:
        assert command_line.main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("segkernels ")

    def test_ctrl_c_is_no_traceback(self, monkeypatch, capsys) -> None:
        def interrupted(_: list[str]) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(doctor, "main", interrupted)
        assert command_line.main(["doctor"]) == 130
        assert capsys.readouterr().err.strip() == "interrupted"

    def test_without_the_benchmarks(self, monkeypatch, tmp_path, capsys) -> None:
        monkeypatch.setattr(command_line, "__file__", str(tmp_path / "segkernels" / "x.py"))
        assert command_line.main(["bench"]) == 1
        assert "source checkout" in capsys.readouterr().err


class TestDoctor:
    @pytest.fixture(autouse=True)
    def native_is_built(self, monkeypatch) -> None:
        """Whether it is has tests of its own; here the report is tested, on the reference."""
        facts = {"compiler": "g++ 12", "source_hash": "0"}
        monkeypatch.setattr(native, "why_not", lambda _: None)
        monkeypatch.setattr(native, "metadata", lambda _: facts)
        table = {"native": "not asked for in this test", "triton": None, "reference": None}
        monkeypatch.setattr(fused, "explain", lambda *_, **__: table | {"triton": "not either"})
        monkeypatch.setattr(doctor, "_torchvision", lambda: doctor.Finding("torchvision", "ok", ""))

    def test_json(self, capsys) -> None:
        status = doctor.main(["--json"])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] is (status == 0)
        assert set(report) == {
            "version", "ok", "environment", "operators", "self_tests", "build"
        }  # fmt: skip
        for finding in report["environment"] + report["self_tests"]:
            assert set(finding) == {"name", "status", "value", "remedy"}
            assert finding["status"] in ("ok", "note", "failed")
            assert finding["status"] != "failed" or finding["remedy"]
        names = [finding["name"] for finding in report["environment"]]
        assert {"python", "torch", "numpy", "triton", "compiler", "nvcc", "GPU"} <= set(names)
        assert set(report["operators"]) == set(fused.OPERATORS)
        for devices in report["operators"].values():
            assert set(devices["cpu"]) == {"native", "triton", "reference"}
        tested = [finding["name"] for finding in report["self_tests"]]
        assert tested[: len(fused.OPERATORS)] == [f"{op} cpu reference" for op in fused.OPERATORS]

    def test_all_well_is_status_0(self, capsys) -> None:
        assert doctor.main([]) == 0
        assert "all well" in capsys.readouterr().out

    def test_a_missing_library_fails_with_its_remedy(self, monkeypatch, capsys) -> None:
        reason = "it is not built; to build it: python -m segkernels build"
        monkeypatch.setattr(native, "why_not", lambda _: reason)
        assert doctor.main([]) == 1
        assert "failed: native cpu: python -m segkernels build" in capsys.readouterr().out

    @pytest.mark.parametrize("factor", [1 + 1e-3, float("nan")])
    def test_wrong_numbers_fail(self, factor, monkeypatch, capsys) -> None:
        results = doctor._results

        def wrong(op: str, backend: str, inputs: dict[str, object]) -> list[torch.Tensor]:
            made = results(op, backend, inputs)
            return [made[0] * factor, *made[1:]] if backend == "fast" else made

        monkeypatch.setattr(doctor, "_results", wrong)
        monkeypatch.setattr(doctor, "_usable", lambda _: [("depthwise_conv2d", "cpu", "fast")])
        public = doctor.segkernels.depthwise_conv2d
        monkeypatch.setattr(
            doctor.segkernels,
            "depthwise_conv2d",
            lambda *a, backend, **k: public(*a, backend="reference", **k),
        )
        assert doctor.main([]) == 1
        out = capsys.readouterr().out
        assert "SEGKERNELS_BACKEND=reference" in out

    def test_a_backend_that_raises_fails(self, monkeypatch, capsys) -> None:
        monkeypatch.setattr(doctor, "_usable", lambda _: [("depthwise_conv2d", "cpu", "absent")])
        assert doctor.main(["--json"]) == 1
        (finding,) = json.loads(capsys.readouterr().out)["self_tests"]
        assert finding["status"] == "failed"
        assert "absent" in finding["value"]


@pytest.mark.parametrize(
    ("triton", "numpy", "interpret", "status"),
    [
        (None, "2.4.6", "0", "note"),
        ("3.7.1", "2.4.6", "1", "ok"),
        ("3.6.0", "2.3.0", "1", "ok"),
        ("3.6.0", "2.5.2", "0", "note"),
        ("3.6.0", "2.5.2", "1", "failed"),
        ("3.5.1", "2.3.0", "0", "failed"),
    ],
)
def test_triton_and_numpy(monkeypatch, triton, numpy, interpret, status) -> None:
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    finding = doctor._triton()
    assert finding.status == status
    assert bool(finding.remedy) is (status != "ok")


def test_a_torchvision_for_another_torch(monkeypatch, tmp_path) -> None:
    broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._torchvision()
    assert finding.status == "failed"
    assert "torchvision::nms does not exist" in finding.value
    assert "pip uninstall torchvision" in finding.remedy


class TestExplain:
    def test_usable_and_why_not(self, capsys) -> None:
        assert doctor.explain_main(["depthwise_conv2d", "--kernel", "9"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "kernel 9x9 is larger than 7x7" in out
        assert "reference ok usable" in out

    def test_a_shape(self, capsys) -> None:
        assert doctor.explain_main(["separable_conv2d", "--shape", "2,8,5,7"]) == 0
        assert "x 2x8x5x7" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments",
        [["depthwise_conv2d", "--shape=-1,4,8,8"],
         ["no_such_operator"], ["depthwise_conv2d", "--case", "no_such_case"],
         ["depthwise_conv2d", "--shape", "1,two"], ["depthwise_conv2d", "--shape", "1,64"],
         ["depthwise_conv2d", "--kernel", "4"], ["depthwise_conv2d", "--stride", "0"]],
    )  # fmt: skip
    def test_bad_arguments(self, arguments, capsys) -> None:
        with pytest.raises(SystemExit) as left:
            doctor.explain_main(arguments)
        assert left.value.code == 2


class TestBuild:
    def test_the_plan_alone(self, capsys) -> None:
        assert command_line.main(["build", "none", "--plan"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("segkernels ")
        assert "SEGKERNELS_BUILD=none" in out

    def test_a_request_that_cannot_be_met(self, monkeypatch, tmp_path, capsys) -> None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        assert command_line.main(["build", "cuda"]) == 1
        assert capsys.readouterr().err.startswith("error: 'cuda' was asked for and cannot be built")

    @pytest.mark.build
    def test_ctrl_c_ends_the_compiler_and_leaves_nothing(self, tmp_path) -> None:
        """A compiler that never ends; the signal reaches the command alone, not its group."""
        compiler = tmp_path / "g++"
        compiler.write_text(
            "#!/bin/sh\n[ $1 = --version ] && exec echo g++ 1\n"
            f"echo $$ >> {tmp_path}/started\nexec sleep 600\n"
        )
        compiler.chmod(0o755)
        source = tmp_path / "csrc" / "toy" / "cpu.cpp"
        source.parent.mkdir(parents=True)
        source.touch()
        code = INTERRUPTED.format(package=str(ROOT / "segkernels"), tmp=str(tmp_path))
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | {"CXX": str(compiler), "MAX_JOBS": "2"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started, deadline = tmp_path / "started", time.monotonic() + 200
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
        assert process.returncode == 130
        assert err.strip() == "interrupted"
        assert not list((tmp_path / "out").iterdir())
        compilers = [Path(f"/proc/{pid}") for pid in started.read_text().split()]
        while any(map(running, compilers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(running, compilers))


def running(process: Path) -> bool:
    """Whether it still runs; one that ended may wait for its parent to take notice."""
    try:
        return (process / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# The command on a tree of the test's own, and without the front door: its import of torch is slow.
INTERRUPTED = """
import sys, types
from pathlib import Path
door = sys.modules["segkernels"] = types.ModuleType("segkernels")
door.__path__ = [{package!r}]
from segkernels import __main__, build_plan
tree = build_plan.Tree(Path({package!r}), Path({tmp!r}) / "csrc")
build_plan.Tree.here = lambda: tree
sys.exit(__main__.main(["build", "cpu", "--output", {tmp!r} + "/out"]))
"""


class TestTables:
    ROWS = (("native", "ok", "usable"), ("triton", "note", "why"))

    def test_without_rich(self, monkeypatch, capsys) -> None:
        monkeypatch.setitem(sys.modules, "rich.box", None)
        console.print_table("Backends", ("backend", "status", "why"), self.ROWS)
        assert capsys.readouterr().out.splitlines() == [
            "Backends",
            "  backend  status  why",
            "  native   ok      usable",
            "  triton   note    why",
            "",
        ]

    def test_no_colour_without_a_terminal(self, capsys) -> None:
        console.print_table("Backends", ("backend", "status", "why"), self.ROWS)
        out = capsys.readouterr().out
        assert "\x1b" not in out
        assert "usable" in out
