"""`doctor` as an operator and a program see it."""

from __future__ import annotations

import json
import re
import sqlite3
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import update

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.postgres import Server
from tests.fakes.rows import attempt_row, checkpoint_row, worker_row
from tests.fakes.site import definition
from worker.clock import SystemClock, from_text
from worker.engine.runners.child import landlock, seccomp
from worker.engine.runners.child.sandbox import level
from worker.store import health, orgs, tables
from worker.store.database import Database


@pytest.fixture
def asked_for_password(
    own_cli: CommandLine, migrated_url: str, request: pytest.FixtureRequest
) -> CommandLine:
    """An installation whose database, where it is a server, lets nobody in without a password."""
    if migrated_url.startswith("postgresql"):
        url = request.getfixturevalue("postgres_server").url_with_password(migrated_url)
        text = own_cli.settings.read_text()
        own_cli.settings.write_text(text.replace(migrated_url, url))
    return own_cli


def test_doctor_exits_0_where_all_is_well(asked_for_password: CommandLine):
    done = asked_for_password("doctor", "-o", "json")

    assert done.code == 0
    assert [row["check"] for row in done.json()] == [
        *("held_snapshots", "live_rows", "web_roles", "file_modes"),
        *("insecure_origins", "sandbox", "network", "broker", "changeable_files", "trusted_code"),
        *("management_secrets", "database_password", "request_keys"),
        *("installation", "workers", "credentials", "tokens", "handlers", "egress"),
        *("pools", "pool_rules", "calendars"),
    ]
    assert all(row["ok"] for row in done.json())


def test_doctor_fails_where_the_database_needs_no_password(
    cli: CommandLine, postgres_url: str, tmp_path: Path
):
    cli = CommandLine(tmp_path, postgres_url.replace("postgres@", "postgres:never-asked-for@"))
    cli("db", "upgrade")

    done = cli("doctor", check=False)

    assert done.code == 1
    assert "the database accepts logins without a password: postgres over TCP" in done.out
    assert "scram-sha-256" in done.err


def test_a_password_of_the_environment_is_not_taken_for_none(
    postgres_url: str, postgres_server: Server, monkeypatch: pytest.MonkeyPatch
):
    url = postgres_server.url_with_password(postgres_url)
    monkeypatch.setenv("PGPASSWORD", "of-the-tests")

    assert health.users_without_password(url) == []
    assert health.users_without_password(postgres_url) == ["postgres over TCP"]


def test_doctor_says_how_far_handlers_are_confined_and_what_is_trusted(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
):
    folder = str(cli.settings.parent)
    monkeypatch.setenv("WORKER_EXECUTION__PRELOAD", "acme-models")
    monkeypatch.setenv("WORKER_EXECUTION__INLINE", "acme-jobs")

    rows = {row["check"]: row for row in cli("doctor", "-o", "json").json()}
    assert rows["sandbox"]["detail"] == level(landlock.abi(), seccomp.lacking())
    assert rows["trusted_code"]["detail"] == "preload: acme-models; inline: acme-jobs"

    monkeypatch.setenv("WORKER_EXECUTION__READ_PATHS", folder)
    done = cli("doctor", "-o", "json", check=False)  # a table cuts a long path
    assert done.code == 1
    rows = {row["check"]: row for row in done.json()}
    assert f"{folder} is open to handlers and " in rows["sandbox"]["detail"]

    monkeypatch.setenv("WORKER_EXECUTION__SANDBOX", "off")
    done = cli("doctor")
    assert "warning: sandbox: off" in done.err


def test_doctor_warns_of_origins_that_get_a_token_unencrypted(cli: CommandLine, monkeypatch):
    monkeypatch.setenv("WORKER_EXECUTION__INSECURE_ORIGINS", "http://api.acme.com")

    done = cli("doctor")

    assert done.code == 0
    assert "warning: insecure_origins: tokens can be sent unencrypted to http://api.acme.com" in done.err


@pytest.mark.parametrize("command", ["doctor", "check"])
def test_what_is_not_sealed_is_named(own_cli: CommandLine, monkeypatch: pytest.MonkeyPatch, command: str):
    own_cli("orgs", "add", "org_a")
    own_cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "0 0 1 1 *", reveal_token=True))

    done = own_cli(command)
    assert "handlers that declare no egress: " in done.err
    assert 'add a line to their @job: egress=["api"], with the other origins that they reach' in done.err
    assert "runs of a definition of acme.note by org_a get the org's token itself" in done.err
    [row] = own_cli("definitions", "list", "-o", "json").json()
    assert row["reveal_token"] is True

    monkeypatch.setenv("WORKER_EXECUTION__NETWORK", "open")
    opened = own_cli(command)
    assert '[execution] network = "open": no run is sealed' in opened.err
    assert "egress: " not in opened.err

    monkeypatch.setenv("WORKER_EXECUTION__NETWORK", "require")
    monkeypatch.setenv("WORKER_EXECUTION__SANDBOX", "off")
    refused = own_cli(command, check=False)
    assert refused.code == 1
    assert "use Linux 6.12 or newer with Landlock and seccomp turned on and sandbox not off" in refused.err


def test_a_worker_that_must_seal_runs_and_cannot_exits_78(
    own_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORKER_EXECUTION__NETWORK", "require")
    monkeypatch.setenv("WORKER_EXECUTION__SANDBOX", "off")

    refused = own_cli("run", check=False)

    assert refused.code == 78
    assert "no run can be sealed" in refused.err
    assert "set network to auto" in refused.err


def test_an_egress_that_an_inline_run_cannot_keep_exits_78(
    own_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORKER_EXECUTION__INLINE", "acme-jobs")
    own_cli("orgs", "add", "org_a")
    keys = {"isolation": "inline", "egress": ["api"]}

    refused = own_cli(
        *("apply", "-", "-o", "json"),
        stdin=definition("org_a", "x", "acme.note", "@daily", **keys),
        check=False,
    )

    assert refused.code == 78
    assert "egress: acme.note would run inline" in refused.err
    assert 'set isolation = \\"child\\"' in refused.err


def test_doctor_exits_1_and_says_what_to_do_where_a_check_fails(cli: CommandLine):
    cli("orgs", "add", "org_a")
    cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "0 0 1 1 *"))
    run = cli("definitions", "run", "org_a", "tick", "-o", "json").json()
    with sqlite3.connect(cli.settings.parent / "worker.db") as connection:
        connection.execute("DELETE FROM live_runs")
    connection.close()

    done = cli("doctor", check=False)

    assert done.code == 1
    assert run["id"] in cli("doctor", "-o", "json", check=False).out
    assert "live_rows" in done.out
    assert "fix: live_rows: " in done.err


CANARY = re.compile("canary[-_]?[a-z]+", re.IGNORECASE)


@pytest.fixture
def planted(own_cli: CommandLine, migrated_url: str) -> CommandLine:
    """An installation with a canary in whatever may hold a secret or say something of a customer."""
    cli = own_cli
    cli.settings.write_text(
        cli.settings.read_text()
        + '[alerts]\nwebhook_url = "https://canary-user:canary-pass@hooks.acme.com/canary-hook"\n'
        + 'webhook_secret = "canary-webhook-secret"\ndeadman_url = "https://ping.acme.com/canary-ping"\n'
        + '[tracing]\nendpoint = "https://traces.acme.com/?key=canary-trace"\nheaders = "key=canary-header"\n'
        + f'[[web.operators]]\nname = "canary-operator"\ntoken_sha256 = "{"ca" * 32}"\n'
    )
    secret = "canary-client-secret"
    line = {"code": "org_canary", "name": "Canary Inc", "issuer": "main", "client_id": "canary-client"}
    cli("orgs", "import", "-", stdin=json.dumps(line | {"client_secret": secret, "tags": ["canary-tag"]}))
    cli("orgs", "pause", "org_canary", "--note", "canary-note")
    cli("orgs", "resume", "org_canary")
    text = definition("org_canary", "canary-job", "acme.note", "@yearly", params={"text": "canary-param"})
    cli("apply", "-", stdin=text)
    run = cli("definitions", "run", "org_canary", "canary-job", "-o", "id").out.strip()
    database = Database.open(migrated_url, clock=SystemClock())
    with database.transaction() as connection:
        now = database.now(connection)
        org_id = orgs.require(connection, "org_canary")["id"]
        error = {"type": "KeyError", "message": "canary-message", "trace": "canary-trace"}
        connection.execute(tables.live_runs.delete())
        connection.execute(
            update(tables.runs).values(
                state="failed",
                reason="error",
                detail="canary-detail",
                error=error,
                result={"text": "canary-result"},
                progress={"done": 1, "note": "canary-progress"},
                attempt=1,
                finished_at=now,
            )
        )
        connection.execute(
            attempt_row(
                run,
                org_id,
                now,
                handler="acme.note",
                error=error,
                error_cause="KeyError: canary-cause",
                claims={"properties": {"key": "canary-claim"}},
                flags={"canary-flag": True},
            )
        )
        connection.execute(checkpoint_row(run, org_id, now, {"at": "canary-checkpoint"}))
        connection.execute(worker_row(now, host="canary-host"))
        connection.execute(
            update(tables.catalogue)
            .where(tables.catalogue.c.name == "acme.chatty")
            .values(error="ImportError: canary-import")
        )
    database.close()
    return cli


@on_either
def test_the_bundle_says_nothing_of_anybody(planted: CommandLine, tmp_path: Path):
    file = tmp_path / "bundle.json"

    done = planted("doctor", "--bundle", str(file), "-o", "json", check=False)

    assert file.exists(), done
    text = file.read_text()
    assert CANARY.findall(text) == []
    assert "acme.kinde.com" in text
    assert file.stat().st_mode & 0o777 == 0o600
    assert CANARY.findall(done.out + done.err) == []


def test_the_bundle_has_what_a_supporter_asks_first(planted: CommandLine, tmp_path: Path):
    file = tmp_path / "bundle.json"
    planted("doctor", "--bundle", str(file), check=False)

    bundle = json.loads(file.read_text())

    assert bundle["versions"]["orgworker"]
    assert bundle["versions"]["commit"]
    assert bundle["database"]["schema"] == bundle["database"]["needs_schema"]
    assert bundle["settings"]["execution"]["lease"] == "30s"
    assert bundle["settings"]["alerts"]["webhook_secret"] == "***"
    assert bundle["settings"]["alerts"]["webhook_url"] == "https://hooks.acme.com"
    [failure] = bundle["failures"]
    assert (failure["org"], failure["definition"], failure["error_type"]) == (
        "org-1",
        "definition-1",
        "KeyError",
    )
    assert failure["id"] == planted("runs", "list", "-o", "id").out.strip()
    assert [worker["host"] for worker in bundle["workers"]] == ["machine-1"]
    assert {row["name"]: row["error"] for row in bundle["handlers"]}["acme.chatty"] == "ImportError"
    assert "org.pause" in {change["action"] for change in bundle["changes"]}
    assert bundle["sizes"][0]["bytes"] > 0
    assert {row["what"] for row in bundle["capacity"]} == {"starts", "children", "memory"}


def test_the_bundle_says_when_most_tokens_are_needed_in_the_day_to_come(own_cli: CommandLine, tmp_path: Path):
    own_cli("orgs", "add", "org_a")
    own_cli("apply", "-", stdin=definition("org_a", "tick", "acme.note", "0 * * * *"))
    own_cli("doctor", "--bundle", str(tmp_path / "bundle.json"), check=False)

    bundle = json.loads((tmp_path / "bundle.json").read_text())

    [issuer] = bundle["issuers"]
    assert from_text(issuer["tokens_at"]) > from_text(bundle["made_at"]) - timedelta(seconds=30)


def test_a_bundle_is_never_written_over_a_file(planted: CommandLine, tmp_path: Path):
    file = tmp_path / "bundle.json"
    file.write_text("mine")

    assert planted("doctor", "--bundle", str(file), check=False).code == 5
    assert file.read_text() == "mine"
    assert planted("doctor", "--bundle", str(tmp_path / "absent" / "b.json"), check=False).code == 2
