"""The commands of orgworker in `console` blocks, run one by one in an installation without a worker.

A page's issuer and budgets, and what its placeholders mean, come first. Pages with `sh` blocks run in
tests/acceptance/test_docs.py instead. The line for `orgs import` of files.md is imported here too.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tests.conftest import copied
from tests.fakes.cli import CommandLine, as_process
from tests.fakes.pages import PAGES, ROOT, Block, blocks, treatment
from tests.fakes.ports import free_port
from tests.fakes.site import definition

pytestmark = pytest.mark.feature("checkout")

ORG = {"code": "org_acme", "issuer": "main", "client_id": "ID", "client_secret": "s3cr3t", "tags": ["pro"]}
# What a reader puts in their place.
PLACEHOLDERS = {"ORGANIZATION_ID": "org_9", "CLIENT": "client-9", "APP_ID": "app-9", "ID": "id-9"}
DEFINITION = definition("org_acme", "export", "http.request", params={"url": "https://api.acme.com/export"})


def commands(page: Path) -> list[str]:
    found = blocks(page.read_text(encoding="utf-8"))
    return [
        command
        for before, block in zip([None, *found], found, strict=False)
        if treatment(block, before, found) == "command"
        for command in re.findall(r"(?m)^\$ (.*)", block.text)
    ]


RUN = [page for page in PAGES if commands(page)]


def settings(page: list[Block], cli: CommandLine) -> str:
    """The issuer of the page, at an address where no provider listens."""
    database = cli.settings.read_text().partition("[issuers.main]")[0]
    issuer = {"profile": "kinde", "audience": "https://api.acme.com"}
    for block in page:
        if block.language == "toml":
            issuer |= tomllib.loads(block.text).get("issuers", {}).get("main", {})
    issuer["url"] = f"http://127.0.0.1:{free_port()}"
    keys = "".join(f'{key} = "{issuer[key]}"\n' for key in ("profile", "url", "audience"))
    return f"{database}[issuers.main]\n{keys}"


def code_of(command: str) -> int:
    """The exit code here: `orgs check` finds no provider, and no worker has stored the rules of a pool."""
    return 1 if " orgs check " in command else 3 if " pools forget " in command else 0


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path, migrated_sqlite_file: Path, plugins: Path):
    cli = CommandLine(tmp_path, copied(migrated_sqlite_file, tmp_path))
    found = blocks(page.read_text(encoding="utf-8"))
    cli.settings.write_text(settings(found, cli))
    cli("keys", "generate")
    cli("orgs", "import", "-", stdin=json.dumps(ORG))
    (tmp_path / "secret").write_text("s3cr3t-of-the-page")
    for block in found:
        given = tomllib.loads(block.text) if block.language == "toml" else {}
        if "budget" in given or "rollout" in given:
            named = [(each["definitions"], each["from"]) for each in given.get("rollout", ())]
            params = {"knowledge_base": "https://kb.acme.com", "chat": "https://chat.acme.com"}
            definitions = [definition("org_acme", *each, params=params) for each in named]
            cli("apply", "-", stdin="\n".join((*definitions, block.text)))
    run = ""
    if any(command.endswith(" RUN") for command in commands(page)):
        cli("apply", "-", stdin=DEFINITION)
        run = cli("definitions", "run", "org_acme", "export", "-o", "id").out.strip()

    for command in commands(page):
        words = [word for word in shlex.split(command.partition(" > ")[0], comments=True) if "=" not in word]
        assert words[0] in ("python", "orgworker"), command
        words = words[1 if words[0] == "orgworker" else words.index("worker") + 1 :]
        given = PLACEHOLDERS | {"FILE": str(tmp_path / "secret"), "RUN": run}
        with as_process(tmp_path, {}):
            done = cli(*(given.get(word, word) for word in words), check=False)
        assert done.code == code_of(command), f"{command}\n{done.out}{done.err}"
        assert "s3cr3t" not in done.out + done.err


def test_the_line_of_files_md_for_orgs_import(cli: CommandLine):
    found = blocks((ROOT / "docs/reference/files.md").read_text(encoding="utf-8"))
    [line] = [block.text for block in found if block.language == "json"]

    cli("orgs", "import", "-", stdin=line)

    assert cli("orgs", "show", "org_acme", "-o", "json").json()["tags"] == ["pro"]
