"""The pool of a run: from its definition, its handler, its org, else `default`, decided when it is made."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.conftest import on_either
from tests.fakes.rows import reading, within
from tests.fakes.stock import Stock
from tests.integration.operations.conftest import Apply, Tables, whole_hour
from worker.diagnosis import doctor
from worker.diagnosis.capacity import Machine, capacity
from worker.diagnosis.why import why
from worker.errors import DefinitionError, Diagnostic, NotFound, UsageError
from worker.features.hosts.operations import add_host
from worker.handlers.catalogue import HandlerEntry
from worker.ids import WorkerId, new_id
from worker.model.orgs import OrgEntry
from worker.model.runs.clauses import clauses
from worker.model.runs.fire import decide
from worker.operations.approvals import forget_rules
from worker.operations.backfill import backfill, fill_backfills
from worker.operations.orgs import add_org, import_orgs
from worker.operations.runs import cancel, retry, run_now
from worker.settings import Settings
from worker.settings.sections import ExecutionSettings, PoolSettings
from worker.store import catalogue, firing, sweeps
from worker.store import pools as pools_module
from worker.store.database import Database
from worker.store.worker_store import WorkerStore
from worker.telemetry import events
from worker.tokens.sealing import KeyRing

HOUR = timedelta(hours=1)
FILE = """
[[org]]
code = "org_acme"
issuer = "main"
{org}

[[definition]]
org = "org_acme"
name = "digest"
handler = "{handler}"
schedule = "every 1h"
spread = "off"
{definition}
"""
OWN = 'pool = "eu-gpu"'
# Of the definition, the handler and the org: what each names, and the pool of the run.
CASES = [
    (OWN, "acme.gpu", 'pool = "eu"', "eu-gpu"),
    ("", "acme.gpu", 'pool = "eu"', "gpu"),
    ("", "acme.plain", 'pool = "eu"', "eu"),
    ("", "acme.plain", "", "default"),
    ("", "acme.unknown", 'pool = "eu"', "eu"),
    ('pool = "default"', "acme.gpu", 'pool = "eu"', "default"),
]
IDS = ["definition", "handler", "org", "nothing", "unknown-handler", "default-by-name"]


@pytest.fixture(autouse=True)
def _a_handler_with_a_pool(database: Database) -> None:
    with database.transaction() as connection:
        entry = HandlerEntry("acme.gpu", "acme-gpu", "1.0", "acme_gpu:run", pool="gpu")
        catalogue.put(connection, [entry], at=database.now(connection))


def text(definition: str, handler: str, org: str) -> str:
    return FILE.format(definition=definition, handler=handler, org=org)


def fire(database: Database) -> None:
    declared = reading(database, catalogue.declared)
    none = catalogue.Declared()
    with database.transaction() as connection:
        firing.fire(
            connection,
            lambda due, now: decide(due, now, lambda name: declared.get(name, none)),
            limit=100,
            specs={},
        )


def pools(rows: Tables) -> list[str]:
    live = {row["id"]: row["pool"] for row in rows.live_runs}
    stored = {row["id"]: row["pool"] for row in rows.runs if row["state"] is None}
    assert live == stored
    return sorted(live.values())


@pytest.mark.parametrize(("definition", "handler", "org", "pool"), CASES, ids=IDS)
def test_every_way_to_make_a_run_gives_it_the_same_pool(
    apply: Apply, database: Database, rows: Tables, definition: str, handler: str, org: str, pool: str
) -> None:
    apply(text(definition, handler, org), allow_unknown_handlers=True)
    now = whole_hour(rows.now())

    rows.make_due_since(now)
    fire(database)
    (fired,) = rows.live_runs
    assert fired["origin"] == "schedule"
    assert pools(rows) == [pool]
    rows.set_ended(fired["id"])

    by_hand = run_now(database, "org_acme", "digest", actor="tester")
    assert pools(rows) == [pool]
    rows.set_ended(by_hand["id"])

    again = retry(database, by_hand["id"], actor="tester")
    assert pools(rows) == [pool]
    rows.set_ended(again["id"])

    backfill(database, "org_acme", "digest", start=now - 3 * HOUR, until=now - HOUR, actor="tester")
    fill_backfills(database)
    assert set(pools(rows)) == {pool}


def test_what_an_edit_settles_has_the_pool_of_the_old_revision(
    apply: Apply, database: Database, rows: Tables
) -> None:
    apply(text(OWN, "acme.plain", ""))
    rows.make_due_since(whole_hour(rows.now()))

    apply(text('pool = "us"', "acme.plain", ""))

    assert pools(rows) == ["eu-gpu"]


def test_a_retry_has_the_pool_that_the_definition_names_now(
    apply: Apply, database: Database, rows: Tables
) -> None:
    apply(text(OWN, "acme.plain", ""))
    run = run_now(database, "org_acme", "digest", actor="tester")
    rows.set_ended(run["id"])
    apply(text('pool = "us"', "acme.plain", ""))

    retry(database, run["id"], actor="tester")

    assert pools(rows) == ["us"]


def test_the_definitions_of_a_template_have_its_pool(apply: Apply, database: Database, rows: Tables) -> None:
    apply(
        """
        [[org]]
        code = "org_acme"
        issuer = "main"
        pool = "us"

        [[template]]
        name = "digest"
        orgs = "all"
        handler = "acme.gpu"
        schedule = "every 1h"
        pool = "eu-gpu"
        """
    )
    run_now(database, "org_acme", "digest", actor="tester")

    assert pools(rows) == ["eu-gpu"]


@on_either
def test_the_pool_of_an_org_can_be_changed_and_removed(apply: Apply, rows: Tables) -> None:
    for line, pool in (('pool = "eu"', "eu"), ('pool = "us"', "us"), ("", None)):
        apply(text("", "acme.plain", line))
        assert [org["pool"] for org in rows.orgs] == [pool]


@pytest.mark.parametrize("name", ["EU", "", "eu gpu", "-eu", "e" * 64, 5, "eu/gpu", "ü"])
def test_a_name_that_is_none_is_refused_everywhere(apply: Apply, database: Database, name: Any) -> None:
    shown = f'"{name}"' if isinstance(name, str) else name
    for wrong in (text(f"pool = {shown}", "acme.plain", ""), text("", "acme.plain", f"pool = {shown}")):
        with pytest.raises(DefinitionError) as refused:
            apply(wrong)
        assert "pool" in refused.value.message
    if isinstance(name, str):
        with pytest.raises(UsageError, match="org org_b, pool: "):
            add_org(database, OrgEntry("org_b", "B", "main", pool=name), actor="tester")


def test_orgs_are_imported_with_their_pool(database: Database, rows: Tables, keyring: KeyRing) -> None:
    line = '{"code": "org_b", "name": "B", "issuer": "main", "pool": "eu"}'
    import_orgs(database, keyring, [line], actor="tester")

    assert [org["pool"] for org in rows.orgs] == ["eu"]


def test_a_run_that_no_worker_or_host_would_take_says_which_pool_is_missing(
    apply: Apply, database: Database
) -> None:
    apply(text(OWN, "acme.plain", ""))
    run = run_now(database, "org_acme", "digest", actor="tester")
    stock = Stock(database)
    stock.worker(handlers=["acme.plain"])

    def explained() -> tuple[str | None, str]:
        found = reading(database, why, run["id"])
        return found.run["reason"], clauses(found).cause

    waits = "it is due and waits for its turn"
    assert explained() == ("due", f"{waits}; no worker or host serves pool eu-gpu")

    within(database, sweeps.mark_no_handler)
    assert explained() == ("no_pool", "no worker or host serves pool eu-gpu")

    stock.worker(handlers=["acme.plain"], pools=["eu-gpu"])
    within(database, sweeps.mark_no_handler)
    assert explained() == ("due", f"{waits}; no worker had a free slot for it yet")


def test_pools_are_listed_with_rules_slots_and_backlog(apply: Apply, database: Database) -> None:
    apply(text(OWN, "acme.plain", ""))
    run_now(database, "org_acme", "digest", actor="tester")
    stock = Stock(database)
    stock.worker(pools=["default", "eu"])
    add_host(database, "gpu1", "us", actor="tester")
    within(database, pools_module.store_rules, {"eu": {"region": "eu"}}, by="here")

    with database.autocommit() as connection:
        rows_of = {row["name"]: row for row in pools_module.overview(connection)}

    assert list(rows_of) == ["default", "eu", "eu-gpu", "us"]
    shown = ("requires", "waiting", "running", "workers", "hosts")
    assert [rows_of["eu"][name] for name in shown] == [{"region": "eu"}, 0, 0, 1, 0]
    assert [rows_of["eu-gpu"][name] for name in shown] == [{}, 1, 0, 0, 0]
    assert [rows_of["us"][name] for name in shown] == [{}, 0, 0, 0, 0]


def test_forgetting_rules_is_in_the_audit(database: Database, rows: Tables) -> None:
    within(database, pools_module.store_rules, {"eu": {"region": "eu"}}, by="here")

    assert forget_rules(database, "eu", actor="ada") == {"name": "eu", "requires": {"region": "eu"}}

    assert [(row["actor"], row["action"], row["subject"]) for row in rows.audit] == [
        ("ada", "pool.forget_rules", "eu")
    ]
    with pytest.raises(NotFound):
        forget_rules(database, "eu", actor="ada")


def test_doctor_finds_a_pool_that_no_worker_or_host_serves(apply: Apply, database: Database) -> None:
    apply(text(OWN, "acme.plain", ""))
    stock = Stock(database)
    stock.worker()

    found = doctor.served_pools(database)

    assert not found.ok
    assert found.detail == "no worker or host serves pool eu-gpu, where a definition of org_acme runs"
    stock.worker(pools=["eu-gpu"])
    assert doctor.served_pools(database).detail == "workers and hosts serve default, eu-gpu"


def test_doctor_finds_rules_that_differ_and_those_of_a_pool_that_is_not_served(database: Database) -> None:
    stock = Stock(database)
    stock.worker()

    def found(rule: str | None) -> Diagnostic:
        requires = {} if rule is None else {"eu": PoolSettings(requires={"region": rule})}
        return doctor.pool_rules(database, Settings(pools=requires))

    assert found(None).detail == "no pool has rules"
    within(database, pools_module.store_rules, {"eu": {"region": "eu"}}, by="here")
    differing, unserved = found("us"), found("eu")
    stock.worker(pools=["eu"])

    assert not differing.ok
    assert differing.detail == "[pools.eu] requires region = us here, and region = eu is stored"
    assert (unserved.ok, unserved.detail) == (True, "pool eu has rules, and no worker or host serves it")
    assert "pools forget eu" in unserved.fix
    assert found(None).detail == "eu requires region = eu"


def test_the_forecast_knows_the_slots_of_each_pool(apply: Apply, database: Database) -> None:
    apply(text(OWN, "acme.plain", ""))
    stock, machine = Stock(database), Machine(2, 2**33)
    stock.worker(children=50)

    def measured() -> dict[str, tuple[float, bool]]:
        found = capacity(database, ExecutionSettings(), machine).measures
        return {each.what: (each.has, each.ok) for each in found if each.what.startswith("pool")}

    assert measured() == {"pool eu-gpu": (0, False)}
    stock.worker(pools=["eu-gpu"], children=4)
    assert measured() == {"pool eu-gpu": (4, True)}
    apply(text("", "acme.plain", ""))
    assert measured() == {"pool default": (50, True)}


async def test_the_backlog_of_each_pool_is_counted(apply: Apply, database: Database) -> None:
    apply(text(OWN, "acme.plain", ""))
    run = run_now(database, "org_acme", "digest", actor="tester")
    store = WorkerStore(database, WorkerId(new_id()), timedelta(seconds=30))
    counted: list[tuple[str, int]] = []

    def heard(emitted: events.Emitted) -> None:
        if emitted.event.name == "pool.counted":
            counted.append((emitted.fields["pool"], emitted.fields["waiting"]))

    end = events.listen(heard)
    await store.count_waiting()
    cancel(database, run["id"], actor="tester")
    await store.count_waiting()
    end()

    assert counted == [("default", 0), ("eu-gpu", 1), ("default", 0), ("eu-gpu", 0)]
