"""Vitals of one incarnation for health checks and metrics, and notifications to systemd."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass


class Notifier:
    """Sends to the socket in `NOTIFY_SOCKET`; without it every call is a no-op.

    Removes the variable from the environment, so that children cannot notify for the worker.
    """

    def __init__(self, address: str | None = None) -> None:
        found = os.environ.pop("NOTIFY_SOCKET", "") if address is None else address
        # A leading @ means the abstract namespace.
        self._address = "\0" + found[1:] if found.startswith("@") else found
        interval = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_seconds = int(interval) / 1e6 if self._address and interval and for_us else None

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """Set the status line of `systemctl status`."""
        self._send(f"STATUS={text}")

    def stopping(self, seconds: float) -> None:
        """Report a drain; systemd waits this many more seconds before it kills the worker."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog, at least every `watchdog_seconds` unless that is None."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            try:
                channel.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                return  # the service manager is gone or its queue is full


@dataclass(frozen=True, slots=True)
class Vitals:
    """The state of one worker incarnation, read from memory.

    `ages` are the seconds since the last tick of each loop, `stalled` the loops that do not tick.
    `lease_remaining` is in seconds, 0 or less after the lease has expired. `slots` and `used` count
    runs by isolation. `broker_fault` is why no broker is up, which keeps it from taking runs.
    """

    ages: Callable[[], Mapping[str, float]]
    stalled: Callable[[], list[str]]
    lease_remaining: Callable[[], float]
    admitting: Callable[[], bool]
    draining: Callable[[], bool]
    slots: Mapping[str, int]
    used: Callable[[str], int]
    broker_fault: Callable[[], str | None] = lambda: None

    def in_words(self) -> str:
        """One line for `systemctl status`: problems, runs, lease."""
        left = self.lease_remaining()
        taken = {name: f"{self.used(name)} of {count} {name}" for name, count in self.slots.items() if count}
        return "; ".join(
            [
                *(["draining"] if self.draining() else []),
                *(f"the loop {name} stands still" for name in self.stalled()),
                *([] if self.broker_fault() is None else [f"no broker: {self.broker_fault()}"]),
                *([] if self.admitting() or self.draining() else ["nothing admitted"]),
                f"runs: {', '.join(taken.values()) or 'no slots'}",
                f"lease: {left:.0f} s" if left > 0 else "lease lost",
            ]
        )
