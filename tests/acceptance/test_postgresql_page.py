"""docs/operating/postgresql.md, executed on an empty server: its roles are all that a worker needs."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psycopg

from tests.fakes.cli import CommandLine
from tests.fakes.pages import ROOT, blocks
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from tests.fakes.site import wait_until

PAGE = ROOT / "docs" / "operating" / "postgresql.md"
DATABASE = ROOT / "docs" / "reference" / "database.md"


@contextlib.contextmanager
def started(line: CommandLine, arguments: list[str]) -> Iterator[str]:
    """A worker with the command line's settings, by the address of its health; it must stop gracefully."""
    listeners = {f"WORKER_WEB__{name}LISTEN": f"127.0.0.1:{free_port()}" for name in ("", "HEALTH_")}
    command = [sys.executable, "-m", "worker", "--config", str(line.settings), *arguments]
    log = line.settings.with_name("worker.log")
    with log.open("wb") as stream:
        worker = subprocess.Popen(command, env=os.environ | listeners, stdout=stream, stderr=stream)
    try:
        yield f"http://{listeners['WORKER_WEB__HEALTH_LISTEN']}"
        worker.terminate()
        assert worker.wait(60) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait()


def is_ready(health: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{health}/readyz").status_code == 200
    return False


def test_the_roles_of_the_page_migrate_and_carry_a_worker(own_postgres: Server, tmp_path):
    page = blocks(PAGE.read_text())
    made, granted, by_hand, serving = (block.text for block in page if block.language == "sql")
    [commands] = [block.text for block in page if block.language == "console"]
    upgrade, generate, start = (
        shlex.split(command, comments=True)[3:] for command in re.findall(r"(?m)^\$ (.*)", commands)
    )
    url = {
        login: own_postgres.url("orgworker").replace("postgres@", f"{login}@")
        for login in ("owner", "worker", "serve")
    }
    for statement in made.split(";\n"):
        if statement.strip():
            own_postgres.execute(statement)
    line = CommandLine(tmp_path, url["worker"])
    text = line.settings.read_text()
    line.settings.write_text(text.replace("[issuers", f'owner_url = "{url["owner"]}"\n[issuers'))

    line(*upgrade)
    with psycopg.connect(url["owner"], autocommit=True) as owner:
        owner.execute(granted.encode())
        owner.execute(serving.encode())

    assert "warnings  -" in line("db", "check").out
    line(*generate)
    with started(line, start) as health:
        wait_until(lambda: is_ready(health), "a worker that takes runs", timeout=60)
    line("orgs", "add", "org_acme", "--issuer", "main")
    assert line("orgs", "list", "-o", "id").out.split()
    line.settings.write_text(text.replace(url["worker"], url["serve"]))
    assert "warnings  -" in line("db", "check").out
    assert "permission denied" in line("orgs", "list", check=False).err
    with psycopg.connect(url["worker"], autocommit=True) as worker:
        owned = worker.execute("SELECT count(*) FROM pg_tables WHERE tableowner = 'worker'").fetchone()
        [question] = [block.text for block in blocks(DATABASE.read_text()) if block.language == "sql"]
        failed = worker.execute(question.encode()).fetchall()
    with psycopg.connect(own_postgres.url("postgres")) as superuser:
        for role in re.findall(r"CREATE ROLE (\w+)", by_hand):
            superuser.execute(f"ALTER ROLE {role} RENAME TO {role}_made_by_the_migration")
        superuser.execute(by_hand.encode())
        superuser.rollback()
    assert owned == (0,)
    assert failed == []
