"""Tools for MCP clients: the official client against the application, and every caller at every tool."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import httpx2
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.server.transport_security import TransportSecuritySettings
from sqlalchemy import insert, select, update

from tests.fakes.hostile_texts import TEXTS
from tests.integration.console.conftest import BASE, OPERATORS, TOKENS, Site, log_in, make_run, on_either
from tests.unit.console.test_quoting import data_of
from worker.clock import SystemClock
from worker.errors import ConfigurationError
from worker.features.console.access import Operator
from worker.features.console.callers import PLANNED
from worker.features.console.mcp import server
from worker.features.console.mcp.tools import MAX_ROWS, ROWS, TOOLS
from worker.features.console.operators import add_operator, make_client_token
from worker.features.console.sessions import SESSION_COOKIE
from worker.features.console.wiring import ConsolePages
from worker.ids import new_id
from worker.kit.web.health import Health
from worker.operations.runs import cancel
from worker.settings import Settings
from worker.store import orgs, tables
from worker.telemetry.metrics import Metrics

URL = f"{BASE}/mcp"
API = "/api/v1"
JSON = {"accept": "application/json, text/event-stream", "mcp-protocol-version": "2025-06-18"}


@pytest.fixture
def served(site: Site) -> Site:
    """With /mcp, and operators."""
    site.mcp_hosts = []
    site.operators = [*OPERATORS]
    return site


def client_token(site: Site, role: str, name: str = "") -> str:
    """The token of the MCP client of a new operator."""
    name = name or f"ada-{role}"
    add_operator(site.database, name, role, taken=(), actor="tester")
    return str(make_client_token(site.database, name, configured=(), actor="tester")["token"])


@asynccontextmanager
async def connected(site: Site, token: str) -> AsyncIterator[ClientSession]:
    """The official client with this token, after `initialize`."""
    transport = httpx2.ASGITransport(site._app(), client=("127.0.0.1", 40000))
    headers = {"authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(transport=transport, headers=headers) as http,
        streamable_http_client(URL, http_client=http) as (read, write),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        yield session


async def send(site: Site, token: str | None, method: str = "tools/list", **params: Any) -> httpx.Response:
    """One request, as a client sends it."""
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    return await site.post("/mcp", token, json=body, headers=JSON)


async def call(site: Site, token: str, tool: str, /, **arguments: Any) -> tuple[bool, list[str]]:
    """Whether a tool failed, and its texts."""
    answer = await send(site, token, "tools/call", name=tool, arguments=arguments)
    assert answer.status_code == 200, answer.text
    result = answer.json()["result"]
    assert "structuredContent" not in result
    return result.get("isError", False), [each["text"] for each in result["content"]]


async def data(site: Site, token: str, tool: str, /, **arguments: Any) -> Any:
    """What a tool quotes."""
    is_error, texts = await call(site, token, tool, **arguments)
    assert not is_error, texts
    return data_of(texts[-1])


def arguments_of(name: str, org: str, run: str) -> Mapping[str, Any]:
    """Arguments of a tool for things of this org."""
    known = {
        "run": run,
        "org": org,
        "name": "approval" if name == "plan_answer_run" else "digest",
        "data": True,
    }
    properties = TOOLS[name].parameters["properties"]
    return {each: value for each, value in known.items() if each in properties}


async def test_the_official_client_reads_what_the_api_says(served: Site):
    token, run = client_token(served, "operator"), make_run(served)
    cancel(served.database, make_run(served), actor="tester")
    paths = {
        "show_overview": "/status",
        "list_runs": f"/runs?limit={ROWS}&org=org_a",
        "list_definitions": f"/definitions?limit={ROWS}&org=org_a",
        "list_orgs": f"/orgs?limit={ROWS}&org=org_a",
        "show_run": f"/runs/{run}",
        "explain_run": f"/runs/{run}/why",
        "list_attempts": f"/runs/{run}/attempts",
        "list_logs": f"/runs/{run}/logs",
        "show_definition": "/definitions/org_a/digest",
        "preview_definition": f"/definitions/org_a/digest/next?count={ROWS}",
        "list_usage": "/usage?org=org_a",
    }
    async with connected(served, token) as session:
        listed = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert listed.keys() == TOOLS.keys() == {*paths, *(f"plan_{change}" for change in PLANNED)}
        for name, path in paths.items():
            result = await session.call_tool(name, dict(arguments_of(name, "org_a", run)))
            assert not result.is_error
            [content] = result.content
            found = data_of(content.text)
            expected = (await served.get(API + path, TOKENS["operator"])).json()
            assert (found["rows"] if TOOLS[name].endpoint.is_list else found) == expected, name
            assert listed[name].annotations.read_only_hint


async def test_a_list_is_read_in_pages(served: Site):
    token = client_token(served, "viewer")
    made = [make_run(served) for _ in range(5)]

    first = await data(served, token, "list_runs", limit=3)
    rest = await data(served, token, "list_runs", limit=3, after=first["after"])

    assert [row["id"] for row in (*first["rows"], *rest["rows"])] == made[::-1]
    assert "after" not in rest
    for arguments in ({"limit": MAX_ROWS + 1}, {"limit": "3"}, {"limits": 3}, {"q": 3}, {"q": "\x00"}):
        is_error, [text] = await call(served, token, "list_runs", **arguments)
        assert is_error and data_of(text)["error"]["code"] == "usage"
    is_error, [text] = await call(served, token, "list_run")
    assert is_error and "list_runs" in data_of(text)["error"]["fix"]


async def test_the_newest_lines_of_a_log(served: Site):
    token, run = client_token(served, "viewer"), make_run(served)
    write_log(served, "org_a", run, [f"line {number}" for number in range(9)])

    found = await data(served, token, "list_logs", run=run, newest="true", limit=2)

    assert [line["text"] for line in found["rows"]] == ["line 7", "line 8"]
    both = f"{API}/runs/{run}/logs?newest=true&after=1.2"
    assert (await served.get(both, TOKENS["viewer"])).status_code == 400


def write_log(site: Site, org: str, run: str, texts: list[str]) -> None:
    with site.database.transaction() as connection:
        org_id, at = orgs.require(connection, org)["id"], site.database.now(connection)
        line = {"run_id": run, "attempt": 1, "org_id": org_id, "at": at, "level": "info", "source": "log"}
        rows = [{**line, "seq": number, "text": text} for number, text in enumerate(texts, 1)]
        connection.execute(insert(tables.run_logs), rows)


@on_either
async def test_fifty_hostile_lines_and_names_come_back_quoted(served: Site):
    """As lines of a log, results, errors, and the name of an org, which are any text."""
    token, run = client_token(served, "operator"), make_run(served)
    cancel(served.database, run, actor="tester")
    storable = [text.replace("\x00", "") for text in TEXTS]
    write_log(served, "org_a", run, storable)

    lines = await data(served, token, "list_logs", run=run, limit=MAX_ROWS)
    assert [line["text"] for line in lines["rows"]] == storable

    with served.database.transaction() as connection:
        old = connection.execute(select(tables.runs).where(tables.runs.c.id == run)).mappings().one()
        for text in storable:
            own = {"id": new_id(), "request_key": None, "state": "failed"}
            said = {"result": {text: text}, "error": {"type": text, "message": text}}
            connection.execute(insert(tables.runs).values(**{**old, **own, **said}))
    rows: list[Any] = []
    while len(rows) < len(storable):
        after = {"after": rows[-1]["id"]} if rows else {}
        # Few enough that none is cut.
        rows += (await data(served, token, "list_runs", state="failed", limit=4, **after))["rows"]
    assert [row["result"] for row in rows[::-1]] == [{text: text} for text in storable]
    assert [row["error"]["message"] for row in rows[::-1]] == storable

    for text in storable:
        with served.database.transaction() as connection:
            connection.execute(update(tables.orgs).where(tables.orgs.c.code == "org_a").values(name=text))
        [org] = (await data(served, token, "list_orgs", org="org_a"))["rows"]
        assert org["name"] == text
        # An error quotes what it was given.
        is_error, texts = await call(served, token, "explain_run", run=text[:500])
        assert is_error and data_of(texts[0])["error"]["code"] in ("not_found", "usage")


@dataclass(frozen=True)
class Who:
    """A caller, the org that it sees (None: all), and whether it may plan."""

    name: str
    token: str
    org: str | None = None
    may_plan: bool = False


async def test_every_caller_at_every_tool_for_things_of_each_org(served: Site):
    """Roles by tools by orgs: what is of another org does not exist, and only clients of operators plan."""
    served.org_role = "operator"
    callers = [
        *(Who(f"the {role}", TOKENS[role]) for role in ("viewer", "operator", "admin")),
        Who("a client of a viewer", client_token(served, "viewer")),
        Who("a client of an operator", client_token(served, "operator"), may_plan=True),
        Who("a client of an admin", client_token(served, "admin"), may_plan=True),
        Who("org_a", served.token("org_a"), org="org_a"),
        Who("org_b", served.token("org_b"), org="org_b"),
    ]
    runs = {org: make_run(served, org) for org in ("org_a", "org_b")}
    ended = {org: make_run(served, org) for org in runs}
    for org, run in ended.items():
        cancel(served.database, run, actor="tester")
        write_log(served, org, run, [f"canary of {org}"])
    before = everything(served)
    wrong, asked = [], 0
    for who in callers:
        listed = (await send(served, who.token)).json()["result"]["tools"]
        names = {tool["name"] for tool in listed}
        for (name, tool), org in ((each, org) for each in TOOLS.items() for org in runs):
            run = (runs if name == "plan_answer_run" else ended)[org]
            is_error, texts = await call(served, who.token, name, **arguments_of(name, org, run))
            found = data_of(texts[-1])
            asked += 1
            may = who.may_plan if tool.is_plan else not (tool.over_all_orgs and who.org)
            wanted = "" if may else "denied"
            if who.org not in (None, org) and wanted == "" and not tool.over_all_orgs:
                wanted = "not_found"
            code = found["error"]["code"] if is_error else ""
            # For an org a tool that it may not call and a thing of another org are both refused.
            if code != wanted and not (
                who.org not in (None, org) and {code, wanted} == {"not_found", "denied"}
            ):
                wrong.append(f"{who.name}: {name} of {org}: {code or 'done'}, not {wanted or 'done'}")
            if may != (name in names):
                wrong.append(f"{who.name}: {name} is{'' if name in names else ' not'} listed")
            other = {"org_a": "org_b", "org_b": "org_a"}.get(who.org or "")
            hidden = {f"canary of {other}", runs.get(other or "", "-"), ended.get(other or "", "-")} - {run}
            if who.org and any(text in json.dumps(found) for text in hidden):
                wrong.append(f"{who.name}: {name} of {org} names {other}")
    assert wrong == []
    assert asked == len(callers) * len(TOOLS) * 2
    assert everything(served) == before


def everything(site: Site) -> Mapping[str, list[Any]]:
    """All rows but plans, and the audit rows of those."""
    with site.database.autocommit() as connection:
        names = ("runs", "live_runs", "definitions", "schedule", "waits", "audit", "skips", "checkpoints")
        found = {
            name: [tuple(row) for row in connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY 1")]
            for name in names
        }
    found["audit"] = [row for row in found["audit"] if "plan.make" not in row]
    return found


async def test_who_is_not_let_in(served: Site):
    add_operator(served.database, "sue", "starter", taken=(), actor="tester")
    answers = {
        "nobody": await send(served, None),
        "a forged token": await send(served, "orgworker_mcp_" + "x" * 43),
        "a starter": await send(served, TOKENS["starter"]),
        "an unknown org": await send(served, served.token("org_z")),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == {
        "nobody": 401,
        "a forged token": 401,
        "a starter": 403,
        "an unknown org": 403,
    }


async def test_a_cookie_does_not_open_it(served: Site):
    """A page of another site can make a browser send the cookie; the control: it opens pages."""
    async with served.client() as browser:
        await log_in(browser, TOKENS["admin"])
        assert browser.cookies.get(SESSION_COOKIE)
        assert (await browser.get("/workers")).status_code == 200
        body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}

        assert (await browser.post("/mcp", json=body, headers=JSON)).status_code == 401


HEADERS = [
    ({"host": "evil.example:8470"}, 421),
    ({"host": "127.0.0.1.evil.example:8470"}, 421),
    ({"host": "evil.example"}, 421),
    ({"origin": "http://evil.example"}, 403),
    ({"origin": "null"}, 403),
    ({"origin": "https://jobs.acme.com.evil.example"}, 403),
    ({"host": "127.0.0.1:8470", "origin": "http://127.0.0.1:8470"}, 200),
    ({"host": "[::1]:9"}, 200),
    ({"host": "jobs.acme.com", "origin": "https://jobs.acme.com"}, 200),
    ({"host": "10.0.0.7:8470"}, 200),
]


@pytest.mark.parametrize(("headers", "status"), HEADERS)
async def test_dns_rebinding_is_refused(served: Site, headers: dict[str, str], status: int):
    """A name of another site that resolves to this address: browsers send the site's name as Host."""
    served.public_url, served.mcp_hosts = "https://jobs.acme.com", ["10.0.0.7:8470"]
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}

    answer = await served.post("/mcp", TOKENS["viewer"], json=body, headers=JSON | headers)

    assert answer.status_code == status, answer.text


async def test_without_the_sdks_protection_another_name_would_be_served(
    served: Site, monkeypatch: pytest.MonkeyPatch
):
    """The control: off, as the SDK has it by default."""
    off = TransportSecuritySettings(enable_dns_rebinding_protection=False)
    monkeypatch.setattr(server, "security_of", lambda public_url, hosts: off)
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    headers = JSON | {"host": "evil.example:8470"}

    assert (await served.post("/mcp", TOKENS["viewer"], json=body, headers=headers)).status_code == 200


async def test_odd_requests_end_at_once_and_leave_nothing(served: Site):
    """No stream stays open, no session is kept, and no task of a request outlives it."""
    token = TOKENS["viewer"]
    batch = [{"jsonrpc": "2.0", "id": n, "method": "tools/list"} for n in range(100)]
    modern = JSON | {"mcp-protocol-version": "2026-07-28", "mcp-method": "subscriptions/listen"}
    listen = {"jsonrpc": "2.0", "id": 1, "method": "subscriptions/listen", "params": {}}
    async with asyncio.timeout(60):
        before = len(asyncio.all_tasks())
        assert (await served.get("/mcp", token)).status_code == 405
        assert (await served.post("/mcp", token, content=b"[" * 50_000, headers=JSON)).status_code == 400
        content = JSON | {"content-type": "application/json"}
        assert (await served.post("/mcp", token, content=b"[" * 50_000, headers=content)).status_code == 400
        assert (await served.post("/mcp", token, content=b" " * 300_000, headers=content)).status_code == 413
        assert (await served.post("/mcp", token, json=batch, headers=JSON)).status_code == 400
        assert (await served.post("/mcp", token, json=listen, headers=modern)).status_code >= 400
        assert (await send(served, token, "no/such")).json()["error"]
        for number in range(30):
            answer = await send(served, token, "initialize", **initialize(number))
            assert answer.status_code == 200 and "mcp-session-id" not in answer.headers
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) <= before


def initialize(number: int) -> dict[str, Any]:
    who = {"name": f"client {number}", "version": "1"}
    return {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": who}


async def test_an_unexpected_error_says_nothing(served: Site, monkeypatch: pytest.MonkeyPatch):
    async def fails(*_: Any) -> Any:
        raise RuntimeError("a text with s3cret in it")

    monkeypatch.setattr("worker.features.console.api.server.Api.answer", fails)

    is_error, [text] = await call(served, TOKENS["viewer"], "list_runs")

    assert is_error and "s3cret" not in text
    assert data_of(text)["error"]["code"] == "unexpected"


async def test_calls_are_counted_as_those_of_the_api(served: Site):
    limits = served.limits
    served.limits = type(limits)(served.clock, logins_per_minute=10, calls_per_second=3)

    statuses = [(await send(served, TOKENS["viewer"])).status_code for _ in range(4)]
    beside = (await served.get(f"{API}/runs", TOKENS["viewer"])).status_code

    assert (statuses, beside) == ([200, 200, 200, 429], 429)


async def test_without_the_setting_there_is_no_such_address(site: Site):
    site.operators = [Operator("v", "viewer", OPERATORS[1].token_sha256)]

    assert (await send(site, TOKENS["viewer"])).status_code == 404


def test_without_the_extra_the_process_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "worker.features.console.mcp.server", raising=False)
    monkeypatch.setitem(sys.modules, "mcp_types", None)
    settings = Settings.model_validate({"web": {"mcp": True}})

    with pytest.raises(ConfigurationError, match="needs the extra mcp") as refused:
        ConsolePages(settings, SystemClock(), Health(Metrics(version="1.0"))).check()
    assert "install that extra" in refused.value.fix
    ConsolePages(Settings(), SystemClock(), Health(Metrics(version="1.0"))).check()
