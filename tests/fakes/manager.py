"""A service manager that keeps what it is told."""

from __future__ import annotations

from worker.telemetry.vitals import Notifier


class Manager(Notifier):
    def __init__(self) -> None:
        super().__init__("")
        self.told: list[str] = []

    def ready(self, status: str) -> None:
        self.told.append(f"ready: {status}")

    def status(self, text: str) -> None:
        self.told.append(text)

    def alive(self) -> None:
        self.told.append("alive")

    def stopping(self, seconds: float) -> None:
        self.told.append(f"stopping: {seconds:g}")
