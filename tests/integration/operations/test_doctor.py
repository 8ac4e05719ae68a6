"""Doctor: what goes wrong slowly or silently is found."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import delete

from tests.conftest import on_either
from tests.fakes.clock import ManualClock
from tests.fakes.stock import Stock
from worker.diagnosis import doctor, machine
from worker.diagnosis.doctor import file_modes, held_snapshots, live_rows, run_checks, too_old
from worker.engine.runners.child import landlock
from worker.handlers.catalogue import HandlerEntry
from worker.ids import ALL_ORGS, new_id
from worker.settings import Settings
from worker.settings.sections import ExecutionSettings
from worker.store import catalogue, tables, workers
from worker.store.database import Database
from worker.store.health import Holder
from worker.store.lists import DEFINITIONS
from worker.store.lists import read as lists


@pytest.fixture
def stock(migrated_url: str, clock: ManualClock):
    database = Database.open(migrated_url, clock=clock)
    yield Stock(database)
    database.close()


def test_a_healthy_database_passes_every_check(stock):
    worker_id, org_id = stock.worker(), stock.org()
    stock.put(*(stock.run(org_id) for _ in range(3)))
    stock.finish(worker_id, stock.ended(stock.admit(worker_id, free=1)[0]))

    findings = {finding.check: finding.ok for finding in run_checks(stock.database, Settings())}
    # What of the machine it looks at, tests/integration/app/test_doctor.py tests.
    for check in ("held_snapshots", "live_rows", "web_roles", "file_modes", "insecure_origins"):
        assert findings[check], check


def test_files_that_others_may_read_are_named(migrated_sqlite_url: str, clock: ManualClock):
    database = Database.open(migrated_sqlite_url, clock=clock)
    file = Path(migrated_sqlite_url.removeprefix("sqlite:///"))
    keyring = file.with_name("keyring")
    keyring.touch(0o644)

    def found() -> tuple[bool, bool]:
        [finding] = [one for one in run_checks(database, Settings()) if one.check == "file_modes"]
        return "keyring" in finding.fix, f"{file.name} " in f"{finding.fix} "

    file.parent.chmod(0o700)
    assert found() == (False, False), "nobody else comes to them"
    file.parent.chmod(0o755)
    assert found() == (True, False)
    file.chmod(0o640)
    assert found() == (True, True)
    file.parent.chmod(0o705)
    assert found() == (True, False), "the group may not enter the folder"
    for path in (file, keyring):
        path.chmod(0o600)
    assert found() == (False, False)
    database.close()


def test_the_group_by_which_this_account_reads_a_key_ring_of_root_is_no_other(
    migrated_sqlite_url: str, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
):
    """As `require` wants it: root owns the key ring, and the worker's group may read it."""
    database = Database.open(migrated_sqlite_url, clock=clock)
    file = Path(migrated_sqlite_url.removeprefix("sqlite:///"))
    file.with_name("keyring").touch(0o640)
    file.with_name("keyring").chmod(0o640)
    file.parent.chmod(0o755)

    assert "keyring" in file_modes(database).fix
    monkeypatch.setattr("worker.diagnosis.doctor.os.geteuid", lambda: file.stat().st_uid + 1)
    assert file_modes(database).fix == ""
    database.close()


def test_an_unfinished_run_without_a_live_row_is_found(stock):
    run = stock.run(stock.org())
    stock.put(run)
    remove(stock, tables.live_runs)

    finding = live_rows(stock.database)

    assert not finding.ok
    assert run.id in finding.detail
    assert finding.fix


@on_either
def test_a_live_row_without_an_unfinished_run_is_found(stock):
    run = stock.run(stock.org())
    stock.put(run)
    remove(stock, tables.runs)

    assert not live_rows(stock.database).ok


def test_a_transaction_that_somebody_forgot_is_found(migrated_postgres_url, clock, monkeypatch):
    monkeypatch.setattr(doctor, "SNAPSHOT_SECONDS", 0.0)
    database = Database.open(migrated_postgres_url, clock=clock)
    with psycopg.connect(migrated_postgres_url, application_name="nightly dump") as forgotten:
        forgotten.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        forgotten.execute("SELECT count(*) FROM runs")

        finding = held_snapshots(database)

    assert not finding.ok
    assert "nightly dump" in finding.detail
    assert "pg_terminate_backend" in finding.fix
    # Sessions of other tests may begin right now.
    assert "nightly dump" not in held_snapshots(database).detail
    database.close()


def test_a_session_is_judged_by_time_and_a_slot_by_how_far_it_lies_back():
    assert too_old(Holder("session", "pid 1", "", "active", 61.0, 1))
    assert not too_old(Holder("session", "pid 1", "", "active", 59.0, 900_000))
    assert too_old(Holder("session", "pid 1", "replica", "walsender", None, 900_000))
    assert too_old(Holder("slot", "old", "pgoutput", "inactive", None, 900_000))
    assert not too_old(Holder("slot", "new", "pgoutput", "active", None, 10))


@on_either
def test_a_dead_worker_is_found_and_one_that_stopped_or_lives_is_not(stock, clock):
    stock.worker()
    assert doctor.workers(stock.database).ok

    now = stock.now()
    with stock.database.transaction() as connection:
        connection.execute(tables.workers.update().values(lease_until=now - timedelta(seconds=1)))
    dead = doctor.workers(stock.database)
    assert not dead.ok
    assert "is silent since " in dead.detail
    assert ": its lease expired at " in dead.detail
    assert "systemctl start orgworker" in dead.fix

    with stock.database.transaction() as connection:
        connection.execute(tables.workers.update().values(ended_at=now))
    stopped = doctor.workers(stock.database)
    assert (stopped.ok, stopped.detail) == (True, "no worker is up, and nothing is due")
    assert stopped.fix == ""


@on_either
def test_who_crashed_within_a_day_is_named_with_who_recovered_the_runs(stock):
    """Three of them; a host that ran nothing may have stopped."""
    dead, *others = [stock.worker() for _ in range(5)]
    silent, me = stock.worker(), stock.worker()
    stock.running(dead)
    stock.change(tables.workers, dead, host="app1")
    stock.change(tables.workers, silent, host_id=new_id(), outcome="crashed", ended_at=stock.now())
    stock.within(workers.recover, max_recoveries=3, by=me, others_than=me)
    stock.change(tables.workers, dead, ended_at=stock.now() + timedelta(seconds=1))

    found = doctor.workers(stock.database)

    assert found.ok
    assert found.detail.startswith("1 worker is up; within a day: app1 crashed ")
    assert f" UTC, 1 run recovered by {me}; here crashed " in found.detail
    assert (found.detail.count("crashed"), found.detail[-8:]) == (3, "; 2 more")
    # `doctor` prints the whole of it as a warning: a table cuts it.
    assert found.fix
    for worker in (dead, *others):
        stock.change(tables.workers, worker, ended_at=stock.now() - timedelta(days=2))
    assert doctor.workers(stock.database).detail == "1 worker is up"


@pytest.mark.feature("calendars")
def test_a_calendar_in_use_that_ends_soon_is_named(database, apply):
    """Not one that nothing names, nor one with later dates."""
    entry = '[[calendar]]\nname = "{}"\ndates = ["{}"]\n'
    definition = (
        '[[definition]]\norg = "org_a"\nname = "{0}"\nhandler = "acme.plain"\nschedule = "@daily"\n'
        'calendar = "{0}"\n'
    )
    apply(
        '[[org]]\ncode = "org_a"\nissuer = "main"\n'
        + entry.format("old", "2001-12-25")
        + entry.format("unused", "2001-12-25")
        + entry.format("far", "2199-12-25")
        + definition.format("old")
        + definition.format("far")
    )

    found = doctor.ending_calendars(database)

    assert found.ok
    assert found.detail == "calendar old has no date after 2001-12-25"
    assert "calendars show old" in found.fix


def test_without_a_worker_only_what_is_due_is_a_fault(stock):
    stock.definition(stock.org(), due_at=stock.now() + timedelta(hours=1))
    assert doctor.workers(stock.database).ok

    stock.definition(stock.org(), due_at=stock.now() - timedelta(hours=2))
    late = doctor.workers(stock.database)
    assert not late.ok
    assert "no worker is up, and what has been due for 2h" in late.detail
    stock.worker()
    assert doctor.workers(stock.database).ok


@on_either
def test_an_org_is_named_whose_credentials_are_all_rejected(stock):
    def credential(org_id: str, generation: int, error: str | None, state: str = "active") -> None:
        row = {"id": new_id(), "org_id": org_id, "generation": generation, "client_id": "m2m", "state": state}
        row |= {"created_at": stock.now(), "created_by": "kim", "last_error": error, "key_id": "k"}
        with stock.database.transaction() as connection:
            connection.execute(tables.credentials.insert().values(sealed=b"x", **row))

    for org_id in (stock.org(), stock.org(state="paused")):
        credential(org_id, 1, "invalid_client")
    rotated = stock.org()
    credential(rotated, 1, None)
    credential(rotated, 2, "invalid_client")
    replaced = stock.org()
    credential(replaced, 1, "invalid_client", state="retired")
    credential(replaced, 2, None)

    dead = doctor.credentials(stock.database)

    assert (dead.ok, dead.detail) == (False, "org_1 gets no token: invalid_client")
    assert "credentials rotate org_1 " in dead.fix


def test_a_handler_that_does_not_load_is_named_with_its_error(stock):
    assert doctor.handlers(stock.database).ok
    entry = HandlerEntry(
        "acme.bad", "acme-jobs", "2.0", "acme:bad", error="ImportError: no module named canary"
    )
    stock.within(catalogue.put, [entry], at=stock.now())

    broken = doctor.handlers(stock.database)

    assert not broken.ok
    assert broken.detail == "acme.bad of acme-jobs 2.0 does not load: ImportError"
    assert "handlers show acme.bad" in broken.fix


NOTE = HandlerEntry("acme.note", "acme-jobs", "2.0", "acme:note")


def of_execution(**values: object) -> Settings:
    return Settings(execution=ExecutionSettings.model_validate(values))


@on_either
def test_handlers_that_declare_no_egress_are_named_with_the_line_to_add(stock):
    assert list(doctor.undeclared_egress(stock.database, Settings())) == []
    listed = replace(NOTE, name="acme.listed", egress=())
    broken = replace(NOTE, name="acme.broken", error="no")
    stock.within(catalogue.put, [NOTE, listed, broken], at=stock.now())

    [found] = doctor.undeclared_egress(stock.database, Settings())

    assert found.detail == (
        "handlers that declare no egress: acme.note; their runs keep the network, the org's token and its "
        "unbound secrets"
    )
    assert 'egress=["api"]' in found.fix
    for execution, meaning in (
        ({"network": "require"}, "their runs reach only the api_origins"),
        ({"egress": ["public"]}, "their runs reach all that [execution] egress lists"),
    ):
        [found] = doctor.undeclared_egress(stock.database, of_execution(**execution))
        assert found.detail.endswith(meaning)
    assert list(doctor.undeclared_egress(stock.database, of_execution(network="open"))) == []
    stock.within(catalogue.put, [replace(NOTE, egress=("api",))], at=stock.now())
    [found] = doctor.undeclared_egress(stock.database, Settings())
    assert (found.detail, found.fix) == ("every handler declares what it reaches", "")


@on_either
def test_definitions_in_batch_mode_need_an_api_and_a_key(stock, tmp_path: Path):
    def found(**apis: dict[str, str]) -> tuple[bool, str, str]:
        settings = Settings.model_validate({"secrets_dir": str(tmp_path), "batches": apis})
        [one] = doctor.unbatched(stock.database, settings)
        return one.ok, one.detail, one.fix

    assert list(doctor.unbatched(stock.database, Settings())) == []
    spec = {"handler": "acme.report", "schedule": "@daily", "model_requests": "batch"}
    stock.definition(stock.org(), spec=spec)

    ok, detail, fix = found()
    assert not ok and "worker.toml has no [batches.NAME]" in detail and fix
    ok, detail, fix = found(openai={"provider": "openai", "secret": "openai_key"})
    assert ok and "no operator's key for openai (of orgs: openai_key)" in detail
    assert "model_key__openai" in fix
    (tmp_path / "model_key__openai").write_text("sk-operator-0001")
    ok, detail, fix = found(openai={"provider": "openai"})
    assert ok and "go into batches" in detail and not fix


@on_either
def test_definitions_whose_runs_get_the_token_itself_are_named(stock):
    org = stock.org()
    stock.definition(org, spec={"handler": "acme.quiet", "schedule": "@daily", "reveal_token": False})
    assert list(doctor.revealed_tokens(stock.database)) == []

    for handler in ("acme.old", "acme.new"):
        stock.definition(org, spec={"handler": handler, "schedule": "@daily", "reveal_token": True})
    [found] = doctor.revealed_tokens(stock.database, org=lambda code: "org 1")

    assert found.ok
    assert found.detail == (
        "runs of a definition of acme.new by org 1 get the org's token itself, also if they are sealed; "
        "and 1 more"
    )
    with stock.database.autocommit() as connection:
        rows = lists.read(connection, DEFINITIONS, ALL_ORGS)
    assert sorted(row["reveal_token"] for row in rows) == [False, True, True]


def test_it_says_whether_runs_can_be_sealed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(landlock, "abi", lambda: landlock.SCOPES)
    assert machine.network(of_execution()).detail == "runs can be sealed"
    capped = machine.network(of_execution(network="require", egress=["api", "public"]))
    assert (capped.ok, capped.detail) == (True, "runs can be sealed, with at most api, public")
    inline = machine.network(of_execution(network="require", inline=["acme-jobs"]))
    assert inline.detail == (
        'runs can be sealed; inline runs of acme-jobs cannot, and fail unless their @job has egress=["open"]'
    )
    assert (inline.ok, inline.fix) == (True, 'give their definitions isolation = "child"')
    fail = machine.network(of_execution(egress=["public"], inline=["acme-jobs"]))
    assert fail.detail.endswith("inline runs of acme-jobs cannot, and fail")
    assert machine.network(of_execution(egress=["open"], inline=["acme-jobs"])).fix == ""
    off = machine.network(of_execution(network="open"))
    assert (off.ok, off.fix) == (True, "set it to auto")
    unconfined = machine.network(of_execution(sandbox="off"))
    assert (unconfined.ok, "does not bind it: off" in unconfined.detail) == (True, True)

    monkeypatch.setattr(landlock, "abi", lambda: 4)
    partial = machine.network(of_execution())
    assert (partial.ok, "does not bind it: partial: Landlock 4" in partial.detail) == (True, True)
    # The sandbox itself says so of what it requires.
    assert machine.network(of_execution(sandbox="require")).ok
    required = of_execution(network="require")
    assert not machine.network(required).ok
    assert "no run can be sealed" not in machine.sandbox(required).detail


def remove(stock: Stock, table: object) -> None:
    with stock.database.transaction() as connection:
        connection.execute(delete(table))
