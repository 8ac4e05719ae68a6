"""Tells systemd how the worker is (sd_notify): ready, status, stopping, watchdog."""

from __future__ import annotations

import os
import socket


class Notifier:
    """Sends to the socket that `NOTIFY_SOCKET` names; without one every call does nothing.

    The variable is taken out of the environment, so that no child speaks for the worker.
    """

    def __init__(self, address: str | None = None) -> None:
        found = os.environ.pop("NOTIFY_SOCKET", "") if address is None else address
        # A leading @ stands for the abstract namespace.
        self._address = "\0" + found[1:] if found.startswith("@") else found
        interval = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_seconds = int(interval) / 1e6 if self._address and interval and for_us else None

    def ready(self, status: str) -> None:
        """The worker is up."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(f"STATUS={text}")

    def stopping(self, seconds: float) -> None:
        """The worker drains; it may take so many seconds longer before systemd kills it."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def alive(self) -> None:
        """Feed the watchdog; at least every `watchdog_seconds`, where that is not None."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            try:
                channel.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                # The service manager is gone or its queue is full: no reason to stop working.
                return
