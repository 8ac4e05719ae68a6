"""One alert for each cause, one more when it is over, however often it strikes in between."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.clock import ManualClock
from worker.telemetry import events
from worker.telemetry.alerts import MOST_OPEN, QUIET, Alert, Alerts
from worker.telemetry.events import emit


class Told(list[Alert]):
    """What was sent, and the alerts that sent it."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.alerts = Alerts(clock, self.append)
        events.listen(self.alerts.take)

    def briefly(self) -> list[tuple[str, str]]:
        return [(alert.kind, alert.status) for alert in self]


@pytest.fixture
def told(clock: ManualClock) -> Told:
    return Told(clock)


def end_run(state: str, org: str = "org_a", definition: str = "digest", **fields: Any) -> None:
    given = {"run": "r", "handler": "acme.digest", "attempt": 1, "outcome": state, "state": state}
    emit("run.ended", **(given | {"org": org, "definition": definition, "seconds": 1.0} | fields))


def fail(org: str = "org_a", **fields: Any) -> None:
    end_run("failed", org, **({"reason": "error", "error_cause": "HTTPError: <n>"} | fields))


def test_a_hundred_failures_of_one_cause_are_one_alert_and_one_resolved(told, clock):
    for number in range(100):
        fail(f"org_{number % 20}")
        clock.advance(1)
    for number in range(20):
        assert told.briefly() == [("failed", "firing")]
        end_run("succeeded", f"org_{number}")

    assert told.briefly() == [("failed", "firing"), ("failed", "resolved")]
    first, last = told
    assert (first.count, first.affected) == (1, 1)
    assert (last.count, last.affected, last.since) == (100, 20, first.at)
    assert last.id == first.id
    assert "acme.digest fails: error (HTTPError: <n>)" in last.summary


def test_another_cause_is_another_alert(told):
    fail()
    fail(error_cause="KeyError")
    fail(handler="acme.other")
    fail(error_cause=None, reason="timed_out")

    assert told.briefly() == [("failed", "firing")] * 4
    assert len({alert.cause for alert in told}) == 4


def test_a_run_that_will_be_tried_again_is_no_alert(told):
    end_run("waiting", reason="retry", error_cause="KeyError")
    end_run("cancelled", reason="requested")
    end_run("skipped", reason="flag_off")

    assert told == []


def test_a_cause_that_strikes_again_after_it_was_over_is_told_again_under_the_same_cause(told, clock):
    fail()
    end_run("succeeded")
    clock.advance(60)
    fail()

    assert told.briefly() == [("failed", "firing"), ("failed", "resolved"), ("failed", "firing")]
    assert told[0].cause == told[2].cause
    assert told[0].id != told[2].id


def test_another_definitions_success_ends_nothing(told):
    fail()
    end_run("succeeded", "org_b")
    end_run("succeeded", "org_a", "other")

    assert told.briefly() == [("failed", "firing")]


def test_refusals_are_told_by_reason_and_detail(told):
    end_run("refused", reason="settings_invalid", detail="max_tokens")
    end_run("refused", "org_b", reason="settings_invalid", detail="max_tokens")
    end_run("refused", reason="org_mismatch", detail="org_x")
    end_run("succeeded", "org_b")
    end_run("succeeded")

    assert told.briefly() == [
        ("refused", "firing"),
        ("refused", "firing"),
        ("refused", "resolved"),
        ("refused", "resolved"),
    ]


def test_a_credential_is_dead_until_the_org_has_a_token_again(told):
    for _ in range(3):
        emit("org.parked", org="org_a", issuer="main", error="invalid_client", seconds=60.0)
    emit("token.requested", org="org_b", issuer="main", seconds=0.1)
    assert told.briefly() == [("credential_dead", "firing")]

    emit("token.requested", org="org_a", issuer="main", seconds=0.1)

    assert told.briefly() == [("credential_dead", "firing"), ("credential_dead", "resolved")]


def test_a_paused_definition_is_told_and_over_when_it_succeeds(told):
    emit("definition.paused", org="org_a", definition="digest", failures=5)
    end_run("succeeded")

    assert told.briefly() == [("paused", "firing"), ("paused", "resolved")]


def test_overdue_is_told_once_and_over_when_it_has_caught_up(told):
    emit("schedule.overdue", org="org_a", definition="digest", seconds=12.0)
    emit("schedule.overdue", org="org_b", definition="digest", seconds=15.0)
    emit("schedule.caught_up")

    assert told.briefly() == [("overdue", "firing"), ("overdue", "resolved")]


def test_a_cause_that_strikes_no_more_is_over_after_longer_than_a_day(told, clock):
    fail()
    clock.advance(QUIET)
    told.alerts.tidy()
    assert len(told) == 1

    clock.advance(1)
    told.alerts.tidy()

    assert told.briefly() == [("failed", "firing"), ("failed", "resolved")]
    assert "not struck again" in told[1].summary


def test_causes_without_end_do_not_fill_the_memory_or_the_mailbox(told):
    for number in range(MOST_OPEN + 10):
        fail(error_cause=f"Error {number}")

    assert len(told) == MOST_OPEN


def test_the_message_names_what_to_look_at_and_no_more(told, clock):
    fail(detail=None)

    body = told[0].as_json()
    assert body["org"] == "org_a"
    assert body["definition"] == "digest"
    assert body["run"] == "r"
    assert "detail" not in body
    assert body["at"] == "2030-01-01T00:00:00.000000Z"
