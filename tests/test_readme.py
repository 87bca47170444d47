"""The README tells the truth: its Python runs, and its tables are those of committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


def test_the_files_it_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("word", ["RESULTS", "TODO", "FIXME"])
def test_nothing_is_left_open(word: str) -> None:
    assert word not in README


def test_the_figures_are_those_of_committed_results() -> None:
    """Every row of the README's tables stands, to the letter, in a report that it names."""
    named = set(re.findall(r"\((benchmarks/results/[^)]+\.md)\)", README))
    report = "\n".join((ROOT / name).read_text() for name in named)
    table = README[README.index("## How fast") : README.index("## What is promised")]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 8
    for row in rows:
        assert row in report, row
