"""Progress on the terminal: a bar with rich, a line with plain text, nothing where nobody watches."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

INTERVAL = 0.2  # seconds between two drawings of the plain line


class Progress:
    """A bar that says how far it is, a note (a loss, a name) and the time left.

    It draws on a terminal only: in a pipe, a log or a test it is silent.

        with Progress("training", total=400) as progress:
            for ...:
                progress.advance(note=f"loss {loss:.3f}")
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self.title, self.total, self.done = title, total, 0
        self._stream = stream or sys.stderr
        self._watched = self._stream.isatty()
        self._start = self._drawn = time.monotonic()
        self._rich: Any = None

    def __enter__(self) -> Progress:
        if self._watched:
            self._rich = _rich_bar(self._stream)
            if self._rich is not None:
                self._rich.start()
                self._task = self._rich.add_task(self.title, total=self.total, note="")
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps as done."""
        self.done += steps
        if self._rich is not None:
            self._rich.update(self._task, advance=steps, note=note)
        elif self._watched and time.monotonic() - self._drawn > INTERVAL:
            self._drawn = time.monotonic()
            left = (self._drawn - self._start) * (self.total - self.done) / self.done
            line = f"{self.title} {self.done}/{self.total}  {note}  {left:.0f} s left"
            self._stream.write(f"\r{line:<79}")
            self._stream.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.stop()
        elif self._watched:
            self._stream.write("\r" + " " * 79 + "\r")
            self._stream.flush()


def _rich_bar(stream: TextIO) -> Any:
    """rich's bar, or None where it is not installed. It minds NO_COLOR by itself."""
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeRemainingColumn(),
        console=Console(file=stream),
        transient=True,
    )
