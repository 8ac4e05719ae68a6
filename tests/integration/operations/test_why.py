"""Why an instant has no run: each cause in words, from what is stored."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from tests.fakes.rows import reading, within, worker_row
from tests.fakes.site import one_definition
from tests.integration.operations.conftest import whole_hour
from worker.clock import to_text
from worker.diagnosis.why import explain, why, why_time
from worker.errors import Conflict, NotFound
from worker.ids import ALL_ORGS, new_id
from worker.model.runs.clauses import clauses, sentence
from worker.model.runs.fire import decide
from worker.model.runs.run import Declared
from worker.operations.definitions import pause_definition, resume_definition
from worker.operations.orgs import set_org_state
from worker.operations.runs import run_now
from worker.store import firing, history, sweeps, tables
from worker.store.lists import runs as run_lists
from worker.store.lists.rows import RunDetail
from worker.store.redaction import redacted

HOUR = timedelta(hours=1)
FILE = one_definition(schedule="every 1h", spread="off", misfire_within="1d")


@pytest.fixture
def ask(apply, database):
    apply(FILE)

    def ask_why(at):
        with database.autocommit() as connection:
            return why_time(connection, "org_acme", "digest", at, now=database.now(connection))

    return ask_why


def fire(database):
    with database.transaction() as connection:
        firing.fire(connection, lambda due, now: decide(due, now, lambda _: Declared()), limit=100, specs={})


def test_an_instant_with_a_run_is_that_runs(ask, database, rows):
    hour = whole_hour(rows.now())
    rows.make_due_since(hour)
    fire(database)
    (run,) = rows.runs

    found = ask(hour)

    assert found.run["id"] == run["id"]
    with database.autocommit() as connection:
        assert why(connection, run["id"]) == why(connection, run["id"], org="org_acme") == found
        with pytest.raises(NotFound):
            why(connection, run["id"], org="org_beta")


def test_a_missed_instant_names_its_skip_and_the_backfill(ask, database, rows):
    hour = whole_hour(rows.now())
    rows.make_due_since(hour - 3 * HOUR)
    fire(database)

    found = ask(hour - 2 * HOUR)

    assert found.what == f"{to_text(hour - 2 * HOUR)} was skipped for org_acme/digest"
    assert "misfire = once" in clauses(found).cause
    # How many depends on where midnight is: a skip ends there.
    assert re.match(r"it is one of [123] scheduled times in a skip from \S+ until \S+$", clauses(found).kept)
    assert found.step.command.startswith(
        f"definitions backfill org_acme digest --from {to_text(hour - 2 * HOUR)}"
    )
    assert found.run["reason"] == "missed"


@on_either
def test_an_overlap_names_the_run_that_was_on(ask, database, rows, clock):
    on = run_now(database, "org_acme", "digest", actor="kim")
    hour = whole_hour(rows.now()) + HOUR
    clock.set(hour)
    rows.make_due_since(hour)
    fire(database)

    found = ask(hour)

    assert found.run["reason"] == "overlap"
    assert clauses(found).cause == f"run {on['id']} had not ended, and overlap = skip kept it out"


def test_what_is_no_instant_names_those_around_it(ask, rows):
    hour = whole_hour(rows.now())

    found = ask(hour + timedelta(minutes=7))

    assert "is not a scheduled time of org_acme/digest" in found.what
    assert to_text(hour) in clauses(found).cause
    assert to_text(hour + HOUR) in clauses(found).cause


def test_what_is_still_to_come_says_whether_it_will(ask, database, rows):
    hour = whole_hour(rows.now()) + 5 * HOUR
    assert clauses(ask(hour)).cause == "it is due then"

    pause_definition(database, "org_acme", "digest", actor="kim", note="broken")
    assert clauses(ask(hour)).cause == "and will not be due while the definition is paused by kim"
    set_org_state(database, "org_acme", "suspended", actor="kim")
    assert clauses(ask(hour)).cause == "and will not be due while the org is suspended"


def test_a_pause_that_is_over_is_still_the_cause(ask, database, rows, clock):
    pause_definition(database, "org_acme", "digest", actor="kim", note="broken")
    clock.advance(5 * HOUR)
    resume_definition(database, "org_acme", "digest", actor="kim")

    found = ask(whole_hour(rows.now()) - 2 * HOUR)

    assert clauses(found).cause.startswith("the definition was paused by kim at ")
    assert clauses(found).cause.endswith("(broken)")


def test_an_orgs_pause_is_the_cause(ask, database, rows, clock):
    set_org_state(database, "org_acme", "paused", actor="kim")
    clock.advance(5 * HOUR)

    assert clauses(ask(whole_hour(rows.now()))).cause.startswith("the org was paused by kim at ")


@on_either
def test_what_nobody_fired_is_told(ask, rows):
    hour = whole_hour(rows.now())
    rows.make_due_since(hour)
    assert clauses(ask(hour)).cause == "no worker has fired it yet"

    rows.make_due_since(hour, spread=timedelta(hours=2))
    assert clauses(ask(hour)).cause.startswith("its spread has not passed yet: it fires at ")


def test_before_the_definition_was_made_nothing_was_due(ask, rows):
    found = ask(whole_hour(rows.now()) - 3 * HOUR)

    assert clauses(found).cause.startswith("the definition was created at ")


def test_a_run_by_hand_of_that_very_instant_is_found(ask, database, rows, clock):
    clock.set(whole_hour(clock.now()) + HOUR)
    run = run_now(database, "org_acme", "digest", actor="kim")

    assert ask(clock.now()).run["id"] == run["id"]


THREE = one_definition("{org}", schedule="@yearly")


@pytest.fixture
def failed(apply, database, rows):
    """A failed run of each of three orgs, by org; `end` ends an attempt of one as it is told."""
    for org in ("org_a", "org_b", "org_c"):
        apply(THREE.format(org=org))

    def end(org: str, cause: str | None, *, ago: timedelta = timedelta(0), error: bool = True) -> str:
        run = run_now(database, org, "digest", actor="kim")
        at = rows.now() - ago
        found = {"type": "KeyError", "message": "'title'"} if error else None
        rows.add_attempt(run["id"], at=at, handler_started_at=at, error=found, error_cause=cause)
        rows.set_ended(run["id"])
        return run["id"]

    return end


def why_of(database, run: str):
    return reading(database, why, run)


def test_it_counts_the_other_orgs_that_met_the_same_error_in_that_hour(database, failed):
    mine = failed("org_a", "KeyError: <text>")
    failed("org_a", "KeyError: <text>")
    assert clauses(why_of(database, mine)).others == "no other org had the same error in the hour around it"

    failed("org_b", "KeyError: <text>", ago=timedelta(minutes=20))
    failed("org_b", "KeyError: <text>")
    failed("org_c", "ValueError: <n>")
    failed("org_c", "KeyError: <text>", ago=timedelta(hours=2))
    found = why_of(database, mine)
    assert found.other_orgs == 1
    assert "1 other org had the same error" in sentence(found)


@on_either
def test_a_waiting_run_without_a_token_counts_the_orgs_that_wait_too(database, failed, rows):
    waiting = [run_now(database, org, "digest", actor="kim")["id"] for org in ("org_a", "org_b", "org_c")]
    with database.transaction() as connection:
        connection.execute(
            update(tables.live_runs).where(tables.live_runs.c.id.in_(waiting[:2])).values(reason="no_token")
        )

    assert clauses(why_of(database, waiting[0])).others == "1 other org is waiting for a token"
    assert clauses(why_of(database, waiting[2])).others is None


@on_either
def test_more_rows_than_are_looked_at_are_at_least_so_many(database, failed, monkeypatch):
    monkeypatch.setattr(history, "MAX_ROWS", 2)
    mine = failed("org_a", "KeyError: <text>")
    for org in ("org_b", "org_c", "org_b"):
        failed(org, "KeyError: <text>")

    assert clauses(why_of(database, mine)).others.startswith("at least ")


def test_a_closed_definition_is_the_cause_of_what_did_not_come(ask, database, rows, clock):
    close_definition(database, "org_acme", "digest", actor="kim")
    clock.advance(5 * HOUR)

    found = ask(whole_hour(rows.now()))

    assert clauses(found).cause.startswith("the definition was closed by kim at ")
    assert (
        clauses(ask(whole_hour(rows.now()) + HOUR)).cause == "and will not be due: the definition is closed"
    )


@on_either
def test_a_definition_that_says_enabled_false_is_the_cause(apply, database, rows, ask):
    apply(FILE.replace('spread = "off"', 'spread = "off"\nenabled = false'))

    assert clauses(ask(whole_hour(rows.now()))).cause == "the definition has enabled = false"
    assert clauses(ask(whole_hour(rows.now()) + HOUR)).cause == (
        "and will not be due while the definition has enabled = false"
    )


def test_a_held_run_says_what_it_is_behind(apply, database):
    apply(FILE.replace('spread = "off"', 'spread = "off"\noverlap = "queue_one"'))
    on = run_now(database, "org_acme", "digest", actor="kim")
    held = run_now(database, "org_acme", "digest", actor="kim")

    found = why_of(database, held["id"])

    assert held["reason"] == "held"
    assert clauses(found).cause.startswith("an earlier run of its definition is unfinished")
    assert found.step.command == "runs list --org org_acme --definition digest --state running"
    assert why_of(database, on["id"]).run["reason"] == "due"


# The cause of a run that waits for a worker; what is in its way follows.
DUE = "it is due and waits for its turn"


@pytest.fixture
def worker_up(rows):
    rows.insert(worker_row(rows.now(), lease_until=rows.now() + HOUR, handlers=["acme.plain"]))


def test_a_run_that_waits_says_what_stands_in_its_way(apply, database, rows):
    apply(FILE.replace('spread = "off"', 'spread = "off"\noverlap = "allow"'))
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]

    alone = why_of(database, run)
    assert (clauses(alone).cause, alone.step.command) == (f"{DUE}; no worker is up to run it", "doctor")
    set_org_state(database, "org_acme", "paused", actor="kim")
    paused = why_of(database, run)
    assert clauses(paused).cause.startswith(f"{DUE}; its org was paused by kim at ")
    assert paused.step.command == "orgs resume org_acme"


def test_a_run_that_waits_behind_its_orgs_limit_says_so(apply, database, rows, worker_up):
    apply(
        FILE.replace('issuer = "main"', 'issuer = "main"\nmax_concurrent_runs = 1').replace(
            'spread = "off"', 'spread = "off"\noverlap = "allow"'
        )
    )
    on = run_now(database, "org_acme", "digest", actor="kim")["id"]
    waiting = run_now(database, "org_acme", "digest", actor="kim")["id"]
    assert clauses(why_of(database, waiting)).cause == f"{DUE}; no worker had a free slot for it yet"

    rows.set_running(on)

    full = why_of(database, waiting)
    assert clauses(full).cause == f"{DUE}; its org already runs as many as its max_concurrent_runs allows: 1"
    assert full.step.command == "runs list --org org_acme --state running"
    assert why_of(database, on).run["state"] == "running"


@on_either
@pytest.mark.parametrize("is_parked", [False, True])
def test_a_run_that_waits_behind_its_definitions_limit_says_so(apply, database, rows, worker_up, is_parked):
    more = {"overlap": "allow", "max_concurrent": 1, "parked_counts": True}
    apply(one_definition(schedule="every 1h", spread="off", **more))
    on = run_now(database, "org_acme", "digest", actor="kim")["id"]
    waiting = run_now(database, "org_acme", "digest", actor="kim")["id"]
    assert why_of(database, waiting).kind == "waiting.no_slot"

    rows.set_running(on)
    if is_parked:
        with database.transaction() as connection:
            mine = update(tables.live_runs).where(tables.live_runs.c.id == on)
            connection.execute(mine.values(state="parked", reason="sleep", worker_id=None))

    full = why_of(database, waiting)
    assert (
        clauses(full).cause == f"{DUE}; its definition already runs as many as its max_concurrent allows: 1"
    )
    assert full.step.command == "runs list --org org_acme --definition digest --state running"


@on_either
def test_a_run_that_waits_behind_its_handlers_limit_says_so(apply, database, rows, worker_up):
    apply(one_definition(schedule="every 1h", spread="off", overlap="allow"))
    on = run_now(database, "org_acme", "digest", actor="kim")["id"]
    waiting = run_now(database, "org_acme", "digest", actor="kim")["id"]
    with database.transaction() as connection:
        connection.execute(update(tables.catalogue).values(max_concurrent=1))
    assert why_of(database, waiting).kind == "waiting.no_slot"

    rows.set_running(on)

    full = why_of(database, waiting)
    assert full.kind == "waiting.handler_limit"
    cause = "its handler acme.plain already runs as many as its max_concurrent allows, over all orgs: 1"
    assert clauses(full).cause == f"{DUE}; {cause}"
    assert full.step.command == "handlers show acme.plain"


@on_either
def test_a_run_that_may_not_start_yet_says_when(apply, database, rows, worker_up):
    apply(FILE)
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]
    later = rows.now() + HOUR
    with database.transaction() as connection:
        connection.execute(update(tables.live_runs).values(available_at=later))

    assert clauses(why_of(database, run)).cause.endswith(f"; it can start at {to_text(later)}")


def test_what_is_to_be_run_of_an_org_that_was_removed_is_told_how_it_comes_back(apply, database):
    apply(FILE)
    set_org_state(database, "org_acme", "removed", actor="kim")

    with pytest.raises(Conflict) as caught:
        run_now(database, "org_acme", "digest", actor="kim")
    assert caught.value.fix == "`orgs add org_acme` makes it active"


def set_waiting(database, run: str, reason: str, detail: str | None = None, **values) -> None:
    with database.transaction() as connection:
        table = tables.live_runs
        changed = update(table).where(table.c.id == run)
        connection.execute(changed.values(state="waiting", reason=reason, detail=detail, **values))


def expire(database) -> None:
    assert len(within(database, sweeps.expire_overdue)) == 1


REJECTED = "credentials_rejected: issuer main rejects the credentials of org org_acme"


@on_either
def test_a_run_that_expires_keeps_what_it_waited_for(apply, database, rows):
    apply(FILE)
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]
    set_waiting(database, run, "no_token", REJECTED, start_by=rows.now() - HOUR)
    expire(database)

    found = why_of(database, run)

    assert (found.run["reason"], found.run["detail"]) == ("expired", f"no_token: {REJECTED}")
    assert clauses(found).cause.startswith(
        "its org had no token: issuer main rejects the credentials of org org_acme, until "
    )
    assert (found.whose, found.step.command) == ("org", "orgs check org_acme")
    # An org's own people read the code of the error, and no more: a message names files and others.
    seen = redacted(RunDetail, found.run, "org_acme")
    assert seen["detail"] == "no_token: credentials_rejected"

    # Fixed: a credential works again.
    with database.transaction() as connection:
        connection.execute(
            tables.credentials.insert().values(
                id=new_id(), org_id=rows.orgs[0]["id"], generation=1, client_id="c", kind="client_secret",
                reference="file:x", state="active", created_at=rows.now(), created_by="kim",
            )
        )  # fmt: skip
    assert why_of(database, run).step.command == f"runs retry {run}"


def test_a_run_that_was_only_due_keeps_no_reason_when_it_expires(apply, database, rows):
    apply(FILE)
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]
    set_waiting(database, run, "due", start_by=rows.now() - HOUR)
    expire(database)

    assert why_of(database, run).run["detail"] is None
    assert (
        clauses(why_of(database, run)).cause == "no worker had a free slot for it within its start_deadline"
    )


def test_it_says_what_came_since_and_since_when_for_this_org(apply, database, rows, clock):
    apply(FILE.replace('spread = "off"', 'spread = "off"\noverlap = "allow"'))

    def ended(state: str) -> str:
        run = run_now(database, "org_acme", "digest", actor="kim")["id"]
        clock.advance(HOUR)
        rows.set_ended(run, state=state)
        return run

    ended("succeeded")
    first, second = ended("failed"), ended("failed")
    began = next(run["finished_at"] for run in rows.runs if run["id"] == first)
    alone = why_of(database, second)
    assert (alone.since, clauses(alone).since_then) == (
        began,
        f"2 runs in a row ended like this since {to_text(began)}; no later run has ended",
    )

    ended("failed")
    assert clauses(why_of(database, second)).since_then == f"all 3 runs since {to_text(began)} failed"
    ended("succeeded")
    assert clauses(why_of(database, second)).since_then == "of 2 later runs 1 succeeded and 1 did not"
    # Of another org's definition nothing is counted.
    apply(THREE.format(org="org_b"))
    rows.set_ended(run_now(database, "org_b", "digest", actor="kim")["id"], state="failed")
    assert why_of(database, second).since_then.count == 2
    with database.autocommit() as connection:
        run = run_lists.run(connection, ALL_ORGS, second)
        assert explain(connection, run, across_orgs=False).since_then.count == 2


def test_more_neighbours_than_are_read_are_at_least_so_many(apply, database, rows, monkeypatch):
    monkeypatch.setattr(history, "NEIGHBOURS", 2)
    apply(FILE.replace('spread = "off"', 'spread = "off"\noverlap = "allow"'))
    runs = [run_now(database, "org_acme", "digest", actor="kim")["id"] for _ in range(4)]
    for run in runs:
        rows.set_ended(run, state="failed")

    assert clauses(why_of(database, runs[0])).since_then.startswith("all at least 3 runs since ")


@on_either
def test_workers_that_were_not_restarted_are_what_blocks(apply, database, rows, worker_up):
    apply(FILE.replace("acme.plain", "acme.note").replace('spread = "off"', 'params = {text = "x"}'))
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]
    for reason in ("due", "no_handler"):
        set_waiting(database, run, reason)
        found = why_of(database, run)
        assert clauses(found).cause.endswith(
            "; restart the workers: none has acme.note, which acme-jobs 1.0 offers"
        )
        assert (found.whose, found.step.verb) == ("operator", "restart_workers")

    # The control: a worker has it.
    with database.transaction() as connection:
        connection.execute(update(tables.workers).values(handlers=["acme.note"]))
    assert why_of(database, run).kind == "waiting.no_handler"
    set_waiting(database, run, "due")
    assert why_of(database, run).kind == "waiting.no_slot"


def test_the_only_worker_may_be_down(apply, database, rows, worker_up, clock):
    apply(FILE)
    run = run_now(database, "org_acme", "digest", actor="kim")["id"]
    set_waiting(database, run, "due")
    assert why_of(database, run).kind == "waiting.no_slot"

    worker = rows.workers[0]
    clock.advance(timedelta(minutes=31))  # of a lease of one hour, renewed four times while it lasts
    found = why_of(database, run)

    assert clauses(found).cause == (
        f"{DUE}; worker {worker['id'][:8]} on a may be down: silent since {to_text(worker['renewed_at'])}, "
        "for longer than two renewals of its lease"
    )
    assert (found.whose, found.probably, found.step.command) == ("operator", True, "doctor")
    assert found.since == worker["renewed_at"]
