"""A time zone that is unknown: which one was meant."""

from __future__ import annotations

import pytest

from worker.errors import DefinitionError, InvalidTrigger
from worker.model.definitions import zones
from worker.model.definitions.file import parse_file
from worker.model.definitions.zones import find_zone, nearest, parse_zone


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Europe/Berln", "Europe/Berlin"),
        ("europe/berlin", "Europe/Berlin"),
        ("Berlin", "Europe/Berlin"),
        ("New York", "America/New_York"),
        ("Kolkatta", "Asia/Kolkata"),
        ("utc", "UTC"),
        ("Mars/Phobos", None),
        # Etc/GMT+2 is two hours behind.
        ("GMT+2", None),
        ("UTC+1", None),
        ("Europe/Berln" * 10_000, None),
    ],
)
def test_the_nearest_zone_is_suggested(name: str, near: str | None):
    assert nearest(name) == near
    with pytest.raises(InvalidTrigger) as caught:
        parse_zone(name)
    assert caught.value.fix == (
        f"did you mean {near}?" if near else 'use an IANA name, such as "Europe/Berlin" or "UTC"'
    )


@pytest.mark.parametrize("kind", ["org", "definition"])
def test_a_file_with_a_misspelt_zone_names_the_one_that_is_meant(kind: str):
    rest = {"org": 'code = "a"\nissuer = "main"', "definition": 'org = "a"\nname = "n"\nhandler = "h.h"'}
    text = f'[[{kind}]]\n{rest[kind]}\ntimezone = "Europe/Berln"\n'
    with pytest.raises(DefinitionError) as caught:
        parse_file(text + ('schedule = "@daily"\n' if kind == "definition" else ""))

    assert caught.value.field == "timezone"
    assert caught.value.fix.startswith("did you mean Europe/Berlin?")


def test_a_zone_is_found_without_a_search_for_others(monkeypatch: pytest.MonkeyPatch):
    """A console cookie names any zone at each request; with `parse_zone`, the control, it costs a search."""
    searched: list[str] = []
    monkeypatch.setattr(zones, "nearest", searched.append)

    assert find_zone("Europe/Berln") is None
    assert searched == []
    with pytest.raises(InvalidTrigger):
        parse_zone("Europe/Berln")
    assert searched == ["Europe/Berln"]
