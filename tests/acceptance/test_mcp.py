"""/mcp of a real process, asked by the official clients of both generations of the protocol."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest
from mcp import ClientSession
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client

from tests.acceptance.test_serve import Process, ended, serving, status
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until
from tests.integration.console.conftest import csrf_of
from tests.unit.console.test_quoting import data_of


@asynccontextmanager
async def connected(url: str, token: str, kind: str) -> AsyncIterator[Any]:
    """A client after it has begun: `Client` agrees on a version, `ClientSession` sends `initialize`."""
    headers = {"authorization": f"Bearer {token}"}
    async with httpx2.AsyncClient(headers=headers, timeout=60) as http:
        transport = streamable_http_client(url, http_client=http)
        if kind == "Client":
            async with Client(transport) as client:
                yield client
            return
        async with transport as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            yield session


async def press(url: str, path: str, token: str) -> int:
    """Log in as a person with a browser, and confirm a plan."""
    async with httpx.AsyncClient(base_url=url, headers={"origin": url}, timeout=60) as browser:
        login = {"token": token, "csrf": csrf_of(await browser.get("/"))}
        assert (await browser.post("/login", data=login)).status_code == 303
        page = await browser.get(path)
        return (await browser.post(path, data={"csrf": csrf_of(page)})).status_code


async def ask(url: str, token: str, kind: str, calls: Mapping[str, Mapping[str, Any]]) -> str:
    """Call each tool once, and return the path of a plan to retry the run again."""
    async with connected(f"{url}/mcp", token, kind) as client:
        listed = {tool.name for tool in (await client.list_tools()).tools}
        assert listed == {*calls, "plan_answer_run"}
        for name, arguments in calls.items():
            result = await client.call_tool(name, dict(arguments))
            texts = [content.text for content in result.content]
            assert not result.is_error, texts
            data_of(texts[-1])
        plan = await client.call_tool("plan_retry_run", dict(calls["plan_retry_run"]))
    found = re.search(rf"{url}(/plans/\S+)", plan.content[0].text)
    assert found is not None
    return found[1]


async def end(process: Process, url: str, token: str) -> None:
    """A client that is connected does not hold the process."""
    async with connected(f"{url}/mcp", token, "ClientSession") as client:
        await client.list_tools()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0


@pytest.mark.timeout(600)
def test_official_clients_ask_and_plan_and_a_person_confirms(site_on_either: Site):
    site, port = site_on_either, free_port()
    url = f"http://127.0.0.1:{port}"
    site.configure(web=f'listen = "127.0.0.1:{port}"\nmcp = true')
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "note", "acme.note", overlap="allow"))
    token = site.cli("operators", "add", "ada", "--role", "operator", "-o", "id").out.strip()
    client_token = site.cli("operators", "mcp-token", "ada", "-o", "id").out.strip()
    run = site.cli("definitions", "run", "org_acme", "note", "-o", "id").out.strip()
    site.cli("runs", "cancel", run)
    named = {"org": "org_acme", "name": "note"}
    calls = {
        "show_overview": {},
        **{f"list_{noun}": {"org": "org_acme"} for noun in ("runs", "definitions", "orgs", "usage")},
        **{name: {"run": run} for name in ("show_run", "explain_run", "list_attempts", "list_logs")},
        **{name: named for name in ("show_definition", "preview_definition")},
        "plan_retry_run": {"run": run, "again": True},
        "plan_pause_definition": named,
    }
    with ended(serving(site)) as process:
        wait_until(lambda: status(port, "/readyz") == 200, "readiness", timeout=240)
        for number, kind in enumerate(("ClientSession", "Client"), 1):
            path = asyncio.run(ask(url, client_token, kind, calls))
            assert len(site.runs()) == number
            assert asyncio.run(press(url, path, token)) == 303
            assert len(site.runs()) == 1 + number
        asyncio.run(end(process, url, client_token))
