"""Two hundred hostile strings, wherever a page shows text that somebody else chose: nothing of them runs."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser
from sqlalchemy import Connection, Table, insert
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from tests.browser.conftest import migrated
from tests.browser.crawling import crawl
from tests.browser.hostile import searches, strings
from tests.fakes import browser as browsers
from tests.fakes import forked
from tests.fakes.browser import Tab
from tests.fakes.ports import free_port
from tests.fakes.site import wait_until
from worker.clock import SystemClock
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.ids import new_id
from worker.store import tables
from worker.store.database import Database

TOKEN = "token-of-the-operator"
EVIL = strings()
SHOWN = "<script>pwned()</script>"
# What no page of ours has: handlers in attributes, and addresses that run.
RUNNING = """() => [...document.querySelectorAll('*')].flatMap(element => [...element.attributes]
    .filter(each => each.name.startsWith('on') || /^\\s*(javascript|vbscript):/i.test(each.value)
        && /^(href|src|action|formaction|xlink:href|data|srcdoc|content)$/.test(each.name))
    .map(each => element.tagName + ' ' + each.name + '=' + each.value.slice(0, 60)))"""
ALARM = "globalThis.pwned = () => console.error('PWNED');"


def fill(connection: Connection, now: datetime) -> str:
    """Rows of every table that pages show, with hostile text in each column that takes any; a run's id."""

    def put(table: Table, **values: Any) -> None:
        connection.execute(insert(table).values(**values))

    worker = new_id()
    put(
        tables.workers,
        id=worker,
        **{"host": SHOWN, "pid": 1, "version": EVIL[1], "handlers": EVIL[:40], "capacity": {"children": 1}},
        **{"started_at": now, "renewed_at": now, "lease_until": now + timedelta(hours=1)},
    )
    for number, evil in enumerate(EVIL):
        org = new_id()
        put(
            tables.orgs,
            **{"id": org, "code": f"org_{number}", "name": evil, "issuer": "main", "tags": [evil]},
            **{"created_at": now, "updated_at": now, "state_note": evil, "state_by": evil, "state_at": now},
            state="paused" if number % 3 else "active",
        )
        put(
            tables.audit,
            **{"id": new_id(), "at": now, "actor": evil, "action": "keys.rotate", "org_id": org},
            **{"subject": evil, "detail": {evil: evil, "reason": evil}},
        )
        changed = {"before": {evil: evil}, "after": {evil: [evil]}}
        detail = {"params": changed, evil: changed}
        put(
            tables.audit,
            **{"id": new_id(), "at": now, "actor": f"operator:{evil}", "action": "definition.change"},
            **{
                "org_id": org,
                "subject": f"org_{number} {evil}",
                "detail": detail,
            },
        )
        fill_budget(connection, org, number, now)
        put(
            tables.credentials,
            **{"id": new_id(), "org_id": org, "generation": 1, "client_id": evil, "reference": evil},
            **{"created_at": now, "created_by": evil, "last_error": evil, "last_used_at": now, "uses": 1},
        )
        put(
            tables.catalogue,
            **{"name": evil, "distribution": evil, "version": evil, "entry_point": evil, "scopes": [evil]},
            **{"error": evil if number % 2 else None, "seen_at": now, "of_worker": True, "description": evil},
            params_schema={"type": "object", "properties": {evil: {"type": "string", "description": evil}}},
        )
        fill_host(connection, evil, number, now)
        fill_definition(connection, org, worker, number, now)
    return first_run(connection)


def fill_budget(connection: Connection, org: str, number: int, now: datetime) -> None:
    """A budget of the org with a hostile meter, and what was spent of it."""
    start = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    budget = {"id": new_id(), "target": org, "org_id": org, "meter": EVIL[number], "per": "month", "limit": 9}
    budget |= {"at_limit": "wait", "warn_at": 0.8, "created_at": now, "updated_at": now, "updated_by": "ada"}
    connection.execute(insert(tables.budgets).values(**budget))
    spent = {"org_id": org, "meter": EVIL[number], "used": number}
    connection.execute(insert(tables.meters).values(**spent, per="month", starts_at=start))
    connection.execute(insert(tables.meter_days).values(**spent, day=now.date(), definition_id=new_id()))


def fill_host(connection: Connection, evil: str, number: int, now: datetime) -> None:
    """A host that declares a handler with hostile text wherever it can; pages show some of each pool."""
    host, pool, digest = new_id(), f"pool-{number // 10}", hashlib.sha256(evil.encode()).hexdigest()
    named = {"id": host, "name": f"host-{number}", "pool": pool, "token_sha256": digest}
    connection.execute(insert(tables.hosts).values(**named, created_at=now, created_by=evil))
    text = {"name": f"gpu.{evil}", "distribution": evil, "version": evil, "entry_point": evil}
    lists = {"scopes": [evil], "secrets": [evil], "bytes": 100, "seen_at": now}
    schema = {"type": "object", "properties": {evil: {"type": "string", "description": evil}}}
    connection.execute(
        insert(tables.host_handlers).values(
            **text, **lists, pool=pool, host_id=host, params_schema=schema, description=evil,
            error=evil if number % 7 == 0 else None,
        )
    )  # fmt: skip
    approved = {"pool": pool, "handler": f"gpu.{evil}", "digest": evil, "ceiling": {"version": 1}}
    if number % 2:
        connection.execute(
            insert(tables.pool_approvals).values(**approved, approved_at=now, approved_by=evil)
        )


def fill_definition(connection: Connection, org: str, worker: str, number: int, now: datetime) -> None:
    """A definition of the org, and a failed run with hostile errors, claims and results."""

    def put(table: Table, **values: Any) -> None:
        connection.execute(insert(table).values(**values))

    evil, other = EVIL[number], EVIL[-1 - number]
    definition, run = new_id(), new_id()
    spec = {"handler": evil, "schedule": "0 3 * * *", "params": {evil: other}, "variants": []}
    put(
        tables.definitions,
        **{"id": definition, "org_id": org, "name": "digest", "revision": 1, "enabled": True},
        **{"created_at": now, "updated_at": now, "pause_note": evil, "paused_by": other, "paused_at": now},
    )
    put(tables.definition_revisions, definition_id=definition, revision=1, spec=spec, at=now, by=evil)
    put(tables.schedule, definition_id=definition, org_id=org, next_scheduled_for=None, next_fire_at=None)
    error = {"type": evil, "message": other, "trace": "\n".join([evil, other, *EVIL[number : number + 10]])}
    shared = {"org_id": org, "definition_id": definition, "revision": 1, "handler": evil}
    put(
        tables.runs,
        **{"id": run, "origin": "manual", "scheduled_for": now, "created_at": now, "created_by": evil},
        **{"idempotency_key": run, "state": "failed", "reason": "error", "detail": evil, "attempt": 1},
        **{
            "started_at": now,
            "finished_at": now,
            "worker_id": worker,
            "error": error,
            "params": {evil: evil},
        },
        **{"progress": {"done": 1, "total": 2, "note": evil}, "result": {evil: [other, evil]}},
        **shared,
    )
    put(
        tables.attempts,
        **{"run_id": run, "attempt": 1, "org_id": org, "worker_id": worker, "fencing_token": 1},
        **{"handler": evil, "started_at": now, "handler_started_at": now, "ended_at": now, "error": error},
        **{"outcome": "failed", "error_cause": other, "flags": {evil: other}, "jti": evil},
        claims={"org_code": evil, "client_id": other, "properties": {evil: other}, "scopes": [evil]},
    )
    put(
        tables.checkpoints,
        **{"run_id": run, "org_id": org, "attempt": 1, "fencing_token": 1, "saved_at": now},
        data={evil: other},
    )
    lines = EVIL if number == 0 else EVIL[number : number + 3]
    for seq, text in enumerate(lines, 1):
        level, source = ("error", "log") if seq % 2 else ("info", "stdout")
        row = {"run_id": run, "attempt": 1, "seq": seq, "org_id": org, "at": now}
        put(tables.run_logs, **row, level=level, source=source, text=text)


def first_run(connection: Connection) -> str:
    query = tables.runs.select().with_only_columns(tables.runs.c.id).order_by(tables.runs.c.id).limit(1)
    return str(connection.execute(query).scalar_one())


@pytest.fixture(scope="module")
def evil_site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, browser: Browser, dialect: str
) -> Iterator[tuple[str, Any, str]]:
    """The address of a console full of hostile text, the cookies of an operator, and a run."""
    folder = tmp_path_factory.mktemp(f"hostile-{dialect}")
    with migrated(request, folder) as url, serving(folder, browser, url, fill) as found:
        yield found


@contextlib.contextmanager
def serving(
    folder: Path, browser: Browser, url: str, fill: Callable[[Connection, datetime], str]
) -> Iterator[tuple[str, Any, str]]:
    """The address of a console over these rows, the cookies of an operator, and what `fill` returned."""
    port, digest = free_port(), hashlib.sha256(TOKEN.encode()).hexdigest()
    (folder / "worker.toml").write_text(
        f'[database]\nurl = "{url}"\n[web]\nlisten = "127.0.0.1:{port}"\ncalls_per_second = 10000\n'
        f'[[web.operators]]\nname = "ada"\nrole = "admin"\ntoken_sha256 = "{digest}"\n'
    )
    database = Database.open(url, clock=SystemClock())
    with database.transaction() as connection:
        made = fill(connection, datetime.now(UTC) - timedelta(hours=1))
    database.close()
    command = [sys.executable, "-m", "worker", "--config", str(folder / "worker.toml"), "serve"]
    with (folder / "serve.log").open("ab") as log:
        served = forked.start(command, cwd=folder, env={"PATH": "/usr/bin:/bin"}, output=log, fork=True)
    base = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: browsers.is_ready(base), "the console to answer")
        with browsers.tab(browser, base) as first:
            first.log_in(TOKEN)
            state = first.page.context.storage_state()
        yield base, state, made
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(timeout=20)


def armed(tab: Tab) -> Tab:
    tab.page.context.add_init_script(ALARM)
    return tab


def test_no_page_runs_any_of_it(browser, evil_site):
    base, state, run = evil_site
    pages = crawl(
        base,
        state,
        each=2,
        also=(400,),
        first=("/", f"/runs/{run}", "/orgs/org_0", "/orgs/org_0/definitions/digest"),
    )
    with browsers.tab(browser, base, state=state) as tab:
        armed(tab)
        for address in (address for each in pages.values() for address in each):
            assert tab.go(address) < 500, address
            assert tab.page.evaluate(RUNNING) == [], address
        tab.go(f"/runs/{run}")
        assert SHOWN in tab.page.inner_text("body")

        assert tab.wrongs == []
        assert tab.foreign() == []
        cookies = {cookie["name"] for cookie in tab.page.context.cookies()}
        assert cookies <= {"orgworker_session", "orgworker_zone"}


def test_a_log_that_is_saved_opens_no_page(browser, evil_site):
    base, state, run = evil_site
    with browsers.tab(browser, base, state=state) as tab:
        armed(tab)
        tab.go(f"/runs/{run}")
        with tab.page.expect_download() as saving:
            tab.page.get_by_role("link", name="Download").click()

        saved = saving.value.path().read_text()
        assert SHOWN in saved
        assert saved.count("\n") >= len(EVIL)
        assert tab.path() == f"/runs/{run}"
        assert tab.wrongs == []


def test_no_search_runs_any_of_it(browser, evil_site):
    base, state, _ = evil_site
    with browsers.tab(browser, base, state=state) as tab:
        armed(tab)
        for evil in searches():
            query = browsers.quoted(evil[:1000])
            assert tab.go(f"/search?q={query}") in (200, 400), evil
            assert tab.page.evaluate(RUNNING) == [], evil

        assert tab.wrongs == []
        assert tab.foreign() == []


@pytest.mark.parametrize("policy", ["", "default-src 'none'"])
def test_the_alarm_sounds_where_it_is_not_escaped(browser, policy):
    """The control: without escaping they run, and with a policy alone the browser reports them."""

    async def page(request: Request) -> HTMLResponse:
        number = int(request.query_params["n"])
        headers = {"content-security-policy": policy} if policy else {}
        return HTMLResponse(f"<!doctype html><title>x</title><p>{EVIL[number]}</p>", headers=headers)

    listener = bind_loopback()
    caught = 0
    with ServerThread(Starlette(routes=[Route("/", page)]), listener):
        for number in (0, 7, 14):
            with browsers.tab(browser, url_of(listener)) as tab:
                armed(tab)
                tab.go(f"/?n={number}")
                tab.page.wait_for_timeout(300)
                caught += any(("CSP-REPORT" if policy else "PWNED") in wrong for wrong in tab.wrongs)

    assert caught == 3
