"""Tables on the terminal: with rich where it is installed, in plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; plain where there is no terminal, since rich would fold it to 80 columns."""
    if not sys.stdout.isatty():
        print(_plain(title, header, rows))
        return
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(_plain(title, header, rows))
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in header:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console = Console()
    console.print(table)


_STYLES = {"ok": "green", "note": "yellow", "failed": "bold red"}


def _plain(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([title, *(f"  {line}" for line in lines), ""])
