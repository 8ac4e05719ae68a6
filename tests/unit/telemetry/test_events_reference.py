"""The documented table of events is the one in the code."""

from __future__ import annotations

import os
from pathlib import Path

from worker.telemetry.events import EVENTS

REFERENCE = Path(__file__).parents[3] / "docs" / "reference" / "events.md"
HEAD = """\
# Events

Everything that the worker reports of itself; each is a line of its log on stderr. The set is closed: a log
line of the worker has one of these names, with these fields. Lines of libraries have the event `log`.

| event | level | fields | meaning |
|---|---|---|---|
"""


def test_the_reference_lists_every_event():
    """`UPDATE_REFERENCE=1 ./dev test tests/unit/telemetry` writes it anew."""
    expected = HEAD
    for event in EVENTS.values():
        fields = ", ".join(f"`{field}`" for field in event.fields)
        expected += f"| `{event.name}` | {event.level} | {fields} | {event.meaning} |\n"
    if os.environ.get("UPDATE_REFERENCE"):
        REFERENCE.write_text(expected)

    assert REFERENCE.read_text() == expected
