"""Stored tokens that were changed, brought back or lost their key: each org uses a token of its own."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.fakes.site import Site, application, definition, wait_until
from worker.demo.provider import Provider
from worker.demo.serving import ServerThread, bind_loopback

LEASE = 'lease = "4s"\nrenew = "500ms"'


class Api:
    """The API of all orgs, which remembers the tokens that runs of each org sent."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[str]] = {}
        app = Starlette(routes=[Route("/{org}", self._answer)])
        self.server = ServerThread(app, bind_loopback()).start()

    async def _answer(self, request: Request) -> Response:
        token = request.headers["authorization"].removeprefix("Bearer ")
        self.tokens.setdefault(request.path_params["org"], []).append(token)
        return JSONResponse({})

    def of(self, org: str) -> list[str]:
        """The tokens of an org's runs, oldest first; each names that org."""
        tokens = self.tokens.get(org, [])
        assert {claims_of(token)["org_code"] for token in tokens} <= {org}
        return tokens


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return claims


@pytest.fixture
def api() -> Iterator[Api]:
    made = Api()
    yield made
    made.server.stop()


@pytest.fixture
def requests(provider: Provider) -> Callable[[], int]:
    """The number of token requests since the last call."""
    counted = 0

    def count() -> int:
        nonlocal counted
        before, counted = counted, provider.requests["token"]
        return counted - before

    count()
    return count


def install(site: Site, api: Api, *orgs: str, extra: str = "") -> None:
    site.configure(execution=LEASE, issuer=f'api_origins = ["{api.server.url}"]', extra=extra)
    site.add_orgs(*(application(org) for org in orgs))
    params = {org: {"urls": [f"{api.server.url}/{org}"]} for org in orgs}
    site.apply("".join(definition(org, "fetch", "acme.fetch", params=params[org]) for org in orgs))


def run_once(site: Site, *orgs: str) -> None:
    """Start a worker, let each org's handler send its token, and stop the worker."""
    for org in orgs:
        site.cli("definitions", "run", org, "fetch")
    worker = site.start_worker()
    for org in orgs:
        wait_until(lambda org=org: site.runs(org)[-1]["state"] == "succeeded", f"the run of {org}")
    site.stop_worker(worker)


def rows_of(site: Site) -> dict[str, dict[str, Any]]:
    """The stored tokens by org."""
    query = "SELECT orgs.code, t.* FROM access_tokens AS t JOIN orgs ON orgs.id = t.org_id"
    return {row.pop("code"): row for row in site.query(query)}


def overwrite(site: Site, id: str, row: dict[str, Any], *columns: str) -> None:
    """Write these columns of a row of `access_tokens` into the one with this id."""
    names = columns or tuple(row)
    changes = ", ".join(f"{name} = ?" for name in names)
    query = f"UPDATE access_tokens SET {changes} WHERE id = ? RETURNING id"
    assert len(site.query(query, *(row[name] for name in names), id)) == 1


def add_generation(site: Site, provider: Provider, org: str) -> None:
    """Give an org a second application, and a credential of it."""
    second = application(org, client_id=f"m2m-{org}-2", client_secret=f"second-secret-of-{org}")
    provider.add(second)
    arguments = ("--client-id", second.client_id, "--secret-file", "-")
    site.cli("credentials", "add", org, "--no-verify", *arguments, stdin=second.client_secret)


def unopened(site: Site) -> dict[str, str]:
    """The last reason by org why a stored token was not used."""
    lines = [json.loads(line) for line in site.log_text().splitlines() if line.startswith("{")]
    return {line["org"]: line["error"] for line in lines if line["event"] == "token.unopened"}


def test_rows_that_were_changed_serve_nobody(
    site: Site, api: Api, provider: Provider, requests: Callable[[], int]
):
    """Swapped between orgs, cut off, and a retired one written back: a new token each, and an event."""
    orgs = ("org_0", "org_1", "org_2", "org_3", "org_4")
    install(site, api, *orgs)
    run_once(site, *orgs)
    before = rows_of(site)
    add_generation(site, provider, "org_3")
    site.cli("credentials", "retire", "org_3", "1", "--now")
    assert "org_3" not in rows_of(site)
    run_once(site, "org_3")
    assert requests() == len(orgs) + 1

    overwrite(site, before["org_0"]["id"], before["org_1"], "sealed", "key_id", "credential_id")
    overwrite(site, before["org_1"]["id"], before["org_0"], "sealed", "key_id")
    overwrite(site, before["org_2"]["id"], {"sealed": bytes(before["org_2"]["sealed"])[:-20]})
    overwrite(site, before["org_3"]["id"], before["org_3"])
    run_once(site, *orgs)

    assert requests() == len(orgs) - 1
    reasons = unopened(site)
    assert {org: "credential" in reason for org, reason in reasons.items()} == {
        "org_0": True,
        "org_1": False,
        "org_2": False,
        "org_3": True,
    }
    for org in orgs:
        assert (len(set(api.of(org))) == 1) == (org == "org_4")
    clients = [claims_of(token)["azp"] for token in api.of("org_3")]
    assert clients == ["m2m-org_3", "m2m-org_3-2", "m2m-org_3-2"]
    # The control: what was not changed, and what is there by now, is used.
    run_once(site, *orgs)
    assert requests() == 0


def test_a_restart_requests_new_tokens_only_if_they_are_not_shared(
    site: Site, api: Api, requests: Callable[[], int]
):
    """Then nothing is stored; that others are used again is shown above."""
    install(site, api, "org_0", extra="[tokens]\nshared = false")
    for _ in range(2):
        run_once(site, "org_0")

    assert requests() == len(set(api.of("org_0"))) == 2
    assert rows_of(site) == {}


def test_tokens_of_a_lost_key_ring_are_replaced(site: Site, api: Api, requests: Callable[[], int]):
    """The secrets are lost with it, which the worker says at its start; tokens never prevent one."""
    install(site, api, "org_0", "org_1")
    run_once(site, "org_0", "org_1")
    (site.folder / "keyring").unlink()
    refused = site.process("run", check=False)
    assert refused.code == 78
    assert "sealed secrets" in refused.err

    site.cli("keys", "generate", "--anew")
    for org in ("org_0", "org_1"):
        app = application(org)
        arguments = ("--client-id", app.client_id, "--secret-file", "-")
        site.cli("credentials", "add", org, "--no-verify", *arguments, stdin=app.client_secret)
    requests()
    run_once(site, "org_0", "org_1")

    assert requests() == 2
    assert set(unopened(site)) == {"org_0", "org_1"}
    assert all(len(set(api.of(org))) == 2 for org in ("org_0", "org_1"))


@contextlib.contextmanager
def backup(site: Site) -> Iterator[Callable[[], None]]:
    """A backup of the database as it is now; a call puts it in its place."""
    file, copy = Path(site.database_url.removeprefix("sqlite:///")), site.folder / "backup.db"
    with (
        contextlib.closing(sqlite3.connect(file)) as one,
        contextlib.closing(sqlite3.connect(copy)) as two,
    ):
        one.backup(two)

    def restore() -> None:
        site.disconnect()
        for part in file.parent.glob(f"{file.name}*"):
            part.unlink()
        copy.rename(file)

    yield restore


@pytest.mark.parametrize("as_documented", [True, False])
def test_a_restored_backup_brings_no_retired_token_back(
    site: Site, api: Api, provider: Provider, as_documented: bool
):
    """With `tokens drop --all` before the first worker; without it, as the control shows, it does."""
    install(site, api, "org_0")
    run_once(site, "org_0")
    [retired] = api.of("org_0")
    with backup(site) as restore:
        add_generation(site, provider, "org_0")
        site.cli("credentials", "retire", "org_0", "1", "--now")
        provider.add(replace(provider.applications["m2m-org_0"], enabled=False))
        run_once(site, "org_0")
        assert api.of("org_0")[1] != retired

        restore()

    seen = len(api.of("org_0"))
    if not as_documented:
        run_once(site, "org_0")
        assert api.of("org_0")[seen:] == [retired]
        return
    assert site.cli("tokens", "drop", "--all", "-o", "json").json()["dropped"] == 1
    site.cli("definitions", "run", "org_0", "fetch")
    worker = site.start_worker()
    wait_until(lambda: site.runs("org_0")[-1]["reason"] == "no_token", "the retired secret to be rejected")
    add_generation(site, provider, "org_0")
    wait_until(lambda: site.runs("org_0")[-1]["state"] == "succeeded", "the run with the new secret")
    site.stop_worker(worker)
    [token] = api.of("org_0")[seen:]
    assert token != retired
    assert claims_of(token)["azp"] == "m2m-org_0-2"
