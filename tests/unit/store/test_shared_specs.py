"""Specs that are kept: what they have in common is held once."""

from __future__ import annotations

import json
import subprocess
import sys

from worker.definitions.definition import from_spec
from worker.store.sql.contract import shared_spec


def spec(number: int) -> str:
    dates = [f"2030-12-{day:02}" for day in range(1, 32)]
    keys = {"handler": "acme.note", "schedule": "@daily", "params": {"number": number}}
    return json.dumps(keys | {"calendar": "holidays", "calendar_dates": dates})


def test_the_definitions_of_a_calendar_hold_its_dates_once():
    """A worker keeps thousands of specs; an org's own params make each another one."""
    first, second = shared_spec(spec(1)), shared_spec(spec(2))

    assert first["params"] != second["params"]
    assert first["calendar_dates"] is second["calendar_dates"]
    read = [from_spec("org_acme", "digest", each).calendar_dates for each in (first, second)]
    assert read[0] is read[1]
    assert len(read[0]) == 31


def test_a_command_that_lists_does_not_load_the_triggers():
    """They take longer to import than a list takes to read."""
    code = "import sys, worker.store.lists.read; sys.exit('apscheduler' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == 0
