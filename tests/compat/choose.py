"""Cuts the committed choice of golden cases out of the full folder: ``python -m
tests.compat.choose``.

For every class that segkernels.compat has: its smallest case, in train mode where there is one, and
the state_dict schemas. float64 results are rounded to float32 and the files compressed, so that
every class of every family fits into 3 MB.
"""

from __future__ import annotations

import json
import lzma
from typing import Any

import torch
from safetensors.torch import load_file, save

from tests.compat.golden import COMMITTED, FULL, manifest, our_class

LIMIT = 3_000_000


def chosen(cases: dict[str, dict[str, Any]]) -> list[str]:
    """One case a class: train mode before others, then the smallest file."""
    best: dict[str, tuple[bool, int, str]] = {}
    for name, case in cases.items():
        if case["mode"] == "none" or our_class(case) is None:
            continue
        rank = (case["mode"] != "train", (FULL / case["file"]).stat().st_size, name)
        kind = case["class"] + str("convert" in case.get("modified", ""))
        best[kind] = min(best.get(kind, rank), rank)
    return sorted(name for _, _, name in best.values())


def main() -> None:
    full = manifest(FULL)
    COMMITTED.mkdir(exist_ok=True)
    for old in COMMITTED.glob("*.xz"):
        old.unlink()
    cases = {}
    for name in chosen(full["cases"]):
        case = {key: value for key, value in full["cases"][name].items() if key != "tensors"}
        tensors = load_file(FULL / case["file"])
        case["file"] += ".xz"
        rounded = {key: t.float() if t.dtype == torch.float64 else t for key, t in tensors.items()}
        (COMMITTED / case["file"]).write_bytes(lzma.compress(save(rounded), preset=9))
        cases[name] = case
    schemas = {
        name: s for name, s in full["state_dict_schemas"].items() if our_class(s) is not None
    }
    short = {
        "conventions": full["conventions"],
        "produced_with": full["produced_with"],
        "cases": cases,
        "state_dict_schemas": schemas,
    }
    (COMMITTED / "manifest.json").write_text(json.dumps(short, indent=0) + "\n")
    size = sum(path.stat().st_size for path in COMMITTED.iterdir())
    print(
        f"{len(cases)} cases, {len(schemas)} schemas, {size / 1e6:.2f} MB of {LIMIT / 1e6:.0f} MB"
    )
    assert size <= LIMIT


if __name__ == "__main__":
    main()
