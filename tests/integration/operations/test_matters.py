"""Matters: what needs attention, as data, on either database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest

from bench import console
from tests.fakes.clock import ManualClock
from tests.fakes.rows import within
from tests.fakes.stock import Stock
from worker.diagnosis import doctor, matters
from worker.diagnosis.matters import Matter
from worker.features.console.pages.links import step_path
from worker.ids import ALL_ORGS, DefinitionId, OrgId
from worker.model.runs.causes import WHOSE
from worker.model.runs.next_steps import VERBS
from worker.store import installation, tables
from worker.store.database import Database
from worker.store.lists.failures import Mismatch, mismatches

DAY = timedelta(days=1)


@pytest.fixture
def stock(database: Database) -> Stock:
    return Stock(database)


def end(
    stock: Stock, org: OrgId, state: str, reason: str | None = None, detail: str | None = None, **values: Any
) -> DefinitionId:
    """A run of a new definition of the org has begun two seconds ago, and ended now."""
    definition = values.pop("definition", None) or stock.definition(org)
    stock.put(stock.run(org, definition, **values))
    worker = stock.worker()
    (admitted,) = stock.admit(worker)
    stock.finish(worker, stock.ended(admitted, state, reason=reason, detail=detail))
    stock.change(tables.workers, worker, ended_at=stock.now())
    return definition


def refuse(stock: Stock, org: OrgId, reason: str = "org_mismatch", detail: str = "other_org") -> DefinitionId:
    return end(stock, org, "refused", reason, detail)


def found(database: Database, *, word: str = "") -> list[Matter]:
    with database.autocommit() as connection:
        return matters.matters(connection, database.now(connection), installation=word)


def mixed_up(database: Database) -> list[Mismatch]:
    with database.autocommit() as connection:
        return mismatches(connection, ALL_ORGS, database.now(connection) - DAY)


def of(kind: str, every: Sequence[Matter]) -> list[Matter]:
    return [matter for matter in every if matter.kind == kind]


def test_the_token_of_another_org_is_above_everything_else(
    database: Database, stock: Stock, monkeypatch: pytest.MonkeyPatch
):
    """The control: as one cause of refused runs among others, it comes after what failed."""
    within(database, installation.store_word, "production")
    victim, other = stock.org(), stock.org()
    refuse(stock, victim)
    for _ in range(3):
        end(stock, other, "failed", "error")

    every = found(database, word="staging")
    first = every[0]
    assert (first.kind, first.level, first.whose) == ("org_mismatch", "bad", "provider")
    assert first.title == f"The provider returns another org's token for {stock.code(victim)}"
    assert first.about.startswith("1 run was refused, and no handler was called.")
    assert first.step.command == f"orgs check {stock.code(victim)}"
    assert first.since is not None
    # Its runs are not listed again by their cause.
    assert of("refused_runs", every) == []
    assert {"installation_differs", "no_worker", "failed_runs"} <= {matter.kind for matter in every}
    monkeypatch.setattr(matters, "mismatches", lambda *given: [])
    kinds = [matter.kind for matter in found(database, word="staging")]
    assert kinds.index("refused_runs") > kinds.index("failed_runs") > kinds.index("installation_differs") == 0


def test_three_orgs_are_named_and_the_rest_counted(database: Database, stock: Stock, clock: ManualClock):
    orgs = [stock.org() for _ in range(5)]
    for org in orgs:
        refuse(stock, org)
        clock.advance(1)

    [first, *_] = found(database)
    latest = [stock.code(org) for org in reversed(orgs)]
    assert first.title.endswith(f" for {', '.join(latest[:3])} and 2 more")
    assert first.about.startswith("5 runs were refused")
    assert first.subject == {"orgs": tuple(latest[:3])}
    assert first.step.command.startswith("runs list -q 'state:refused reason:org_mismatch since:")


def test_a_mismatch_is_over_once_a_later_run_of_the_org_has_succeeded(
    database: Database, stock: Stock, clock: ManualClock
):
    """Not by a run of another org, nor by one that had begun before, with the token of that time."""
    org, other = stock.org(), stock.org()
    definition = refuse(stock, org)
    end(stock, other, "succeeded")
    assert [one.orgs for one in mixed_up(database)] == [(stock.code(org),)]

    # `end` makes an attempt that began two seconds before it ended.
    end(stock, org, "succeeded", definition=definition)
    assert len(mixed_up(database)) == 1
    clock.advance(10)
    end(stock, org, "failed", "error")
    assert len(mixed_up(database)) == 1
    end(stock, org, "succeeded")
    assert mixed_up(database) == []
    # Its runs still need a retry.
    assert len(of("refused_runs", found(database))) == 1


def test_each_mismatch_has_its_own_matter_and_ends_with_the_day_or_the_org(
    database: Database, stock: Stock, clock: ManualClock
):
    one, two, three = (stock.org() for _ in range(3))
    refuse(stock, one, "org_mismatch", "org_missing")
    refuse(stock, two, "client_mismatch", "other_client")
    refuse(stock, three, "scope_missing", "jobs:read")

    every = found(database)
    assert {matter.kind for matter in every[:2]} == {"org_mismatch", "client_mismatch"}
    assert {matter.title.partition(" for ")[0] for matter in every[:2]} == {
        "The provider returns a token that names no org",
        "The provider returns another client's token",
    }
    stock.change(tables.orgs, one, state="removed")
    assert [mismatch.reason for mismatch in mixed_up(database)] == ["client_mismatch"]
    clock.advance(DAY.total_seconds() + 60)
    assert mixed_up(database) == []


@pytest.mark.parametrize(("flood", "control"), [("runs", "FAILING"), ("definitions", "NEWEST")])
def test_a_flood_of_other_failures_hides_no_mismatch(
    database: Database,
    stock: Stock,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    flood: str,
    control: str,
):
    """An org that is refused again and again for another reason, or has many broken definitions.

    The control: each of the two lists alone has no place left for it.
    """
    monkeypatch.setattr("worker.store.lists.failures.NEWEST", 2)
    monkeypatch.setattr("worker.store.lists.failures.FAILING", 2)
    victim, noisy = stock.org(), stock.org()
    refuse(stock, victim)
    definition = stock.definition(noisy)
    for _ in range(3):
        clock.advance(1)
        if flood == "runs":
            end(stock, noisy, "refused", "settings_invalid", "quota", definition=definition)
        else:
            end(stock, noisy, "failed", "error")

    assert [one.orgs for one in mixed_up(database)] == [(stock.code(victim),)]
    monkeypatch.setattr(f"worker.store.lists.failures.{control}", 0)
    assert mixed_up(database) == []


def test_what_the_page_reads_is_bounded_and_by_an_index(database: Database, stock: Stock):
    """The control is that of `test_console_size`, whose database has no mismatch."""
    for _ in range(3):
        refuse(stock, stock.org())
    runs = [stock.run(org := stock.org(), stock.definition(org)) for _ in range(3)]
    stock.put(*runs)
    for run in runs:
        stock.change(tables.live_runs, run.id, reason="no_pool")
    recorder = console.Recorder(strict=True)

    with recorder.on() as statements:
        assert {"org_mismatch", "waiting:no_pool"} <= {matter.kind for matter in found(database)}
    faults = [fault for statement in statements for fault in statement.faults]
    assert len(statements) > 8
    assert faults == []


def test_doctor_names_the_orgs(database: Database, stock: Stock):
    """The control: it passes without a mismatch."""
    assert [each.ok for each in doctor.tokens(database)] == [True]
    orgs = [stock.org() for _ in range(4)]
    for org in orgs:
        refuse(stock, org)

    [finding] = doctor.tokens(database)
    [hidden] = doctor.tokens(database, lambda code: "an org")
    assert not finding.ok
    assert f"another org's token for {stock.code(orgs[0])}, " in finding.detail
    assert " and 1 more" in finding.detail
    assert finding.fix.startswith(f"`orgs check {stock.code(orgs[0])}` ")
    assert "org_" not in hidden.detail + hidden.fix


def test_every_matter_is_data_with_a_step_for_both_surfaces(database: Database, stock: Stock):
    """One of each that rows in the database can make."""
    within(database, installation.store_word, "production")
    org = stock.org()
    refuse(stock, org)
    end(stock, org, "failed", "error")
    end(stock, org, "refused", "scope_missing", "jobs:read")
    stock.let_lease_pass(stock.worker())
    paused = stock.definition(org, due_at=stock.now() - timedelta(hours=1))
    stock.change(tables.definitions, paused, paused_at=stock.now(), paused_by="ada")
    for reason in ("no_token", "no_pool", "budget", "answer"):
        stock.put(run := stock.run(org, stock.definition(org)))
        stock.change(tables.live_runs, run.id, reason=reason, detail="gpu: it")

    every = found(database, word="staging")
    code = stock.code(org)
    assert [(matter.kind, matter.title) for matter in every] == [
        ("org_mismatch", f"The provider returns another org's token for {code}"),
        (
            "installation_differs",
            "The database belongs to the installation production, and worker.toml to staging",
        ),
        ("no_worker", "No worker is running"),
        ("worker_missing", "1 worker missing"),
        ("overdue", "Scheduled times are overdue"),
        ("failed_runs", "error"),
        ("refused_runs", "scope_missing: jobs:read"),
        ("handlers_broken", "1 handler does not load"),
        ("waiting:no_pool", "1 run waits for a worker or host of pool default"),
        ("no_token:gpu", "No token from issuer main (gpu)"),
        ("definitions_paused", "1 definition paused"),
        ("waiting:answer", "1 run waits for a person's answer"),
        ("waiting:budget", "1 run waits for the budget of gpu: it"),
    ]
    for matter in every:
        row = matter.as_row()
        assert row["verb"] in VERBS
        assert row["next"] == matter.step.command
        assert step_path(matter.step).startswith("/")
        assert matter.whose in WHOSE
    steps = {matter.kind: matter.step.command for matter in every}
    assert steps["installation_differs"] == "installation show"
    assert steps["overdue"].startswith(f"definitions show {code} ")
    of_orgs = [matter for matter in every if "orgs" in matter.subject]
    assert len(of_orgs) == 7
    assert all(code in matter.title + matter.about for matter in of_orgs)
