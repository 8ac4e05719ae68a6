"""A host is its pool's: what it declares places no run, grants nothing, and changes nothing elsewhere.

Each attack is made twice: as this release answers it, and as the one before did (`before`), where it works.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, update

from tests.conftest import on_either
from tests.fakes.rows import within
from tests.fakes.site import definition
from tests.integration.hosts.conftest import FILE, HANDLER, OTHER, Fleet, Host, end_of, fence, step_of
from worker.engine.attempt.plan import HandlerRegistry, NetworkPolicy
from worker.errors import UnknownHandler
from worker.features.hosts import delivery, wire
from worker.features.hosts import listener as web
from worker.features.hosts.delivery import GrantedHandlers
from worker.features.hosts.operations import remove_host
from worker.features.org_secrets.operations import add_secret
from worker.handlers.calls import MAX_METERS
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import Grant
from worker.ids import RunId, WorkerId
from worker.model.definitions.budgets import MAX_AMOUNT, MAX_SUM
from worker.model.definitions.file import parse_file
from worker.model.egress import Egress
from worker.model.runs import outcome as outcomes
from worker.model.runs.fire import decide
from worker.operations.apply import apply
from worker.store import catalogue, host_grants, host_handlers, host_store, spending, sweeps, tables
from worker.store.dialect import database_now

OWN = HandlerEntry("gpu.own", "gpu", "1", "gpu:own")
KEYED = replace(OWN, secrets=("openai",))
SCOPED = replace(OWN, scopes=("admin:all",))
LONG = replace(OWN, timeout="36500d", max_attempts=2**31 - 1)
# Definitions of a handler that only hosts have, and two of one of workers; `limited` sets its own limits.
ONLY_HOSTS = "".join(
    definition(org, name, handler, "every 1h", overlap="allow", **keys)
    for org, name, handler, keys in (
        ("org_a", "own", "gpu.own", {"pool": "eu"}),
        (
            "org_a",
            "limited",
            "gpu.own",
            {"pool": "eu", "scopes": ["read:kb"], "timeout": "2h", "max_attempts": 7},
        ),
        ("org_b", "nowhere", "gpu.own", {}),
        ("org_b", "hourly", "acme.render", {}),
        (
            "org_a",
            "varied",
            "acme.render",
            {"pool": "eu", "variants": [{"flag": "v2", "handler": "gpu.own"}]},
        ),
    )
)


@pytest.fixture
def fleet(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """With definitions of a handler that only hosts have; workers see at once what changed."""
    monkeypatch.setattr(delivery, "HANDLERS_AGE", -1.0)
    monkeypatch.setattr(host_store, "SERVING_AGE", -1.0)
    apply(fleet.database, parse_file(ONLY_HOSTS), actor="test", allow_unknown_handlers=True)
    return fleet


@pytest.fixture(params=["now", "before"])
def before(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the defence is off, as in the release before: one catalogue, all of which is granted."""
    if request.param == "before":

        def report(connection: Connection, worker: WorkerId, entries: Sequence[HandlerEntry]) -> None:
            catalogue.put(connection, entries, at=database_now(connection))
            mine = tables.workers.c.id == worker
            names = sorted(entry.name for entry in entries if entry.error is None)
            connection.execute(update(tables.workers).where(mine).values(handlers=names))

        monkeypatch.setattr(host_handlers, "report", report)
        monkeypatch.setattr(
            Grant, "of", classmethod(lambda cls, pool, declared, workers, approved: cls(workers or declared))
        )
    return request.param == "before"


async def in_eu(fleet: Fleet, *entries: HandlerEntry, name: str = "gpu1", pool: str = "eu") -> Host:
    return await fleet.host(name, pool, entries=entries)


async def fired(fleet: Fleet, *names: str) -> dict[str, dict[str, Any]]:
    """The scheduled runs of these definitions, by the org's code and the name, as a worker fires them."""
    # Longer ago than schedules of all orgs are spread.
    at = fleet.one.tools.clock.now() - timedelta(hours=2)
    with fleet.database.transaction() as connection:
        due = update(tables.schedule).values(next_scheduled_for=at, next_fire_at=at)
        connection.execute(due)
    handlers = HandlerRegistry()
    handlers.learn(await fleet.one.store.look_at_pools())
    await fleet.one.store.fire(lambda due, now: decide(due, now, handlers.declared), limit=100)
    named = {row["id"]: row["name"] for row in fleet.rows.all(tables.definitions)}
    rows = fleet.rows.all(tables.live_runs)
    return {named[row["definition_id"]]: row for row in rows if named[row["definition_id"]] in names}


def mark(fleet: Fleet) -> None:
    within(fleet.database, sweeps.mark_no_handler)


def approve(fleet: Fleet, entry: HandlerEntry, pool: str = "eu") -> None:
    with fleet.database.transaction() as connection:
        of = next(
            row["digest"]
            for row in host_grants.declared_by_hosts(connection, pool)
            if (row["handler"], row["secrets"], row["scopes"])
            == (entry.name, sorted(entry.secrets), sorted(entry.scopes))
        )
        at = database_now(connection)
        assert host_grants.approve(connection, pool, entry.name, of, by="ana", at=at) is not None


def waits(fleet: Fleet, run: RunId) -> tuple[str, str | None]:
    live = fleet.rows.unended(run)
    return live["reason"], live["detail"]


# placing


@on_either
@pytest.mark.parametrize("handler", ["gpu.own", HANDLER])
async def test_no_scheduled_run_goes_where_a_host_says(fleet: Fleet, before: bool, handler: str) -> None:
    """For a handler that only hosts have, and for one of workers, reported while none of them is there."""
    host = await in_eu(fleet, HandlerEntry(handler, "aaa", "1", "aaa:take", pool="pa"), pool="pa")
    names = ["nowhere"] if handler == OWN.name else ["hourly"]

    rows = await fired(fleet, *names)

    assert {row["pool"] for row in rows.values()} == ({"pa"} if before else {"default"})
    taken = await host.take(fleet.one, wait=1.0 if before else 0.1)
    assert bool(taken) is before
    assert (fleet.tokens.texts == []) is not before


@on_either
async def test_isolation_is_what_all_hosts_of_the_pool_declare(fleet: Fleet) -> None:
    inline = replace(OWN, isolation="inline")
    await in_eu(fleet, inline)
    await in_eu(fleet, inline, name="gpu2", pool="us")

    rows = await fired(fleet, "own", "nowhere")
    assert [rows[name]["isolation"] for name in ("own", "nowhere")] == ["inline", "child"]

    await in_eu(fleet, OWN, name="gpu3")
    assert (await fleet.one.store.look_at_pools())["gpu.own"].isolation_in("eu") == "child"


# a declaration that breaks others


async def test_a_broken_handler_of_a_host_blocks_no_definition(fleet: Fleet, before: bool) -> None:
    await in_eu(fleet, HandlerEntry(HANDLER, "acme", "1", "acme:render", error="no"), pool="pa")
    again = parse_file(FILE.replace("@yearly", "@monthly"))

    if before:
        with pytest.raises(UnknownHandler):
            apply(fleet.database, again, actor="test")
    else:
        assert apply(fleet.database, again, actor="test")


async def test_many_handlers_push_no_others_out(
    fleet: Fleet, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 in one call made `apply` refuse the workers' own and lost the pools that they declare."""
    monkeypatch.setattr(catalogue, "MAX_ENTRIES", 600)
    if before:
        monkeypatch.setattr(wire, "MAX_HANDLERS", 10_000)
        monkeypatch.setattr(web, "OWN_BYTES", 2**30)
    with fleet.database.transaction() as connection:
        mine = HandlerEntry("m.placed", "m", "1", "m:placed", pool="eu")
        catalogue.put(connection, [mine], at=database_now(connection))
    host = await in_eu(fleet, OWN, pool="pa")
    # Before and after it in the alphabet, so that neither order of reading helps.
    many = [replace(OWN, name=f"{letter}.{n}") for letter in "az" for n in range(600)]
    message = {"entries": [wire.ENTRY.write(entry) for entry in many]}

    answer = await host.send(fleet.one, "handlers", message)

    again = parse_file(FILE.replace("@yearly", "@monthly"))
    declared = await fleet.one.store.look_at_pools()
    assert ("m.placed" in declared) is not before
    if before:
        with pytest.raises(UnknownHandler):
            apply(fleet.database, again, actor="test")
        return
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid")
    assert "500 handlers" in answer.json()["detail"]
    assert {row["name"] for row in fleet.rows.all(tables.host_handlers)} == {"gpu.own"}
    assert apply(fleet.database, again, actor="test")


@on_either
async def test_a_host_limits_nobody_elses_runs(fleet: Fleet, before: bool) -> None:
    none = HandlerEntry(HANDLER, "acme", "1", "acme:render", scopes=("read:kb",), max_concurrent=0)
    here = await fleet.host("h1")
    await in_eu(fleet, none, pool="pa")
    run = fleet.start()

    taken = await here.take(fleet.one, wait=0.2 if before else 5.0)

    assert [one.run.id for one in taken] == ([] if before else [run])


@on_either
async def test_a_host_that_limits_its_own_handler_to_none_takes_none(fleet: Fleet) -> None:
    idle, other = await in_eu(fleet, replace(OWN, max_concurrent=0)), await in_eu(fleet, OWN, name="gpu2")
    run = fleet.start("own")

    assert await idle.take(fleet.one, wait=0.2) == []
    assert [one.run.id for one in await other.take(fleet.one)] == [run]


# what a handler asks for


async def test_secrets_are_not_the_hosts_to_choose(fleet: Fleet, before: bool) -> None:
    add_secret(fleet.database, fleet.one.ring, "org_a", "openai", "sk-canary-of-a", actor="test")
    host = await in_eu(fleet, KEYED)
    run = fleet.start("own")

    taken = await host.take(fleet.one, wait=5.0 if before else 0.2)

    if before:
        assert [one.work.secrets for one in taken] == [{"openai": "sk-canary-of-a"}]
        return
    mark(fleet)
    reason, detail = waits(fleet, run)
    assert (taken, reason) == ([], "not_approved")
    assert detail == host_grants_command(KEYED)
    assert fleet.rows.attempts(run) == []
    approve(fleet, KEYED)
    assert [one.work.secrets for one in await host.take(fleet.one)] == [{"openai": "sk-canary-of-a"}]


def host_grants_command(entry: HandlerEntry, pool: str = "eu") -> str:
    return Grant.of(pool, entry, None, None).command


async def test_a_secret_that_an_org_lacks_is_not_named(fleet: Fleet, before: bool) -> None:
    """Else a host could ask which names an org has."""
    host = await in_eu(fleet, replace(OWN, secrets=("guessed",)))
    run = fleet.start("own")

    async with asyncio.timeout(20):
        while before and fleet.rows.run(run)["finished_at"] is None:
            await host.take(fleet.one, wait=0.2)
    assert await host.take(fleet.one, wait=0.2) == []

    mark(fleet)
    named = "guessed" in str([fleet.rows.run(run), fleet.rows.live(run), fleet.rows.attempts(run)])
    assert named is before


async def test_scopes_are_not_the_hosts_to_choose(fleet: Fleet, before: bool) -> None:
    host = await in_eu(fleet, SCOPED)
    run, limited = fleet.start("own"), fleet.start("limited")

    taken = await host.take(fleet.one, 2, wait=1.0)

    asked = [wanted.scopes for wanted in fleet.tokens.wanted]
    if before:
        assert frozenset({"admin:all"}) in asked
        return
    # A definition that lists its scopes needs no approval: the handler's are not used.
    assert [one.run.id for one in taken] == [limited]
    assert asked == [frozenset({"read:kb"})]
    assert waits(fleet, run) == ("not_approved", host_grants_command(SCOPED))
    assert fleet.rows.attempts(run) == []


async def test_egress_is_not_the_hosts_to_choose(fleet: Fleet, before: bool) -> None:
    """Where sealed runs are required, a host's handler would be open because the host says so."""
    fleet.one.tools.plans.network = NetworkPolicy("require")
    opened = replace(OWN, egress=("open",), audiences=("mcp",))
    host = await in_eu(fleet, opened)
    run = fleet.start("own")

    taken = await host.take(fleet.one, wait=5.0 if before else 0.2)

    if before:
        assert [(one.work.egress.is_open, one.work.egress.audiences) for one in taken] == [(True, ("mcp",))]
        return
    mark(fleet)
    assert (taken, waits(fleet, run)) == ([], ("not_approved", host_grants_command(opened)))
    approve(fleet, opened)
    [one] = await host.take(fleet.one)
    assert one.work.egress == Egress((("open",),), audiences=("mcp",), owners=("handler",))


async def test_which_handlers_it_starts_is_not_the_hosts_to_choose(fleet: Fleet, before: bool) -> None:
    """It could start any handler of the workers, with params of its own."""
    starting = replace(OWN, children=("gpu.other",))
    host = await in_eu(fleet, starting)
    run = fleet.start("own")

    taken = await host.take(fleet.one, wait=5.0 if before else 0.2)

    if before:
        assert len(taken) == 1
        return
    mark(fleet)
    assert (taken, waits(fleet, run)) == ([], ("not_approved", host_grants_command(starting)))
    approve(fleet, starting)
    [one] = await host.take(fleet.one)
    for worker in fleet.workers:
        for name, answer in (("gpu.other", "placed"), ("acme.secret", "error")):
            child = {"handler": name, "key": "k", "occurrence": 1, "params_json": "{}"}
            call = fence(one) | {"handler": one.work.handler, "children": [child]}
            response = await host.send(worker, "start_children", call)
            assert answer in response.json()
    # Two workers, one key.
    [link] = fleet.rows.all(tables.children)
    assert (link["parent_id"], link["handler"]) == (run, "gpu.other")
    live = fleet.rows.unended(link["run_id"])
    assert (live["pool"], live["org_id"]) == ("eu", fleet.org("org_a"))


async def test_a_host_that_leaves_its_list_out_reaches_no_more(fleet: Fleet, before: bool) -> None:
    """Such as a version of a plug-in that drops it, once an administrator has approved the one before."""
    listed = replace(OWN, egress=("api", "https://a.example"))
    await in_eu(fleet, listed)
    if not before:
        approve(fleet, listed)
    silent = await in_eu(fleet, OWN, name="gpu2")
    fleet.start("own")

    [one] = await silent.take(fleet.one)

    assert one.work.egress.lists == (() if before else (listed.egress,))


async def test_a_handler_that_lists_nothing_anywhere_runs_as_the_operator_says(fleet: Fleet) -> None:
    """As before there were lists; what requires sealed runs gives it the API and no more."""
    host = await in_eu(fleet, OWN)
    fleet.start("own")
    [open_] = await host.take(fleet.one)
    assert open_.work.egress.lists == ()

    fleet.one.tools.plans.network = NetworkPolicy("require")
    fleet.one.tools.plans._plans.clear()
    fleet.start("own")
    [sealed] = await host.take(fleet.one)
    assert sealed.work.egress.lists == (("api",),)


async def test_timeout_and_attempts_are_not_the_hosts_to_choose(fleet: Fleet, before: bool) -> None:
    host = await in_eu(fleet, LONG)
    runs = {fleet.start("own"): "own", fleet.start("limited"): "limited"}

    taken = {runs[one.run.id]: one for one in await take_some(host, fleet, 2 if before else 1)}

    if before:
        assert taken["own"].timeout == timedelta(days=36500)
        return
    assert taken.keys() == {"limited"}
    assert taken["limited"].timeout == timedelta(hours=2)
    failed = outcomes.Failed(outcomes.Error("E", "x"))
    for attempt in range(1, 8):
        [one] = list(taken.values()) if attempt == 1 else await take_now(host, fleet)
        assert one.run.attempt == attempt
        await host.finish(fleet.one, end_of(one, failed))
    assert fleet.rows.run(taken["limited"].run.id)["state"] == "failed"


async def take_now(host: Host, fleet: Fleet) -> list[wire.Taken]:
    """What it takes once all waiting runs are due."""
    with fleet.database.transaction() as connection:
        waiting = update(tables.live_runs).where(tables.live_runs.c.state == "waiting")
        connection.execute(waiting.values(available_at=database_now(connection)))
    return await host.take(fleet.one)


async def take_some(host: Host, fleet: Fleet, count: int) -> list[wire.Taken]:
    taken: list[wire.Taken] = []
    async with asyncio.timeout(20):
        while len(taken) < count:
            taken += await host.take(fleet.one, count, wait=1.0)
    return taken


async def test_a_variant_adds_no_scope_that_was_not_approved(fleet: Fleet, before: bool) -> None:
    """The issuer is not even asked for the scopes of a variant, whose flag the token decides."""
    host = await in_eu(fleet, HandlerEntry(HANDLER, "acme", "1", "acme:render"), SCOPED)
    run = fleet.start("varied")

    taken = await host.take(fleet.one, wait=5.0 if before else 0.2)

    asked = [wanted.also_ask for wanted in fleet.tokens.wanted]
    assert (frozenset({"admin:all"}) in asked) is before
    assert bool(taken) is before
    if not before:
        mark(fleet)
        assert waits(fleet, run) == ("not_approved", host_grants_command(SCOPED))


async def test_a_worker_that_did_not_prepare_the_attempt_adds_no_scope_either(
    fleet: Fleet, before: bool
) -> None:
    """There the host says which variant its run is of."""
    host = await in_eu(fleet, HandlerEntry(HANDLER, "acme", "1", "acme:render"), OWN)
    fleet.start("varied")
    [taken] = await host.take(fleet.one)
    await host.call(fleet.two, "handlers", entries=[wire.ENTRY.write(SCOPED)])
    fleet.tokens.wanted.clear()

    await host.send(fleet.two, "token", {**fence(taken), "handler": OWN.name, "fresh": True})

    assert any("admin:all" in wanted.scopes for wanted in fleet.tokens.wanted) is before


async def test_a_handler_of_workers_needs_no_approval_for_what_they_declare(fleet: Fleet) -> None:
    add_secret(fleet.database, fleet.one.ring, "org_a", "openai", "sk-canary", actor="test")
    same = HandlerEntry("acme.keyed", "acme", "1", "acme:keyed", secrets=("openai",))
    host = await fleet.host(entries=[same])
    run = fleet.start("keyed")
    assert [one.run.id for one in await host.take(fleet.one)] == [run]

    # The control: with one more it does.
    more = await fleet.host("h2", entries=[replace(same, secrets=("openai", "stripe"))])
    fleet.start("keyed")
    assert await more.take(fleet.one, wait=0.2) == []
    [row] = [row for row in within(fleet.database, host_grants.declared_by_hosts) if row["pending"]]
    assert (row["handler"], row["hosts"], row["pending"]) == ("acme.keyed", ["h2"], ["secrets"])


# approving


async def test_an_old_incarnation_goes_on_while_a_new_one_declares_more(fleet: Fleet) -> None:
    """A rolling update: both have the same token, and the new version waits for its approval."""
    old = await in_eu(fleet, SCOPED)
    approve(fleet, SCOPED)
    more = replace(SCOPED, version="2", scopes=("admin:all", "delete:all"))
    new = Host(fleet.client, old.token)
    await new.register(fleet.one, [more])
    fleet.tokens.scopes = frozenset({"admin:all", "delete:all", "read:kb"})
    runs = [fleet.start("own"), fleet.start("limited")]

    assert await new.take(fleet.one, 2, wait=0.3) == []
    assert [waits(fleet, run)[0] for run in runs] == ["due", "due"]
    assert sorted(one.run.id for one in await old.take_all(fleet.one, 2)) == sorted(runs)

    approve(fleet, more)
    another = fleet.start("own")
    assert [one.run.id for one in await new.take(fleet.one)] == [another]


@on_either
async def test_an_approval_lets_waiting_runs_start(fleet: Fleet) -> None:
    fleet.tokens.scopes = frozenset({"admin:all"})
    host = await in_eu(fleet, SCOPED)
    run = fleet.start("own")
    assert await host.take(fleet.one, wait=0.2) == []
    assert waits(fleet, run)[0] == "not_approved"
    assert fleet.rows.live(run)["available_at"] > fleet.one.tools.clock.now()  # type: ignore[index]
    # The control: of another pool, or of what the host no longer declares, it lets nothing start.
    with fleet.database.transaction() as connection:
        digest = host_grants.declared_by_hosts(connection, "eu")[0]["digest"]
        at = database_now(connection)
        for pool, wrong in (("us", digest), ("eu", "1-" + "0" * 40)):
            assert host_grants.approve(connection, pool, OWN.name, wrong, by="ana", at=at) is None
    assert await host.take(fleet.one, wait=0.2) == []

    approve(fleet, SCOPED)

    assert [one.run.id for one in await host.take(fleet.one)] == [run]
    [wanted] = fleet.tokens.wanted
    assert wanted.scopes == {"admin:all"}


async def test_a_run_that_was_admitted_meanwhile_is_not_started(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a declaration may get is looked at again when the attempt is prepared."""
    monkeypatch.setattr(GrantedHandlers, "limits", HandlerRegistry.limits)
    host = await in_eu(fleet, KEYED)
    run = fleet.start("own")

    assert await host.take(fleet.one, wait=0.5) == []

    assert waits(fleet, run) == ("not_approved", host_grants_command(KEYED))
    [attempt] = fleet.rows.attempts(run)
    assert (attempt["outcome"], attempt["claims"]) == ("handed_back", None)
    assert fleet.tokens.texts == []
    assert fleet.rows.live(run)["failures"] == 0  # type: ignore[index]


@on_either
async def test_reasons_change_with_what_is_approved(fleet: Fleet) -> None:
    host = await in_eu(fleet, KEYED)
    run = fleet.start("own")
    mark(fleet)
    assert waits(fleet, run) == ("not_approved", host_grants_command(KEYED))
    more = replace(KEYED, secrets=("openai", "stripe"))
    await host.call(fleet.one, "handlers", entries=[wire.ENTRY.write(more)])
    mark(fleet)
    assert waits(fleet, run) == ("not_approved", host_grants_command(more))

    approve(fleet, more)
    mark(fleet)
    assert waits(fleet, run)[0] == "due"
    remove_host(fleet.database, "gpu1", actor="test")
    mark(fleet)
    assert waits(fleet, run) == ("no_pool", "eu")


@on_either
async def test_an_approval_outlives_the_hosts_and_is_only_of_its_pool(fleet: Fleet) -> None:
    await in_eu(fleet, KEYED)
    approve(fleet, KEYED)
    add_secret(fleet.database, fleet.one.ring, "org_a", "openai", "sk-canary", actor="test")
    remove_host(fleet.database, "gpu1", actor="test")
    run = fleet.start("own")

    again = await in_eu(fleet, KEYED, name="gpu2")
    elsewhere = await in_eu(fleet, KEYED, name="us1", pool="us")

    assert [one.run.id for one in await again.take(fleet.one)] == [run]
    offered = await fleet.one.api.shared.store.offered(WorkerId(elsewhere.id))  # type: ignore[union-attr]
    assert offered.grants[OWN.name].beyond == {"secrets"}


# the previous release


async def of_older(fleet: Fleet, host: Host, *entries: HandlerEntry) -> None:
    """Let an incarnation be one that registered at a worker of the previous release, with these handlers."""
    mine = tables.workers.c.id == host.id
    with fleet.database.transaction() as connection:
        connection.execute(tables.host_handlers.delete())
        names = [entry.name for entry in entries]
        connection.execute(update(tables.workers).where(mine).values(offers=None, handlers=names))
        catalogue.put(
            connection, [entry for entry in entries if entry.name == OWN.name], at=database_now(connection)
        )
        theirs = tables.catalogue.c.name == OWN.name
        connection.execute(update(tables.catalogue).where(theirs).values(of_worker=None))


@on_either
async def test_a_host_that_registered_at_an_older_worker_goes_on_within_the_ceiling(
    fleet: Fleet,
) -> None:
    host = await fleet.host(entries=[])
    both = [HandlerEntry(name, "acme", "1", "acme:render") for name in (HANDLER, OTHER)]
    await of_older(fleet, host, *both, OWN)
    run = fleet.start()
    own = fleet.start("nowhere", org="org_b")
    assert sorted(one.run.id for one in await host.take_all(fleet.one, 2)) == sorted([run, own])

    await of_older(fleet, host, *both, KEYED)
    fleet.start("nowhere", org="org_b")
    assert await host.take(fleet.one, wait=0.3) == []
    [row] = [row for row in within(fleet.database, host_grants.declared_by_hosts) if row["pending"]]
    assert (row["handler"], row["hosts"], row["secrets"]) == (OWN.name, ["h1"], ["openai"])


async def test_what_a_host_told_an_older_worker_places_no_run(fleet: Fleet) -> None:
    host = await in_eu(fleet, OWN, pool="pa")
    await of_older(fleet, host, replace(OWN, pool="pa"))

    rows = await fired(fleet, "nowhere")

    assert rows["nowhere"]["pool"] == "default"
    # The control: as a worker's it does.
    with fleet.database.transaction() as connection:
        connection.execute(update(tables.catalogue).values(of_worker=True))
    assert (await fleet.one.store.look_at_pools())[OWN.name].pool == "pa"


async def store_spends(fleet: Fleet, host: Host, taken: wire.Taken, *, steps: int = 12) -> list[int]:
    """As many steps, each with as many spends of as much as one may have; the statuses of the answers."""
    spends = [["llm", MAX_AMOUNT]] * MAX_METERS
    sent = [step_of(taken, key=str(n), seq=n, spends=spends) for n in range(1, steps + 1)]
    return [(await host.send(fleet.one, "store", {"steps": [step]})).status_code for step in sent]


@on_either
async def test_the_sums_of_what_a_hosts_runs_spend_have_a_limit(fleet: Fleet) -> None:
    """In 64 bits they would overflow, and no spend of the org and meter could be stored from then on."""
    host, taken = await fleet.busy_host()

    assert set(await store_spends(fleet, host, taken)) == {200}

    assert [row["used"] for row in fleet.rows.all(tables.meter_days)] == [MAX_SUM]
    assert await host.call(fleet.one, "spend", **fence(taken), meter="llm", amount=1, key="1:1")
    assert [row["used"] for row in fleet.rows.all(tables.meter_days)] == [MAX_SUM]


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
async def test_without_that_limit_the_spends_of_the_org_are_not_stored_any_more(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(spending, "Capped", lambda number: number)
    host, taken = await fleet.busy_host()

    assert 500 in await store_spends(fleet, host, taken)


async def test_a_spend_of_more_than_one_may_have_is_an_error_that_says_so(fleet: Fleet) -> None:
    host, taken = await fleet.busy_host()
    spend = {**fence(taken), "handler": HANDLER, "meter": "llm", "key": "1:1"}

    for amount in (MAX_AMOUNT + 1, -1, 1.5, True, 2**63):
        refused = await host.send(fleet.one, "spend", {**spend, "amount": amount})
        assert refused.status_code == 422
        assert f"amount: not a whole number from 0 to {MAX_AMOUNT}" in refused.text
    step = step_of(taken, spends=[["llm", MAX_AMOUNT + 1]])
    refused = await host.send(fleet.one, "store", {"steps": [step]})
    assert refused.status_code == 422
    assert f"not a whole number from 0 to {MAX_AMOUNT}" in refused.text
    assert fleet.rows.all(tables.spends) == []
