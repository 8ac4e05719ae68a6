"""docs/operating/postgresql.md, executed on an empty server: its roles are all that a worker needs."""

from __future__ import annotations

import re

import psycopg

from tests.fakes.cli import CommandLine
from tests.fakes.pages import ROOT, blocks
from tests.fakes.postgres import Server

PAGE = ROOT / "docs" / "operating" / "postgresql.md"
DATABASE = ROOT / "docs" / "reference" / "database.md"


def test_the_roles_of_the_page_migrate_and_carry_a_worker(own_postgres: Server, tmp_path):
    page = [block.text for block in blocks(PAGE.read_text()) if block.language == "sql"]
    made, granted, by_hand, serving = page
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

    line("db", "upgrade")
    with psycopg.connect(url["owner"], autocommit=True) as owner:
        owner.execute(granted.encode())
        owner.execute(serving.encode())

    assert "warnings  -" in line("db", "check").out
    line("keys", "generate")
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
