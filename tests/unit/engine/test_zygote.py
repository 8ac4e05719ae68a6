"""A process that is forked once the lease has expired does nothing before the lease is renewed."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worker.engine.runners.child import linux, zygote
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.zygote import Zygote

PID = 2**31 - 1


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the zygote does to processes, instead of that."""
    seen: list[Any] = []

    def forked() -> int:
        seen.append("fork")
        return PID

    monkeypatch.setattr(os, "fork", forked)
    monkeypatch.setattr(linux, "stop_all", lambda everyone: seen.append("stop all"))
    monkeypatch.setattr(linux, "send", lambda pids, number: seen.append((*pids, number)))
    return seen


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Zygote]:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield Zygote(mine, Setup(folder=str(tmp_path)))


def begin(made: Zygote, *, freeze_in: float) -> None:
    """A lease and a start that arrive at once: while the zygote was loaded, or stood still."""
    descriptors = [os.open(os.devnull, os.O_RDWR) for _ in range(3)]
    made._obey({"op": "lease", "freeze_at": time.monotonic() + freeze_in}, [])
    made._obey({"op": "start", "run": 1, "grouped": False, "folder": "", "sealed": False}, descriptors)


def test_a_process_that_starts_after_the_lease_has_expired_is_stopped_at_once(
    made: Zygote, done: list[Any]
) -> None:
    begin(made, freeze_in=-1)

    assert done == ["stop all", "fork", (PID, signal.SIGSTOP)]


def test_a_process_that_starts_in_time_is_not_stopped(made: Zygote, done: list[Any]) -> None:
    begin(made, freeze_in=60)

    assert done == ["fork"]


def test_a_process_that_is_forked_while_all_are_frozen_waits_to_be_stopped() -> None:
    """It may be the first of the two that the kernel lets go on."""
    reader, writer = os.pipe()
    os.write(writer, b"!")

    zygote._wait_at(reader, writer)

    for descriptor in (reader, writer):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_it_ends_if_the_zygote_is_gone_before_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)

    with pytest.raises(SystemExit):
        zygote._wait_at(*os.pipe())
