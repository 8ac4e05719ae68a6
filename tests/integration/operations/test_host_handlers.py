"""Handlers that hosts declare, as definitions, runs and checks of orgs see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from tests.conftest import on_either
from tests.fakes.rows import reading, within
from tests.fakes.site import definition, org_entry
from tests.fakes.stock import Stock
from tests.integration.operations.conftest import Apply, Tables
from tests.integration.store.test_hosts import added, begin
from worker.diagnosis import doctor
from worker.diagnosis.requirements import lacking_of_all_orgs, load_org, scopes_of
from worker.diagnosis.why import why
from worker.errors import Conflict, DefinitionError, NotFound, UnknownHandler
from worker.features.hosts.operations import list_hosts, remove_host
from worker.handlers.catalogue import HandlerEntry
from worker.ids import ALL_ORGS
from worker.model.runs.clauses import clauses
from worker.operations.approvals import approve, list_approvals
from worker.operations.definitions import edit_definition
from worker.operations.handlers import Handlers, forget
from worker.operations.runs import run_now
from worker.store import catalogue, host_handlers, places, tables
from worker.store.database import Database
from worker.store.dialect import all_rows
from worker.store.lists import handlers as handler_list

RENDER = HandlerEntry(
    "gpu.render",
    "gpu-jobs",
    "1.0",
    "gpu:render",
    params_schema={
        "type": "object",
        "properties": {"frames": {"type": "integer"}},
        "additionalProperties": False,
    },
)
KEYED = replace(RENDER, name="gpu.keyed", params_schema=None, secrets=("openai",), scopes=("read:gpu",))


def text(*keys: str, handler: str = "gpu.render", org_pool: str = "") -> str:
    own = {"pool": org_pool} if org_pool else {}
    org = org_entry("org_acme", name="Acme", **own)
    return org + definition("org_acme", "nightly", handler, "@daily") + "\n".join(keys)


def template(*keys: str) -> str:
    return """
[[template]]
name = "nightly"
orgs = "all"
handler = "gpu.render"
schedule = "@daily"
""" + "\n".join(keys)


@pytest.fixture
def stock(database: Database) -> Stock:
    return Stock(database)


def host_of(stock: Stock, pool: str, *entries: HandlerEntry, name: str | None = None) -> str:
    """A live host of a pool that declares these handlers; its incarnation."""
    _, host = added(stock, name or f"{pool}-host", pool=pool)
    worker = begin(stock, host)
    stock.within(host_handlers.report, worker, entries)
    return worker


def use_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what any host declares counts for every pool, as in the release before."""

    def everywhere(connection: Any, name: str, pool: str) -> list[dict[str, Any]]:
        of_hosts = tables.host_handlers.c
        query = select(tables.host_handlers).where(of_hosts.name == name)
        return all_rows(connection, query.order_by(of_hosts.distribution))

    monkeypatch.setattr(places, "declared_in", everywhere)


# Definitions


def test_a_definition_whose_handler_only_hosts_offer_must_name_its_pool(
    apply: Apply, rows: Tables, stock: Stock
) -> None:
    host_of(stock, "eu", RENDER)
    host_of(stock, "default", RENDER)

    with pytest.raises(DefinitionError, match=r"nightly, pool: only hosts offer gpu\.render") as refused:
        apply(text())
    assert refused.value.field == "pool"
    assert refused.value.fix == 'write pool = "default", or another whose hosts offer it: eu'
    assert rows.definitions == []
    # The default pool must be written, too.
    for keys in ('pool = "default"', 'pool = "eu"'):
        apply(text(keys))
    apply(text(org_pool="eu"))
    with pytest.raises(UnknownHandler, match="no worker and no host of pool us offers") as elsewhere:
        apply(text('pool = "us"'))
    assert 'write pool = "default"' in elsewhere.value.fix


def test_a_host_keeps_nobody_from_a_handler_that_is_to_come(apply: Apply, rows: Tables, stock: Stock) -> None:
    """It may declare any name: a definition that is stored before its workers come still is."""
    host_of(stock, "eu", RENDER)

    apply(text(), allow_unknown_handlers=True)

    assert len(rows.definitions) == 1


@on_either
@pytest.mark.parametrize("control", [False, True])
def test_what_another_pool_declares_refuses_no_definition(
    apply: Apply, stock: Stock, monkeypatch: pytest.MonkeyPatch, control: bool
) -> None:
    host_of(stock, "eu", RENDER)
    host_of(stock, "us", replace(RENDER, distribution="aaa", params_schema={"required": ["x"]}))
    if control:
        use_the_catalogue(monkeypatch)
        with pytest.raises(DefinitionError, match="x"):
            apply(text('pool = "eu"'))
    else:
        apply(text('pool = "eu"'))


def test_params_are_checked_by_what_hosts_of_the_pool_declare(apply: Apply, stock: Stock) -> None:
    host_of(stock, "eu", RENDER)
    host_of(stock, "us", replace(RENDER, params_schema=None))

    apply(text('pool = "us"', 'params = { frames = "many" }'))
    with pytest.raises(DefinitionError, match=r"params\.frames"):
        apply(text('pool = "eu"', 'params = { frames = "many" }'))
    with pytest.raises(DefinitionError, match="no param speed"):
        apply(text('pool = "eu"', 'params_by_hand = ["speed"]'))
    apply(text('pool = "eu"', "params = { frames = 3 }"))


@on_either
def test_a_pool_at_zero_hosts_breaks_no_apply(apply: Apply, stock: Stock, database: Database) -> None:
    worker = host_of(stock, "eu", RENDER)
    stock.change(tables.workers, worker, ended_at=stock.now())

    apply(text('pool = "eu"', "params = { frames = 3 }"))

    remove_host(database, "eu-host", actor="tester")
    with pytest.raises(UnknownHandler):
        apply(text('pool = "eu"', "params = { frames = 4 }"))


@on_either
def test_a_template_names_its_pool_or_takes_it_from_each_org(apply: Apply, stock: Stock) -> None:
    host_of(stock, "eu", RENDER)
    orgs = '[[org]]\ncode = "org_a"\nname = "A"\nissuer = "main"\npool = "eu"\n'
    other = '[[org]]\ncode = "org_b"\nname = "B"\nissuer = "main"\n'

    with pytest.raises(DefinitionError, match="template nightly, pool: only hosts offer"):
        apply(template())
    apply(orgs + template())
    with pytest.raises(DefinitionError, match="template nightly, pool: only hosts offer"):
        apply(other + template('overlap = "allow"'))
    with pytest.raises(UnknownHandler, match="no host of pool us"):
        apply(other + 'pool = "us"\n' + template('overlap = "allow"'))
    apply(other + template('pool = "eu"'))


def test_an_edit_goes_through_the_same_check(apply: Apply, stock: Stock, database: Database) -> None:
    host_of(stock, "eu", RENDER)
    apply(text(handler="acme.plain"))
    edit = {"handler": "gpu.render"}

    with pytest.raises(DefinitionError, match="only hosts offer"):
        edit_definition(database, "org_acme", "nightly", edit, actor="tester")
    row = edit_definition(database, "org_acme", "nightly", edit | {"pool": "eu"}, actor="tester")
    assert row["spec"]["pool"] == "eu"
    with pytest.raises(DefinitionError, match="only hosts offer"):
        edit_definition(database, "org_acme", "nightly", {"pool": None}, actor="tester")


def test_a_run_by_hand_is_checked_and_isolated_as_hosts_of_its_pool_say(
    apply: Apply, stock: Stock, database: Database
) -> None:
    inline = replace(RENDER, isolation="inline", distribution="acme-inline")
    host_of(stock, "eu", inline)
    host_of(stock, "us", RENDER)
    apply(text('pool = "eu"'), inline=["acme-inline"])

    with pytest.raises(DefinitionError, match=r"params\.frames"):
        run_now(database, "org_acme", "nightly", actor="tester", params={"frames": "many"})
    run = run_now(database, "org_acme", "nightly", actor="tester", params={"frames": 3})

    [live] = stock.all(tables.live_runs)
    assert (live["id"], live["pool"], live["isolation"]) == (run["id"], "eu", "inline")


# What orgs are asked for


def needs(database: Database) -> tuple[frozenset[str], frozenset[str]]:
    """The scopes and secrets of the definition of org_acme."""
    with database.autocommit() as connection:
        org, handlers = load_org(connection, "org_acme"), Handlers(connection)
        own, _ = scopes_of(org.definitions[0], handlers, org.pool)
        return own, handlers.secrets_of("gpu.keyed", "eu")


def test_scopes_and_secrets_of_a_host_are_required_once_they_are_approved(
    apply: Apply, stock: Stock, database: Database
) -> None:
    """An org's application gets the scopes that its definitions require: a host must not choose them."""
    host_of(stock, "eu", KEYED)
    apply(text('pool = "eu"', handler="gpu.keyed"))

    assert needs(database) == (frozenset(), frozenset())
    assert lacking_of_all_orgs(database) == []

    [row] = list_approvals(database, "eu")
    approve(database, "eu", "gpu.keyed", row["digest"], actor="ana")
    assert needs(database) == ({"read:gpu"}, {"openai"})
    [(org, lacking)] = lacking_of_all_orgs(database)
    assert org == "org_acme" and lacking.detail.startswith("org org_acme has no secret openai: ")


def test_without_the_ceiling_a_host_would_choose_the_scopes(
    apply: Apply, stock: Stock, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    host_of(stock, "eu", KEYED)
    apply(text('pool = "eu"', handler="gpu.keyed"))
    monkeypatch.setattr("worker.operations.handlers.clamped", lambda entry, ceiling: entry)

    assert needs(database) == ({"read:gpu"}, {"openai"})


# Approvals


def test_an_approval_is_by_its_digest_and_in_the_audit(
    apply: Apply, stock: Stock, database: Database, rows: Tables
) -> None:
    host_of(stock, "eu", RENDER, KEYED)
    [row] = list_approvals(database)
    assert (row["pool"], row["handler"], row["approved"], row["hosts"]) == (
        "eu",
        "gpu.keyed",
        False,
        ["eu-host"],
    )
    digest = row["digest"]

    with pytest.raises(NotFound, match="no host of pool us"):
        approve(database, "us", "gpu.keyed", digest, actor="ana")
    with pytest.raises(NotFound, match="no host of pool us"):
        list_approvals(database, "us")
    with pytest.raises(NotFound, match="declares a handler gpu.other"):
        approve(database, "eu", "gpu.other", digest, actor="ana")
    with pytest.raises(Conflict) as other:
        approve(database, "eu", "gpu.keyed", digest[:-1] + "x", actor="ana")
    assert f"`pools approve eu gpu.keyed {digest}`" in other.value.fix
    assert [row["action"] for row in rows.audit if row["action"].startswith("pool")] == []

    given = approve(database, "eu", "gpu.keyed", digest, actor="ana")
    again = approve(database, "eu", "gpu.keyed", digest, actor="bob")

    assert (given["secrets"], given["scopes"], given["approved_by"]) == (["openai"], ["read:gpu"], "ana")
    assert again == given
    [audited] = [row for row in rows.audit if row["action"] == "pool.approve"]
    assert (audited["actor"], audited["org_id"], audited["subject"]) == ("ana", None, "eu gpu.keyed")
    assert audited["detail"]["digest"] == digest
    [row] = list_approvals(database)
    assert (row["approved"], row["approved_by"]) == (True, "ana")


@on_either
def test_what_hosts_declare_meanwhile_is_not_what_was_looked_at(stock: Stock, database: Database) -> None:
    """The digest is of what is declared: a host cannot exchange it between the look and the approval."""
    worker = host_of(stock, "eu", KEYED)
    [row] = list_approvals(database)
    within(database, host_handlers.report, worker, [replace(KEYED, secrets=("openai", "stripe"))])

    with pytest.raises(Conflict):
        approve(database, "eu", "gpu.keyed", row["digest"], actor="ana")
    [now] = list_approvals(database)
    assert (now["digest"] != row["digest"], now["approved"]) == (True, False)


def test_without_the_digest_a_host_would_exchange_what_is_approved(
    stock: Stock, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: an approval by name takes whatever is declared at that moment."""
    worker = host_of(stock, "eu", KEYED)
    monkeypatch.setattr("worker.store.host_grants.digest", lambda pool, handler, ceiling: "1-any")
    [row] = list_approvals(database)
    within(database, host_handlers.report, worker, [replace(KEYED, secrets=("openai", "stripe"))])

    given = approve(database, "eu", "gpu.keyed", row["digest"], actor="ana")
    assert given["secrets"] == ["openai", "stripe"]


def waiting_run(stock: Stock, database: Database) -> str:
    """A run that waits for an approval, as housekeeping has marked it."""
    run = run_now(database, "org_acme", "nightly", actor="tester")["id"]
    later = stock.now().replace(year=2100)
    stock.change(tables.live_runs, run, reason="not_approved", available_at=later)
    return str(run)


@on_either
def test_an_approval_makes_waiting_runs_due_at_once_and_why_names_its_command(
    apply: Apply, stock: Stock, database: Database
) -> None:
    host_of(stock, "eu", KEYED)
    apply(text('pool = "eu"', handler="gpu.keyed"))
    run = waiting_run(stock, database)
    [row] = list_approvals(database)

    found = reading(database, why, run)
    assert (
        "secrets openai, scopes read:gpu for gpu.keyed, which no administrator has approved"
        in clauses(found).cause
    )
    assert found.step.command == f"pools approve eu gpu.keyed {row['digest']}"

    approve(database, "eu", "gpu.keyed", row["digest"], actor="ana")
    [live] = stock.all(tables.live_runs)
    assert live["available_at"] <= stock.now()


def test_why_says_what_a_definition_may_set_itself_and_quotes_names(
    apply: Apply, stock: Stock, database: Database
) -> None:
    hostile = replace(RENDER, name="gpu; rm -rf ~", timeout="5h", params_schema=None)
    host_of(stock, "eu", hostile)
    apply(text('pool = "eu"', handler="gpu; rm -rf ~"))
    run = waiting_run(stock, database)

    found = reading(database, why, run)

    assert clauses(found).cause.endswith("a definition that sets timeout itself needs no approval")
    assert found.step.command.startswith("pools approve eu 'gpu; rm -rf ~' 1-")


@on_either
def test_why_names_the_pools_of_a_handler_that_hosts_offer_elsewhere(
    apply: Apply, stock: Stock, database: Database
) -> None:
    host_of(stock, "eu", RENDER)
    apply(text(), allow_unknown_handlers=True)
    run = run_now(database, "org_acme", "nightly", actor="tester")["id"]
    stock.change(tables.live_runs, run, reason="no_handler")

    found = reading(database, why, run)

    assert (
        "only hosts offer its handler gpu.render, those of pool eu, and its pool is default"
        in clauses(found).cause
    )


# Whose a handler is


def test_a_handler_of_workers_is_forgotten_once_no_live_worker_offers_it(
    apply: Apply, stock: Stock, database: Database, rows: Tables
) -> None:
    host_of(stock, "eu", replace(RENDER, name="acme.plain"))
    worker = stock.worker(handlers=["acme.plain"])
    apply(text(handler="acme.plain"))

    with pytest.raises(Conflict, match="workers offer acme.plain"):
        forget(database, "acme.plain", actor="ana")
    with pytest.raises(NotFound):
        forget(database, "acme.gone", actor="ana")
    stock.change(tables.workers, worker, ended_at=stock.now())
    assert forget(database, "acme.plain", actor="ana") == {
        "name": "acme.plain",
        "distributions": ["acme-jobs"],
    }

    assert [row["subject"] for row in rows.audit if row["action"] == "handler.forget"] == ["acme.plain"]
    with pytest.raises(DefinitionError, match="only hosts offer acme.plain"):
        apply(text("priority = 3", handler="acme.plain"))
    with pytest.raises(NotFound, match="hosts of eu do"):
        forget(database, "acme.plain", actor="ana")


def listed(database: Database, scope: Any = ALL_ORGS) -> list[tuple[str, str, str | None]]:
    rows = reading(database, handler_list.listed, scope)
    return [(row["name"], row["source"], row["pool"]) for row in rows if row["name"].startswith("gpu")]


def test_handlers_are_listed_with_who_offers_them_and_where(
    apply: Apply, stock: Stock, database: Database
) -> None:
    host_of(stock, "eu", RENDER, replace(RENDER, name="gpu.other"))
    host_of(stock, "eu", RENDER, name="eu-second")
    host_of(stock, "us", RENDER)
    within(database, catalogue.put, [replace(RENDER, name="gpu.own", pool="us")], at=stock.now())
    apply(text('pool = "eu"'))
    org_id = stock.all(tables.orgs)[0]["id"]

    assert listed(database) == [
        ("gpu.other", "host", "eu"),
        ("gpu.own", "worker", "us"),
        ("gpu.render", "host", "eu"),
        ("gpu.render", "host", "us"),
    ]
    # An org sees what its definitions run, and of no other pool.
    assert listed(database, org_id) == [("gpu.render", "host", "eu")]


def test_no_pool_crowds_out_the_handlers_of_another(stock: Stock, database: Database, monkeypatch) -> None:
    many = [replace(RENDER, name=f"gpu.{number:03}") for number in range(30)]
    host_of(stock, "eu", *many)
    host_of(stock, "us", RENDER)
    monkeypatch.setattr(handler_list, "OF_POOL", 20)
    monkeypatch.setattr(handler_list, "SCHEMA_BYTES", 2_000)

    rows = [row for row in reading(database, handler_list.listed, ALL_ORGS) if row["source"] == "host"]

    assert [sum(row["pool"] == pool for row in rows) for pool in ("eu", "us")] == [20, 1]
    [of_us] = [row for row in rows if row["pool"] == "us"]
    assert of_us["params_schema"] == RENDER.params_schema
    schemas = [row["params_schema"] is not None for row in rows if row["pool"] == "eu"]
    assert (schemas[0], schemas[-1]) == (True, False)


# Doctor and check


def of_check(database: Database, name: str) -> Sequence[tuple[bool, str, str]]:
    found = [*doctor.unapproved(database), *doctor.homeless(database)]
    return [(one.ok, one.detail, one.fix) for one in found if one.check == name]


def test_doctor_and_check_name_what_is_not_approved_and_fail_if_runs_wait(
    apply: Apply, stock: Stock, database: Database
) -> None:
    assert of_check(database, "approvals") == []
    host_of(stock, "eu", KEYED)

    [(ok, detail, fix)] = of_check(database, "approvals")
    assert (ok, detail) == (
        True,
        "hosts of pool eu declare secrets, scopes for gpu.keyed beyond what is approved",
    )
    [row] = list_approvals(database)
    assert f"`pools approve eu gpu.keyed {row['digest']}`" in fix
    assert "openai" not in detail + fix
    [host] = list_hosts(database)
    assert host["pending"] == ["gpu.keyed"]

    apply(text('pool = "eu"', handler="gpu.keyed"))
    [(ok, detail, _)] = of_check(database, "approvals")
    assert (ok, detail.endswith("; its runs wait")) == (False, True)
    assert not next(doctor.unapproved(database)).ok

    approve(database, "eu", "gpu.keyed", row["digest"], actor="ana")
    assert [ok for ok, _, _ in of_check(database, "approvals")] == [True]
    assert [host["pending"] for host in list_hosts(database)] == [[]]


def test_doctor_needs_no_approval_of_what_every_definition_sets_itself(
    apply: Apply, stock: Stock, database: Database
) -> None:
    host_of(stock, "eu", replace(RENDER, timeout="5h"))
    apply(text('pool = "eu"'))
    assert [ok for ok, _, _ in of_check(database, "approvals")] == [False]

    apply(text('pool = "eu"', 'timeout = "10m"'))
    assert [ok for ok, _, _ in of_check(database, "approvals")] == [True]


def test_doctor_names_a_handler_that_does_not_load_on_hosts_of_a_pool(
    stock: Stock, database: Database
) -> None:
    within(database, catalogue.forget_name, "acme.broken")
    host_of(stock, "eu", replace(RENDER, error="ImportError: s3cret"))

    found = doctor.handlers(database)

    assert (found.ok, found.detail) == (
        True,
        "gpu.render of gpu-jobs 1.0 on hosts of pool eu does not load: ImportError",
    )


def test_doctor_finds_definitions_whose_pool_is_gone(apply: Apply, stock: Stock, database: Database) -> None:
    host_of(stock, "eu", RENDER)
    apply(text(org_pool="eu"))
    assert of_check(database, "hosts_only") == []

    apply('[[org]]\ncode = "org_acme"\nname = "Acme"\nissuer = "main"\n')

    [(ok, detail, fix)] = of_check(database, "hosts_only")
    assert (ok, detail) == (False, "only hosts offer gpu.render, and a definition of org_acme names no pool")
    assert 'pool = "eu"' in fix
