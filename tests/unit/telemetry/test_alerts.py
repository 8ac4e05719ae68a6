"""What strikes is gathered from the events, by its cause; what is no trouble is not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from worker.telemetry import alerts, events
from worker.telemetry.alerts import MAX_OPEN, Alert, Strike, Strikes
from worker.telemetry.events import EVENTS, emit


class Heard:
    """What struck, as it is taken by whoever writes it down."""

    def __init__(self, clock: ManualClock) -> None:
        self.times = 0
        self.strikes = Strikes(clock, self._on_strike)
        events.listen(self.strikes.hear)

    def _on_strike(self) -> None:
        self.times += 1

    def taken(self) -> list[Strike]:
        return self.strikes.take()

    def kinds(self) -> list[str]:
        return [strike.kind for strike in self.taken()]


@pytest.fixture
def heard(clock: ManualClock) -> Heard:
    return Heard(clock)


def end_run(state: str, org: str = "org_a", definition: str = "digest", **fields: Any) -> None:
    given = {"run": "r", "handler": "acme.digest", "attempt": 1, "outcome": state, "state": state}
    emit("run.ended", **(given | {"org": org, "definition": definition, "seconds": 1.0} | fields))


def fail(org: str = "org_a", **fields: Any) -> None:
    end_run("failed", org, **({"reason": "error", "error_cause": "HTTPError: <n>"} | fields))


def test_what_is_late_is_one_cause_for_an_org_and_why(heard: Heard) -> None:
    late = {"scheduled_for": "2027-01-04T03:00:00Z", "late_at": "2027-01-04T06:00:00Z"}
    for org, definition, why in (
        ("org_a", "digest", "waiting (no_token)"),
        ("org_a", "sync", "waiting (no_token)"),
        ("org_a", "export", "failed (error)"),
        ("org_b", "digest", "waiting (no_token)"),
    ):
        emit("schedule.late", org=org, definition=definition, newest_run="r", why=why, **late)

    first, second, third = heard.taken()

    assert (first.kind, first.count) == ("late", 2)
    assert first.definitions == {("org_a", "digest"), ("org_a", "sync")}
    assert first.summary == "digest of org_a is late, due by 2027-01-04T06:00:00Z: waiting (no_token)"
    assert first.fields["newest_run"] == "r"
    assert (second.definitions, third.definitions) == ({("org_a", "export")}, {("org_b", "digest")})


def test_a_hundred_failures_of_one_cause_are_one_strike_that_knows_whom_it_struck(heard, clock):
    began = clock.now()
    for number in range(100):
        fail(f"org_{number % 20}", run=f"run-{number}")
        clock.advance(1)

    assert heard.times == 100
    [strike] = heard.taken()
    assert (strike.kind, strike.count, len(strike.runs)) == ("failed", 100, 20)
    assert strike.summary == "acme.digest fails: error (HTTPError: <n>)"
    assert (strike.fields["run"], strike.runs["org_0", "digest"]) == ("run-0", "run-80")
    assert (strike.at - began).total_seconds() == 99
    assert heard.taken() == []


def test_a_child_that_fails_strikes_nothing(heard):
    """The run that started it fails, or goes on without it."""
    fail(child=True)
    end_run("refused", child=True, reason="child_exceeds")
    assert heard.taken() == []

    fail()
    assert heard.kinds() == ["failed"]


def test_a_summary_has_the_status_that_its_cause_leaves_out(heard):
    fail(error_summary="HTTPError: the CRM answers 503")
    fail(error_summary="HTTPError: the CRM answers 502")

    [strike] = heard.taken()
    assert strike.summary == "acme.digest fails: error (HTTPError: the CRM answers 503)"


def test_another_cause_is_another_strike(heard):
    fail()
    fail(error_cause="KeyError")
    fail(handler="acme.other")
    fail(error_cause=None, reason="timed_out")

    taken = heard.taken()
    assert [strike.kind for strike in taken] == ["failed"] * 4
    assert len({strike.cause for strike in taken}) == 4


def test_refusals_are_parted_by_reason_and_detail(heard):
    end_run("refused", reason="settings_invalid", detail="max_tokens")
    end_run("refused", "org_b", reason="settings_invalid", detail="max_tokens")
    end_run("refused", reason="org_mismatch", detail="org_x")

    assert [(strike.kind, strike.count) for strike in heard.taken()] == [("refused", 2), ("refused", 1)]


def test_a_cause_has_one_name_for_all_workers_and_all_times(heard, clock):
    fail()
    [here] = heard.taken()
    clock.advance(86_400)
    other = Heard(clock)
    fail("org_b", run="s")

    [there] = other.taken()
    assert here.cause == there.cause


def test_pauses_dead_credentials_and_what_is_overdue_strike_whom_they_name(heard):
    emit("definition.paused", org="org_a", definition="digest", failures=5)
    emit("org.parked", org="org_a", issuer="main", error="invalid_client", seconds=60.0)
    emit("credential.unusable", org="org_b", generation=1, error="no key")
    emit("schedule.overdue", org="org_a", definition="digest", seconds=12.0)
    emit("run.recovered", run="r", attempt=4, worker="w", state="failed")

    paused, parked, unusable, overdue, lost = heard.taken()
    assert (paused.kind, paused.definitions) == ("paused", {("org_a", "digest")})
    assert (parked.kind, parked.orgs) == ("credential_dead", {"org_a"})
    assert (unusable.kind, unusable.orgs) == ("credential_dead", {"org_b"})
    assert (overdue.kind, overdue.definitions, overdue.orgs, overdue.runs) == ("overdue", set(), set(), {})
    assert (lost.kind, list(lost.runs.values())) == ("failed", ["r"])


def test_failures_of_provisioning_are_one_cause_for_each_error(heard):
    for org in ("org_a", "org_b"):
        emit("provisioning.failed", org=org, issuer="main", error="provider_refused")
    emit("provisioning.failed", org="org_c", issuer="main", error="unclear")
    emit("provisioning.unavailable", issuer="main", error="unclear", detail="no usable response")

    refused, unclear, round_ = heard.taken()
    assert {strike.kind for strike in (refused, unclear, round_)} == {"provisioning_failed"}
    assert [strike.orgs for strike in (refused, unclear, round_)] == [{"org_a", "org_b"}, {"org_c"}, set()]


def test_a_run_that_will_be_tried_again_or_was_not_to_be_is_no_strike(heard):
    end_run("waiting", reason="retry", error_cause="KeyError")
    end_run("succeeded")
    end_run("cancelled", reason="requested")
    end_run("skipped", reason="flag_off")
    emit("run.recovered", run="r", attempt=1, worker="w", state="waiting")

    assert (heard.taken(), heard.times) == ([], 0)


def test_each_kind_comes_of_an_event_of_the_table_and_of_no_other(heard):
    for name, event in EVENTS.items():
        emit(name, **dict.fromkeys(event.fields))
        emit(name, **dict.fromkeys(event.fields) | ({"state": "failed"} if "state" in event.fields else {}))

    assert set(heard.kinds()) == {
        *("failed", "paused", "credential_dead", "overdue", "provisioning_failed", "waiting"),
        *("files_opened", "files_changeable", "egress_denied", "late"),
        *("unpriced", "forecast", "rollout"),
    }


def test_each_file_that_was_opened_is_a_cause(heard):
    for path, restored in (("/etc/a", True), ("/etc/a", True), ("/etc/b", False)):
        emit("files.opened", path=path, mode="0644", restored=restored)
    emit("files.changeable", path="/etc/a", files=2)

    assert [(strike.kind, strike.count, strike.summary) for strike in heard.taken()] == [
        ("files_opened", 2, "/etc/a was opened to other accounts (0644); its mode is restored"),
        ("files_opened", 1, "/etc/b was opened to other accounts (0644); another account owns it"),
        ("files_changeable", 1, "handlers could open /etc/a to other accounts; `doctor` has the fix"),
    ]


def deny(handler: str, origin: str, org: str = "org_a") -> None:
    given = {"run": "r", "attempt": 1, "reason": "not listed"}
    emit("egress.denied", org=org, handler=handler, origin=origin, **given)


def test_each_origin_that_a_handler_was_denied_is_a_cause(heard):
    for org in ("org_a", "org_b"):
        deny("acme.digest", "https://evil.example", org)
    deny("acme.digest", "https://other.example")
    deny("acme.render", "https://evil.example")

    assert [(strike.kind, strike.count, strike.summary) for strike in heard.taken()] == [
        ("egress_denied", 2, "acme.digest was denied requests to https://evil.example: not listed"),
        ("egress_denied", 1, "acme.digest was denied requests to https://other.example: not listed"),
        ("egress_denied", 1, "acme.render was denied requests to https://evil.example: not listed"),
    ]


def test_a_handler_that_tries_many_origins_uses_up_few_of_the_open_alerts(heard, monkeypatch):
    def causes() -> int:
        for number in range(MAX_OPEN + 10):
            deny("acme.hostile", f"https://{number}.example")
        deny("acme.digest", "https://evil.example")
        return len(heard.taken())

    assert causes() == alerts.MAX_ORIGINS + 2

    # The control: each of them would be a cause.
    monkeypatch.setattr(alerts, "MAX_ORIGINS", 10 * MAX_OPEN)
    assert causes() == MAX_OPEN


def test_what_could_not_be_written_down_comes_again_with_what_struck_meanwhile(heard):
    fail("org_a")
    taken = heard.taken()
    fail("org_b")
    heard.strikes.put_back(taken)

    [strike] = heard.taken()
    assert (strike.count, strike.fields["org"], len(strike.runs)) == (2, "org_a", 2)


def test_causes_without_end_do_not_fill_the_memory(heard):
    for number in range(MAX_OPEN + 10):
        fail(error_cause=f"Error {number}")

    assert len(heard.taken()) == MAX_OPEN


def test_the_message_names_what_to_look_at_and_no_more(heard, clock):
    fail(detail=None)
    [strike] = heard.taken()
    at = clock.now()
    alert = Alert("1", strike.cause, strike.kind, "firing", strike.summary, at, at, 1, 1, strike.fields)

    body = alert.as_json()
    assert (body["org"], body["definition"], body["run"]) == ("org_a", "digest", "r")
    assert "detail" not in body
    assert body["at"] == "2030-01-01T00:00:00.000000Z"
