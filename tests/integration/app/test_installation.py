"""A copy of production's database, with a worker.toml of its own, beside production at the same provider."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select
from starlette.types import Receive, Scope, Send

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.kinde.server import Kinde
from tests.integration.app.conftest import AUDIENCE
from worker.demo.provider import Application
from worker.features.provisioning import fleet
from worker.features.provisioning import process as provision_process
from worker.features.provisioning.provisioning import exclusive
from worker.ids import new_id
from worker.operations.installation import Ownership
from worker.settings import load
from worker.store import installation, tables
from worker.store.database import Database
from worker.wiring import open_database

BY_HAND = ("--client-id", "by-hand", "--secret-file", "-", "--quiet", "0s")
# Every command that provisions, rotates or deletes. `--orphans` alone only lists, but of whom is not known.
VERBS: dict[str, tuple[str, ...]] = {
    "sync": ("orgs", "sync"),
    "sync of one org": ("orgs", "sync", "--org", "org_3"),
    "sync that suspends": ("orgs", "sync", "--absent", "suspend", "--yes"),
    "sync that provisions": ("orgs", "sync", "--provision"),
    "orphans": ("orgs", "sync", "--orphans"),
    "deletion": ("orgs", "sync", "--orphans", "--delete"),
    "rotation": ("credentials", "rotate", "--older-than", "0s", "--limit", "1"),
    "rotation by hand": ("credentials", "rotate", "org_1", *BY_HAND),
    "properties": ("orgs", "properties", "org_1", "--set", "plan=pro"),
    "provision": ("provision",),
}
READS = (
    ("orgs", "list"),
    ("orgs", "sync", "--dry-run"),
    ("orgs", "properties", "org_1"),
    ("credentials", "rotate", "--older-than", "0s", "--dry-run"),
    ("credentials", "verify", "org_1"),
    ("installation", "show"),
    ("db", "upgrade"),
)


class Place:
    """A command line whose worker.toml names an installation, and the provider."""

    def __init__(self, cli: CommandLine, kinde: Kinde) -> None:
        self.cli = cli
        self.kinde = kinde
        self.applications: list[Application] = []

    def name(self, word: str) -> None:
        """Let worker.toml name this installation; "": none."""
        text = re.sub(r"^installation = .*\n", "", self.cli.settings.read_text())
        self.cli.settings.write_text((f'installation = "{word}"\n' if word else "") + text)

    def __call__(self, *arguments: str, **options: Any) -> Any:
        return self.cli(*arguments, **options)

    def json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self.cli(*arguments, "-o", "json", **options).out)

    def open(self) -> closing[Database]:
        return closing(open_database(load(str(self.cli.settings))))

    def stored(self) -> dict[str, list[Any]]:
        names = ("orgs", "applications", "credentials", "audit", "facts")
        with self.open() as database, database.autocommit() as connection:
            return {
                name: sorted(connection.execute(select(tables.metadata.tables[name])).all(), key=str)
                for name in names
            }

    def changes(self) -> list[str]:
        """What was sent to the provider that changes something."""
        return [each.method for each in self.kinde.recorded.exchanges if each.method != "GET"]

    def add_of_production(self, org: str) -> Application:
        """An application that production made after the database was copied: the copy has no row of it."""
        key = self.json("installation", "show")["key"]
        made = self.kinde.provider.management.make_application(f"orgworker {key} {new_id()} {org}", org)
        self.applications.append(made)
        return made

    def secret(self) -> str:
        """That of an application which a person made."""
        made = self.kinde.provider.management.make_application("by hand", "org_1")
        made.client_id, old = "by-hand", made.client_id
        self.kinde.provider.applications["by-hand"] = self.kinde.provider.applications.pop(old)
        made.audiences = (AUDIENCE,)
        return made.client_secret

    def there(self) -> set[str]:
        return set(self.kinde.provider.applications)


@pytest.fixture
def production(kinde_cli: CommandLine, kinde: Kinde, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Two orgs with applications; the provider has a third org."""
    monkeypatch.setattr(fleet, "DROPPED", timedelta())
    kinde.api.application_properties.add("plan")
    kinde.add_orgs(2)
    with kinde_cli.settings.open("a") as settings:
        settings.write('[provisioning]\noverlap = "0s"\n')
    place = Place(kinde_cli, kinde)
    place.name("production")
    place("db", "upgrade")
    place("orgs", "sync", "--provision")
    kinde.api.add_org("org_3", "Org 3")
    return place


@pytest.fixture
def copy(production: Place) -> Place:
    """The same database with the worker.toml of staging."""
    production.name("staging")
    return production


@pytest.fixture
def off(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Turns the check off, for controls."""
    return lambda: monkeypatch.setattr(Ownership, "check", lambda self, connection: None)


def test_a_copy_cannot_delete_what_production_made_since(copy: Place, off: Any) -> None:
    application = copy.add_of_production("org_1")

    refused = copy("orgs", "sync", "--orphans", "--delete", "-o", "json", check=False)

    assert refused.code == 78
    error = json.loads(refused.err)["error"]
    assert error["code"] == "installation_mismatch"
    assert '"staging"' in error["message"] and '"production"' in error["message"]
    assert "adopt --same" in error["fix"] and "adopt --new" in error["fix"]
    assert application.client_id in copy.there()
    # The control: without the check the copy deletes it, since the key is the same.
    off()
    (row,) = copy.json("orgs", "sync", "--orphans", "--delete")
    assert row["deleted"] and application.client_id not in copy.there()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `provision` would run in the foreground."""
    made: list[str] = []

    async def start(*_: object) -> None:
        made.append("provision")

    monkeypatch.setattr(provision_process, "_provision", start)
    return made


def test_what_provisions_rotates_or_deletes_is_refused(copy: Place, started: list[str]) -> None:
    copy.add_of_production("org_1")
    secret = copy.secret()
    before, there, sent = copy.stored(), copy.there(), len(copy.changes())

    for verb, words in VERBS.items():
        table = () if verb == "provision" else ("-o", "json")
        refused = copy(*words, *table, stdin=secret if verb == "rotation by hand" else "", check=False)

        assert refused.code == 78, (verb, refused.err)
        assert "installation" in refused.err and "adopt --new" in refused.err, verb
        assert copy.stored() == before and copy.there() == there and len(copy.changes()) == sent, verb
    assert started == []


@pytest.mark.parametrize("verb", VERBS)
def test_without_the_check_each_of_them_does_something(
    copy: Place, off: Any, verb: str, started: list[str]
) -> None:
    """The control of each command."""
    copy.add_of_production("org_1")
    stdin = copy.secret() if verb == "rotation by hand" else ""
    before, sent = copy.stored(), len(copy.changes())

    off()
    done = copy(*VERBS[verb], stdin=stdin)

    is_changed = copy.stored() != before or len(copy.changes()) != sent or bool(started)
    assert is_changed or (verb == "orphans" and "org_1" in done.out)


def test_reads_go_on_in_a_copy(copy: Place) -> None:
    there = copy.there()
    for command in READS:
        copy(*command)

    shown = copy.json("installation", "show")
    assert shown["state"] == "differs"
    assert (shown["installation"], shown["database"]) == ("staging", "production")
    assert copy.there() == there


def test_where_one_of_them_has_no_word_all_goes_on(production: Place) -> None:
    """As with the previous release, in either direction."""
    production.name("")
    production("orgs", "sync", "--provision")
    assert len(production.kinde.applications_of("org_3")) == 1
    assert production.json("installation", "show")["state"] == "unset"

    with production.open() as database, database.transaction() as connection:
        connection.execute(delete(tables.facts).where(tables.facts.c.name == installation.WORD))
    production.name("production")
    assert production.json("orgs", "sync", "--orphans", "--delete") == []
    assert production.json("installation", "show")["state"] == "unset"


@on_either
def test_db_upgrade_stores_the_word_once_and_never_asks(production: Place) -> None:
    production.name("staging")
    production("db", "upgrade")
    assert production.json("installation", "show")["database"] == "production"

    with production.open() as database, database.transaction() as connection:
        connection.execute(delete(tables.facts).where(tables.facts.c.name == installation.WORD))
    production.name("")
    production("db", "upgrade")
    assert production.json("installation", "show")["database"] is None
    production.name("staging")
    production("db", "upgrade")
    assert production.json("installation", "show")["state"] == "matches"


class During:
    """Calls something while the provider carries out the first deletion that it gets."""

    def __init__(self, kinde: Kinde, work: Callable[[], None]) -> None:
        self.app = kinde.faulty.app
        self.work = work
        self.deletions = 0
        kinde.faulty.app = self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "DELETE":
            self.deletions += 1
            if self.deletions == 1:
                await asyncio.to_thread(self.work)
        await self.app(scope, receive, send)


@on_either
@pytest.mark.parametrize("how", ["same", "new"])
def test_an_adoption_between_two_acts_stops_the_next_one(production: Place, how: str) -> None:
    """By another process, even if the lock was lost that keeps it away; what was read before is stale."""
    production.add_of_production("org_1")
    production.add_of_production("org_2")

    def adopt() -> None:
        with production.open() as database, database.transaction() as connection:
            if how == "same":
                installation.change_word(connection, "restored")
            else:
                # To the same word: the rows that the command has read are of the old key.
                installation.renew(connection, "production", at=database.now(connection))

    During(production.kinde, adopt)
    done = production("orgs", "sync", "--orphans", "--delete", "-o", "json", check=False)

    rows = json.loads(done.out)
    assert done.code == 1 and [row["deleted"] for row in rows] == [True, False]
    assert "installation" in rows[1]["error"] and rows[1]["id"] in production.there()


def test_without_the_check_the_second_act_is_sent(production: Place, off: Any) -> None:
    """The control of the one above."""
    production.add_of_production("org_1")
    production.add_of_production("org_2")

    def adopt() -> None:
        with production.open() as database, database.transaction() as connection:
            installation.renew(connection, "other", at=database.now(connection))

    off()
    During(production.kinde, adopt)

    assert [row["deleted"] for row in production.json("orgs", "sync", "--orphans", "--delete")] == [True] * 2


@on_either
def test_a_restore_is_adopted_with_its_applications(copy: Place) -> None:
    key = copy.json("installation", "show")["key"]
    orphan = copy.add_of_production("org_1")

    adopted = copy.json("installation", "adopt", "--same")

    assert adopted == {
        "installation": "staging",
        "database": "staging",
        "key": key,
        "state": "matches",
        "before": "production",
        "forgotten": 0,
    }
    (row,) = copy.json("orgs", "sync", "--orphans", "--delete")
    assert row["id"] == orphan.client_id and row["deleted"]
    assert len(copy.json("credentials", "rotate", "--older-than", "0s")) == 2
    # A second time changes nothing.
    before = copy.stored()
    copy("installation", "adopt", "--same")
    assert copy.stored() == before


def test_a_copy_that_is_adopted_owns_nothing_at_the_provider(copy: Place) -> None:
    """Neither what its rows had, nor what production makes under the old key."""
    key = copy.json("installation", "show")["key"]
    copy.add_of_production("org_1")
    there = copy.there()

    adopted = copy.json("installation", "adopt", "--new", "--yes")

    assert adopted["state"] == "matches" and adopted["key"] != key and adopted["forgotten"] == 2
    assert copy.json("orgs", "sync", "--orphans", "--delete") == []
    assert copy.json("credentials", "rotate", "--older-than", "0s") == []
    changed = copy("orgs", "properties", "org_1", "--set", "plan=pro", check=False)
    assert changed.code == 5 and "came with a copy" in changed.err
    assert copy.there() == there
    # Credentials stay in use, and what it makes from now on is its own.
    assert copy("credentials", "verify", "org_1").code == 0
    copy("orgs", "sync", "--provision")
    (made,) = copy.kinde.applications_of("org_3")
    assert made.name.startswith(f"orgworker {adopted['key']} ")
    assert [row["org"] for row in copy.json("credentials", "rotate", "--older-than", "0s")] == ["org_3"]
    assert there <= copy.there()


def test_what_a_copy_would_do_with_rows_that_it_kept(copy: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the one above: with its rows, the adopted copy deletes what it did not make."""
    monkeypatch.setattr("worker.store.applications.forget", lambda connection, _, at: 0)
    there = copy.there()

    copy("installation", "adopt", "--new", "--yes")
    copy("credentials", "rotate", "--older-than", "0s")

    assert not there <= copy.there()


def test_an_adoption_is_in_the_audit(copy: Place) -> None:
    before = copy.json("installation", "show")
    after = copy.json("installation", "adopt", "--new")

    (row,) = [each for each in copy.json("audit", "list") if each["action"] == "installation.adopt"]

    assert row["subject"] == "staging" and row["org"] is None
    assert row["detail"] == {
        "how": "new",
        "before": "production",
        "key": after["key"],
        "key_before": before["key"],
        "forgotten": 2,
    }


@on_either
def test_an_adoption_waits_for_no_one(copy: Place) -> None:
    """While another process provisions, and so may act at the provider, it exits 75 and changes nothing."""
    before = copy.stored()
    copy.name("production")
    with copy.open() as database, exclusive(Ownership(database, "production"), "main"):
        copy.name("staging")
        for how in ("--same", "--new"):
            refused = copy("installation", "adopt", how, check=False)
            assert refused.code == 75 and "provision" in refused.err
    assert copy.stored() == before


def test_what_cannot_be_adopted_says_why(copy: Place) -> None:
    for wrong in ((), ("--same", "--new")):
        assert copy("installation", "adopt", *wrong, check=False).code == 2
    copy.name("")
    refused = copy("installation", "adopt", "--new", check=False)
    assert refused.code == 78 and 'installation = "production"' in refused.err
    copy.name("Staging!")
    refused = copy("installation", "show", check=False)
    assert refused.code == 78 and "installation: write a word of at most 63" in refused.err


@on_either
def test_a_person_who_says_no_adopts_nothing(copy: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ask on a terminal: one gives up applications, the other takes them."""
    before = copy.stored()

    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("tests.fakes.cli.io.TextIOWrapper", Terminal)
    for how in ("--same", "--new"):
        refused = copy("installation", "adopt", how, stdin="no\n", check=False)
        assert refused.code == 1 and "nothing was changed" in refused.err
    assert copy.stored() == before
    copy("installation", "adopt", "--new", stdin="yes\n")
    assert copy.json("installation", "show")["state"] == "matches"


def test_doctor_names_the_difference_and_the_line(copy: Place) -> None:
    def found() -> Any:
        rows = json.loads(copy("doctor", "-o", "json", check=False).out)
        return next(row for row in rows if row["check"] == "installation")

    differs = found()
    assert not differs["ok"] and "adopt --new" in differs["fix"] and "production" in differs["detail"]
    copy.name("")
    assert found()["ok"] and 'installation = "production"' in found()["fix"]
    assert "in a copy" in found()["fix"]
    with copy.open() as database, database.transaction() as connection:
        connection.execute(delete(tables.facts).where(tables.facts.c.name == installation.WORD))
    assert found()["ok"] and "at the top of worker.toml" in found()["fix"]
    copy.name("staging")
    assert found()["ok"] and "db upgrade" in found()["fix"]
    copy("db", "upgrade")
    assert found() == found() | {"ok": True, "fix": ""}
