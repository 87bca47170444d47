"""The native build: what it decides on every kind of machine, and what it does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from segkernels import build as building
from segkernels.build_plan import MARK, Plan, Tree, make_plan
from segkernels.toolchain import (
    ARCHS,
    BuildError,
    Tool,
    Torch,
    choose_archs,
    choose_jobs,
    covers,
    find_compiler,
    find_nvcc,
)

ROOT = Path(__file__).resolve().parent.parent


def script(folder: Path, name: str, body: str) -> Path:
    """A program of that name that runs `body` in a shell."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def nvcc_stub(folder: Path, release: str) -> Path:
    """An nvcc that knows its release and architectures, and cannot compile."""
    archs = " ".join(f"compute_{n}" for n in (75, 80, 86, 89, 90, 100, 120))
    return script(
        folder / "bin",
        "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, release {release}";;\n'
        f'--list-gpu-arch) printf "%s\\n" {archs};; *) exit 1;; esac',
    )


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A checkout with one operator, `toy`, on the CPU and in CUDA."""
    csrc, package = tmp_path / "tree" / "csrc", tmp_path / "tree" / "segkernels"
    for folder in (csrc / "toy", csrc / "common", package):
        folder.mkdir(parents=True)
    (csrc / "common" / "sign.h").write_text("#define SIGN 2.0\n")
    (csrc / "toy" / "cpu.cpp").write_text("int toy() { return 1; }\n")
    (csrc / "toy" / "cuda.cu").write_text("__global__ void toy() {}\n")
    (package / "_version.py").write_text('__version__ = "1.2.3"\n')
    return Tree(package, csrc)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """An environment with nothing on PATH and no CUDA toolkit."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty"), "CUDA_HOME": str(tmp_path / "empty")}


def with_compiler(env: dict[str, str]) -> dict[str, str]:
    script(Path(env["PATH"]), "g++", "echo g++ 99.1")
    return env


def with_nvcc(env: dict[str, str], tmp_path: Path, release: str) -> dict[str, str]:
    nvcc_stub(tmp_path / "cuda", release)
    return env | {"CUDA_HOME": str(tmp_path / "cuda")}


def with_torch(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    torch = Torch(Path("/torch"), version, cuda, None)
    monkeypatch.setattr("segkernels.build_plan.find_torch", lambda: torch)


class TestPlan:
    def test_without_a_compiler_nothing_is_built_and_the_plan_says_so(self, tree, env) -> None:
        plan = make_plan(env=env, tree=tree)
        assert plan.libraries == ()
        assert "no C++ compiler on PATH" in plan.skipped["cpu"]
        assert "python -m segkernels build" in plan.skipped["cpu"]
        assert building.build(plan) == []

    def test_cxx_is_obeyed_or_refused(self, tree, env) -> None:
        with_compiler(env)
        assert make_plan(env=env, tree=tree).libraries == ("cpu",)
        broken = make_plan(env=env | {"CXX": "no-such-compiler"}, tree=tree)
        assert "CXX=no-such-compiler does not run" in broken.skipped["cpu"]

    def test_without_nvcc_only_the_cpu_library(self, tree, env, monkeypatch) -> None:
        with_torch(monkeypatch, "2.13.0+cu130", "13.0")
        plan = make_plan(env=with_compiler(env), tree=tree)
        assert plan.libraries == ("cpu",)
        assert "no working nvcc" in plan.skipped["cuda"]

    def test_an_nvcc_of_another_major_version_is_not_used(
        self, tree, env, tmp_path, monkeypatch
    ) -> None:
        with_torch(monkeypatch, "2.13.0+cu130", "13.0")
        env = with_nvcc(with_compiler(env), tmp_path, "11.8")
        plan = make_plan(env=env, tree=tree)
        assert plan.libraries == ("cpu",)
        assert "nvcc is CUDA 11.8, torch 2.13.0+cu130 is CUDA 13.0" in plan.skipped["cuda"]
        with pytest.raises(BuildError, match=r"CUDA 11\.8"):
            make_plan("cuda", env=env, tree=tree)

    def test_an_nvcc_of_another_minor_version_is_used_with_a_note(
        self, tree, env, tmp_path, monkeypatch
    ) -> None:
        with_torch(monkeypatch, "2.13.0+cu130", "13.0")
        plan = make_plan(env=with_nvcc(with_compiler(env), tmp_path, "13.2"), tree=tree)
        assert plan.libraries == ("cpu", "cuda")
        assert any("13.2" in note for note in plan.notes)

    def test_the_gpu_is_never_asked_for(self, tree, env, tmp_path, monkeypatch) -> None:
        with_torch(monkeypatch, "2.13.0+cu130", "13.0")
        plan = make_plan(env=with_nvcc(with_compiler(env), tmp_path, "13.0"), tree=tree)
        assert plan.libraries == ("cpu", "cuda")
        assert (plan.archs, plan.archs_from) == (ARCHS, "default list")

    def test_a_cpu_torch_gets_cuda_only_when_asked(self, tree, env, tmp_path, monkeypatch) -> None:
        with_torch(monkeypatch, "2.13.0+cpu", None)
        env = with_nvcc(with_compiler(env), tmp_path, "13.0")
        assert "CPU build of torch" in make_plan(env=env, tree=tree).skipped["cuda"]
        plan = make_plan("cuda", env=env, tree=tree)
        assert plan.libraries == ("cpu", "cuda")
        assert "compiled only" in plan.text()

    def test_a_torch_without_the_stable_abi_is_refused(self, tree, env, monkeypatch) -> None:
        with_torch(monkeypatch, "2.9.1", None)
        plan = make_plan(env=with_compiler(env), tree=tree)
        assert plan.skipped["cpu"] == "torch 2.9.1 is older than 2.11"

    @pytest.mark.parametrize(
        ("request_", "libraries"), [("auto", ("cpu",)), ("none", ()), ("cpu", ("cpu",))]
    )
    def test_segkernels_build(self, tree, env, request_, libraries) -> None:
        plan = make_plan(env=with_compiler(env) | {"SEGKERNELS_BUILD": request_}, tree=tree)
        assert plan.libraries == libraries

    @pytest.mark.parametrize("request_", ["cpu", "cuda"])
    def test_an_explicit_request_that_cannot_be_met_is_an_error(self, tree, env, request_) -> None:
        with pytest.raises(BuildError, match="no C\\+\\+ compiler") as raised:
            make_plan(env=env | {"SEGKERNELS_BUILD": request_}, tree=tree)
        assert "SEGKERNELS_BUILD=auto" in str(raised.value)

    def test_an_unknown_request_is_an_error(self, tree, env) -> None:
        with pytest.raises(BuildError, match="auto, none, cpu, cuda"):
            make_plan(env=env | {"SEGKERNELS_BUILD": "gpu"}, tree=tree)

    def test_its_text(self, tree, env, tmp_path, monkeypatch) -> None:
        with_torch(monkeypatch, "2.13.0+cu130", "13.0")
        env = with_nvcc(with_compiler(env), tmp_path, "13.0") | {"MAX_JOBS": "3"}
        assert make_plan(env=env, tree=tree).text().splitlines() == [
            "segkernels 1.2.3, native build (auto)",
            "  torch     2.13.0+cu130, CUDA 13.0",
            "  compiler  g++ 99.1",
            "  nvcc      13.0",
            "  cpu       1 source file -> _native_cpu.so",
            "  cuda      1 source file -> _native_cuda.so",
            "  archs     8.0 8.6 8.9 9.0a 10.0 12.0+PTX (default list)",
            "  jobs      3 (MAX_JOBS)",
        ]


class TestToolchain:
    def test_torch_is_found_without_importing_it(self) -> None:
        code = "import sys; from segkernels.toolchain import find_torch; t = find_torch();"
        code += "assert 'torch' not in sys.modules; print(t.version)"
        import torch

        assert run_without_front_door(code).stdout.strip() == torch.__version__

    def test_without_torch(self) -> None:
        code = (
            "import sys; sys.modules['torch'] = None;"
            "from segkernels.build_plan import make_plan; print(make_plan().text())"
        )
        text = run_without_front_door(code).stdout
        assert "torch     not installed" in text
        assert text.count("python -m segkernels build") == 2

    @pytest.mark.parametrize(("text", "jobs"), [("1", 1), ("7", 7)])
    def test_max_jobs(self, text, jobs) -> None:
        assert choose_jobs({"MAX_JOBS": text}) == (jobs, "MAX_JOBS")

    @pytest.mark.parametrize("text", ["0", "many", "-2"])
    def test_a_wrong_max_jobs_is_an_error(self, text) -> None:
        with pytest.raises(BuildError, match="MAX_JOBS"):
            choose_jobs({"MAX_JOBS": text})

    @pytest.mark.parametrize(("gib", "jobs"), [(1, 1), (5, 2), (999, 4)])
    def test_jobs_leave_half_the_memory_free(self, monkeypatch, gib, jobs) -> None:
        monkeypatch.setattr("segkernels.toolchain._free_memory", lambda: gib << 30)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
        assert choose_jobs({})[0] == jobs

    def test_find_compiler_takes_arguments_in_cxx(self, env) -> None:
        wrapper = script(Path(env["PATH"]), "ccache", 'echo "$1 9"')
        tool = find_compiler(env | {"CXX": "ccache g++"})
        assert tool == Tool((str(wrapper), "g++"), "g++ 9")

    def test_an_nvcc_that_does_not_run_is_none(self, env, tmp_path) -> None:
        script(tmp_path / "cuda" / "bin", "nvcc", "exit 3")
        assert find_nvcc(env | {"CUDA_HOME": str(tmp_path / "cuda")}) is None

    def test_cuda_home_is_the_only_place_looked_at(self, env, tmp_path) -> None:
        nvcc_stub(tmp_path / "cuda", "12.4")
        path = str(tmp_path / "cuda" / "bin")
        assert find_nvcc(env | {"PATH": path}) is None
        del env["CUDA_HOME"]
        assert find_nvcc(env | {"PATH": path}) == Tool((f"{path}/nvcc",), "12.4")


class TestArchs:
    @pytest.fixture
    def nvcc(self, tmp_path: Path) -> Tool:
        return Tool((str(nvcc_stub(tmp_path / "cuda", "13.0")),), "13.0")

    def test_order_of_precedence(self, nvcc, env) -> None:
        script(Path(env["PATH"]), "nvidia-smi", 'printf "8.6\\n9.0\\n8.6\\n"')
        both = env | {"SEGKERNELS_CUDA_ARCHS": "8.9,9.0a", "TORCH_CUDA_ARCH_LIST": "8.0;10.0"}
        assert choose_archs(both, nvcc) == (("8.9", "9.0a"), "SEGKERNELS_CUDA_ARCHS")
        del both["SEGKERNELS_CUDA_ARCHS"]
        assert choose_archs(both, nvcc) == (("8.0", "10.0"), "TORCH_CUDA_ARCH_LIST")
        assert choose_archs(env, nvcc) == (("8.6", "9.0a"), "the GPUs here")

    def test_what_cannot_be_compiled_is_an_error_only_where_it_was_asked_for(
        self, nvcc, env
    ) -> None:
        old = "7.5 8.0 12.9+PTX Hopper"
        assert choose_archs(env | {"TORCH_CUDA_ARCH_LIST": old}, nvcc)[0] == ("8.0",)
        with pytest.raises(BuildError, match=r"asks for 7\.5 12\.9\+PTX Hopper"):
            choose_archs(env | {"SEGKERNELS_CUDA_ARCHS": old}, nvcc)

    @pytest.mark.parametrize(
        ("archs", "capability", "runs"),
        [
            (("8.0",), (8, 6), True),
            (("8.6",), (8, 0), False),
            (("8.0",), (9, 0), False),
            (("8.0+PTX",), (9, 0), True),
            (("9.0a",), (9, 0), True),
            (("9.0a",), (10, 0), False),
            (ARCHS, (7, 5), False),
            (ARCHS, (12, 1), True),
            (ARCHS, (13, 0), True),
            (("10.0",), (10, 3), True),
        ],
    )
    def test_covers(self, archs, capability, runs) -> None:
        assert covers(archs, capability) is runs


@pytest.mark.build
@pytest.mark.skipif(find_compiler(os.environ) is None, reason="no C++ compiler")
class TestCompiling:
    """With the real compiler, on a source that takes a moment."""

    @pytest.fixture(params=["ninja", "without ninja"])
    def plan(self, request, tree, monkeypatch) -> Plan:
        if request.param == "without ninja":
            monkeypatch.setattr(building, "find_ninja", lambda: None)
        return make_plan("cpu", tree=tree)

    def test_a_library_carries_its_metadata(self, plan, tree, capsys) -> None:
        (library,) = building.build(plan)
        assert library == tree.package / "_native_cpu.so"
        text = library.read_bytes()
        assert MARK in text
        assert f'"source_hash": "{tree.source_hash("cpu")}"'.encode() in text
        out = capsys.readouterr().out
        assert "[3/3] _native_cpu.so" in out
        assert re.search(r"built _native_cpu.so in \d+\.\d s", out)

    def test_a_failure_shows_the_error_and_the_log(self, plan, tree) -> None:
        warnings = "".join(f"int f{n}(int unused) {{ return 1; }}\n" for n in range(30))
        (tree.csrc / "toy" / "cpu.cpp").write_text(f"int a = missing;\n{warnings}")
        with pytest.raises(BuildError, match="missing") as raised:
            building.build(plan)
        text = str(raised.value)
        assert len(text.splitlines()) <= 22
        assert Path(text.rsplit("whole log: ")[1]).read_text()
        assert not (tree.package / "_native_cpu.so").exists()

    def test_a_failure_leaves_the_earlier_library(self, plan, tree) -> None:
        (library,) = building.build(plan)
        earlier = library.read_bytes()
        (tree.csrc / "toy" / "cpu.cpp").write_text("#error broken\n")
        with pytest.raises(BuildError, match="broken"):
            building.build(plan)
        assert library.read_bytes() == earlier
        assert [f.name for f in tree.package.glob("*.so*")] == ["_native_cpu.so"]


@pytest.mark.build
@pytest.mark.skipif(find_compiler(os.environ) is None, reason="no C++ compiler")
class TestIncremental:
    def test_only_what_changed_is_compiled(self, tree, capsys) -> None:
        (tree.csrc / "toy" / "cpu.cpp").write_text('#include "common/sign.h"\nint x = SIGN;\n')
        (tree.csrc / "other").mkdir()
        (tree.csrc / "other" / "cpu.cpp").write_text("int other() { return 1; }\n")
        building.build(make_plan("cpu", tree=tree))
        assert "other/cpu.cpp" in capsys.readouterr().out
        building.build(make_plan("cpu", tree=tree))
        assert "/cpu.cpp" not in capsys.readouterr().out
        before = tree.source_hash("cpu")
        (tree.csrc / "common" / "sign.h").write_text("#define SIGN 3\n")
        assert tree.source_hash("cpu") != before
        building.build(make_plan("cpu", tree=tree))
        out = capsys.readouterr().out
        assert "toy/cpu.cpp" in out
        assert "other/cpu.cpp" not in out

    def test_a_lock_keeps_builds_apart(self, tree, capsys) -> None:
        plan = make_plan("cpu", tree=tree)
        tree.work.mkdir(parents=True)
        with building.locked(tree.work / "lock", timeout=1):
            with pytest.raises(BuildError, match=f"process {os.getpid()}") as raised:
                building.build(plan, timeout=0.3)
            assert "0 s" in str(raised.value)
            waiting = threading.Thread(target=building.build, args=(plan,))
            waiting.start()
            time.sleep(0.3)
            assert waiting.is_alive()
        waiting.join()
        assert "waiting for another build" in capsys.readouterr().out
        assert (tree.package / "_native_cpu.so").exists()

    def test_a_killed_builder_leaves_no_lock(self, tree, tmp_path) -> None:
        tree.work.mkdir(parents=True)
        lock = tree.work / "lock"
        code = (
            "import os, pathlib; from segkernels.build import locked\n"
            f"with locked(pathlib.Path({str(lock)!r}), 1): os.kill(os.getpid(), 9)"
        )
        assert run_without_front_door(code, check=False).returncode == -9
        with building.locked(lock, timeout=0.2):
            pass

    def test_no_gpu_code_names_this_machine(self, tree) -> None:
        assert not [f for f in make_plan("cpu", tree=tree).flags("cpu") if f.startswith("-m")]


@pytest.mark.build
class TestInstalling:
    """`pip install` of a copy of this checkout, without a network."""

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(*IGNORED))

    def test_without_torch_the_package_is_pure_and_says_so(self, source, tmp_path) -> None:
        blocked = tmp_path / "blocked"
        blocked.mkdir()
        (blocked / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None\n")
        done = pip_install(source, tmp_path / "site", {"PYTHONPATH": str(blocked)})
        assert done.returncode == 0, done.stdout
        assert "torch     not installed" in done.stdout
        assert "installs without native kernels" in done.stdout
        package = tmp_path / "site" / "segkernels"
        assert (package / "py.typed").exists()
        assert (package / "csrc" / "build_info.cpp").exists()
        assert not list(package.rglob("*.so"))
        code = "import segkernels; print(segkernels.__file__)"
        env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert found.stdout.startswith(str(package)), found.stderr

    @pytest.mark.skipif(find_compiler(os.environ) is None, reason="no C++ compiler")
    def test_with_torch_and_a_compiler_it_has_the_native_library(self, source, tree) -> None:
        shutil.rmtree(source / "csrc")
        shutil.copytree(tree.csrc, source / "csrc")
        done = pip_install(source, source.parent / "site", {"SEGKERNELS_BUILD": "cpu"})
        assert done.returncode == 0, done.stdout
        assert (source.parent / "site" / "segkernels" / "_native_cpu.so").exists()

    def test_a_request_that_cannot_be_met_fails(self, source, env) -> None:
        env = {"SEGKERNELS_BUILD": "cuda", "CUDA_HOME": env["CUDA_HOME"]}
        done = pip_install(source, source.parent / "site", env)
        assert done.returncode != 0
        assert "no working nvcc" in done.stdout


def pip_install(
    source: Path, target: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(source)],
        env=os.environ | {"SEGKERNELS_BUILD": "auto"} | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


IGNORED = ("build", ".git", ".venv", "*.so", "runs", "*.egg-info", "__pycache__", "golden")


def run_without_front_door(code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run code that may import the package's modules, as setup.py does: not its `__init__`."""
    door = (
        "import sys, types; p = types.ModuleType('segkernels');"
        f"p.__path__ = [{str(ROOT / 'segkernels')!r}]; sys.modules['segkernels'] = p\n"
    )
    command = [sys.executable, "-c", door + code]
    return subprocess.run(command, capture_output=True, text=True, check=check)
