"""Budgets: applied all or nothing and nothing twice, raised by operators, listed with what is used."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import insert, update

from tests.conftest import on_either
from tests.fakes.rows import reading
from tests.fakes.site import definition, org_entry
from worker.clock import to_text
from worker.errors import AccessDenied, Conflict, DefinitionError, NotFound, UsageError
from worker.ids import ALL_ORGS, new_id
from worker.model.runs.waits import NewWait
from worker.operations import budgets as operations_budgets
from worker.operations.answers import answer
from worker.operations.budgets import raise_budget, remove_budget
from worker.operations.runs import run_now
from worker.store import tables
from worker.store.database import Database
from worker.store.lists.usage import budget_rows, budgets_of, usage
from worker.store.sql import statements

ORGS = org_entry("org_acme", tags=["pro"], timezone="Pacific/Auckland") + org_entry("org_beta")
BUDGET = """
[[budget]]
org = "org_acme"
meter = "llm_tokens"
limit = 1000
per = "day"
"""
ALL = """
[[budget]]
orgs = { tags = ["pro"] }
meter = "llm_tokens"
limit_from = "property:monthly_tokens"
per = "month"
at_limit = "ask"
"""
DIGEST = definition("org_acme", "digest", "acme.plain", "@yearly")


def test_a_file_adds_budgets_and_the_same_file_changes_nothing(apply, rows):
    changes = apply(ORGS + BUDGET + ALL)

    assert [(each.kind, each.action, each.org, each.name) for each in changes[2:]] == [
        ("budget", "add", "org_acme", "llm_tokens per day"),
        ("budget", "add", None, 'llm_tokens per month of {"tags": ["pro"]}'),
    ]
    assert [row["action"] for row in rows.audit][-2:] == ["budget.add", "budget.add"]
    before = rows.everything()
    assert apply(ORGS + BUDGET + ALL) == []
    assert rows.everything() == before


@on_either
def test_a_change_names_what_changes(apply, rows):
    apply(ORGS + BUDGET)

    [change] = apply(BUDGET.replace("1000", "2000"))

    assert (change.action, change.fields) == ("change", {"limit": (1000, 2000)})
    assert [row["limit"] for row in rows.budgets] == [2000]


def test_a_budget_that_the_file_lacks_goes_only_with_prune(apply, rows):
    other = BUDGET.replace("org_acme", "org_beta")
    apply(ORGS + BUDGET + ALL + other)

    assert apply(DIGEST)[0].kind == "definition"
    [change] = apply(DIGEST, prune=True)

    assert (change.kind, change.action, change.org) == ("budget", "remove", "org_acme")
    # Other orgs' stay, and those that select orgs.
    assert len(rows.budgets) == 2


def test_nothing_is_changed_if_a_budget_is_refused(apply, rows):
    before = rows.everything()

    with pytest.raises(DefinitionError) as refused:
        apply(ORGS + BUDGET.replace("org_acme", "org_gone"))
    assert refused.value.field == "org"
    with pytest.raises(DefinitionError) as refused:
        apply(ALL.replace('{ tags = ["pro"] }', '{ issuer = "gone" }'), issuers=["main"])
    assert refused.value.field == "orgs.issuer"
    assert rows.everything() == before


def test_a_raise_counts_until_its_end_and_is_in_the_audit(apply, rows, database: Database):
    apply(ORGS + BUDGET)

    row = raise_budget(
        database, "org_acme", "llm_tokens", by=500, per="day", until=None, actor="ann", reason="a big import"
    )

    assert (row["limit"], row["created_by"]) == (1500, "ann")
    assert rows.now() < row["until"] <= rows.now() + timedelta(days=1)
    [level] = reading(database, budgets_of, "org_acme")
    assert (level["limit"], level["used"], level["left"], level["resets_at"]) == (1500, 0, 1500, row["until"])
    entry = rows.audit[-1]
    assert (entry["action"], entry["subject"]) == ("budget.raise", "org_acme llm_tokens")
    assert entry["detail"] == {
        "by": 500,
        "per": "day",
        "until": to_text(row["until"]),
        "reason": "a big import",
    }


def test_a_raise_lets_the_runs_that_wait_for_it_be_looked_at_now(apply, rows, database: Database):
    apply(ORGS + BUDGET + DIGEST)
    run = run_now(database, "org_acme", "digest", actor="ann")
    with database.transaction() as connection:
        connection.execute(
            update(tables.live_runs).values(reason="budget", available_at=rows.now() + timedelta(hours=9))
        )

    raise_budget(database, "org_acme", "llm_tokens", by=1, per="day", until=None, actor="ann")

    [live] = rows.live_runs
    assert (live["id"], live["available_at"] <= rows.now()) == (run["id"], True)


@pytest.mark.parametrize(
    ("org", "meter", "by", "per", "hours", "error"),
    [
        ("org_gone", "llm_tokens", 1, "day", None, NotFound),
        ("org_beta", "llm_tokens", 1, "day", None, NotFound),
        ("org_acme", "calls", 1, "day", None, NotFound),
        ("org_acme", "llm_tokens", 1, "month", None, NotFound),
        ("org_acme", "llm_tokens", 0, "day", None, UsageError),
        ("org_acme", "llm_tokens", 1, "week", None, UsageError),
        ("org_acme", "llm_tokens", 1, "day", -1, UsageError),
    ],
)
def test_a_raise_of_nothing_is_refused(apply, rows, database, org, meter, by, per, hours, error):
    apply(ORGS + BUDGET)
    until = None if hours is None else rows.now() + timedelta(hours=hours)

    with pytest.raises(error) as refused:
        raise_budget(database, org, meter, by=by, per=per, until=until, actor="ann")

    assert refused.value.fix
    assert rows.budget_raises == []


@on_either
def test_a_budget_can_be_removed_by_its_id(apply, rows, database: Database):
    apply(ORGS + BUDGET + ALL)
    selecting, of_org = reading(database, budget_rows, limit=10)

    assert remove_budget(database, of_org["id"], actor="ann")["name"] == "llm_tokens per day"

    assert [row["id"] for row in rows.budgets] == [selecting["id"]]
    assert selecting["limit_from"] == "property:monthly_tokens"
    with pytest.raises(NotFound):
        remove_budget(database, of_org["id"], actor="ann")


@on_either
def test_usage_is_summed_by_meter_definition_or_day(apply, rows, database: Database):
    apply(ORGS + DIGEST)
    ids = {row["code"]: row["id"] for row in rows.orgs}
    [digest] = rows.definitions
    today = rows.now().date()
    with database.transaction() as connection:
        for org, meter, definition, ago, used in (
            ("org_acme", "llm_tokens", digest["id"], 0, 5),
            ("org_acme", "llm_tokens", digest["id"], 1, 7),
            ("org_acme", "llm_tokens", digest["id"], 40, 100),
            ("org_acme", "calls", new_id(), 0, 1),
            ("org_beta", "calls", new_id(), 0, 2),
        ):
            connection.execute(
                insert(tables.meter_days).values(
                    day=today - timedelta(days=ago),
                    org_id=ids[org],
                    meter=meter,
                    definition_id=definition,
                    used=used,
                )
            )

    def listed(org, by, *names, **window):
        return [tuple(row[name] for name in names) for row in reading(database, usage, org, by, **window)]

    assert listed(ALL_ORGS, "meter", "org", "meter", "used") == [
        ("org_acme", "llm_tokens", 12),
        ("org_acme", "calls", 1),
        ("org_beta", "calls", 2),
    ]
    assert listed("org_acme", "definition", "meter", "definition", "used") == [
        ("llm_tokens", "digest", 12),
        ("calls", None, 1),
    ]
    assert listed("org_acme", "day", "day", "meter", "used") == [
        (today, "llm_tokens", 5),
        (today, "calls", 1),
        (today - timedelta(days=1), "llm_tokens", 7),
    ]
    assert listed("org_acme", "meter", "used", since=rows.now() - timedelta(days=50))[0] == (112,)
    assert listed(ALL_ORGS, "meter", "org", limit=1) == [("org_acme",)] * 2
    assert listed(ALL_ORGS, "meter", "org", limit=1, after="org_acme") == [("org_beta",)]
    with pytest.raises(UsageError):
        listed(ALL_ORGS, "week", "org")
    with pytest.raises(NotFound):
        listed("org_gone", "meter", "org")


# --- questions ---

WAIT = "budget:llm_tokens"


@pytest.fixture
def asking(apply, rows, database: Database):
    """A run that asks whether its budget is raised; `per` is the period."""

    def make(per: str = "day") -> str:
        at_limit = 'at_limit = "ask"\n'
        apply(ORGS + BUDGET.replace('"day"', f'"{per}"') + at_limit + DIGEST)
        run = run_now(database, "org_acme", "digest", actor="ann")["id"]
        rows.set_running(run)
        ask = {"meter": "llm_tokens", "per": per, "limit": 1000, "used": 1100, "resets_at": None}
        with database.transaction() as connection:
            wait = NewWait(WAIT, 1, "budget", None if per == "run" else 3600.0, json.dumps(ask))
            statements(connection).open_wait(connection, run, 1, attempt=1, wait=wait)
        return str(run)

    return make


def test_a_yes_raises_the_budget_until_its_period_ends(asking, rows, database: Database):
    run = asking()

    row = answer(database, run, WAIT, {"by": 500}, actor="ann")

    assert (row["answer"], row["answered_by"]) == ({"by": 500}, "ann")
    [raised] = rows.budget_raises
    [wait] = rows.waits
    assert (raised["amount"], raised["per"], raised["run_id"]) == (500, "day", None)
    assert raised["until"] <= wait["until"]
    assert raised["until"] > rows.now()
    assert rows.audit[-1]["detail"] == {"wait": WAIT, "occurrence": 1, "by": 500}
    with pytest.raises(Conflict, match="answered already"):
        answer(database, run, WAIT, {"by": 1}, actor="bob")


@pytest.mark.parametrize(
    "ask",
    [
        {"meter": "calls", "per": "day"},
        {"meter": "llm_tokens", "per": "month"},
        {"meter": "llm_tokens", "per": ["day"]},
        {"question": "more?"},
        "more?",
    ],
)
def test_a_question_that_a_run_wrote_itself_raises_nothing(asking, rows, database: Database, ask):
    """Workers of the previous release store it."""
    run = asking()
    with database.transaction() as connection:
        connection.execute(tables.waits.update().values(ask=ask))

    with pytest.raises(Conflict, match="is not a question about a budget of its org"):
        answer(database, run, WAIT, {"by": 500}, actor="ann")
    assert rows.budget_raises == []
    assert answer(database, run, WAIT, False, actor="ann")["answer"] is False


@on_either
def test_believed_such_a_question_raises_what_it_names(asking, rows, database: Database, monkeypatch):
    """The control of the test above."""
    run = asking()
    with database.transaction() as connection:
        connection.execute(tables.waits.update().values(ask={"meter": "llm_tokens", "per": "month"}))

    def believed(connection, org_id, run_id, meter, wait, now):
        return wait["ask"]["per"], wait["until"]

    monkeypatch.setattr(operations_budgets, "_asked", believed)
    answer(database, run, WAIT, {"by": 500}, actor="ann")

    assert [raised["per"] for raised in rows.budget_raises] == ["month"]


@on_either
def test_a_raise_ends_with_its_period_whatever_the_run_waits_for(asking, rows, database: Database):
    run = asking()
    until = rows.now() + timedelta(days=36_500)
    with database.transaction() as connection:
        connection.execute(tables.waits.update().values(until=until))

    answer(database, run, WAIT, {"by": 500}, actor="ann")

    assert rows.budget_raises[0]["until"] <= rows.now() + timedelta(days=1, hours=2)


def test_a_budget_of_one_run_is_raised_for_this_run_alone(asking, rows, database: Database):
    run = asking("run")

    answer(database, run, WAIT, {"by": 500}, actor="ann")

    assert [str(row["run_id"]) for row in rows.budget_raises] == [run]


def test_a_no_raises_nothing(asking, rows, database: Database):
    run = asking()

    assert answer(database, run, WAIT, False, actor="ann")["answer"] is False
    assert rows.budget_raises == []


@pytest.mark.parametrize(
    ("data", "org", "name", "error"),
    [
        (True, None, WAIT, UsageError),
        ({"by": 0}, None, WAIT, UsageError),
        ({"by": "5"}, None, WAIT, UsageError),
        ({"by": 5, "until": 1}, None, WAIT, UsageError),
        ({"by": 5}, "org_acme", WAIT, AccessDenied),
        ({"by": 5}, None, "budget:calls", Conflict),
    ],
)
def test_an_answer_that_is_none_changes_nothing(asking, rows, database: Database, data, org, name, error):
    run = asking()

    with pytest.raises(error) as refused:
        answer(database, run, name, data, actor="ann", org=org)

    assert refused.value.fix
    assert (rows.budget_raises, rows.waits[0]["answered_at"]) == ([], None)
