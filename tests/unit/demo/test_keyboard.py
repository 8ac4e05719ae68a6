"""Enter on the demo's terminal; elsewhere nothing is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from io import StringIO

import pytest

from worker.demo.run import Keyboard


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal: what a person types into, and standard input."""
    ends = os.openpty()
    yield ends
    for end in ends:
        os.close(end)


@pytest.fixture
def in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.tcgetpgrp", lambda descriptor: os.getpgrp())


@pytest.mark.usefixtures("in_front")
def test_enter_is_seen_once_however_often_it_was_pressed(terminal: tuple[int, int]):
    typed, stdin = terminal
    keyboard = Keyboard(stdin)
    os.write(typed, b"\n")

    assert keyboard.wait(threading.Event(), 5)
    assert not keyboard.wait(threading.Event(), 0)


def test_nothing_is_read_in_the_background(terminal: tuple[int, int]):
    """A read would stop the process; and the line is for the shell."""
    typed, stdin = terminal
    os.write(typed, b"\n")

    assert not Keyboard(stdin).wait(threading.Event(), 0)
    assert os.read(stdin, 10) == b"\n"


@pytest.mark.usefixtures("in_front")
def test_a_terminal_that_is_gone_or_ended_is_left_alone(terminal: tuple[int, int]):
    typed, stdin = terminal
    keyboard = Keyboard(stdin)
    os.write(typed, b"\x04")

    assert not keyboard.wait(threading.Event(), 5)
    assert not keyboard.is_there


def test_standard_input_that_is_no_terminal_is_not_read(monkeypatch: pytest.MonkeyPatch):
    for stdin in (StringIO("\n"), None):
        monkeypatch.setattr("sys.stdin", stdin)
        assert not Keyboard.of_terminal().is_there
