"""A new secret in an old one's place: verified first, added once, the old one retired when nobody uses it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.clock import ManualClock
from tests.fakes.issuer import App, FakeIssuer
from tests.fakes.provisioned import opened_checks
from worker.diagnosis.check_orgs import Checks
from worker.errors import Busy, ConfigurationError, Conflict, CredentialsRejected, IssuerUnavailable
from worker.ids import OrgId
from worker.operations.credentials import Rotation, add_credential, retire_credential
from worker.operations.installation import Ownership
from worker.operations.keys import rekey
from worker.operations.orgs import import_orgs
from worker.store import tables
from worker.tokens.sealing import KeyRing
from worker.wiring.secrets import OpenedCredentials


class Passing(ManualClock):
    """A clock on which every sleep is over at once, and has taken its time; `meanwhile` happens then."""

    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        self.meanwhile()
        await asyncio.sleep(0)


@dataclass
class Place:
    """An org with one secret, its issuer, and a way to rotate."""

    database: Any
    ring: Any
    issuer: FakeIssuer
    checks: Checks
    clock: Passing
    said: list[str] = field(default_factory=list)

    async def rotate(
        self, secret: str, client_id: str = "client-2", **spans: timedelta
    ) -> list[dict[str, Any]]:
        rotation = Rotation(
            Ownership(self.database, ""),
            self.ring,
            self.checks,
            "org_a",
            actor="ops",
            clock=self.clock,
            report=self.said.append,
        )
        return await rotation.run(client_id, secret, **spans)


@pytest.fixture
def clock() -> Passing:
    return Passing()


@pytest.fixture
async def place(database: Any, keyring: Any, clock: Passing, tmp_path: Path) -> AsyncIterator[Place]:
    line = {
        "code": "org_a",
        "name": "A",
        "issuer": "main",
        "client_id": "client-1",
        "client_secret": "secret-1",
    }
    import_orgs(database, keyring, [json.dumps(line)], actor="ops")
    async with opened_checks(database, keyring, clock) as (issuer, checks):
        issuer.add(App("org_a", "client-1", "secret-1"))
        yield Place(database, keyring, issuer, checks, clock)


async def test_a_rotation_verifies_adds_waits_and_retires(place: Place, rows: Any) -> None:
    place.issuer.add(App("org_a", "client-2", "secret-2"))
    began = place.clock.monotonic()

    after = await place.rotate("secret-2")

    assert [(row["generation"], row["state"]) for row in after] == [(2, "active"), (1, "retired")]
    assert 15 <= place.clock.monotonic() - began < 20
    assert [step.split()[0] for step in place.said] == ["the", "added", "waiting", "generation"]


async def test_a_secret_that_the_issuer_rejects_changes_nothing(place: Place, rows: Any) -> None:
    before = rows.everything()

    with pytest.raises(CredentialsRejected, match="rejects the credentials"):
        await place.rotate("wrong")

    assert rows.everything() == before


async def test_an_application_of_another_org_changes_nothing(place: Place, rows: Any) -> None:
    place.issuer.add(App("org_b", "client-2", "secret-2"))

    with pytest.raises(CredentialsRejected, match="org_b"):
        await place.rotate("secret-2")

    assert len(rows.credentials) == 1


async def test_an_issuer_that_is_away_changes_nothing(place: Place, rows: Any) -> None:
    place.issuer.answer = lambda form: httpx.Response(503)

    with pytest.raises(IssuerUnavailable):
        await place.rotate("secret-2")

    assert len(rows.credentials) == 1


@on_either
async def test_while_the_old_secret_is_used_it_is_not_retired_and_the_command_goes_on_later(
    place: Place, rows: Any
) -> None:
    place.issuer.add(App("org_a", "client-2", "secret-2"))

    place.clock.meanwhile = lambda: use(place, 1)
    with pytest.raises(Busy, match="none was retired"):
        await place.rotate("secret-2", timeout=timedelta(seconds=60))
    assert [row["state"] for row in rows.credentials] == ["active", "active"]

    place.clock.meanwhile = lambda: None
    after = await place.rotate("secret-2")

    assert [(row["generation"], row["state"]) for row in after] == [(2, "active"), (1, "retired")]
    assert "it is generation 2 already" in place.said


async def test_a_secret_that_is_a_file_is_read_again_when_it_changes(
    place: Place, rows: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "acme").write_text("first\n")
    add_credential(place.database, None, "org_a", client_id="c", reference="file:acme", actor="ops")
    source = OpenedCredentials(place.database, place.ring, str(folder), place.clock)
    org_id = OrgId(rows.orgs[0]["id"])
    assert [found.secret.reveal() for found in await source.active(org_id)] == ["first", "secret-1"]

    (folder / "acme").write_text("second\n")

    assert [found.secret.reveal() for found in await source.active(org_id)] == ["second", "secret-1"]
    (folder / "acme").unlink()
    assert [found.secret.reveal() for found in await source.active(org_id)] == ["secret-1"]


async def test_a_worker_that_is_up_opens_what_a_new_key_seals(place: Place, rows: Any) -> None:
    source = OpenedCredentials(place.database, place.ring, "", place.clock)

    rekey(place.database, place.ring, actor="ops")

    assert [found.secret.reveal() for found in await source.active(OrgId(rows.orgs[0]["id"]))] == ["secret-1"]


async def test_of_generations_that_do_not_open_the_others_serve(
    place: Place, rows: Any, emitted: list[Any], tmp_path: Path
) -> None:
    lost = KeyRing.generate(tmp_path / "lost")
    add_credential(place.database, lost, "org_a", client_id="c", secret="secret-2", actor="ops")
    source = OpenedCredentials(place.database, place.ring, "", place.clock)
    org_id = OrgId(rows.orgs[0]["id"])

    for _ in range(3):
        assert [found.generation for found in await source.active(org_id)] == [1]
    assert [event.event.name for event in emitted] == ["credential.unusable"]

    retire_credential(place.database, "org_a", 1, actor="ops")
    with pytest.raises(ConfigurationError, match="not in"):
        await source.active(org_id)


@on_either
async def test_what_leaked_is_destroyed_also_when_it_was_retired_before(place: Place, rows: Any) -> None:
    retire_credential(place.database, "org_a", 1, actor="ops")
    assert rows.credentials[0]["sealed"] is not None

    retire_credential(place.database, "org_a", 1, actor="ops", now=True)

    assert (rows.credentials[0]["sealed"], rows.credentials[0]["key_id"]) == (None, None)
    with pytest.raises(Conflict):
        retire_credential(place.database, "org_a", 1, actor="ops", now=True)


def use(place: Place, generation: int) -> None:
    """As if a worker had asked for a token with this generation."""
    credentials = tables.credentials
    with place.database.transaction() as connection:
        connection.execute(
            update(credentials)
            .where(credentials.c.generation == generation)
            .values(uses=credentials.c.uses + 1, last_used_at=place.clock.now())
        )
