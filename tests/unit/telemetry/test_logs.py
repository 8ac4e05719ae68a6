"""Lines on stderr: one each, masked, for a machine or for a person."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.masking import MASK, masker

SECRET = "s3cr3t-of-acme-0123456789"


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield io.StringIO()
    root.setLevel(level)
    root.handlers[:] = handlers


def test_an_event_is_one_line_of_json(out):
    logs.configure("json", stream=out)

    emit(
        "run.ended",
        org="org_acme",
        run="019a",
        attempt=2,
        outcome="succeeded",
        state="succeeded",
        reason=None,
    )

    line = json.loads(out.getvalue())
    assert line.pop("at").endswith("Z")
    assert line == {
        "level": "info",
        "event": "run.ended",
        "org": "org_acme",
        "run": "019a",
        "attempt": 2,
        "outcome": "succeeded",
        "state": "succeeded",
    }


def test_a_person_reads_words_and_text_from_outside_stays_on_its_line(out):
    logs.configure("console", stream=out)

    emit("definition.failed", org="org_acme", definition="a b\n12:00 error", error="X")

    [line] = out.getvalue().splitlines()
    assert line[13:] == r'error   definition.failed  org=org_acme definition="a b\n12:00 error" error=X'


@pytest.mark.parametrize("style", ["json", "console"])
def test_no_secret_stands_in_a_line_also_not_in_a_trace(out, style):
    masker.register(SECRET)
    logs.configure(style, stream=out)

    emit("loop.failed", loop="fire", error=f"ValueError: {SECRET}")
    logging.getLogger("somebody.else").warning("sent %s", SECRET)
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("somebody.else").exception("failed")

    assert SECRET not in out.getvalue()
    assert out.getvalue().count(MASK) == 3
    assert len(out.getvalue().splitlines()) == 3


def test_debug_events_and_what_libraries_chat_about_are_left_out(out):
    logs.configure("json", stream=out)

    emit("run.admitted", run="019a")
    logging.getLogger("httpx").info("GET https://acme.example/?q=1")
    logging.getLogger("psycopg").warning("error ignored terminating <psycopg.Pipeline>")

    assert out.getvalue() == ""


def test_configured_twice_it_logs_once_to_the_newer_stream(out):
    logs.configure("json", stream=io.StringIO())
    logs.configure("json", level="debug", stream=out)

    emit("run.admitted", run="019a")

    assert len(out.getvalue().splitlines()) == 1
