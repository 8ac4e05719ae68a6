"""sd_notify, seen from the service manager's end of the socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.telemetry.vitals import Notifier


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def test_the_manager_hears_ready_status_stopping_and_the_watchdog(manager):
    notifier = Notifier()

    notifier.ready("admitting")
    notifier.status("3 runs")
    notifier.alive()
    notifier.stopping(60.5)

    assert [manager.recv(200).decode() for _ in range(4)] == [
        "READY=1\nSTATUS=admitting",
        "STATUS=3 runs",
        "WATCHDOG=1",
        "STOPPING=1\nEXTEND_TIMEOUT_USEC=60500000",
    ]


def test_children_do_not_inherit_the_socket(manager):
    Notifier()

    assert "NOTIFY_SOCKET" not in os.environ


def test_the_watchdog_is_fed_only_where_it_is_this_process_that_is_watched(manager, monkeypatch):
    address = os.environ["NOTIFY_SOCKET"]
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")

    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert Notifier(address).watchdog_seconds == 20

    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Notifier(address).watchdog_seconds is None
    assert Notifier("").watchdog_seconds is None


def test_an_abstract_address_is_understood():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(f"\0orgworker-{os.getpid()}")
        receiver.settimeout(5)

        Notifier(f"@orgworker-{os.getpid()}").alive()

        assert receiver.recv(100) == b"WATCHDOG=1"


def test_without_a_manager_or_after_it_is_gone_nothing_happens(tmp_path):
    Notifier("").ready("x")
    Notifier(str(tmp_path / "nobody")).ready("x")
