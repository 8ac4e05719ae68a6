"""`./dev test --plain` runs the tests without anything that only makes them faster."""

from __future__ import annotations

from typing import Any

import pytest

from tests import speed
from tests.fakes import forked


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "the control"])
def test_a_plain_run_changes_nothing(monkeypatch: pytest.MonkeyPatch, plain: bool):
    done: list[str] = []

    def record(owner: Any, name: str) -> None:
        monkeypatch.setattr(owner, name, lambda *_: done.append(name))

    for owner, name in (
        (speed.gc, "disable"),
        (speed.gc, "freeze"),
        (speed.unsynced, "begin"),
        (speed.event, "listen"),
        (speed, "postpone_parsers"),
        (speed, "reuse_keys"),
        (speed, "reuse_authorities"),
    ):
        record(owner, name)
    monkeypatch.setattr(speed, "PLAIN", plain)

    speed.begin()
    speed.collected()

    reused = ("reuse_keys", "reuse_authorities")
    everything = ["postpone_parsers", "disable", "begin", *reused, "listen", "freeze"]
    assert done == ([] if plain else everything)


def test_workers_of_a_plain_run_are_new_interpreters(monkeypatch: pytest.MonkeyPatch):
    for name in forked.ONLY_NEW:
        monkeypatch.delenv(name, raising=False)
    assert forked.is_possible()

    monkeypatch.setenv("ORGWORKER_TEST_PLAIN", "1")

    assert not forked.is_possible()
