"""No management secret, client secret or token is written, however the provider repeats them in failures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import select
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tenacity import wait_none

from tests.conftest import copied
from tests.fakes.cli import CommandLine
from tests.fakes.kinde.server import MANAGER, Kinde, serve_kinde
from tests.integration.app.conftest import AUDIENCE, TEMPLATE
from worker.clock import SystemClock
from worker.settings import load
from worker.store import tables
from worker.store.database import Database

pytestmark = pytest.mark.feature("provisioning")

Retold = Callable[[dict[str, Any], str], tuple[int, bytes]]


def answer(body: object, status: int = 400) -> tuple[int, bytes]:
    return status, json.dumps(body).encode()


# Responses that repeat the request's token, and what the genuine response had, where no secret belongs.
TALKATIVE: list[tuple[str, str, Retold]] = [
    (
        "POST",
        "/api/v1/applications",
        lambda body, told: answer({"errors": [{"code": told, "message": told}]}),
    ),
    ("POST", "/api/v1/applications", lambda body, told: (502, told.encode())),
    ("POST", "/api/v1/applications", lambda body, told: (201, told.encode()[:-9])),
    ("POST", "/api/v1/applications", lambda body, told: answer({"application": {"id": [told]}}, 201)),
    ("POST", "/api/v1/applications", lambda body, told: answer({"application": {"id": told}}, 201)),
    ("GET", "/api/v1/applications/", lambda body, told: answer({"application": {told: told}}, 200)),
    (
        "GET",
        "/api/v1/applications/",
        lambda body, told: answer({"application": body["application"] | {"name": told}}, 200),
    ),
    ("PATCH", "/api/v1/apis", lambda body, told: (500, told.encode())),
    ("PATCH", "/api/v1/apis", lambda body, told: answer({"errors": [{"code": "NO", "message": told}]}, 403)),
    ("GET", "/api/v1/apis", lambda body, told: answer({"apis": [{"id": "1", "audience": told}]}, 200)),
    ("POST", "/oauth2/token", lambda body, told: answer({"error": told, "error_description": told}, 401)),
    ("POST", "/oauth2/token", lambda body, told: answer({"access_token": [told]}, 200)),
    ("POST", "/oauth2/token", lambda body, told: (503, told.encode())),
]


@dataclass
class Talkative:
    """Answers with the next retold response whose request comes, after it carried that out."""

    app: ASGIApp
    left: list[tuple[str, str, Retold]] = field(default_factory=list)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fits = (
            each
            for each in self.left
            if scope["type"] == "http" and scope["method"] == each[0] and scope["path"].startswith(each[1])
        )
        if (chosen := next(fits, None)) is None:
            await self.app(scope, receive, send)
            return
        self.left.remove(chosen)
        asked, told = bytearray(), bytearray()

        async def keep_asked() -> Message:
            message = await receive()
            asked.extend(message.get("body", b""))
            return message

        async def keep_told(message: Message) -> None:
            told.extend(message.get("body", b""))

        await self.app(scope, keep_asked, keep_told)
        bearer = dict(scope["headers"]).get(b"authorization", b"").decode()
        text = f"{bearer} {asked.decode()} {told.decode()}"
        status, body = chosen[2](json.loads(told or b"{}"), text)
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def kinde() -> Iterator[Kinde]:
    with serve_kinde() as served:
        served.api.add_api("Acme's API", AUDIENCE, ("read:kb",))
        served.add_orgs(4)
        yield served


@pytest.fixture
def cli(
    tmp_path: Path, migrated_sqlite_file: Path, plugins: Path, kinde: Kinde, monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    folder, made = tmp_path, CommandLine(tmp_path, copied(migrated_sqlite_file, tmp_path))
    before = made.settings.read_text()
    made.settings.write_text(
        before[: before.index("[issuers.main]")]
        + f'[log]\nlevel = "debug"\n[issuers.main]\nurl = "{kinde.url}"\naudience = "{AUDIENCE}"\n'
        f'max_requests_per_second = 1000\n[issuers.main.management]\nclient_id = "{MANAGER}"\n'
    )
    (folder / "management__main").write_text(kinde.secret)
    (folder / "templates.toml").write_text(TEMPLATE)
    made("apply", str(folder / "templates.toml"), "--allow-unknown-handlers")
    monkeypatch.setattr("worker.features.provisioning.provisioning.SETTLES", 0.01)
    monkeypatch.setattr("worker.features.provisioning.application_rights.TRIES", (0.01, 0.01, 0.01))
    monkeypatch.setattr("worker.features.provisioning.management.calls._jitter", wait_none())
    return made


def rows_of_all_tables(cli: CommandLine) -> str:
    settings = load(str(cli.settings), environ={})
    database = Database.open(settings.database.url, clock=SystemClock())
    try:
        with database.autocommit() as connection:
            return "\n".join(
                repr(tuple(row))
                for table in tables.metadata.sorted_tables
                for row in connection.execute(select(table))
            )
    finally:
        database.close()


def forms(secret: str) -> list[str]:
    """The ways in which a secret could be written down; of a token also its signature alone."""
    raw = [secret, secret.rpartition(".")[2]]
    return [*raw, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")[:-1]]


def test_no_secret_is_written_whatever_the_provider_repeats(
    cli: CommandLine, kinde: Kinde, tmp_path: Path
) -> None:
    kinde.provider.issued.clear()
    seen: dict[str, str] = {}
    secrets = {app.client_secret for app in kinde.provider.applications.values()}

    def note(name: str, *arguments: str) -> None:
        done = cli(*arguments, check=False)
        seen[name] = done.out + done.err
        secrets.update(app.client_secret for app in kinde.provider.applications.values())

    talkative = kinde.faulty.app = Talkative(kinde.faulty.app)
    failed = 0
    for number, response in enumerate(TALKATIVE):
        org = kinde.api.add_org(f"org_told_{number}", "Told").code
        times = 1 if response[1] == "/oauth2/token" else 40
        talkative.left = [response] * times
        note(f"sync {number}", "orgs", "sync", "--provision", "--org", org, "-o", "json")
        assert len(talkative.left) < times, f"response {number} was not used: {seen}"
        failed += '"error": null' not in seen[f"sync {number}"]
    talkative.left = []
    # From the others it recovers: it asks again, or looks for what it made.
    assert failed >= 6
    bundle = tmp_path / "bundle.json"
    kinde.api.application_properties.add("plan")
    for command in (
        "orgs sync --provision",
        "orgs sync --provision -o jsonl",
        "orgs sync --orphans -o json",
        "orgs properties org_2 --set plan=pro -o json",
        "orgs check --all -o json",
        "orgs diff org_2 -o json",
        "orgs list -o json",
        "orgs show org_2 -o json",
        "credentials list -o json",
        "audit list -o json --limit 500",
        "config show",
        "check -o json",
        f"doctor --bundle {bundle}",
    ):
        note(command, *command.split())
    seen["bundle"], seen["rows"] = bundle.read_text(), rows_of_all_tables(cli)

    found = {
        name: secret[:6]
        for name, text in seen.items()
        for secret in (*secrets, *kinde.provider.issued)
        if any(form in text for form in forms(secret))
    }
    assert len(secrets) > len(TALKATIVE) / 2 and kinde.secret in secrets and kinde.provider.issued
    assert found == {}
    # The control: what may be told of an application is there.
    clients = [app.client_id for app in kinde.applications_of("org_2")]
    told = ("credentials list -o json", "audit list -o json --limit 500", "rows")
    assert all(client in seen[name] for client in clients for name in told)
