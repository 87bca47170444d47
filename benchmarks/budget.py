"""The committed figures of every kernel (codegen.json), and the law by which new ones are judged.

- Worse is more registers, stack, spills, shared memory or accesses to local memory; fewer matrix
  instructions or 16-byte loads; a kernel that the budget lacks, and one of it that is gone. Better
  passes, and is told.
- A kernel that spills never passes, nor one with more shared memory (of a fixed size) than the
  architecture has; no budget may hold either.
- Figures of another version of the compiler are held to that, and else only to no stack where the
  budget has none and matrix instructions where it has some.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine_code import Figures

BUDGET = Path(__file__).with_name("codegen.json")
MORE_IS_WORSE = ("registers", "stack", "spill_stores", "spill_loads", "shared", "local")
FEWER_IS_WORSE = ("matrix", "wgmma", "loads16")
# bytes of shared memory that a block may have: CUDA C++ Programming Guide (compute capabilities),
# AMD Instinct MI300 ISA (local data share)
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_90a": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}

Group = tuple[str, str]  # target and compiler: ("sm_90a", "cuda")
Kernels = Mapping[str, Figures]


@dataclass(frozen=True)
class Budget:
    """The figures by group and kernel, and the versions of the compilers that they are of."""

    compilers: Mapping[str, str]
    kernels: Mapping[Group, Kernels]

    @classmethod
    def read(cls, path: Path = BUDGET) -> Budget:
        content = json.loads(path.read_text(encoding="utf-8"))
        kernels: dict[Group, dict[str, Figures]] = {}
        for line, figures in content["kernels"].items():
            target, compiler, name = line.split(" ", 2)
            kernels.setdefault((target, compiler), {})[name] = Figures(**figures)
        return cls(content["compilers"], kernels)

    def write(self, path: Path = BUDGET) -> None:
        """One line a kernel, sorted; what is zero is left out. Raises ValueError by the law."""
        bad = [
            f"{name} for {group[0]}: {fault}"
            for group, kernels in self.kernels.items()
            for name, figures in kernels.items()
            for fault in faults(group[0], figures)
        ]
        if bad:
            raise ValueError("no budget may hold\n  " + "\n  ".join(bad))
        lines = sorted(
            f"{json.dumps(' '.join((*group, name)))}: {json.dumps(nonzero(figures))}"
            for group, kernels in self.kernels.items()
            for name, figures in kernels.items()
        )
        compilers = json.dumps(dict(sorted(self.compilers.items())))
        body = ",\n".join(lines)
        path.write_text(f'{{"compilers": {compilers},\n"kernels": {{\n{body}\n}}}}\n')


@dataclass(frozen=True)
class Verdict:
    """What changed about a kernel; it passes where nothing is worse."""

    name: str
    worse: tuple[str, ...] = ()
    better: tuple[str, ...] = ()


def judge(target: str, budget: Kernels, now: Kernels, same_compiler: bool = True) -> list[Verdict]:
    """The kernels of one group that changed or are at fault."""
    gone = [name for name in budget if name not in now] if same_compiler else []
    verdicts = [Verdict(name, ("gone",)) for name in gone]
    for name, figures in now.items():
        worse, better = faults(target, figures), list[str]()
        before = budget.get(name)
        if before is None:
            worse += ["not in the budget"] * same_compiler
        elif same_compiler:
            more, better = changes(before, figures)
            worse += more
        else:
            worse += lost(before, figures)
        verdicts.append(Verdict(name, tuple(worse), tuple(better)))
    return [verdict for verdict in verdicts if verdict.worse or verdict.better]


def faults(target: str, figures: Figures) -> list[str]:
    """What nothing excuses."""
    found = []
    if spilled := figures.spill_stores + figures.spill_loads:
        found.append(f"spills {spilled} bytes")
    if figures.shared > SHARED[target]:
        found.append(f"{figures.shared} bytes of shared memory, of {SHARED[target]}")
    return found


def changes(before: Figures, now: Figures) -> tuple[list[str], list[str]]:
    """(what is worse, what is better)."""
    worse, better = list[str](), list[str]()
    for field in MORE_IS_WORSE + FEWER_IS_WORSE:
        old, new = getattr(before, field), getattr(now, field)
        if old != new:
            (worse if (new > old) == (field in MORE_IS_WORSE) else better).append(
                f"{field} {old} → {new}"
            )
    return worse, better


def lost(before: Figures, now: Figures) -> list[str]:
    """What must hold across versions of a compiler."""
    found = []
    if now.stack and not before.stack:
        found.append(f"stack 0 → {now.stack}")
    if before.matrix and not now.matrix:
        found.append(f"matrix {before.matrix} → 0")
    return found


def nonzero(figures: Figures) -> dict[str, int]:
    return {field: value for field, value in figures._asdict().items() if value}
