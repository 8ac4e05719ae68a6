"""The web application over a real database, with two orgs, their tokens and operators."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.conftest import Filled
from tests.fakes.clock import ManualClock
from tests.fakes.issuer import App, FakeIssuer, kinde_issuer
from tests.fakes.limits import no_limits
from tests.fakes.site import definition, org_entry
from worker.features.console.access import Access, Operator, StoredOperators
from worker.features.console.callers import OpenRing, Role, no_ring
from worker.features.console.login import Login
from worker.features.console.server import build
from worker.guard import Guard
from worker.handlers.catalogue import HandlerEntry
from worker.ids import ALL_ORGS
from worker.kit.web.clients import Addresses
from worker.kit.web.health import Health
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.credentials import add_credential
from worker.operations.runs import run_now
from worker.store import catalogue, orgs
from worker.store.database import Database
from worker.store.lists import AUDIT, Page
from worker.store.lists.read import read
from worker.store.orgs import OrgCaller
from worker.telemetry.metrics import Metrics

on_either = pytest.mark.parametrize("database", ["sqlite", "postgresql"], indirect=True)
BASE = "http://127.0.0.1:8470"
# The headers of a form that a page of ours sent.
OURS = {"origin": BASE}
TOKENS: dict[Role, str] = {
    role: f"token-of-the-{role}" for role in ("starter", "viewer", "operator", "admin")
}
OPERATORS = [
    Operator(role, role, hashlib.sha256(token.encode()).hexdigest()) for role, token in TOKENS.items()
]
DEFINITIONS = "".join(
    org_entry(code, name=f"<b>{code}</b>", issuer=issuer)
    + definition(code, "digest", handler, "0 3 * * *", overlap="allow")
    for code, issuer, handler in (
        ("org_a", "main", "acme.digest"),
        ("org_b", "main", "acme.other"),
        ("org_c", "elsewhere", "acme.other"),
    )
)
TEMPLATE = """
[[template]]
name = "export"
orgs = { issuer = "nobody" }
handler = "acme.digest"
schedule = "@hourly"
"""


class Site:
    """Asks the application as somebody, from some address."""

    def __init__(self, database: Database, clock: ManualClock) -> None:
        self.database = database
        self.clock = clock
        self.issuer = FakeIssuer(clock)
        self.apps = {
            code: App(code, f"m2m-{code}", "s3cret") for code in ("org_a", "org_b", "org_c", "org_z")
        }
        self.operators: list[Operator] = []
        self.org_role: Role = "operator"
        self.org_scope = ""
        self.public_url = ""
        self.installation = ""
        # Without it there is no /mcp.
        self.mcp_hosts: list[str] | None = None
        self.trusted_proxies: tuple[str, ...] = ()
        self.limits = no_limits(clock)
        self.login: Login | None = None
        self.login_basis = ""
        self.portal: tuple[str, ...] = ("run", "pause", "retry")
        self.top_orgs = 0
        self.org_usage = False
        self.guard = Guard(kinde_issuer(), client=self.issuer.client(), clock=clock)
        # As `serve`: without a key ring.
        self.open_ring: OpenRing = no_ring
        self._built: tuple[dict[str, Any], Any] | None = None

    def token(self, code: str, **claims: Any) -> str:
        return self.issuer.token(self.apps[code], **claims)

    def client(
        self, token: str | None = None, *, address: str = "127.0.0.1", base: str = BASE
    ) -> httpx.AsyncClient:
        """Asks as whoever has this token, in a process of its own."""
        return asking(self._build(), token, address, base)

    def _app(self) -> Any:
        """The application for `get` and `post`, built again only for other settings: that takes 5 ms."""
        settings = {key: value for key, value in vars(self).items() if key not in ("apps", "_built")}
        settings["operators"] = list(self.operators)
        if self._built is None or self._built[0] != settings:
            self._built = (settings, self._build())
        return self._built[1]

    def _build(self) -> Any:
        async def find_caller(code: str, client_id: str) -> OrgCaller | None:
            return await self.database.call_autocommit(orgs.find_caller, code, client_id)

        access = Access(
            self.operators,
            {"main": self.guard},
            find_caller,
            org_role=self.org_role,
            org_scope=self.org_scope,
            addresses=Addresses(self.trusted_proxies),
            limits=self.limits,
            stored=StoredOperators(self.database, self.clock),
            login_basis=self.login_basis,
            portal=self.portal,
        )
        health = Health(Metrics(version="1.0", top_orgs=self.top_orgs))
        return build(
            health,
            self.database,
            access,
            self.clock,
            public_url=self.public_url,
            login=self.login,
            open_ring=self.open_ring,
            installation=self.installation,
            mcp_hosts=self.mcp_hosts,
            org_usage=self.org_usage,
        )

    def last_change(self) -> tuple[str, str, Any]:
        with self.database.autocommit() as connection:
            [row] = read(connection, AUDIT, ALL_ORGS, Page(limit=1))
        return row["actor"], row["action"], row["detail"]

    async def get(
        self, path: str, token: str | None = None, *, address: str = "127.0.0.1", base: str = BASE
    ) -> httpx.Response:
        async with asking(self._app(), token, address, base) as client:
            return await client.get(path)

    async def post(self, path: str, token: str | None = None, **request: Any) -> httpx.Response:
        async with asking(self._app(), token) as client:
            return await client.post(path, **request)


def asking(app: Any, token: str | None, address: str = "127.0.0.1", base: str = BASE) -> httpx.AsyncClient:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    transport = httpx.ASGITransport(app, client=(address, 40000), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url=base, headers=headers)


def csrf_of(page: httpx.Response) -> str:
    """The CSRF token of the first form of a page."""
    found = re.search(r'name="csrf" value="([^"]+)"', page.text)
    assert found is not None
    return found[1]


async def log_in(client: httpx.AsyncClient, token: str, **headers: str) -> httpx.Response:
    """Send the login form as a browser does; `headers` in place of its own."""
    page = await client.get("/")
    form = {"token": token, "csrf": csrf_of(page)}
    return await client.post("/login", data=form, headers=headers or {"origin": str(client.base_url)})


@asynccontextmanager
async def logged_in(site: Site, token: str) -> AsyncIterator[httpx.AsyncClient]:
    async with site.client() as client:
        answer = await log_in(client, token)
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        yield client


def make_run(site: Site, org: str = "org_a") -> str:
    """A new run of the org's definition, which waits."""
    return str(run_now(site.database, org, "digest", actor="tester")["id"])


def fill(url: str) -> None:
    opened = Database.open(url, clock=ManualClock())
    names = ("acme.digest", "acme.other")
    entries = [HandlerEntry(name, "acme-jobs", "1.0", "acme_jobs:x") for name in names]
    with opened.transaction() as connection:
        catalogue.put(connection, entries, at=opened.now(connection))
    apply(opened, parse_file(DEFINITIONS + TEMPLATE), actor="tester")
    for code in ("org_a", "org_b", "org_c"):
        client_id = f"m2m-{code}"
        add_credential(opened, None, code, client_id=client_id, actor="tester", reference="absent-secret")
    opened.close()


FILLED = Filled("web", fill)


@pytest.fixture
def database(request: pytest.FixtureRequest, clock: ManualClock) -> Iterator[Database]:
    """On SQLite, but where a test asks for either."""
    with FILLED.url(getattr(request, "param", "sqlite"), request) as url:
        opened = Database.open(url, clock=clock)
        yield opened
        opened.close()


@pytest.fixture
async def site(database: Database, clock: ManualClock) -> AsyncIterator[Site]:
    made = Site(database, clock)
    yield made
    await made.guard.close()


@pytest.fixture
def staffed(site: Site) -> Site:
    """The same with operators."""
    site.operators = OPERATORS
    return site
