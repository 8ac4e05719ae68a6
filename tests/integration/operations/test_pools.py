"""The pool of a run: from its definition, its handler, its org, else `default`, decided when it is made."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.integration.operations.conftest import Apply, Tables, whole_hour
from worker.errors import DefinitionError, UsageError
from worker.handlers.catalogue import HandlerEntry
from worker.operations.backfill import backfill, fill_backfills
from worker.operations.orgs import add_org, import_orgs
from worker.operations.runs import retry, run_now
from worker.orgs import OrgEntry
from worker.runs.fire import decide
from worker.store import catalogue, firing
from worker.store.database import Database
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
    with database.autocommit() as connection:
        declared = catalogue.declared(connection)
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
