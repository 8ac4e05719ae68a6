"""Answers: the first one wins, later ones conflict, early ones are kept; only for runs of the org."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.rows import reading
from tests.fakes.site import one_definition, org_entry
from tests.fakes.stock import Stock
from worker.app.verbs import runs as cli_runs
from worker.diagnosis.why import why
from worker.errors import AccessDenied, CanaryFailed, Conflict, NotFound, UsageError
from worker.features.org_secrets.operations import add_secret, rotate_secret
from worker.ids import new_id
from worker.model.runs.clauses import clauses
from worker.model.runs.run import AdmittedRun
from worker.model.runs.waits import NewWait
from worker.model.search import parsed
from worker.operations import answers
from worker.operations.answers import answer, answer_many
from worker.operations.runs import cancel, run_now
from worker.store import tables
from worker.store.edit_runs import Cancellable
from worker.store.lists import runs as run_lists
from worker.store.sql import statements
from worker.telemetry.masking import MASK, Masker

FILE = one_definition() + org_entry("org_globex")


@pytest.fixture
def stock(database) -> Stock:
    return Stock(database)


@pytest.fixture
def parked(apply, database, stock) -> Callable[..., AdmittedRun]:
    """A parked run with these waits; without waits it is still running."""
    apply(FILE)
    worker = stock.worker(handlers=("acme.plain",))

    def park(*waits: NewWait) -> AdmittedRun:
        run_now(database, "org_acme", "digest", actor="tester")
        [run] = stock.admit(worker, offered={"acme.plain": None})
        for wait in waits:
            with database.transaction() as connection:
                statements(connection).open_wait(
                    connection, run.id, run.fencing_token, attempt=run.attempt, wait=wait
                )
        if waits:
            stock.finish(worker, stock.ended(run, "parked", outcome="parked", reason="answer", result=None))
        return run

    return park


APPROVAL = NewWait("approval", 1, "answer", 3600.0, '{"question":"publish?"}')


def give(database, run: AdmittedRun, data: Any = True, **options: Any) -> Any:
    name = options.pop("name", "approval")
    return answer(database, run.id, name, data, **{"actor": "operator:kim"} | options)


@on_either
def test_an_answer_wakes_the_run_and_is_in_its_row_and_the_audit(parked, database, stock):
    run = parked(APPROVAL)

    row = give(database, run, {"yes": True})

    assert (row["answered_by"], row["answer"], row["ask"]) == (
        "operator:kim",
        {"yes": True},
        {"question": "publish?"},
    )
    shown = reading(database, run_lists.run, "org_acme", run.id)
    assert (shown["state"], shown["reason"]) == ("waiting", "resumed")
    assert [wait["answer"] for wait in shown["waits"]] == [{"yes": True}]
    [entry] = stock.all(tables.audit, tables.audit.c.action == "run.answer")
    assert (entry["actor"], entry["subject"]) == ("operator:kim", run.id)
    assert entry["detail"] == {"wait": "approval", "occurrence": 1}


@pytest.mark.parametrize("scoped", [True, False])
def test_an_answer_does_not_tell_another_orgs_secret(parked, database, keyring, scoped, monkeypatch):
    """An org answers its own run with guesses; the control is one mask for all orgs."""
    if not scoped:
        monkeypatch.setattr(Masker, "_indexes", lambda self, org: [self._all])
    guesses = [f"sk-{number:05}" for number in range(5_900)]
    add_secret(database, keyring, "org_globex", "openai", "sk-04123", actor="ops")

    row = give(database, parked(APPROVAL), guesses, org="org_acme")

    told = [guess for guess, stored in zip(guesses, row["answer"], strict=True) if stored != guess]
    assert told == ([] if scoped else ["sk-04123"])


def test_an_answer_is_masked_with_the_secrets_of_its_org(parked, database, keyring):
    add_secret(database, keyring, "org_acme", "openai", "sk-canary-acme", actor="ops")
    rotate_secret(database, keyring, "org_acme", "openai", "sk-canary-next", actor="ops")

    row = give(database, parked(APPROVAL), ["sk-canary-acme", {"sk": "sk-canary-next"}])

    assert row["answer"] == [MASK, {"sk": MASK}]


def test_the_first_answer_wins(parked, database):
    run = parked(APPROVAL)
    give(database, run, 1)

    with pytest.raises(Conflict, match="was answered already, by operator:kim"):
        give(database, run, 2, actor="operator:lee")


def test_an_early_answer_is_kept_and_a_second_one_conflicts(parked, database):
    run = parked()
    assert give(database, run, "early")["opened_at"] is None

    with pytest.raises(Conflict, match="answered already"):
        give(database, run, "later")


def test_an_answer_is_for_one_occurrence(parked, database, stock):
    """One that does not exist is refused like another name."""
    run = parked(APPROVAL, replace(APPROVAL, occurrence=2))

    assert give(database, run, "second", occurrence=2)["occurrence"] == 2
    with pytest.raises(Conflict, match="waits for approval, not approval#3") as refused:
        give(database, run, "third", occurrence=3)

    assert refused.value.fix.startswith("did you mean approval? ")
    [first, _] = sorted(stock.all(tables.waits), key=lambda row: row["occurrence"])
    assert first["answered_at"] is None


def test_an_answer_after_the_deadline_conflicts(parked, database, stock):
    run = parked(APPROVAL)
    stock.change(tables.waits, run.id, until=stock.now() - timedelta(seconds=1))

    with pytest.raises(Conflict, match="was not answered in time"):
        give(database, run)


def test_the_answer_to_an_ended_run_conflicts(parked, database):
    run = parked(APPROVAL)
    cancel(database, run.id, actor="tester")

    with pytest.raises(Conflict, match="has ended"):
        give(database, run)


@pytest.mark.parametrize("kind", ["sleep", "children", "batch"])
def test_what_is_no_question_has_no_answer(parked, database, stock, kind):
    run = parked(NewWait("pause", 1, kind, 3600.0))

    with pytest.raises(Conflict, match=f"is of kind {kind}"):
        give(database, run, name="pause")
    assert stock.unended(run.id)["state"] == "parked"
    with pytest.raises(UsageError, match="a sleep has no answer"):
        give(database, run, name="sleep")


@pytest.mark.parametrize("name", ["children:gather", f"batch:{'a' * 32}", "limit:crm"])
def test_no_answer_is_kept_for_a_wait_that_is_no_question(parked, database, stock, name):
    """The run would fail as it comes to that wait: it is stored as one of another kind."""
    run = parked()

    with pytest.raises(UsageError, match="is not a question"):
        give(database, run, name=name)
    with pytest.raises(UsageError, match="is not a question"):
        list(answer_many(database, Cancellable(), name, 1, actor="tester", limit=10))

    assert stock.all(tables.waits) == []


def test_a_run_of_another_org_does_not_exist(parked, database):
    run = parked(APPROVAL)

    with pytest.raises(NotFound):
        give(database, run, org="org_globex")
    with pytest.raises(NotFound):
        answer(database, new_id(), "approval", 1, actor="tester")


def test_an_org_does_not_answer_for_its_budgets(parked, database):
    run = parked(NewWait("budget:llm_tokens", 1, "budget"))

    with pytest.raises(AccessDenied, match="only an operator"):
        give(database, run, name="budget:llm_tokens", org="org_acme")


def test_early_answers_are_limited(parked, database):
    run = parked()
    for number in range(100):
        give(database, run, name=f"wait-{number}")

    with pytest.raises(Conflict, match="100 answers"):
        give(database, run, name="one-more")


@pytest.mark.parametrize(
    ("name", "data", "occurrence", "problem"),
    [
        ("no name", True, 1, "is not a name"),
        ("approval", "x" * 70_000, 1, "the maximum is 64 KiB"),
        ("approval", "\0", 1, "NUL"),
        ("approval", float("inf"), 1, "NaN"),
        ("approval", True, 0, "occurrence"),
    ],
)
def test_what_cannot_be_an_answer_is_refused(parked, database, name, data, occurrence, problem):
    run = parked(APPROVAL)

    with pytest.raises(UsageError, match=problem):
        give(database, run, data, name=name, occurrence=occurrence)


def test_all_that_match_a_search_are_answered_but_only_what_waits_for_that_name(parked, database):
    """The control is a single answer, which is kept for a wait to come: of many, none is."""
    run = parked(APPROVAL)

    def give_all(name: str = "approval", text: str = "org:org_acme", **options: Any) -> list[Any]:
        query = parsed(text, now=datetime.now(UTC))
        which = Cancellable(query=query, state="waiting", reason="answer")
        return list(answer_many(database, which, name, True, actor="kim", limit=10, **options))

    assert [row["left"] for row in give_all("aproval")] == ["waits for approval, not aproval"]
    assert give_all(text="org:org_globex") == []
    assert [(row["id"], row["left"]) for row in give_all(dry_run=True)] == [(run.id, None)]
    [given] = give_all()
    assert (given["id"], given["occurrence"], given["left"]) == (run.id, 1, None)
    assert give_all() == []
    shown = reading(database, run_lists.run, "org_acme", run.id)
    assert [(wait["name"], wait["answered_by"]) for wait in shown["waits"]] == [("approval", "kim")]
    assert give(database, run, name="aproval")["answer"] is True


def test_why_says_what_it_waits_for_and_how_to_answer(parked, database):
    run = parked(APPROVAL)

    found = reading(database, why, run.id)

    assert "waits for an answer, without a process; " in clauses(found).cause
    assert "it asked for approval (since" in clauses(found).cause
    assert found.step.command == f"runs answer {run.id} approval --data JSON"


class StillWaiting(Exception):
    pass


def test_a_canary_that_waits_for_a_person_ends_the_retry_and_says_how_to_answer(
    parked, database, monkeypatch, capsys
):
    """One that sleeps, and the same one once it was answered, the controls, are waited for."""

    def first(run: AdmittedRun) -> None:
        row = {"id": run.id, "org": "org_acme", "definition": "digest", "state": "waiting"}
        cli_runs._try_first(database, iter([row]), 1, [])

    def sleep(seconds: float) -> None:
        raise StillWaiting

    monkeypatch.setattr("worker.app.verbs.runs.time.sleep", sleep)
    asleep = parked(NewWait("sleep", 1, "sleep", 3600.0))
    with pytest.raises(StillWaiting):
        first(asleep)
    cancel(database, asleep.id, actor="tester")
    run = parked(APPROVAL)

    with pytest.raises(CanaryFailed) as ended:
        first(run)

    assert "org_acme/digest waits for an answer to approval; nothing else was retried" in ended.value.message
    assert ended.value.fix.startswith(f"`runs answer {run.id} approval --data JSON`")
    give(database, run)
    with pytest.raises(StillWaiting):
        first(run)


@on_either
def test_two_answers_at_the_same_instant_have_one_winner(parked, database, stock):
    """Each in its own transaction, started together; a thousand times with FAULTS=full."""
    lost, times = [], 1000 if os.environ.get("FAULTS") == "full" else 25
    for _ in range(times):
        run = parked(APPROVAL)
        start, won = threading.Barrier(2), []

        def give_one(by: str, run: AdmittedRun = run, start: Any = start, won: list[str] = won) -> None:
            start.wait()
            try:
                won.append(give(database, run, by, actor=by)["answer"])
            except Conflict:
                lost.append(by)

        both = [threading.Thread(target=give_one, args=(by,)) for by in ("kim", "lee")]
        for one in both:
            one.start()
        for one in both:
            one.join()
        [winner] = won
        [row] = stock.all(tables.waits, tables.waits.c.run_id == run.id)
        assert (row["answer"], row["answered_by"]) == (winner, winner)
        cancel(database, run.id, actor="tester")
    assert len(lost) == times


def test_the_deadline_is_the_database_s(parked, database, stock):
    run = parked(replace(APPROVAL, seconds=None))
    stock.change(tables.live_runs, run.id, available_at=stock.now() + timedelta(days=400))

    assert give(database, run)["until"] is None


BOUND = replace(APPROVAL, options=("yes", "no", 1))


@pytest.mark.parametrize("data", ["maybe", "Yes", ["yes"], {"answer": "yes"}, None, True])
def test_an_answer_that_is_no_option_is_refused(parked, database, stock, data):
    """The control: without options the same answer is taken."""
    run = parked(BOUND, replace(APPROVAL, name="free"))

    with pytest.raises(UsageError, match='the answer to approval is one of "yes" / "no" / 1'):
        give(database, run, data)

    assert stock.unended(run.id)["state"] == "parked"
    assert stock.all(tables.audit, tables.audit.c.action == "run.answer") == []
    row = give(database, run, "no")
    assert (row["answer"], row["options"], row["refused"]) == ("no", ["yes", "no", 1], None)
    assert give(database, run, data, name="free")["answer"] == data


@on_either
def test_of_many_those_are_left_whose_options_have_no_such_answer(parked, database):
    run = parked(BOUND)
    which = Cancellable(query=parsed("org:org_acme", now=datetime.now(UTC)), state="waiting", reason="answer")

    def give_all(data: Any, **options: Any) -> list[Any]:
        rows = answer_many(database, which, "approval", data, actor="kim", limit=10, **options)
        return [(row["id"], row["left"]) for row in rows]

    left = 'the answer to approval is one of "yes" / "no" / 1'
    assert give_all("maybe", dry_run=True) == give_all("maybe") == [(run.id, left)]
    assert give_all("yes", dry_run=True) == give_all("yes") == [(run.id, None)]


def test_a_misspelt_name_is_refused_while_the_run_waits(parked, database, stock, monkeypatch):
    """The control takes it without the look at what is open: nobody is told, and the run waits on."""
    run = parked(APPROVAL, NewWait("sleep", 1, "sleep", 60.0))

    with pytest.raises(Conflict, match="waits for approval, not aproval") as refused:
        give(database, run, name="aproval")

    assert refused.value.fix.startswith(f"did you mean approval? `runs show {run.id}`")
    assert {row["name"] for row in stock.all(tables.waits)} == {"approval", "sleep"}
    monkeypatch.setattr(answers, "_refuse_another", lambda *args: None)
    assert give(database, run, name="aproval")["opened_at"] is None
    assert stock.unended(run.id)["state"] == "parked"


def test_an_early_answer_is_kept_while_nothing_is_asked(parked, database, stock):
    """Neither a sleep, nor what was answered, nor what nobody can answer any more is open."""
    asleep = parked(NewWait("sleep", 1, "sleep", 60.0), NewWait("budget:calls", 1, "budget", 60.0))
    assert give(database, asleep)["opened_at"] is None
    cancel(database, asleep.id, actor="tester")
    answered = parked(APPROVAL)
    give(database, answered)
    assert give(database, answered, name="publish")["opened_at"] is None
    cancel(database, answered.id, actor="tester")
    late = parked(APPROVAL)
    stock.change(tables.waits, late.id, until=stock.now() - timedelta(seconds=1))
    assert give(database, late, name="publish")["opened_at"] is None


def test_the_question_of_a_budget_is_open_too(parked, database):
    run = parked(NewWait("budget:llm_tokens", 1, "budget", 60.0, '{"per":"day","meter":"llm_tokens"}'))

    with pytest.raises(Conflict, match="waits for budget:llm_tokens, not approval"):
        give(database, run)
    with pytest.raises(Conflict, match="does not ask budget:llm_token") as refused:
        give(database, run, False, name="budget:llm_token")

    assert refused.value.fix.startswith("did you mean budget:llm_tokens? ")


@on_either
def test_a_question_that_opens_meanwhile_is_seen(parked, database, monkeypatch):
    """Its opening and the answer lock the run's row. The control, without the lock, keeps the answer."""
    run = parked()

    def race(name: str, wrong: str) -> list[str]:
        """Give a misspelt answer while the transaction that opens the wait is not committed."""
        outcomes = list[str]()

        def late() -> None:
            try:
                outcomes.append(give(database, run, name=wrong)["name"])
            except Conflict as refused:
                outcomes.append(refused.message)

        with database.transaction() as connection:
            statements(connection).open_wait(
                connection, run.id, run.fencing_token, attempt=1, wait=replace(APPROVAL, name=name)
            )
            answering = threading.Thread(target=late)
            answering.start()
            answering.join(0.3)
        answering.join()
        return outcomes

    assert race("approval", "aproval") == [f"run {run.id} waits for approval, not aproval"]
    give(database, run)
    if database.dialect == "postgresql":
        # SQLite has one writer at a time anyway.
        monkeypatch.setattr(answers.waits, "lock_attempt", lambda connection, org_id, run_id: 1)
        assert race("publish", "publsh") == ["publsh"]
