"""Compiles the native libraries: what is built, with what, why not, and where it goes.

    csrc/*/cpu.cpp       -> _native_cpu.so    C++ kernels, LibTorch stable ABI
    csrc/*/cuda.cu       -> _native_cuda.so   CUDA kernels; on its own, for it loads only with CUDA
    csrc/build_info.cpp  -> _build_info*.so   what was built (pybind11)

Sources are found by that rule alone. A `Plan` is made from the environment and printed; then ninja
compiles what changed, under a lock, and finished libraries are renamed into place. Each carries its
`metadata` as text. Standard library only: `setup.py` uses this before torch can be imported.

    SEGKERNELS_BUILD       auto (default): all this machine can; none; cpu; cuda (both libraries).
                           What is named and cannot be built is an error.
    SEGKERNELS_CUDA_ARCHS  e.g. "8.0 9.0a 12.0+PTX"; else TORCH_CUDA_ARCH_LIST, else the GPUs here,
                           else every supported architecture
    MAX_JOBS               parallel compilations; else from cores and free memory
    CXX, CXXFLAGS, CUDA_HOME
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from segkernels.build_plan import MARK, REQUESTS, Plan, make_plan
from segkernels.toolchain import BuildError, find_ninja


class Step(NamedTuple):
    """One command of the build: what to call it, what it runs, makes and reads."""

    title: str
    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]


def steps(plan: Plan, work: Path) -> Iterator[Step]:
    """Every command of the build, the objects of a library before the library."""
    assert plan.torch and plan.compiler, "a plan with a library has both"
    cxx = plan.compiler.command
    torch_libraries = [f"-L{plan.torch.root / 'lib'}", "-ltorch_cpu", "-lc10"]
    for library in plan.libraries:
        compiler, linker = cxx, (*cxx, "-Wl,--as-needed")
        if library == "cuda" and plan.nvcc:
            compiler = (*plan.nvcc.command, f"-ccbin={cxx[0]}")
            linker = (*compiler, "-Xlinker=--as-needed")
            if plan.torch.cuda:
                torch_libraries += ["-ltorch_cuda", "-lc10_cuda"]
        compiler = (*compiler, *plan.flags(library))
        stamp = _stamp(work / f"{library}_stamp.cpp", plan.metadata(library))
        objects = [_compile((*cxx, *plan.flags("cpu")), stamp, plan, work)]
        objects += [_compile(compiler, source, plan, work) for source in plan.tree.sources(library)]
        yield from objects
        yield _link(linker, objects, work / f"_native_{library}.so", torch_libraries)
    if plan.build_info:
        metadata = plan.skipped | {library: plan.metadata(library) for library in plan.libraries}
        stamp = _stamp(work / "build_info_stamp.cpp", metadata)
        python = ("-O1", "-isystem", sysconfig.get_path("include"))
        compiler = (*cxx, *plan.flags("cpu"), *python)
        sources = (stamp, plan.tree.csrc / "build_info.cpp")
        objects = [_compile(compiler, source, plan, work) for source in sources]
        yield from objects
        yield _link(cxx, objects, work / f"_build_info{sysconfig.get_config_var('EXT_SUFFIX')}")


def _compile(compiler: tuple[str, ...], source: Path, plan: Plan, work: Path) -> Step:
    assert plan.torch
    name = "/".join(source.parts[-2:]) if plan.tree.csrc in source.parents else source.name
    output = work / f"{name.replace('/', '_')}.o"
    include = (f"-I{plan.tree.csrc}", "-isystem", str(plan.torch.root / "include"))
    dependencies = ("-MMD", "-MF", f"{output}.d")
    command = (*compiler, *include, *dependencies, "-c", str(source), "-o", str(output))
    return Step(name, command, output, (source,))


def _link(
    linker: tuple[str, ...], objects: list[Step], output: Path, libraries: Sequence[str] = ()
) -> Step:
    inputs = tuple(step.output for step in objects)
    command = (*linker, "-shared", "-o", str(output), *map(str, inputs), *libraries)
    return Step(output.name, command, output, inputs)


def _stamp(path: Path, metadata: dict[str, Any]) -> Path:
    """The metadata as a source file, to be linked into a library; touched only when it changes."""
    text = f"{MARK.decode()}{json.dumps(metadata)}"
    source = (
        'extern "C" __attribute__((used)) const char segkernels_build[] =\n'
        f'    R"json({text})json";\n'
    )
    if not path.exists() or path.read_text() != source:
        path.write_text(source)
    return path


def build(
    plan: Plan, *, output: Path | None = None, work: Path | None = None, timeout: float = 600
) -> list[Path]:
    """Compile a plan's libraries into `output` (the package); returns them.

    Only what changed is compiled; `work` keeps the objects (`build/native`). One build at a time
    works there: another one is waited for up to `timeout` seconds. Raises BuildError with the end
    of the log where a command fails.
    """
    output, work = output or plan.tree.package, work or plan.tree.work
    if not plan.libraries:
        return []
    started = time.monotonic()
    tools = (plan.torch, plan.compiler, plan.nvcc, sys.version)
    key = hashlib.sha256(repr(tools).encode()).hexdigest()[:8]
    try:
        (work / key).mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write to {error.filename}: {error.strerror}") from error
    with locked(work / "lock", timeout):
        todo = list(steps(plan, work / key))
        run = _run_ninja if find_ninja() else _run_plain
        run(todo, work / key, plan.jobs)
        made = [step.output for step in todo if step.output.suffix == ".so"]
        built = [_install(file, output) for file in made]
    names = ", ".join(file.name for file in built)
    print(f"built {names} in {time.monotonic() - started:.1f} s -> {output}", flush=True)
    return built


def _install(file: Path, folder: Path) -> Path:
    """Rename into place, so that a process never sees half a library nor loses one in use."""
    target = folder / file.name
    fresh = folder / f".{file.name}.{os.getpid()}"
    shutil.copyfile(file, fresh)
    os.replace(fresh, target)
    return target


@contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Hold a lock that the system releases even when its holder is killed."""
    import fcntl

    with path.open("a+") as lock:
        deadline, told = time.monotonic() + timeout, False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
            if time.monotonic() > deadline:
                raise BuildError(
                    f"another build (process {holder}) held {path} for {timeout:.0f} s\n"
                    "  wait for it or end it, then build again"
                )
            if not told:
                print(f"waiting for another build (process {holder}) ...", flush=True)
                told = True
            time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _run_ninja(todo: list[Step], work: Path, jobs: int) -> None:
    def escaped(text: str | Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(text))

    lines = [
        "rule compile\n  command = $run\n  description = $title\n  depfile = $out.d\n  deps = gcc"
    ]
    lines += ["rule link\n  command = $run\n  description = $title"]
    for step in todo:
        rule = "compile" if step.output.suffix == ".o" else "link"
        inputs = " ".join(map(escaped, step.inputs))
        command = shlex.join(step.command).replace("$", "$$")
        lines += [f"build {escaped(step.output)}: {rule} {inputs}"]
        lines += [f"  run = {command}\n  title = {step.title}"]
    (work / "build.ninja").write_text("\n".join(lines) + "\n")
    ninja = [find_ninja() or "ninja", "-C", str(work), "-j", str(jobs)]
    log = work / "build.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            ninja,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"NINJA_STATUS": "[%f/%t] "},
        )
        try:
            for line in process.stdout or ():
                sink.write(line)
                if re.match(r"\[\d+/\d+\]", line):
                    print(line, end="", flush=True)
        finally:  # on Ctrl-C too: ninja removes what it had half written, then ends
            process.terminate()
            process.wait()
    _check(process.returncode, log)


def _run_plain(todo: list[Step], work: Path, jobs: int) -> None:
    """Without ninja: everything anew, the objects in parallel, then the libraries."""
    log = work / "build.log"
    done = 0
    with log.open("w") as sink, ThreadPoolExecutor(jobs) as pool:

        def run(step: Step) -> int:
            nonlocal done
            result = subprocess.run(step.command, capture_output=True, text=True)
            done += 1
            print(f"[{done}/{len(todo)}] {step.title}", flush=True)
            sink.write(f"{shlex.join(step.command)}\n{result.stdout}{result.stderr}")
            return result.returncode

        for suffix in (".o", ".so"):
            codes = list(pool.map(run, [step for step in todo if step.output.suffix == suffix]))
            sink.flush()
            _check(max(codes), log)


def _check(code: int, log: Path) -> None:
    """Raise with twenty lines of the log: from the first error on, else the last ones."""
    if code == 0:
        return
    lines = log.read_text().splitlines()
    first = next((n for n, line in enumerate(lines) if re.search(r"\berror\b", line)), -20)
    shown = "\n".join(f"  {line}" for line in lines[first:][:20])
    raise BuildError(f"the native build failed\n{shown}\n  whole log: {log}")


def main(arguments: list[str] | None = None) -> int:
    """`python -m segkernels build`: compile the native libraries now."""
    parser = argparse.ArgumentParser(
        prog="python -m segkernels build",
        description="Compile the native libraries into the package.",
        epilog="example: SEGKERNELS_CUDA_ARCHS=9.0a python -m segkernels build cuda",
    )
    parser.add_argument(
        "request", nargs="?", choices=REQUESTS, help="default: SEGKERNELS_BUILD or auto"
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and compile nothing")
    parser.add_argument(
        "--output", type=Path, help="folder for the libraries (default: the package)"
    )
    options = parser.parse_args(arguments)
    try:
        plan = make_plan(options.request)
        print(plan.text(), flush=True)
        if not options.plan:
            build(plan, output=options.output)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
