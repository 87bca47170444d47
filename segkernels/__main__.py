"""The command line: `python -m segkernels COMMAND`, one line per command."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

from segkernels._version import __version__


class Command(NamedTuple):
    """A command: the function `main(arguments) -> exit status` that does it, and what it does."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "demo": Command("segkernels.demo", "main", "train a small network, compare and time it"),
    "doctor": Command("segkernels.doctor", "main", "what runs here, what does not, and the remedy"),
    "explain": Command("segkernels.doctor", "explain_main", "which backends can run an operator"),
    "bench": Command("benchmarks.__main__", "main", "time every operator against PyTorch"),
    "build": Command("segkernels.build", "main", "compile the native libraries"),
}

NO_BENCHMARKS = """the benchmarks are not part of an installed package, only of a source checkout
  in the checkout: python -m segkernels bench"""

EXAMPLES = """examples:
  python -m segkernels demo
  python -m segkernels doctor --json
  python -m segkernels explain separable_conv2d --dtype bfloat16
  python -m segkernels bench --quick

python -m segkernels COMMAND --help tells more about a command."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"segkernels {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        if command.module.startswith("benchmarks") and not _find_benchmarks():
            print(f"error: {NO_BENCHMARKS}", file=sys.stderr)
            return 1
        run = getattr(importlib.import_module(command.module), command.function)
        return int(run(rest) or 0)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = "\n".join(f"  {name:<{width}}{c.summary}" for name, c in COMMANDS.items())
    return f"usage: python -m segkernels COMMAND [options]\n\ncommands:\n{lines}\n\n{EXAMPLES}"


def _find_benchmarks() -> bool:
    """Put a checkout on the path, for they stand beside the package there and nowhere else."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "benchmarks" / "__main__.py").exists():
        sys.path.insert(0, str(checkout))
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
