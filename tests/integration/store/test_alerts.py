"""Open alerts in the database: one a cause for all workers, told in order, over when the rows say so."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.fakes.clock import ManualClock
from tests.fakes.rows import within
from tests.fakes.stock import Stock
from worker.ids import new_id
from worker.model.runs.waits import NewWait
from worker.store import alerts, sweeps, tables, waits
from worker.store.alerts import CLAIM, QUIET
from worker.store.database import Database
from worker.store.sql import statements
from worker.telemetry.alerts import MAX_OPEN, Alert, Strike

OVERDUE = 10.0


class Ledger:
    """The alerts of a database, and the rows that end them."""

    def __init__(self, stock: Stock, clock: ManualClock) -> None:
        self.stock = stock
        self.clock = clock
        self.database = stock.database
        self.worker = stock.worker()

    def run(self, definition_id: str, org_id: str, state: str, **values: Any) -> str:
        """Carry one run of a definition to that end; its id."""
        run = self.stock.run(org_id, definition_id, **values)
        self.stock.put(run)
        self.clock.advance(1)
        (admitted,) = self.stock.admit(self.worker)
        self.stock.finish(self.worker, self.stock.ended(admitted, state))
        return run.id

    def note(self, *strikes: Strike) -> None:
        within(self.database, alerts.note, strikes)

    def settle(self) -> None:
        within(self.database, alerts.resolve_ended, overdue=OVERDUE)

    def claim(self) -> Alert | None:
        claimed = within(self.database, alerts.claim)
        return None if claimed is None else claimed[0]

    def told(self, alert: Alert) -> None:
        within(self.database, alerts.mark_delivered, alert)

    def deliver(self) -> list[Alert]:
        """Tell all that there is to tell."""
        delivered = []
        while (alert := self.claim()) is not None:
            self.told(alert)
            delivered.append(alert)
        return delivered

    def briefly(self) -> list[tuple[str, str]]:
        return [(alert.kind, alert.status) for alert in self.deliver()]

    def change(self, **values: Any) -> None:
        with self.database.transaction() as connection:
            connection.execute(update(tables.alerts).values(**values))

    def rows(self) -> int:
        with self.database.autocommit() as connection:
            found = [
                connection.execute(select(table)).all() for table in (tables.alerts, tables.alert_strikes)
            ]
        return sum(len(each) for each in found)


@pytest.fixture
def ledger(stock: Stock, clock: ManualClock) -> Ledger:
    return Ledger(stock, clock)


def strike(ledger: Ledger, kind: Any = "failed", cause: str = "c", **values: Any) -> Strike:
    return Strike(cause, kind, "it went wrong", {"org": "org_1"}, ledger.stock.now(), **values)


def failed(ledger: Ledger, definition_id: str, org_id: str, cause: str = "c") -> Strike:
    run = ledger.run(definition_id, org_id, "failed")
    return strike(ledger, cause=cause, runs={(definition_id,): run})


@pytest.mark.parametrize("many", [1, 2])
def test_a_late_definition_is_told_once_an_org_and_cause_until_all_are_done(
    ledger: Ledger, stock: Stock, many: int
) -> None:
    org = stock.org()
    late = [stock.definition(org) for _ in range(many)]
    names = [row["name"] for row in stock.all(tables.definitions) if row["id"] in late]
    with stock.database.transaction() as connection:
        at = {"scheduled_for": stock.now(), "late_at": stock.now()}
        rows = [{"definition_id": id_, "org_id": org} | at for id_ in late]
        connection.execute(insert(tables.late_definitions), rows)
    for name in names:
        ledger.note(strike(ledger, "late", definitions={(stock.code(org), name)}))

    ledger.settle()
    assert ledger.briefly() == [("late", "firing")]
    for number, definition in enumerate(late):
        assert number == 0 or ledger.briefly() == []
        with stock.database.transaction() as connection:
            gone = tables.late_definitions.delete()
            connection.execute(gone.where(tables.late_definitions.c.definition_id == definition))
        ledger.settle()
    assert ledger.briefly() == [("late", "resolved")]


def test_failures_of_one_cause_are_one_alert_and_one_resolved_when_each_has_succeeded(ledger, stock):
    org = stock.org()
    struck = [stock.definition(org) for _ in range(3)]
    for _ in range(3):
        ledger.note(*(failed(ledger, one, org) for one in struck))
    [first] = ledger.deliver()
    assert (first.kind, first.status, first.count, first.affected) == ("failed", "firing", 9, 3)

    for one in struck[:2]:
        ledger.run(one, org, "succeeded")
    ledger.settle()
    assert ledger.deliver() == []
    ledger.run(struck[2], org, "succeeded")
    ledger.settle()

    [last] = ledger.deliver()
    assert (last.status, last.id, last.since, last.count, last.affected) == (
        "resolved",
        first.id,
        first.since,
        9,
        3,
    )
    assert last.summary == "over, each affected definition succeeded again: it went wrong"
    assert last.fields == {"org": "org_1"}
    assert ledger.rows() == 0


def test_a_success_before_the_failure_or_of_another_definition_or_of_a_child_ends_nothing(ledger, stock):
    org = stock.org()
    struck, other = stock.definition(org), stock.definition(org)
    ledger.run(struck, org, "succeeded")
    ledger.note(failed(ledger, struck, org))
    ledger.run(other, org, "succeeded")
    ledger.run(struck, org, "succeeded", origin="child")
    ledger.settle()

    assert ledger.briefly() == [("failed", "firing")]


def test_a_definition_that_is_closed_strikes_no_more(ledger, stock):
    org = stock.org()
    struck = stock.definition(org)
    ledger.note(failed(ledger, struck, org))
    stock.change(tables.definitions, struck, closed_at=stock.now())
    ledger.settle()

    assert ledger.briefly() == [("failed", "firing"), ("failed", "resolved")]


def test_what_one_worker_has_claimed_no_other_tells_until_that_worker_seems_dead(ledger):
    ledger.note(strike(ledger, "paused"))
    ledger.note(strike(ledger, "paused"))

    assert ledger.claim() is not None
    assert ledger.claim() is None
    ledger.change(try_at=ledger.stock.now() - timedelta(microseconds=1))
    assert ledger.claim() is not None
    with ledger.database.autocommit() as connection:
        [until] = connection.execute(select(tables.alerts.c.try_at)).scalars()
    assert timedelta() < until - ledger.stock.now() <= CLAIM


def test_an_alert_that_is_not_taken_is_claimed_again_later_with_its_tries(ledger):
    ledger.note(strike(ledger))
    alert = ledger.claim()
    with ledger.database.transaction() as connection:
        alerts.retry_later(connection, alert, 0.0)
        assert alerts.claim(connection) == (alert, 1)
        alerts.retry_later(connection, alert, 30.0)
        assert alerts.claim(connection) is None


def test_a_cause_that_is_over_before_it_was_told_is_told_with_its_end_behind(ledger):
    ledger.note(strike(ledger, "paused", definitions={("org_gone", "d")}))
    ledger.note(strike(ledger, "overdue", "o"))
    ledger.settle()

    assert sorted(ledger.briefly()) == [("overdue", "firing"), ("overdue", "resolved"), ("paused", "firing")]


def test_a_cause_that_strikes_again_before_its_end_was_told_goes_on_without_a_word(ledger):
    ledger.note(strike(ledger, "overdue"))
    assert ledger.briefly() == [("overdue", "firing")]
    ledger.settle()
    ledger.note(strike(ledger, "overdue"))

    assert ledger.deliver() == []


def test_a_cause_that_strikes_again_while_its_end_is_told_is_told_anew(ledger):
    ledger.note(strike(ledger, "overdue"))
    [first] = ledger.deliver()
    ledger.settle()
    end = ledger.claim()
    assert end is not None
    ledger.note(strike(ledger, "overdue"))
    ledger.told(end)

    [again] = ledger.deliver()
    assert (end.status, again.status, again.cause) == ("resolved", "firing", first.cause)


@pytest.mark.parametrize("status", ["firing", "resolved"])
def test_a_worker_that_stood_still_after_its_post_changes_no_newer_alert(ledger, clock, status):
    """Another worker has delivered the alert and its end meanwhile, and the cause occurred again."""
    ledger.note(strike(ledger, "overdue"))
    if status == "resolved":
        ledger.deliver()
        ledger.settle()
    posted = ledger.claim()
    assert posted is not None and posted.status == status
    clock.advance(CLAIM + timedelta(seconds=1))
    ledger.deliver()
    ledger.settle()
    ledger.deliver()
    assert ledger.rows() == 0
    clock.advance(1)
    ledger.note(strike(ledger, "overdue"))
    with ledger.database.transaction() as connection:
        alerts.retry_later(connection, posted, 300.0)
    ledger.told(posted)

    assert ledger.briefly() == [("overdue", "firing")]
    ledger.settle()
    assert ledger.briefly() == [("overdue", "resolved")]


def test_a_pause_is_over_when_the_definition_is_resumed(ledger, stock):
    org = stock.org()
    struck = stock.definition(org)
    stock.change(tables.definitions, struck, paused_at=stock.now(), paused_by="worker")
    with ledger.database.autocommit() as connection:
        code, name = connection.execute(
            select(tables.orgs.c.code, tables.definitions.c.name).join_from(tables.orgs, tables.definitions)
        ).one()
    ledger.note(strike(ledger, "paused", definitions={(code, name)}))
    ledger.settle()
    assert ledger.briefly() == [("paused", "firing")]
    stock.change(tables.definitions, struck, paused_at=None)
    ledger.settle()

    assert ledger.briefly() == [("paused", "resolved")]


def test_a_credential_is_dead_until_the_issuer_has_given_a_token_for_the_org(ledger, stock):
    org, at = stock.org(), stock.now()
    given = {"id": new_id(), "org_id": org, "generation": 1, "client_id": "c", "created_by": "a"}
    used = {"created_at": at, "last_used_at": at, "last_error": "invalid_client"}
    with ledger.database.transaction() as connection:
        connection.execute(insert(tables.credentials).values(**given, **used))
        code = connection.execute(select(tables.orgs.c.code)).scalar_one()
    ledger.note(strike(ledger, "credential_dead", orgs={code}))
    ledger.settle()
    assert ledger.briefly() == [("credential_dead", "firing")]
    later = ledger.stock.now() + timedelta(seconds=1)
    stock.change(tables.credentials, given["id"], last_used_at=later, last_error=None)
    ledger.settle()

    assert ledger.briefly() == [("credential_dead", "resolved")]


def test_provisioning_fails_until_no_step_of_an_application_is_in_error(ledger, stock):
    org, at = stock.org(), stock.now()
    row = {
        "id": new_id(),
        "org_id": org,
        "issuer": "main",
        "name": "orgworker 0000 0000 o",
        "state": "active",
    }
    made = {"created_at": at, "created_by": "provision", "updated_at": at, "last_error": "refused"}
    with ledger.database.transaction() as connection:
        connection.execute(insert(tables.applications).values(**row, **made))
        code = connection.execute(select(tables.orgs.c.code)).scalar_one()
    ledger.note(strike(ledger, "provisioning_failed", orgs={code}))
    ledger.settle()
    assert ledger.briefly() == [("provisioning_failed", "firing")]
    stock.change(tables.applications, row["id"], last_error=None)
    ledger.settle()

    assert ledger.briefly() == [("provisioning_failed", "resolved")]


def test_a_wait_is_over_when_it_is_answered(ledger, stock):
    org = stock.org()
    stock.put(stock.run(org, stock.definition(org)))
    [run] = stock.admit(ledger.worker)
    wait = NewWait("approval", 1, "answer", alert=True)
    with ledger.database.transaction() as connection:
        statements(connection).open_wait(connection, run.id, run.fencing_token, attempt=1, wait=wait)
    stock.finish(ledger.worker, stock.ended(run, "parked", outcome="parked", reason="answer"))
    ledger.note(strike(ledger, "waiting", runs={("org", "ask"): run.id}))
    ledger.settle()
    assert ledger.briefly() == [("waiting", "firing")]

    with ledger.database.transaction() as connection:
        found = waits.find(connection, org, run.id, "approval", 1)
        waits.answer(connection, found, True, at=stock.now(), by="kim")
    ledger.settle()

    assert ledger.briefly() == [("waiting", "resolved")]


def test_a_wait_is_not_over_while_the_next_attempt_comes_to_it_again(ledger, stock):
    """A run that also slept goes on, and asks still."""
    org = stock.org()
    stock.put(stock.run(org, stock.definition(org)))
    for attempt, asks in ((1, [("waiting", "firing")]), (2, [])):
        [run] = stock.admit(ledger.worker)
        ledger.settle()
        assert ledger.briefly() == []
        for wait in (
            NewWait("approval", 1, "answer", alert=True),
            NewWait("sleep", attempt, "sleep", seconds=60.0),
        ):
            with ledger.database.transaction() as connection:
                hot = statements(connection)
                hot.open_wait(connection, run.id, run.fencing_token, attempt=attempt, wait=wait)
        stock.finish(ledger.worker, stock.ended(run, "parked", outcome="parked", reason="answer"))
        ledger.note(strike(ledger, "waiting", runs={("org", "ask"): run.id}))
        ledger.settle()
        assert ledger.briefly() == asks
        stock.make_available(run.id)
        assert within(ledger.database, sweeps.wake_due) == 1
        ledger.settle()
        assert ledger.briefly() == []


def test_overdue_is_over_when_nothing_that_has_come_is_unfired_for_so_long(ledger, stock):
    stock.definition(stock.org(), due_at=stock.now() - timedelta(seconds=OVERDUE + 5))
    ledger.note(strike(ledger, "overdue"))
    ledger.settle()
    assert ledger.briefly() == [("overdue", "firing")]
    with ledger.database.transaction() as connection:
        connection.execute(update(tables.schedule).values(next_fire_at=ledger.stock.now()))
    ledger.settle()

    assert ledger.briefly() == [("overdue", "resolved")]


def test_a_cause_that_strikes_no_more_is_over_after_longer_than_a_day(ledger, stock):
    org = stock.org()
    ledger.note(failed(ledger, stock.definition(org), org))
    ledger.deliver()
    ledger.change(struck_at=stock.now() - QUIET - timedelta(seconds=1))
    ledger.settle()

    [end] = ledger.deliver()
    assert "it has not occurred again" in end.summary


@pytest.mark.parametrize("kind", ["files_opened", "files_changeable", "egress_denied"])
def test_what_only_occurs_is_over_after_longer_than_a_day(ledger, stock, kind):
    ledger.note(strike(ledger, kind))
    ledger.settle()
    assert ledger.briefly() == [(kind, "firing")]
    ledger.change(struck_at=stock.now() - QUIET - timedelta(seconds=1))
    ledger.settle()

    assert ledger.briefly() == [(kind, "resolved")]


def test_causes_without_end_do_not_fill_the_table_or_the_mailbox(ledger):
    ledger.note(*(strike(ledger, cause=f"c{number}") for number in range(MAX_OPEN + 10)))
    ledger.note(strike(ledger, cause="one more"), strike(ledger, cause="c5"))

    assert ledger.rows() == MAX_OPEN


def test_two_workers_that_meet_a_cause_at_once_tell_it_once(postgres: Database, clock: ManualClock):
    ledger = Ledger(Stock(postgres), clock)
    ledger.note(strike(ledger))
    with postgres.transaction() as one, postgres.transaction() as other:
        assert alerts.claim(one) is not None
        assert alerts.claim(other) is None
