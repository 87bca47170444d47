"""Code generation: every kernel compiled without a device and held to the budget; the law itself,
on kernels made worse on purpose; the prediction."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import budget as law
from benchmarks import codegen, machine_code, roofline
from benchmarks.budget import Budget, faults, judge
from benchmarks.machine_code import Figures
from benchmarks.work import operators
from segkernels import fused
from segkernels.build_plan import Tree
from segkernels.toolchain import BuildError

CUDA, TRITON = ([t for t, kind in codegen.GROUPS if kind == k] for k in ("cuda", "triton"))
# which of the bfloat16 kernels are compiled by default
SHORT = {"sm_80": "c256_65_r12_train", "sm_90": "channels_last", "gfx942": "c256_65_r12_train"}


def why_not(kind: str) -> str:
    """Why kernels of a kind cannot be compiled here, or nothing."""
    if kind == "triton":
        return "" if machine_code.triton_compiles() else "Triton is missing, or interpreted here"
    try:
        machine_code.plan_for("9.0a")
        machine_code.tool("nvdisasm")
    except BuildError as error:
        return str(error)
    return ""


needs_nvcc = pytest.mark.skipif(bool(why_not("cuda")), reason=why_not("cuda"))
needs_triton = pytest.mark.skipif(bool(why_not("triton")), reason=why_not("triton"))


def check(group: law.Group, now: law.Kernels, names: Iterable[str]) -> None:
    """The kernels of these names are no worse than the budget's, and none is new or gone."""
    budget = Budget.read()
    target, kind = group
    held = {n: budget.kernels[group][n] for n in names if n in budget.kernels[group]}
    same = budget.compilers[kind] == codegen.compilers()[kind]
    worse = {v.name: v.worse for v in judge(target, held, now, same) if v.worse}
    assert not worse, "python -m benchmarks codegen --update, if this is meant\n" + "\n".join(
        f"  {target} {kind} {name}: {', '.join(what)}" for name, what in worse.items()
    )


# ---- the kernels ---------------------------------------------------------------------------------


@pytest.mark.build
@needs_nvcc
@pytest.mark.parametrize("target", CUDA)
def test_cuda_kernels_keep_the_budget(target: str) -> None:
    group = (target, "cuda")
    check(group, codegen.compiled(group), Budget.read().kernels[group])


@pytest.mark.build
@needs_triton
@pytest.mark.parametrize("part", ["default", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TRITON)
def test_triton_kernels_keep_the_budget(target: str, part: str) -> None:
    """The names are those of the budget; by default some of them are compiled."""
    from benchmarks import ahead_of_time

    kernels = ahead_of_time.named(ahead_of_time.calls(codegen.TRITON_DTYPES), target)
    budget = Budget.read()
    if budget.compilers["triton"] == codegen.compilers()["triton"]:
        assert set(kernels) == set(budget.kernels[target, "triton"])
    if part == "default":
        kernels = {n: k for n, k in kernels.items() if SHORT[target] in n and "bfloat16" in n}
    check((target, "triton"), ahead_of_time.compiled(kernels, target, 2), kernels)


@pytest.mark.build
@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("variant", ["float16", "awkward", "odd channels", "batch"])
@pytest.mark.parametrize("target", TRITON)
def test_no_triton_kernel_spills(target: str, variant: str) -> None:
    """What the budget has not: float16, the awkward cases, and a case of each operator with
    channels that no vector divides, or with the batch of a training. (float64 is there to check
    the others: one of its kernels spills 8 bytes.)"""
    from benchmarks import ahead_of_time
    from benchmarks.ahead_of_time import Call, calls

    first = {op: next(c for c in calls(["bfloat16"]) if c.op == op) for op in operators()}

    def like(call: Call, batch: int, channels: int) -> Call:
        shape = (batch, channels, *call.case.shape[2:])
        return call._replace(case=replace(call.case, shape=shape))

    some = {
        "float16": lambda: calls(["float16"]),
        "awkward": lambda: calls(["bfloat16"], group="AWKWARD"),
        "odd channels": lambda: (like(call, 1, 21) for call in first.values()),
        "batch": lambda: (like(call, 16, call.case.shape[1]) for call in first.values()),
    }
    kernels = ahead_of_time.named(some[variant](), target)
    found = ahead_of_time.compiled(kernels, target, 2)
    assert not {name: what for name, f in found.items() if (what := faults(target, f))}


@needs_triton
def test_every_triton_kernel_is_in_the_budget() -> None:
    """A kernel that no paper's case launches would be compiled by nobody."""
    package = Path(fused.__file__).parent
    modules = [
        ".".join(("segkernels", *path.relative_to(package).with_suffix("").parts))
        for path in package.glob("ops/**/*.py")
        if "import triton" in path.read_text()
    ]
    every = {n for m in modules for n in vars(importlib.import_module(m)) if n.endswith("_kernel")}
    listed = Budget.read().kernels
    for target in TRITON:
        assert every == {name.split()[4] for name in listed[target, "triton"]}


def test_the_budget_is_of_kernels_that_may_ship() -> None:
    budget = Budget.read()
    assert set(budget.kernels) == set(codegen.GROUPS)
    for (target, _), kernels in budget.kernels.items():
        assert kernels
        for name, figures in kernels.items():
            assert not faults(target, figures), name
            assert figures.registers and figures.instructions, name


def test_matrix_products_are_made_by_matrix_instructions() -> None:
    """Every 16-bit instantiation of a kernel that has them in another one."""
    for group in (g for g in codegen.GROUPS if g[1] == "cuda"):
        kernels = Budget.read().kernels[group]
        products = {name.split("<")[0] for name, f in kernels.items() if f.matrix}
        assert products
        for name, figures in kernels.items():
            if name.split("<")[0] in products and "16" in name:
                assert figures.matrix, name


# ---- the law, on kernels made worse --------------------------------------------------------------

TOY = """
template <int LIVE>
__device__ void live_values(const float* x, float* y) {{
  float v[LIVE];
#pragma unroll
  for (int i = 0; i < LIVE; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < LIVE; ++i) y[i * 1024 + threadIdx.x] = v[i] * v[(i + 7) % LIVE];
}}
__global__ void {bounds} bounded_kernel(const float* x, float* y) {{ live_values<60>(x, y); }}
__global__ void live_kernel(const float* x, float* y) {{ live_values<{live}>(x, y); }}

template <class T>
__global__ void product_kernel(const unsigned* a, T* c) {{
  const unsigned *p = a + 8 * threadIdx.x, *q = p + 4;
  T* d = c + 4 * threadIdx.x;
  {product}
}}
template __global__ void product_kernel<float>(const unsigned*, float*);
{more}
"""
HMMA = """asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]));"""
GOOD = {"bounds": "", "live": 20, "product": HMMA, "more": ""}
WORSE = {
    "bounds": "__launch_bounds__(1024, 2)",  # 32 registers, for 60 values
    "live": 60,
    "product": "d[0] += p[0] * q[0];",
    "more": "__global__ void new_kernel() {}",
}


def toy(folder: Path, parts: Mapping[str, object]) -> law.Kernels:
    """The figures of the toy kernels, compiled as the real ones are."""
    source = folder / "csrc" / "toy"
    source.mkdir(parents=True)
    (source / "cpu.cpp").touch()
    (source / "cuda.cu").write_text(TOY.format(**parts))
    return machine_code.cuda_kernels("9.0a", Tree(Tree.here().package, folder / "csrc"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[law.Kernels, law.Kernels]:
    """Kernels for a budget, and the same made worse."""
    good = toy(tmp_path_factory.mktemp("good"), GOOD)
    assert set(good) == {"bounded_kernel", "live_kernel", "product_kernel<float>"}
    assert good["product_kernel<float>"].matrix == 1
    assert good["live_kernel"].loads == 20
    assert not judge("sm_90a", good, good)
    return good, toy(tmp_path_factory.mktemp("worse"), WORSE)


@pytest.mark.build
@needs_nvcc
@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        ("bounded_kernel", "spills"),
        ("live_kernel", "registers"),
        ("product_kernel<float>", "matrix 1 → 0"),
        ("new_kernel", "not in the budget"),
    ],
)
def test_a_kernel_made_worse_fails(kernel: str, what: str, toys) -> None:
    worse = {v.name: v.worse for v in judge("sm_90a", *toys)}
    assert any(what in reason for reason in worse[kernel]), worse
    others = toys[1].keys() - {kernel}
    assert not any(what in reason for name in others for reason in worse[name])


@pytest.mark.build
@needs_nvcc
def test_no_budget_is_written_with_a_spill(toys, tmp_path) -> None:
    assert toys[1]["bounded_kernel"].local and toys[1]["bounded_kernel"].stack
    with pytest.raises(ValueError, match="bounded_kernel for sm_90a: spills"):
        Budget({}, {("sm_90a", "cuda"): toys[1]}).write(tmp_path / "budget.json")
    assert not (tmp_path / "budget.json").exists()


@pytest.mark.build
@needs_nvcc
def test_a_warning_is_an_error(tmp_path) -> None:
    with pytest.raises(BuildError, match="never referenced"):
        toy(tmp_path, GOOD | {"more": "__global__ void new_kernel() { int unused; }"})


BEFORE = Figures(registers=64, shared=1024, matrix=8, loads16=4, instructions=100)


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({"registers": 65}, False),
        ({"registers": 63}, True),
        ({"stack": 8}, False),
        ({"shared": 1025}, False),
        ({"local": 1}, False),
        ({"matrix": 7}, False),
        ({"loads16": 3}, False),
        ({"loads16": 5, "instructions": 200}, True),
    ],
)
def test_the_law(change: dict[str, int], passes: bool) -> None:
    (verdict,) = judge("sm_90a", {"a": BEFORE}, {"a": BEFORE._replace(**change)})
    assert (not verdict.worse) == passes
    assert bool(verdict.better) == passes


def test_a_kernel_that_is_gone() -> None:
    assert [v.worse for v in judge("sm_90a", {"a": BEFORE}, {})] == [("gone",)]


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({"registers": 90, "matrix": 4, "loads16": 0}, True),
        ({"stack": 8}, False),
        ({"spill_loads": 4}, False),
        ({"matrix": 0}, False),
        ({"shared": 228 << 10}, False),
    ],
)
def test_another_compiler_is_held_to_less(change: dict[str, int], passes: bool) -> None:
    now = {"a": BEFORE._replace(**change)}
    budget = {"a": BEFORE, "gone": BEFORE}
    assert (not judge("sm_90a", budget, now | {"new": BEFORE}, same_compiler=False)) == passes


def test_the_budget_is_read_as_it_was_written(tmp_path) -> None:
    kernels = {("sm_90a", "cuda"): {"f<bf16, 8>": BEFORE, "b": Figures(registers=1)}}
    path = tmp_path / "budget.json"
    Budget({"cuda": "13.0.88"}, kernels).write(path)
    assert Budget.read(path) == Budget({"cuda": "13.0.88"}, kernels)
    assert [line.split(":")[0] for line in path.read_text().splitlines()[2:-1]] == [
        '"sm_90a cuda b"',
        '"sm_90a cuda f<bf16, 8>"',
    ]


# ---- reading -------------------------------------------------------------------------------------


def test_instructions_by_kind() -> None:
    code = "HMMA.16816.F32.BF16 HGMMA.64x256x16.F32 UTCHMMA HFMA2.MMA LDG.E.128.CONSTANT LDG.E.U16"
    code += " LDGSTS.E.BYPASS.LTC128B.128 LDG.E.LTC128B LDS.64 LDSM.16.M88.4 STS FFMA.RM FFMA2 DFMA"
    code += " LDL.LU STL LD.E LDC.64 LDCU NOP"
    assert machine_code.count(code.split()) == Figures(
        matrix=3, wgmma=2, loads=5, loads16=2, shared_loads=2, shared_stores=1, ffma=2, dfma=1,
        local=2, instructions=19,
    )  # fmt: skip


def test_names_are_short() -> None:
    symbols = {
        "_ZN10segkernels4cuda30depthwise_conv2d_finish_kernelI13__nv_bfloat16EEvPKT_": (
            "depthwise_conv2d_finish_kernel<bf16>"
        ),
        "_ZN10segkernels4cuda11walk_kernelI6__halfLi8ELb1EEEvPKT_NS0_7StridesE": (
            "walk_kernel<fp16, 8, true>"
        ),
        "_ZN10segkernels12_GLOBAL__N_112plain_kernelEPKf": "plain_kernel",
    }
    assert machine_code.readable(symbols) == symbols


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path) -> SimpleNamespace:
    """The command over two kernels of which the second may be changed, its file and its exit."""
    path = tmp_path / "codegen.json"
    kernels = {"a": BEFORE, "b": BEFORE}
    read, write = Budget.read, Budget.write
    monkeypatch.setattr(codegen, "compilers", lambda: {"cuda": "1", "triton": "1"})
    monkeypatch.setattr(codegen, "compiled", lambda _: dict(kernels))
    monkeypatch.setattr(Budget, "read", lambda: read(path))
    monkeypatch.setattr(Budget, "write", lambda self: write(self, path))
    monkeypatch.setattr(roofline, "plans", lambda *_: [])

    def run(*arguments: str) -> int:
        return benchmarks.main(["codegen", *arguments])

    assert run("--update") == 0
    return SimpleNamespace(kernels=kernels, path=path, run=run)


@pytest.mark.parametrize(
    ("registers", "status", "word"), [(64, 0, ""), (60, 0, "better"), (70, 1, "WORSE")]
)
def test_the_command_tells_what_changed(registers, status, word, command, capsys) -> None:
    command.kernels["b"] = BEFORE._replace(registers=registers)
    assert command.run("--arch", "sm_90a") == status
    told = capsys.readouterr().out
    assert (f"{word}  sm_90a cuda b: registers 64 → {registers}" in told) == bool(word)
    assert command.run("--update") == 0
    assert command.run() == 0


def test_no_update_accepts_a_spill(command, capsys) -> None:
    before = command.path.read_text()
    command.kernels["b"] = BEFORE._replace(spill_stores=8)
    assert command.run("--update") == 1
    assert "spills 8 bytes" in capsys.readouterr().err
    assert command.path.read_text() == before


def test_another_version_is_told(command, capsys, monkeypatch) -> None:
    monkeypatch.setattr(codegen, "compilers", lambda: {"cuda": "2", "triton": "1"})
    command.kernels["b"] = BEFORE._replace(registers=70)
    assert command.run("--arch", "sm_90a") == 0
    assert "cuda 2 is here, the budget of sm_90a is of 1" in capsys.readouterr().out
