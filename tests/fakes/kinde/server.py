"""A Kinde environment on a loopback port: token endpoint, keys, management API, faults, and a record."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.fakes.kinde.document import Exchange, document
from tests.fakes.kinde.faults import Faulty, Script
from worker.clock import Clock
from worker.demo.management import ManagementApi, Organization
from worker.demo.provider import Application, Provider
from worker.demo.serving import ServerThread, bind_loopback, url_of
from worker.settings import IssuerSettings, Settings
from worker.settings.sections import ManagementSettings

MANAGER = "management-client"


class Recorded:
    """An application whose exchanges below /api/ are recorded: the newest 20,000."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.exchanges: deque[Exchange] = deque(maxlen=20_000)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/api/"):
            await self.app(scope, receive, send)
            return
        asked, told, status = bytearray(), bytearray(), 0

        async def receive_and_keep() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def send_and_keep(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            told.extend(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                # Before the client has it: a test may go on as soon as it does.
                query = scope["query_string"].decode()
                path = scope.get("raw_path", b"").decode() or scope["path"]
                self.exchanges.append(
                    Exchange(scope["method"], path, query, bytes(asked), status, bytes(told))
                )
            await send(message)

        await self.app(scope, receive_and_keep, send_and_keep)


@dataclass
class Kinde:
    """The environment. `faults` strike before the record, so that all that is recorded was carried out."""

    provider: Provider
    recorded: Recorded
    faulty: Faulty
    thread: ServerThread
    secret: str

    @property
    def url(self) -> str:
        return self.provider.url

    @property
    def api(self) -> ManagementApi:
        return self.provider.management

    @property
    def script(self) -> Script:
        return self.faulty.script

    @script.setter
    def script(self, script: Script) -> None:
        self.faulty.script = script

    def add_orgs(self, count: int, *, name: str = "org") -> list[Organization]:
        return [self.api.add_org(f"{name}_{n}", f"Org {n}") for n in range(1, count + 1)]

    def applications_of(self, org: str) -> list[Application]:
        return [app for app in self.provider.applications.values() if app.org_code == org]

    def token_requests(self) -> int:
        """All requests to the token endpoint, those for management tokens included."""
        return self.provider.requests["token"]

    def carried_out(self) -> int:
        """All management requests with a success."""
        return self.api.carried_out.total()

    def undocumented(self) -> list[str]:
        """What of the recorded exchanges Kinde's document does not allow; 401 is in its guides only."""
        return [
            fault
            for exchange in list(self.recorded.exchanges)
            if exchange.status != 401
            for fault in document().faults(exchange)
        ]

    def issuer_settings(self, **changes: object) -> IssuerSettings:
        """The issuer as worker.toml configures it; the secret is to be written by `write_secret`."""
        values: dict[str, object] = {
            "url": self.url,
            "max_requests_per_second": 10_000,
            "management": ManagementSettings(client_id=MANAGER),
        }
        return IssuerSettings(**values | changes)

    def settings(self, secrets_dir: object, **changes: object) -> Settings:
        return Settings(secrets_dir=str(secrets_dir), issuers={"main": self.issuer_settings(**changes)})

    def reset(self) -> None:
        """Forget all but the address, the keys and the management application."""
        self.provider.applications.clear()
        self.provider.add(
            Application(
                *("", MANAGER, self.secret),
                self.provider.management.scopes(),
                (f"{self.url}/api",),
                name="orgworker",
            )
        )
        self.provider.requests.clear()
        self.provider.token_requests.clear()
        provider = self.provider
        provider.management = ManagementApi(self.url, provider.keys, provider.applications, provider._clock)
        self.recorded.app = self.provider.asgi()
        self.recorded.exchanges.clear()
        self.script = Script()

    def __enter__(self) -> Kinde:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.stop()


def serve_kinde(*, clock: Clock | None = None, port: int = 0) -> Kinde:
    """An environment without orgs, whose management application has the scopes that orgworker names."""
    listener = bind_loopback(port)
    provider = Provider(url_of(listener), clock=clock)
    recorded = Recorded(provider.asgi())
    faulty = Faulty(recorded, Script())
    made = Kinde(provider, recorded, faulty, ServerThread(faulty, listener), secrets.token_urlsafe(32))
    made.reset()
    return made
