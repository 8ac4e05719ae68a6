"""Tests at another time of day: `pytest --start-at '2027-03-28T01:59:50 Europe/Berlin'`.

The wall clock of this process and of its Python children starts at that time and ticks. It restarts for each
unit test and for each module of the other tests. Monotonic clocks, file times and PostgreSQL keep the real
time; tests that need PostgreSQL are deselected.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import time_machine

# Each process reads it at its start: PYTHONPATH also reaches those with an environment of their own.
SITECUSTOMIZE = """\
import datetime, pathlib, time
import time_machine
ahead = float(pathlib.Path(__file__).with_name("ahead").read_text())
start = datetime.datetime.fromtimestamp(time.time() + ahead, datetime.UTC)
time_machine.travel(start, tick=True).start()
"""


def parsed(text: str) -> datetime:
    """A time with a zone, or in UTC.

    Raises:
        ValueError: it is not `2028-02-29T12:00` with an optional zone such as `Europe/Berlin` after it.
    """
    local, _, zone = text.partition(" ")
    return datetime.fromisoformat(local).replace(tzinfo=ZoneInfo(zone or "UTC"))


class ShiftedClock:
    """A pytest plugin; also sets TZ, for this process and its children."""

    def __init__(self, start: datetime) -> None:
        self.start = start
        self.travel: time_machine.travel | None = None
        self.module: object = None
        os.environ["TZ"] = str(start.tzinfo)
        time.tzset()
        self.folder = Path(tempfile.mkdtemp(prefix="orgworker-clock-"))
        (self.folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        os.environ["PYTHONPATH"] = str(self.folder)
        os.environ["ORGWORKER_SHIFTED_CLOCK"] = str(start)
        sys.path.insert(0, str(self.folder))

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the tests that need PostgreSQL."""
        apart = [item for item in items if needs_postgres(item)]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if not needs_postgres(item)]

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Restart the clock, but not under the fixtures of a module."""
        module = item.path
        if self.travel is None or module != self.module or "unit" in module.parts:
            self.module = module
            self._begin()
        return (yield)

    def pytest_unconfigure(self) -> None:
        if self.travel is not None:
            self.travel.stop()
            self.travel = None

    def _begin(self) -> None:
        self.pytest_unconfigure()
        ahead = self.start.timestamp() - time.time()
        (self.folder / "ahead").write_text(str(ahead))
        self.travel = time_machine.travel(self.start.astimezone(UTC), tick=True)
        self.travel.start()


def needs_postgres(item: pytest.Item) -> bool:
    """Whether a test names a fixture or a parameter of PostgreSQL."""
    names = getattr(item, "fixturenames", ())
    return any("postgres" in name for name in names) or "postgresql" in item.name
