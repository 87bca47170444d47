"""What compilers make of the kernels: registers, memory, and instructions by kind.

`cuda_kernels` compiles every csrc/*/cuda.cu to a cubin with the commands of the real build and
reads nvcc's report and the disassembly. Counts are of instructions in the code, not of how often
they run.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from segkernels.build import Step, locked, steps
from segkernels.build_plan import Plan, Tree, make_plan
from segkernels.toolchain import BuildError

STRICT = ("-Werror=all-warnings", "--resource-usage")


class Figures(NamedTuple):
    """One kernel: bytes a thread (stack, spills) or a block (shared), and instructions."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    matrix: int = 0  # matrix multiplications: HMMA, HGMMA, UTCHMMA, v_mfma
    wgmma: int = 0  # of them, those that more than one warp starts: HGMMA, UTCHMMA
    loads: int = 0  # from global memory
    loads16: int = 0  # of them, those of 16 bytes or more a thread
    shared_loads: int = 0
    shared_stores: int = 0
    ffma: int = 0
    dfma: int = 0
    local: int = 0  # accesses to local memory
    instructions: int = 0


# kind -> mnemonics; an instruction may be of several kinds
NVIDIA = {
    "matrix": r"(UTC)?[A-Z]{1,3}MMA(\.|$)",
    "wgmma": r"(UTC[A-Z]+|[A-Z]G)MMA(\.|$)",
    "loads": r"LD(G|GSTS)?(\.|$)",  # LD: the address space is not known to the compiler
    "loads16": r"LD(G|GSTS)?\..*\b(128|256)(\.|$)",
    "shared_loads": r"LDSM?(\.|$)",
    "shared_stores": r"STSM?(\.|$)",
    "ffma": r"FFMA2?(\.|$)",
    "dfma": r"DFMA(\.|$)",
    "local": r"(LDL|STL)(\.|$)",
    "instructions": r"(?!NOP)",
}
AMD = {
    "matrix": r"v_s?mfma",
    "loads": r"(global|buffer|flat)_load",
    "loads16": r"(global|buffer|flat)_load_dwordx4",
    "shared_loads": r"ds_read",
    "shared_stores": r"ds_write",
    "ffma": r"v_(pk_)?(fma|fmac|fma_mix|fmamk|fmaak)_f32",
    "dfma": r"v_(fma|fmac)_f64",
    "local": r"scratch_",
    "instructions": r"(?!s_nop)",
}


def count(mnemonics: Iterable[str], kinds: Mapping[str, str] = NVIDIA) -> Figures:
    """Instructions by kind."""
    total: Counter[str] = Counter()
    for mnemonic, number in Counter(mnemonics).items():
        total.update({k: number for k, pattern in kinds.items() if re.match(pattern, mnemonic)})
    return Figures(**total)


def disassemble(cubin: Path) -> dict[str, list[str]]:
    """The mnemonics of every function, by its mangled name."""
    command = [tool("nvdisasm"), "-c", "-ndf", str(cubin)]  # no dataflow analysis
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions: dict[str, list[str]] = {}
    line = re.compile(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)|^\t\.section\s+\.text\.([^,]+)",
        re.MULTILINE,
    )
    current: list[str] = []
    for instruction in line.finditer(text):
        if instruction[2]:
            current = functions.setdefault(instruction[2], [])
        else:
            current.append(instruction[1])
    return functions


def tool(name: str) -> str:
    """nvdisasm or cuobjdump: of the CUDA toolkit, else those in Triton's wheel."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return str(path)
    raise BuildError(f"no {name}: it comes with the CUDA toolkit and with Triton")


def resources(report: str) -> dict[str, Figures]:
    """What nvcc's --resource-usage says of every kernel and what it calls, by mangled name."""
    found: dict[str, Figures] = {}
    for part in re.split(r"Compiling entry function ", report)[1:]:

        def most(pattern: str, text: str = part) -> int:
            return max(map(int, re.findall(pattern, text)), default=0)

        found[part.split("'")[1]] = Figures(
            registers=most(r"Used (\d+) registers"),
            stack=most(r"(\d+) bytes stack frame"),
            spill_stores=most(r"(\d+) bytes spill stores"),
            spill_loads=most(r"(\d+) bytes spill loads"),
            shared=most(r"(\d+) bytes smem"),
        )
    return found


def readable(symbols: Iterable[str]) -> dict[str, str]:
    """Mangled name -> depthwise_conv2d_walk_kernel<bf16, 8, 3, false>."""
    return _readable(tuple(symbols))


@functools.cache
def _readable(symbols: tuple[str, ...]) -> dict[str, str]:
    filter_ = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    )
    return dict(zip(symbols, map(_short, filter_.stdout.splitlines()), strict=True))


def _short(signature: str) -> str:
    """Without result, namespaces and arguments; the storage types as PyTorch's users say them."""
    plain = signature.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b(?:\w+::)+(?=\w)", "", plain)
    name = re.match(r"\w+(<.*?>(?=\())?", name)[0]  # type: ignore[index]
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def triton_compiles() -> bool:
    """Whether Triton is there, and compiles its kernels in this process."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return importlib.util.find_spec("triton") is not None and not interpreted


def plan_for(arch: str, tree: Tree | None = None) -> Plan:
    """The real build, for one architecture. Raises BuildError where it cannot be done."""
    return make_plan("cuda", env={**os.environ, "SEGKERNELS_CUDA_ARCHS": arch}, tree=tree)


def nvcc_version() -> str:
    """All of it, such as 13.0.88. Raises BuildError where there is no nvcc for this torch."""
    nvcc = plan_for("9.0a").nvcc
    assert nvcc, "a plan for CUDA has nvcc"
    banner = subprocess.check_output([*nvcc.command, "--version"], text=True)
    full = re.search(r"\bV(\d[\d.]+)", banner)
    return full[1] if full else nvcc.version


def cuda_kernels(arch: str, tree: Tree | None = None) -> dict[str, Figures]:
    """Every kernel instantiation of csrc/*/cuda.cu for an architecture ("9.0a"), by short name."""
    plan = plan_for(arch, tree)
    folder = plan.tree.work.parent / "codegen" / arch
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", timeout=600), ThreadPoolExecutor(plan.jobs) as pool:
        made = list(pool.map(lambda step: figures_of(step, plan), compilations(plan, folder)))
    every = {name: figures for kernels in made for name, figures in kernels.items()}
    if len(every) < sum(map(len, made)):
        raise ValueError("two sources have kernels of one name")
    return every


def compilations(plan: Plan, folder: Path) -> list[Step]:
    """The build's compilations of CUDA sources, to a cubin, with warnings as errors."""
    sources = plan.tree.sources("cuda")

    def to_cubin(step: Step) -> Step:
        """-t is of no use to one architecture, and depends on the memory of the moment."""
        same = (word for word in step.command if not word.startswith("-t="))
        return step._replace(command=(*("-cubin" if w == "-c" else w for w in same), *STRICT))

    return [to_cubin(step) for step in steps(plan, folder) if step.inputs[0] in sources]


def figures_of(step: Step, plan: Plan) -> dict[str, Figures]:
    """Compile, unless the cubin there is of the same sources, flags and compiler; and read it."""
    report, stamp = step.output.with_suffix(".txt"), step.output.with_suffix(".stamp")
    facts = (step.command, plan.tree.source_hash("cuda"), plan.nvcc)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == digest):
        stamp.unlink(missing_ok=True)
        done = subprocess.run(step.command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{step.title} for {plan.archs[0]}\n{done.stdout}{done.stderr}")
        report.write_text(done.stdout + done.stderr)
        stamp.write_text(digest)
    return read(step.output, report.read_text())


def read(cubin: Path, report: str) -> dict[str, Figures]:
    """The figures of a cubin's kernels, by short name, with nvcc's report of its making."""
    code, used = disassemble(cubin), resources(report)
    names = readable(used)
    if len(set(names.values())) < len(used):
        raise ValueError(
            f"kernels of one name in {cubin.stem}: {', '.join(sorted(names.values()))}"
        )
    return {
        names[symbol]: count(code[symbol])._replace(
            **{k: v for k, v in figures._asdict().items() if v}
        )
        for symbol, figures in used.items()
    }
