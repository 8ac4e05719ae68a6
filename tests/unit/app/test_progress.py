"""What is drawn of a command's progress, and where nothing is."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from tests.fakes.clock import ManualClock
from worker.kit import progress
from worker.kit.progress import ProgressBar, shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was drawn, one drawing after the other."""
        return self.getvalue().split("\r\033[K")[1:]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    # pytest puts its own stderr in place when the test begins.
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=made))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    return made


def test_a_bar_grows_says_what_is_left_and_goes(terminal: Terminal, clock: ManualClock):
    with ProgressBar("orgs", 200, monotonic=clock.monotonic) as bar:
        bar.at(1)
        clock.advance(10)
        bar.at(100)
        clock.advance(0.01)
        bar.at(101)
        clock.advance(9.99)
        bar.at(200)

    half, full, gone = terminal.lines()
    assert half == f"orgs [{'#' * 15}{'.' * 15}] 100/200  0:10 left"
    assert full == f"orgs [{'#' * 30}] 200/200"
    assert gone == ""


def test_the_next_step_starts_from_nothing(terminal: Terminal, clock: ManualClock):
    with ProgressBar("definitions", monotonic=clock.monotonic) as bar:
        clock.advance(60)
        bar.at(100, 100, "definitions checked")
        bar.at(1, 100, "definitions written")
        clock.advance(10)
        bar.at(50, 100, "definitions written")

    checked, written, _ = terminal.lines()
    assert checked == f"definitions checked [{'#' * 30}] 100/100"
    assert written == f"definitions written [{'#' * 15}{'.' * 15}] 50/100  0:10 left"


def test_without_a_total_the_number_is_counted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)

    assert list(shown("abc", "runs")) == ["a", "b", "c"]
    assert terminal.lines() == ["runs 1", "runs 2", "runs 3", ""]


def test_a_long_line_is_cut_at_the_width_of_the_terminal(
    terminal: Terminal, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "20")
    with ProgressBar("orgs", 200, monotonic=clock.monotonic) as bar:
        clock.advance(1)
        bar.at(100)

    assert len(terminal.lines()[0]) == 19


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_nothing_is_drawn_in_a_pipe_or_on_a_dumb_terminal(
    term: str, terminal: Terminal, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    if term == "xterm":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
    monkeypatch.setenv("TERM", term)
    with ProgressBar("orgs", 2, monotonic=clock.monotonic) as bar:
        clock.advance(1)
        bar.at(1)

    assert terminal.getvalue() == ""


def test_the_line_goes_before_an_error_is_printed(terminal: Terminal, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)

    def failing():
        yield 1
        raise ValueError

    with pytest.raises(ValueError):
        list(shown(failing(), "runs"))
    assert terminal.lines() == ["runs 1", ""]
