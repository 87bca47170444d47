"""The progress bar: seen on a terminal, with rich or without, and silent elsewhere."""

from __future__ import annotations

import io

import pytest

from segkernels import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(stream: io.StringIO) -> str:
    with progress.Progress("training", 4, stream) as bar:
        for step in range(4):
            bar.advance(note=f"loss {step}")
    assert bar.done == 4
    return stream.getvalue()


def test_silent_in_a_pipe() -> None:
    assert run(io.StringIO()) == ""


def test_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_rich_bar", lambda stream: None)
    monkeypatch.setattr(progress, "INTERVAL", -1)
    written = run(Terminal())
    assert "training 3/4  loss 2" in written and "s left" in written
    assert written.endswith("\r") and "\x1b" not in written


def test_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    written = run(Terminal())
    assert "training" in written and "4/4" in written and "loss 3" in written


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_rich_bar", lambda stream: None)
    terminal = Terminal()
    with pytest.raises(KeyboardInterrupt), progress.Progress("training", 4, terminal):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\r")
