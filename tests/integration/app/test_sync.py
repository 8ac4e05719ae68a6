"""`orgs sync` from nothing to verified credentials, over HTTP against a provider with faults."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime

import pytest
from sqlalchemy import insert, select

from tests.conftest import on_either
from tests.fakes.cli import CommandLine
from tests.fakes.kinde.faults import Script
from tests.fakes.kinde.server import Kinde
from tests.fakes.site import definition
from tests.integration.app.conftest import TEMPLATE
from worker import settings, wiring
from worker.clock import SystemClock
from worker.diagnosis.check_orgs import open_checks
from worker.engine.attempt.inflight import record_claims
from worker.guard.claims import Claims
from worker.model.claims import ClaimsRecord
from worker.model.runs.outcome import Trail
from worker.store import tables

pytestmark = pytest.mark.feature("provisioning")

ORGS = 6
CANARY = "canary-Zq7-4421"
EXTRA = definition("org_2", "extra", "acme.fetch", "0 1 * * *", scopes=["read:none"])


@pytest.fixture
def cli(kinde_cli: CommandLine, kinde: Kinde) -> CommandLine:
    kinde.add_orgs(ORGS)
    with kinde_cli.settings.open("a") as settings:
        settings.write('tags = { eu = "handle=eu" }\n')
    file = kinde_cli.settings.with_name("templates.toml")
    file.write_text(TEMPLATE)
    kinde_cli("apply", str(file))
    return kinde_cli


def test_from_orgs_at_the_provider_to_credentials(cli: CommandLine, kinde: Kinde) -> None:
    planned = json.loads(cli("orgs", "sync", "--provision", "--dry-run", "-o", "json").out)
    before, tokens = kinde.carried_out(), kinde.token_requests()
    done = cli("orgs", "sync", "--provision", "-o", "json")
    rows = json.loads(done.out)

    # Made, read again for its org, authorised, one scope; the orgs and the APIs are listed for all.
    assert kinde.carried_out() - before <= 4 * ORGS + 3
    assert kinde.token_requests() - tokens == ORGS + 1
    assert [row["org"] for row in planned] == [row["org"] for row in rows]
    assert [row["changes"] for row in rows] == [["added", "provisioned"]] * ORGS
    assert json.loads(cli("orgs", "sync", "--provision", "-o", "json").out) == []
    credentials = json.loads(cli("credentials", "list", "-o", "json").out)
    assert {row["org"]: row["client_id"] for row in credentials} == {
        row["org"]: row["client_id"] for row in rows
    }
    assert {row["state"] for row in credentials} == {"active"}
    checked = json.loads(cli("orgs", "check", "--all", "-o", "json").out)
    assert {(row["ok"], tuple(row["scopes"])) for row in checked} == {(True, ("read:kb",))}
    everything = done.out + done.err + cli("audit", "list", "-o", "json").out
    assert not any(app.client_secret in everything for app in kinde.provider.applications.values())


def test_orphans_are_listed_and_deleted(cli: CommandLine, kinde: Kinde) -> None:
    cli("orgs", "sync", "--provision")
    cli("orgs", "remove", "org_1", "--yes")

    cli("orgs", "sync", "--orphans", "--delete", "--dry-run")
    (orphan,) = json.loads(cli("orgs", "sync", "--orphans", "-o", "json").out)
    assert orphan["org"] == "org_1" and orphan["id"] and not orphan["deleted"]
    (deleted,) = json.loads(cli("orgs", "sync", "--orphans", "--delete", "-o", "json").out)
    assert deleted["id"] == orphan["id"] and deleted["deleted"]
    assert kinde.applications_of("org_1") == []
    assert json.loads(cli("orgs", "sync", "--orphans", "-o", "json").out) == []
    # Two of one name: the one that org_2 uses stays.
    (used,) = kinde.applications_of("org_2")
    second = kinde.provider.management.make_application(used.name, "org_2")
    assert cli("orgs", "sync", "--orphans", "--org", "org_3", "-o", "id").out == ""
    assert cli("orgs", "sync", "--orphans", "--delete", "-o", "id").out.split() == [second.client_id]
    assert kinde.applications_of("org_2") == [used]
    # A removed org stays removed, although the provider lists it.
    assert json.loads(cli("orgs", "sync", "-o", "json").out) == []
    assert "org_1 is removed" in cli("orgs", "sync", "--provision", "--org", "org_1").err


def test_a_dry_run_leaves_nothing(cli: CommandLine, kinde: Kinde) -> None:
    folder = cli.settings.parent
    (folder / "keyring").unlink()
    before = sorted(folder.iterdir())

    planned = json.loads(cli("orgs", "sync", "--provision", "--dry-run", "-o", "json").out)

    assert {tuple(row["changes"]) for row in planned} == {("added", "provisioned")}
    assert sorted(folder.iterdir()) == before
    assert json.loads(cli("orgs", "list", "-o", "json").out) == [] and kinde.applications_of("org_1") == []
    cli("orgs", "sync")
    kinde.api.orgs["org_2"].name, kinde.api.orgs["org_2"].handle = "New", "eu"
    (row,) = json.loads(cli("orgs", "sync", "--dry-run", "-o", "json").out)
    assert (row["org"], row["name"], row["changes"]) == ("org_2", "New", ["renamed", "tagged"])


def test_a_scope_that_the_provider_lacks_stops_one_org(cli: CommandLine, kinde: Kinde) -> None:
    (cli.settings.parent / "extra.toml").write_text(EXTRA)
    cli("orgs", "sync")
    cli("apply", str(cli.settings.parent / "extra.toml"))

    done = cli("orgs", "sync", "--provision", "-o", "json", check=False)
    checked = cli("orgs", "check", "org_2", check=False)

    rows = {row["org"]: row for row in json.loads(done.out)}
    assert done.code == 1 and [row["org"] for row in rows.values() if row["error"]] == ["org_2"]
    assert "has no scope read:none" in rows["org_2"]["error"] and "add the scope" in rows["org_2"]["fix"]
    assert list(rows) == sorted(rows) and rows["org_1"]["name"] == "Org 1"
    assert checked.code == 1 and "its application is not ready" in checked.err
    assert "has no scope read:none" in checked.err and "orgs sync --provision --org org_2" in checked.err


def test_what_cannot_be_done_says_why(cli: CommandLine, kinde: Kinde) -> None:
    assert cli("orgs", "sync", "--org", "nobody", check=False).code == 3
    assert cli("orgs", "sync", "--delete", check=False).code == 2
    for option in ("--provision", "--yes", "--absent=suspend"):
        assert cli("orgs", "sync", "--orphans", option, check=False).code == 2
    kinde.script = Script(throttle=1.0, retry_after="1000")
    assert cli("orgs", "sync", check=False).code == 75
    kinde.script = Script()
    assert cli("orgs", "sync", "--issuer", "other", check=False).code == 3
    (cli.settings.parent / "management__main").write_text("wrong")
    refused = cli("orgs", "sync", check=False)
    assert refused.code == 78 and "management__main" in refused.err
    (cli.settings.parent / "management__main").unlink()
    assert cli("orgs", "sync", check=False).code == 78


@on_either
def test_properties_are_changed_and_named_but_never_stored(cli: CommandLine, kinde: Kinde) -> None:
    kinde.api.application_properties |= {"plan", "secret_name", "beta"}
    cli("orgs", "sync", "--provision", "--org", "org_1")
    cli("orgs", "properties", "org_1", "--set", f"plan={CANARY}", "--set", "beta=true")
    run_with_token(cli, "org_1")

    assert json.loads(cli("orgs", "diff", "org_1", "-o", "json").out)["changes"] == []
    changed = cli("orgs", "properties", "org_1", "--set", "plan=free", "--unset", "beta", "-o", "json")
    told = [cli("orgs", "diff", "org_1", "-o", "json"), cli("orgs", "check", "org_1", "-o", "json")]

    assert json.loads(changed.out) == [{"name": "plan", "value": "free"}]
    diff, check = (json.loads(each.out) for each in told)
    assert [(each["kind"], each["name"], each["change"]) for each in diff["changes"]] == [
        # At Kinde an unset property is an empty text.
        ("property", "beta", "changed"),
        ("property", "plan", "changed"),
    ]
    assert check[0]["changes"] == diff["changes"] and check[0]["unread"] == ["property beta", "property plan"]
    audit = cli("audit", "list", "-o", "json").out
    assert {row["subject"] for row in json.loads(audit) if row["action"].startswith("property.")} == {
        "org_1 plan",
        "org_1 beta",
    }
    everything = "".join([audit, *(each.out + each.err for each in told)])
    assert CANARY not in everything
    assert all(CANARY.encode() not in file.read_bytes() for file in cli.settings.parent.glob("*.db*"))
    unknown = cli("orgs", "properties", "org_1", "--set", "nonsense=1", check=False)
    assert unknown.code == 1 and "define the property" in unknown.err


def run_with_token(cli: CommandLine, org: str) -> None:
    """As if a worker had run something of the org: the attempt keeps its claims."""
    run_id = cli("definitions", "run", org, "nightly", "-o", "id").out.strip()
    config = settings.load(str(cli.settings), environ={})
    database = wiring.open_database(config)

    async def claims() -> Claims:
        async with open_checks(config, database, SystemClock()) as checks:
            report = await checks.verify(org)
        assert report.probes[0].claims is not None
        return report.probes[0].claims

    trail = Trail("acme.fetch")
    record = ClaimsRecord.of(asyncio.run(claims()), wiring.open_keyring(config).digests())
    record_claims(trail, record, datetime.now(UTC))
    with database.transaction() as connection:
        now = database.now(connection)
        row = {
            "run_id": run_id,
            "attempt": 1,
            "org_id": connection.execute(select(tables.runs.c.org_id)).scalar_one(),
            "worker_id": run_id,
            "fencing_token": 1,
            "handler": "acme.fetch",
            "started_at": now,
            "token_ready_at": now,
            "ended_at": now,
            "outcome": "succeeded",
            "claims": json.loads(record.claims),
        }
        connection.execute(insert(tables.attempts), row)
    database.close()
