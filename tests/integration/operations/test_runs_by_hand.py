"""Runs made and ended by hand: the overlap rule, request keys, cancel and retry."""

from __future__ import annotations

import json

import pytest

from tests.conftest import on_either
from tests.fakes.closing import close_definition
from tests.fakes.rows import reading
from tests.fakes.site import one_definition
from worker.diagnosis.why import why
from worker.errors import Conflict, DefinitionError, NotFound
from worker.handlers.catalogue import HandlerEntry
from worker.model.runs.clauses import clauses, sentence
from worker.operations.definitions import pause_definition
from worker.operations.orgs import set_org_state
from worker.operations.runs import cancel, retry, run_now
from worker.store import catalogue, tables
from worker.store.lists import RUNS, Page
from worker.store.lists import runs as run_lists
from worker.store.lists.read import read
from worker.store.lists.rows import Run, columns_of

FILE = one_definition(handler="acme.note", params={"text": "hello"})


@pytest.fixture
def site(apply, database):
    """An org with one definition of the given overlap; a way to run it and to look at its runs."""

    class Site:
        def having(self, overlap):
            apply(FILE + f'overlap = "{overlap}"')
            return self

        def run(self, **options):
            return run_now(database, "org_acme", "digest", **{"actor": "tester"} | options)

        def runs(self, **narrowed):
            return reading(database, read, RUNS, "org_acme", Page(**narrowed))

        def show(self, run_id):
            return reading(database, run_lists.run, "org_acme", run_id)

    return Site()


def test_run_now_makes_a_run_that_may_start_at_once(site, rows):
    run = site.having("skip").run()

    assert (run["state"], run["reason"], run["origin"]) == ("waiting", "due", "manual")
    assert run["available_at"] == run["scheduled_for"] <= rows.now()
    assert (run["org"], run["definition"], run["handler"]) == ("org_acme", "digest", "acme.note")
    assert tuple(run) == columns_of(Run)
    [live] = rows.live_runs
    assert (live["serial"], live["isolation"], live["start_by"]) == (True, "child", None)
    assert rows.runs[0]["created_by"] == "tester"
    assert rows.audit[-1]["action"] == "definition.run"


def test_the_same_request_key_makes_one_run_whatever_became_of_it(site, rows):
    first = site.having("skip").run(request_key="order-7")

    assert site.run(request_key="order-7")["id"] == first["id"]
    rows.set_ended(first["id"])
    again = site.run(request_key="order-7")

    assert (again["id"], again["state"]) == (first["id"], "failed")
    assert len(rows.runs) == 1


def test_params_by_hand_are_laid_over_the_definitions_and_checked(site, rows):
    site.having("allow").run(params={"times": 3})

    assert rows.live_runs[0]["params"] == {"text": "hello", "times": 3}
    with pytest.raises(DefinitionError, match=r"params\.times: 'many' is not of type integer"):
        site.run(params={"times": "many"})
    assert len(rows.runs) == 1


@pytest.mark.parametrize(("typed", "taken"), [("5", "5"), ("true", "true"), ('"5"', "5"), ("[1]", "[1]")])
def test_a_param_from_the_command_line_is_what_the_handler_takes(site, rows, typed, taken):
    """`--param text=5` of a handler that wants a text, which cannot know that 5 reads as a number."""
    site.having("allow").run(
        params={"text": json.loads(typed), "times": 3}, typed={"text": typed, "times": "3"}
    )

    assert rows.live_runs[0]["params"] == {"text": taken, "times": 3}


def test_a_param_that_fits_in_neither_form_is_refused_as_it_was_read(site):
    with pytest.raises(DefinitionError, match=r"params\.times: 'many' is not of type integer"):
        site.having("allow").run(params={"times": "many"}, typed={"times": "many"})


@pytest.mark.parametrize(
    ("pattern", "refused"),
    [(r"^([a-zA-Z0-9_.-]+)+@acme\.com$", True), (r"^(?!root)([a-z]+)+@acme\.com$", False)],
)
def test_a_pattern_that_backtracks_holds_nobody(site, rows, database, pattern, refused):
    """With Python's `re` the interpreter would stand still for years; what needs it is left to the run."""
    schema = {"type": "object", "properties": {"text": {"type": "string", "pattern": pattern}}}
    site.having("allow")
    entry = HandlerEntry("acme.note", "acme-jobs", "1.0", "acme_jobs:note", params_schema=schema)
    with database.transaction() as connection:
        catalogue.put(connection, [entry], at=database.now(connection))

    if refused:
        with pytest.raises(DefinitionError, match=r"params\.text: 'a+\.\.\. does not match"):
            site.run(params={"text": "a" * 100})
        assert rows.live_runs == []
    else:
        site.run(params={"text": "a" * 100})
        assert len(rows.live_runs) == 1


def test_a_param_that_no_database_keeps_is_refused(site, rows):
    with pytest.raises(DefinitionError, match="text has a NUL character") as refused:
        site.having("allow").run(params={"text": "a\0b"})
    assert refused.value.field == "params"
    assert rows.live_runs == []


def test_skip_refuses_a_second_run_and_names_the_first(site, rows):
    first = site.having("skip").run()

    with pytest.raises(Conflict, match=f"run {first['id']} of this definition is waiting"):
        site.run()
    rows.set_running(first["id"])
    with pytest.raises(Conflict, match=f"run {first['id']} of this definition is running"):
        site.run()

    assert len(rows.runs) == len(rows.live_runs) == 1


def test_queue_one_holds_one_back_and_refuses_the_next(site, rows):
    first = site.having("queue_one").run()
    second = site.run()

    assert (second["state"], second["reason"]) == ("waiting", "held")
    with pytest.raises(Conflict, match=f"run {second['id']} of this definition is held back already"):
        site.run()
    assert [run["id"] for run in site.runs()] == [second["id"], first["id"]]


def test_replace_ends_what_waits_and_takes_its_place(site, rows):
    first = site.having("replace").run()

    second = site.run()

    assert second["reason"] == "due"
    old = site.show(first["id"])
    assert (old["state"], old["reason"]) == ("cancelled", "replaced")
    assert [live["id"] for live in rows.live_runs] == [second["id"]]


def test_replace_asks_what_runs_to_stop_and_holds_the_new_one_until_then(site, rows):
    first = site.having("replace").run()
    rows.set_running(first["id"])

    second = site.run()
    third = site.run()

    live = {row["id"]: row for row in rows.live_runs}
    assert live.keys() == {first["id"], third["id"]}
    assert live[first["id"]]["cancel_reason"] == "replaced"
    assert live[third["id"]]["state"] == "held"
    assert site.show(second["id"])["reason"] == "replaced"


def test_allow_lets_any_number_be_unfinished(site, rows):
    site.having("allow").run()
    site.run()

    assert [live["serial"] for live in rows.live_runs] == [False, False]


def test_a_paused_definition_runs_by_hand_a_closed_one_or_a_stopped_org_does_not(site, database):
    site.having("allow")
    pause_definition(database, "org_acme", "digest", actor="ops")
    site.run()
    set_org_state(database, "org_acme", "paused", actor="ops")
    with pytest.raises(Conflict, match="org_acme is paused"):
        site.run()
    set_org_state(database, "org_acme", "active", actor="ops")
    close_definition(database, "org_acme", "digest", actor="ops")
    with pytest.raises(Conflict, match="closed"):
        site.run()


def test_cancelling_a_waiting_run_ends_it_at_once(site, database, rows):
    first = site.having("queue_one").run()
    second = site.run()

    row = cancel(database, first["id"], actor="tester")

    assert (row["state"], row["reason"]) == ("cancelled", "requested")
    assert row["finished_at"] is not None
    assert site.show(second["id"])["reason"] == "due"
    assert [(each["state"], each["runs"]) for each in rows.rollup_hours] == [("cancelled", 1)]
    with pytest.raises(Conflict, match="has ended: cancelled"):
        cancel(database, first["id"], actor="tester")


@on_either
def test_cancelling_a_running_run_asks_it_to_stop(site, database, rows):
    run = site.having("skip").run()
    rows.set_running(run["id"])

    row = cancel(database, run["id"], actor="tester")

    assert row["state"] == "running"
    [live] = rows.live_runs
    assert live["cancel_reason"] == "requested"
    asked_at = live["cancel_requested_at"]
    cancel(database, run["id"], actor="tester")
    assert rows.live_runs[0]["cancel_requested_at"] == asked_at


def test_another_orgs_run_does_not_exist(site, database, apply):
    run = site.having("skip").run()
    apply('[[org]]\ncode = "org_other"\nissuer = "main"')

    with pytest.raises(NotFound):
        cancel(database, run["id"], actor="tester", org="org_other")
    with pytest.raises(NotFound), database.autocommit() as connection:
        run_lists.run(connection, "org_other", run["id"])


def test_a_retry_is_a_new_run_of_the_same_instant(site, database, rows):
    old = site.having("skip").run(params={"times": 2})
    rows.set_ended(old["id"])

    new = retry(database, old["id"], actor="tester")

    assert new["id"] != old["id"]
    assert (new["origin"], new["retry_of"], new["state"]) == ("retry", old["id"], "waiting")
    assert new["scheduled_for"] == old["scheduled_for"]
    kept = {row["id"]: row for row in rows.runs}
    assert kept[new["id"]]["idempotency_key"] == kept[old["id"]]["idempotency_key"]
    assert kept[new["id"]]["params"] == {"text": "hello", "times": 2}
    assert kept[old["id"]]["state"] == "failed"


def test_a_run_is_retried_once_unless_it_is_asked_for_again(site, database, rows):
    old = site.having("allow").run()
    assert old["retried_as"] is None
    rows.set_ended(old["id"])
    new = retry(database, old["id"], actor="tester")

    with pytest.raises(Conflict, match=f"was retried already, as run {new['id']}") as caught:
        retry(database, old["id"], actor="tester")
    assert "--again" in caught.value.fix
    other = retry(database, old["id"], actor="tester", again=True)

    assert [row["retried_as"] for row in site.runs()] == [None, None, other["id"]]
    assert site.show(old["id"])["retried_as"] == other["id"]


def test_why_follows_the_retries_of_a_failure_to_the_last(site, database, rows):
    old = site.having("allow").run()
    rows.set_ended(old["id"])
    first = retry(database, old["id"], actor="tester")
    rows.set_ended(first["id"])
    last = retry(database, first["id"], actor="tester")
    rows.set_ended(last["id"], "succeeded", None)

    found = reading(database, why, old["id"])

    assert found.run["retried_as"] == first["id"]
    assert (
        clauses(found).retry
        == f"it was retried as run {last['id']}, which succeeded: no other retry is needed"
    )
    assert found.step.command == f"runs show {last['id']}"


@on_either
def test_a_retry_may_begin_from_the_old_checkpoint(site, database, rows):
    old = site.having("skip").run()
    with pytest.raises(Conflict, match="has not ended"):
        retry(database, old["id"], actor="tester")
    rows.set_ended(old["id"])
    with pytest.raises(Conflict, match="saved no checkpoint and stored no step"):
        retry(database, old["id"], actor="tester", from_checkpoint=True)
    assert len(rows.runs) == 1
    with database.transaction() as connection:
        connection.execute(
            tables.checkpoints.insert().values(
                run_id=old["id"],
                org_id=rows.orgs[0]["id"],
                attempt=1,
                fencing_token=1,
                saved_at=rows.now(),
                data={"done": 41},
            )
        )

    new = retry(database, old["id"], actor="tester", from_checkpoint=True)

    assert site.show(new["id"])["checkpoint"] == {"done": 41}


@pytest.fixture
def step(database, rows):
    """Store a step of a run, as its handler did."""

    def insert_step(run_id, seq=1, *, handler="acme.note", result=0, size=None, **values):
        with database.transaction() as connection:
            text = json.dumps(result)
            connection.execute(
                tables.steps.insert().values(
                    {
                        "run_id": run_id, "seq": seq, "org_id": rows.orgs[0]["id"], "name": "ask",
                        "key": None, "occurrence": seq, "attempt": 1, "fencing_token": 1, "handler": handler,
                        "started_at": rows.now(), "ended_at": rows.now(),
                        "size": len(text) if size is None else size, "result": result,
                    } | values
                )
            )  # fmt: skip

    return insert_step


def test_a_retry_may_begin_from_steps_alone(site, database, rows, step):
    old = site.having("skip").run()
    for seq in (1, 2, 5):
        step(old["id"], seq, result={"n": seq})
    rows.set_ended(old["id"])

    new = retry(database, old["id"], actor="tester", from_checkpoint=True)

    shown = site.show(new["id"])
    assert (shown["checkpoint"], shown["step_count"]) == (None, 3)
    assert [(one["seq"], one["attempt"], one["result"]) for one in shown["steps"]] == [
        (seq, 1, {"n": seq}) for seq in (1, 2, 5)
    ]
    assert site.show(old["id"])["steps"] == shown["steps"]
    rows.set_ended(new["id"])
    again = retry(database, old["id"], actor="tester", again=True)
    assert site.show(again["id"])["steps"] == []


@on_either
def test_a_retry_has_what_its_steps_spent_and_it_is_not_counted_again(site, database, rows, step):
    old = site.having("skip").run()
    step(old["id"])
    with database.transaction() as connection:
        connection.execute(
            tables.spends.insert(),
            [
                {
                    "run_id": old["id"], "meter": "llm_tokens", "key": key, "org_id": rows.orgs[0]["id"],
                    "definition_id": rows.definitions[0]["id"], "amount": amount, "at": rows.now(),
                }
                for key, amount in (("step:1", 20), ("1:1", 3))
            ],
        )  # fmt: skip
    rows.set_ended(old["id"])
    assert site.show(old["id"])["spends"] == [{"meter": "llm_tokens", "amount": 23, "spends": 2}]

    new = retry(database, old["id"], actor="tester", from_checkpoint=True)

    assert site.show(new["id"])["spends"] == [{"meter": "llm_tokens", "amount": 20, "spends": 1}]
    assert (rows.meters, rows.meter_days) == ([], [])


@pytest.mark.parametrize(
    ("handler", "why_not"),
    [
        ("acme.gone", "its definition no longer names it"),
        ("acme.missing", "no installed distribution offers it"),
    ],
)
def test_progress_of_a_handler_that_is_gone_is_not_continued(
    site, apply, database, rows, step, handler, why_not
):
    """Another version would not understand it."""
    old = site.having("skip").run()
    step(old["id"], handler=handler)
    rows.set_ended(old["id"])
    if handler == "acme.missing":
        spec = rows.definition_revisions[0]["spec"] | {"variants": [{"flag": "v2", "handler": handler}]}
        with database.transaction() as connection:
            connection.execute(tables.definition_revisions.update().values(spec=spec))

    with pytest.raises(Conflict, match=f"the handler {handler} stored the progress of run .*, and {why_not}"):
        retry(database, old["id"], actor="tester", from_checkpoint=True)
    assert len(rows.runs) == 1
    retry(database, old["id"], actor="tester")


def test_a_run_shows_its_newest_steps_and_the_results_that_fit(site, database, monkeypatch, step):
    run = site.having("skip").run()
    monkeypatch.setattr(run_lists, "MAX_LIMIT", 4)
    monkeypatch.setattr(run_lists, "RESULT_BYTES", 100)
    for seq in range(1, 7):
        step(run["id"], seq, result=seq, size=40)

    shown = site.show(run["id"])

    assert shown["step_count"] == 6
    assert [(one["seq"], one["result"], one["size"]) for one in shown["steps"]] == [
        (3, None, 40),
        (4, None, 40),
        (5, 5, 40),
        (6, 6, 40),
    ]
    assert "its 6 steps, the last one ask#6" in sentence(reading(database, why, run["id"]))


def test_closing_cancels_what_waits_and_leaves_what_runs(site, database, rows):
    site.having("allow")
    running, waiting = site.run(), site.run()
    rows.set_running(running["id"])

    closed = close_definition(database, "org_acme", "digest", actor="tester")

    assert (closed["state"], closed["next_fire_at"]) == ("closed", None)
    assert site.show(waiting["id"])["reason"] == "closed"
    [live] = rows.live_runs
    assert (live["id"], live["cancel_requested_at"]) == (running["id"], None)
