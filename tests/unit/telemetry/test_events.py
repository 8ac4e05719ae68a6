"""The table of events, and what emit does with it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.fakes.log import documented
from worker.telemetry import events
from worker.telemetry.events import EVENTS, Emitted, emit, listen

PACKAGE = Path(__file__).parents[3] / "worker"


def calls_of_emit() -> list[tuple[str, str, set[str]]]:
    """(place, event, fields) of each call in the package whose event is written out.

    The guard imports no telemetry: it calls `self._report`, which is `emit` in a worker.
    """
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args or not isinstance(node.args[0], ast.Constant):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("emit", "_report"):
                fields = {keyword.arg for keyword in node.keywords if keyword.arg}
                found.append((f"{path.relative_to(PACKAGE)}:{node.lineno}", node.args[0].value, fields))
    return found


def test_a_listener_gets_the_event_with_its_fields():
    seen: list[Emitted] = []
    listen(seen.append)

    emit("lease.lost", late=1.5)

    assert [(one.event.name, one.event.level, one.fields) for one in seen] == [
        ("lease.lost", "error", {"late": 1.5})
    ]


def test_a_listener_that_has_ended_hears_nothing():
    seen: list[Emitted] = []
    end = listen(seen.append)
    end()
    end()

    emit("lease.lost", late=1.5)

    assert seen == []


def test_an_unknown_event_is_a_mistake_of_the_caller():
    with pytest.raises(TypeError, match="unknown event 'lease.vanished'"):
        emit("lease.vanished")


def test_an_unknown_field_is_a_mistake_of_the_caller():
    with pytest.raises(TypeError, match="lease.lost has the fields late"):
        emit("lease.lost", secret="s3cret")


def test_a_listener_that_fails_stops_neither_the_caller_nor_the_other_listeners(emitted, caplog):
    events.listeners.insert(0, lambda _: 1 / 0)

    emit("lease.lost", late=1.5)

    assert [one.event.name for one in emitted] == ["lease.lost"]
    assert "a listener failed at lease.lost" in caplog.text


def test_every_event_has_a_meaning_and_plain_names():
    for name, event in EVENTS.items():
        assert name == event.name
        assert event.meaning
        assert len(set(event.fields)) == len(event.fields)


def test_every_call_in_the_package_names_an_event_and_fields_of_the_table():
    unknown = [
        (place, name, sorted(fields))
        for place, name, fields in calls_of_emit()
        if name not in EVENTS or not fields <= set(EVENTS[name].fields)
    ]

    assert unknown == []


def test_an_event_of_a_run_says_whose_it_is_and_which_attempt():
    fields_of = {name: set(event.fields) for name, event in EVENTS.items()}
    whose = {
        name for name, fields in fields_of.items() if "run" in fields and not {"org", "attempt"} <= fields
    }
    whose |= {name for name, fields in fields_of.items() if "definition" in fields and "org" not in fields}
    assert whose == set()
    silent = [
        (place, name)
        for place, name, fields in calls_of_emit()
        if ("run" in fields or name.startswith("run.")) and not {"org", "run", "attempt"} <= fields
    ]
    assert silent == []


def test_the_page_has_exactly_these_events_and_fields():
    page = {name: fields for name, fields in documented().items() if name != "log"}

    assert page == {name: set(event.fields) for name, event in EVENTS.items()}
