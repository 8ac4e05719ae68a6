"""Each command driven into failure: the exit code that is documented, one error that says what to do next."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from tests.fakes import forked
from tests.fakes.cli import CommandLine, Completed
from tests.fakes.site import definition
from tests.suites import is_here
from worker.app.shell import build

RUN = "01999999-9999-7999-8999-999999999999"
FILE = definition("org_acme", "tick", "acme.note", "@yearly")
SECRET = "Zq7-canary-secret-23421608"
LINE = json.dumps({"code": "org_b", "name": "B", "issuer": "main", "client_id": "b", "client_secret": SECRET})
BEAT = "beat_schedule = {'tick': {'task': 'acme.note', 'schedule': 60}}\n"
CREDENTIAL = ("--client-id", "b", "--secret-file", "-")

# Each command as it would be right, and what it reads from standard input.
PRICES = (
    '[{"id": "house", "name": "House", "api_pattern": "x", "models": '
    '[{"id": "m", "match": {"equals": "m"}, "prices": {"input_mtok": 1}}]}]'
)
RIGHT: dict[str, tuple[tuple[str, ...], str]] = {
    "run": ((), ""),
    "host": ((), ""),
    "serve": ((), ""),
    "provision": ((), ""),
    "relay": ((), ""),
    "outbox ddl": (("postgresql",), ""),
    "outbox list": ((), ""),
    "outbox retry": (("1",), ""),
    "demo": (("--seconds", "1"), ""),
    "apply": (("-",), FILE),
    "try": (("acme.note",), ""),
    "new-job": (("acme.fresh",), ""),
    "check": ((), ""),
    "doctor": ((), ""),
    "completion": (("bash",), ""),
    "orgs add": (("org_new",), ""),
    "orgs import": (("-",), LINE),
    "status": ((), ""),
    "failures": ((), ""),
    "login": ((), ""),
    "orgs list": ((), ""),
    "orgs show": (("org_acme",), ""),
    "orgs pause": (("org_acme",), ""),
    "orgs resume": (("org_acme",), ""),
    "orgs suspend": (("org_acme",), ""),
    "orgs remove": (("org_acme",), ""),
    "orgs check": (("org_acme",), ""),
    "orgs sync": ((), ""),
    "orgs properties": (("org_acme",), ""),
    "orgs diff": (("org_acme",), ""),
    "credentials add": (("org_acme", *CREDENTIAL, "--no-verify"), SECRET),
    "credentials list": ((), ""),
    "credentials verify": (("org_acme",), ""),
    "credentials rotate": (("org_acme", *CREDENTIAL), SECRET),
    "credentials retire": (("org_acme", "1"), ""),
    "tokens drop": (("--all",), ""),
    "definitions backfill": (("org_acme", "tick", "--from", "2020-01-01", "--until", "2020-01-02"), ""),
    "definitions backfills": ((), ""),
    "definitions list": ((), ""),
    "definitions show": (("org_acme", "tick"), ""),
    "definitions next": (("org_acme", "tick"), ""),
    "definitions run": (("org_acme", "tick"), ""),
    "definitions edit": (("org_acme", "tick", "priority=1"), ""),
    "definitions state show": (("org_acme", "tick"), ""),
    "definitions state set": (("org_acme", "tick", "--data", "{}"), ""),
    "definitions state clear": (("org_acme", "tick"), ""),
    "definitions pause": (("org_acme", "tick"), ""),
    "definitions resume": (("org_acme", "tick"), ""),
    "templates list": ((), ""),
    "templates show": (("export",), ""),
    "templates run": (("export",), ""),
    "templates backfill": (("nightly", "--from", "2026-01-01", "--until", "2026-01-02"), ""),
    "templates close": (("export",), ""),
    "calendars list": ((), ""),
    "calendars show": (("holidays",), ""),
    "calendars remove": (("holidays",), ""),
    "limits list": ((), ""),
    "batches list": ((), ""),
    "limits show": (("https://api.example.com", "org"), ""),
    "limits remove": (("https://api.example.com", "org"), ""),
    "rollouts list": ((), ""),
    "rollouts show": (("digest-v2",), ""),
    "rollouts plan": (("digest-v2",), ""),
    "rollouts advance": (("digest-v2",), ""),
    "rollouts halt": (("digest-v2", "--reason", "bad"), ""),
    "rollouts resume": (("digest-v2", "--reason", "fixed"), ""),
    "rollouts finish": (("digest-v2", "--reason", "good"), ""),
    "rollouts undo": (("digest-v2", "--reason", "bad"), ""),
    "runs why": ((RUN,), ""),
    "runs retry": ((RUN,), ""),
    "runs cancel": ((RUN,), ""),
    "runs answer": ((RUN, "approval", "--data", "true"), ""),
    "runs list": ((), ""),
    "runs show": ((RUN,), ""),
    "runs logs": ((RUN,), ""),
    "skips list": ((), ""),
    "audit list": ((), ""),
    "handlers list": ((), ""),
    "handlers show": (("acme.note",), ""),
    "handlers forget": (("acme.note",), ""),
    "budgets list": ((), ""),
    "budgets raise": (("org_acme", "llm_tokens", "--by", "10"), ""),
    "budgets remove": ((RUN,), ""),
    "usage list": ((), ""),
    "prices list": ((), ""),
    "prices show": (("gpt-5-mini",), ""),
    "prices update": (("-",), PRICES),
    "db upgrade": ((), ""),
    "db check": ((), ""),
    "keys generate": ((), ""),
    "operators list": ((), ""),
    "operators add": (("ops",), ""),
    "operators remove": (("ops",), ""),
    "operators mcp-token": (("ops",), ""),
    "hosts list": ((), ""),
    "hosts add": (("gpu1", "--pool", "eu-gpu"), ""),
    "hosts remove": (("gpu1",), ""),
    "pools list": ((), ""),
    "pools forget": (("eu-gpu",), ""),
    "pools approvals": ((), ""),
    "pools approve": (("eu-gpu", "acme.note", "1-0"), ""),
    "pools revoke": (("eu-gpu", "acme.note"), ""),
    "product list": ((), ""),
    "product allow": (("shop", "org_acme"), ""),
    "product revoke": (("shop",), ""),
    "keys list": ((), ""),
    "keys rekey": ((), ""),
    "keys add": ((), ""),
    "keys remove": (("k00000000",), ""),
    "secrets add": (("org_acme", "openai"), SECRET),
    "secrets list": ((), ""),
    "secrets bind": (("org_acme", "openai", "--for", "https://api.openai.com"), ""),
    "secrets rotate": (("org_acme", "openai"), SECRET),
    "secrets remove": (("org_acme", "openai"), ""),
    "config show": ((), ""),
    "installation show": ((), ""),
    "installation adopt": (("--same",), ""),
    "import crontab": (("-", "--org", "org_acme", "--handler", "acme.note"), "0 3 * * * true\n"),
    "import celery-beat": (("-", "--org", "org_acme"), BEAT),
    "import apscheduler": (("-", "--org", "org_acme"), "scheduler.add_job(tick, 'cron', hour=3)\n"),
}
RIGHT = {command: line for command, line in RIGHT.items() if is_here(command)}
# These go on without an output of their own to choose.
WITHOUT_OUTPUT = {"run", "host", "serve", "provision", "relay", "demo", "completion", "new-job"}
# Servers change the process they are in, so they get one of their own.
SERVERS = {"run", "host", "serve", "provision", "relay"}
IMPORTS = {"import crontab", "import celery-beat", "import apscheduler"}
NEED_NO_SETTINGS = {"demo", "completion", "try", "new-job", "outbox ddl"} | IMPORTS
NEED_NO_DATABASE = NEED_NO_SETTINGS | {"db upgrade", "keys generate", "config show"}
LIST_WHAT_IS_INSTALLED = {"handlers list", "handlers show"}
# Those that look at a database that is there, of whatever version, or not at all.
TAKE_ANY_SCHEMA = NEED_NO_SETTINGS | {"config show", "keys generate"}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name))


def in_a_process(cli: CommandLine, *arguments: str) -> Completed:
    command = [sys.executable, "-m", "worker", "--config", str(cli.settings), *arguments]
    return forked.run(command, cwd=cli.settings.parent, env=os.environ)


def failing(
    cli: CommandLine,
    command: str,
    *more: str,
    code: int,
    stdin: str | None = None,
    outputs: tuple[str, ...] = ("text", "json"),
) -> None:
    """Give a command that must fail, for people and for programs; what it says must be of use.

    The option that is not there tries every output of each command; for failures of what all commands
    share, settings and database, one output is enough.
    """
    arguments, given = RIGHT[command]
    given = given if stdin is None else stdin
    line = (*command.split(), *(more or arguments))
    for output in ("text",) if command in WITHOUT_OUTPUT else outputs:
        options = () if output == "text" else ("-o", output)
        if command in SERVERS:
            said = in_a_process(cli, *line)
        else:
            said = cli(*line, *options, stdin=given, check=False)
        assert (said.code, said.out) == (code, ""), said
        if output == "text":
            error, fix = [row for row in said.err.splitlines() if row.startswith(("error: ", "fix: "))]
            assert error.startswith("error: ")
            assert len(fix) > len("fix: ")
        else:
            told = json.loads(said.err)["error"]
            assert set(told) == {"code", "message", "fix"}
            assert all(told.values()), told
        for word in ("Traceback", "error: unexpected", SECRET):
            assert word not in said.err


@pytest.fixture(scope="module")
def site(cli: CommandLine) -> CommandLine:
    """With an org, a definition, a template and a run that has ended."""
    cli("orgs", "add", "org_acme")
    cli("apply", "-", stdin=FILE)
    template = '[[template]]\nname = "export"\norgs = "all"\nhandler = "acme.note"\nschedule = "@yearly"\n'
    if is_here("calendars"):
        template += 'calendar = "holidays"\n[[calendar]]\nname = "holidays"\ndates = ["2030-12-25"]\n'
    if is_here("limits"):
        template += '[[limit]]\norigin = "https://api.example.com"\nper = "org"\nrate = "40/s"\n'
    if is_here("rollouts"):
        template += '[[rollout]]\nname = "digest-v2"\ndefinitions = "export"\nfrom = "acme.note"\n'
        template += 'to = "acme.note_v2"\nsteps = ["5%", "100%"]\n'
    cli("apply", "-", stdin=template)
    return cli


@pytest.fixture(scope="module")
def ended(site: CommandLine) -> str:
    run = site("definitions", "run", "org_acme", "tick", "-o", "id").out.strip()
    site("runs", "cancel", run)
    return run


def elsewhere(folder: Path, url: str) -> CommandLine:
    return CommandLine(folder, url)


def test_every_command_has_its_right_line_here():
    assert set(commands(typer.main.get_command(build()))) == set(RIGHT)


@pytest.mark.parametrize("command", RIGHT)
def test_an_option_that_is_not_there_exits_2(cli: CommandLine, command: str):
    failing(cli, command, *RIGHT[command][0], "--nonsense", code=2, outputs=("text", "json", "jsonl"))


@pytest.mark.parametrize("command", sorted(set(RIGHT) - NEED_NO_SETTINGS))
def test_settings_that_cannot_be_read_exit_78(tmp_path: Path, command: str):
    cli = elsewhere(tmp_path, f"sqlite:///{tmp_path / 'worker.db'}")
    cli.settings.write_text("[database]\nurl = 7\nnonsense = true\n")
    failing(cli, command, code=78, outputs=("json",))


@pytest.mark.parametrize("command", [each for each in ("orgs list", "host", "run") if is_here(each)])
def test_a_file_of_settings_that_is_broken_or_missing_exits_78(tmp_path: Path, command: str):
    cli = elsewhere(tmp_path, f"sqlite:///{tmp_path / 'worker.db'}")
    cli.settings.write_text("[database")
    failing(cli, command, code=78)
    cli.settings.unlink()
    failing(cli, command, code=78)


@pytest.mark.parametrize("command", sorted(set(RIGHT) - NEED_NO_DATABASE - LIST_WHAT_IS_INSTALLED))
def test_a_database_that_is_not_there_exits_78_and_none_is_made(tmp_path: Path, command: str):
    cli = elsewhere(tmp_path, f"sqlite:///{tmp_path / 'worker.db'}")
    failing(cli, command, code=78, outputs=("json",))
    assert not (tmp_path / "worker.db").exists()


@pytest.mark.parametrize("command", sorted(set(RIGHT) - TAKE_ANY_SCHEMA))
def test_a_database_of_a_newer_release_exits_78(site: CommandLine, tmp_path: Path, command: str):
    shutil.copy(site.settings.parent / "worker.db", tmp_path / "worker.db")
    with sqlite3.connect(tmp_path / "worker.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("DELETE FROM facts WHERE name = 'schema.works_with'")
    connection.close()
    failing(elsewhere(tmp_path, f"sqlite:///{tmp_path / 'worker.db'}"), command, code=78, outputs=("json",))


# Those that look at no database of ours. A host must not have one; `provision` has no issuer to follow here,
# and says that first; the outbox is in that of a product.
LOOK_AT_NO_DATABASE = NEED_NO_SETTINGS | {
    *("keys generate", "config show", "provision", "host", "relay", "outbox list", "outbox retry")
}


@pytest.mark.parametrize("command", sorted(set(RIGHT) - LOOK_AT_NO_DATABASE))
def test_a_database_that_cannot_be_reached_exits_69(tmp_path: Path, command: str):
    with socket.socket() as closed:
        # Bound and not listening: nobody else gets the port, and no connection is taken.
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        cli = elsewhere(tmp_path, f"postgresql://nobody:{SECRET}@127.0.0.1:{port}/absent")
        failing(cli, command, code=69, outputs=("json",))


WRONG: list[tuple[str, tuple[str, ...], int]] = [
    ("run", ("more",), 2),
    ("host", ("more",), 2),
    ("serve", ("more",), 2),
    ("relay", ("more",), 2),
    ("outbox ddl", ("oracle",), 2),
    ("outbox ddl", ("mysql", "--table", "a; b"), 78),
    ("outbox list", ("--limit", "0"), 2),
    ("outbox list", ("--state", "lost"), 2),
    # [relay] is empty here.
    ("outbox list", (), 78),
    ("outbox retry", ("soon",), 2),
    ("demo", ("--seconds", "soon"), 2),
    ("completion", ("tcsh",), 2),
    ("new-job", ("no name",), 2),
    ("apply", ("absent.toml",), 2),
    ("try", ("acme.not-here",), 3),
    ("import crontab", ("absent", "--org", "org_acme", "--handler", "acme.note"), 2),
    ("import crontab", ("-", "--org", "org_acme"), 2),
    ("import crontab", ("-", "--org", "a/b", "--handler", "acme.note"), 2),
    ("import crontab", ("-", "--org", "org_acme", "--handler", "acme.note", "--zone", "Mars/Olympus"), 2),
    ("import celery-beat", ("-",), 2),
    ("import celery-beat", ("absent.py", "--org", "org_acme"), 2),
    ("import apscheduler", ("-", "--org", "org_acme", "--handler", " "), 2),
    ("import apscheduler", ("absent.py", "--org", "org_acme"), 2),
    ("failures", ("--state", "lost"), 2),
    ("failures", ("--since", "soon"), 2),
    ("orgs add", ("org_acme",), 5),
    ("orgs add", ("org_c", "--issuer", "absent"), 2),
    ("orgs add", ("org_c", "--timezone", "Mars/Olympus"), 2),
    ("orgs add", ("org_c", "--weight", "0"), 2),
    ("orgs import", ("absent.jsonl",), 2),
    ("orgs list", ("--state", "lost"), 2),
    ("orgs list", ("--limit", "0"), 2),
    ("orgs list", ("--since", "soon"), 2),
    ("orgs list", ("--after", "x"), 3),
    ("orgs list", ("--org", "absent"), 3),
    ("orgs show", ("absent",), 3),
    ("orgs pause", ("absent",), 3),
    ("orgs resume", ("absent",), 3),
    ("orgs suspend", ("absent",), 3),
    ("orgs remove", ("absent",), 3),
    ("orgs check", ("org_acme", "--all"), 2),
    ("orgs check", ("absent",), 3),
    ("credentials add", ("org_acme", "--client-id", "b"), 2),
    ("credentials add", ("absent", *CREDENTIAL), 3),
    ("credentials add", ("org_acme", "--client-id", "b", "--secret-file", "absent"), 2),
    ("credentials list", ("absent",), 3),
    ("credentials list", ("--state", "lost"), 2),
    ("credentials list", ("--limit", "1001"), 2),
    ("credentials verify", ("absent",), 3),
    ("credentials verify", ("org_acme", "7"), 3),
    ("credentials rotate", ("absent", *CREDENTIAL), 3),
    ("credentials rotate", ("org_acme", *CREDENTIAL, "--quiet", "soon"), 2),
    ("credentials retire", ("org_acme", "7"), 3),
    ("credentials retire", ("org_acme", "newest"), 2),
    ("secrets add", ("absent", "openai"), 3),
    ("secrets add", ("org_acme", "openai", "--for", "http://api.openai.com"), 2),
    ("secrets add", ("org_acme", "openai", "--header", "x-api-key"), 2),
    ("secrets bind", ("org_acme", "openai"), 2),
    ("secrets bind", ("org_acme", "openai", "--clear", "--for", "https://api.openai.com"), 2),
    ("secrets bind", ("org_acme", "openai", "--for", "https://api.openai.com", "--header", "host"), 2),
    ("secrets bind", ("org_acme", "absent", "--clear"), 3),
    ("definitions backfill", ("org_acme", "tick", "--from", "2020-01-02", "--until", "2020-01-01"), 2),
    ("definitions backfill", ("org_acme", "absent", "--from", "2020-01-01", "--until", "2020-01-02"), 3),
    ("definitions backfill", ("org_acme", "tick", "--from", "2020-01-01", "--until", "2120-01-01"), 2),
    (
        "definitions backfill",
        ("org_acme", "tick", "--from", "2020-01-01", "--until", "2020-01-02", "--cancel"),
        3,
    ),
    ("definitions backfills", ("--org", "absent"), 3),
    ("definitions list", ("--state", "lost"), 2),
    ("definitions list", ("--org", "absent"), 3),
    ("definitions show", ("org_acme", "absent"), 3),
    ("definitions next", ("org_acme",), 2),
    ("definitions next", ("org_acme", "absent"), 3),
    ("definitions next", ("--schedule", "0 0 31 2 *"), 78),
    ("definitions next", ("--schedule", "nonsense"), 78),
    ("definitions next", ("--schedule", "@daily", "--timezone", "Mars/Olympus"), 78),
    ("definitions next", ("--schedule", "@daily", "-n", "0"), 2),
    ("definitions run", ("org_acme", "absent"), 3),
    ("definitions run", ("org_acme", "tick", "--param", "nonsense"), 2),
    ("definitions run", ("org_acme", "tick", "--request-key", ""), 2),
    ("definitions edit", ("org_acme", "tick", "nonsense=1"), 78),
    ("definitions edit", ("org_acme", "tick", "priority=1", "--revision", "99"), 5),
    ("definitions pause", ("org_acme", "absent"), 3),
    ("definitions resume", ("org_acme", "tick"), 5),
    ("templates list", ("--state", "lost"), 2),
    ("templates show", ("absent",), 3),
    ("templates close", ("absent",), 3),
    ("runs why", ("--org", "org_acme"), 2),
    ("runs why", (RUN,), 3),
    ("runs why", ("--org", "org_acme", "--definition", "absent", "--at", "2020-01-01"), 3),
    ("calendars list", ("--limit", "0"), 2),
    ("calendars show", ("absent",), 3),
    ("calendars remove", ("absent",), 3),
    ("calendars remove", ("holidays",), 5),
    ("limits list", ("--limit", "0"), 2),
    ("batches list", ("--limit", "0"), 2),
    ("limits show", ("https://absent.example", "org"), 3),
    ("limits show", ("https://api.example.com", "day"), 3),
    ("limits remove", ("https://absent.example", "org"), 3),
    ("rollouts list", ("--limit", "0"), 2),
    ("rollouts show", ("absent",), 3),
    ("rollouts plan", ("absent",), 3),
    ("rollouts advance", ("absent",), 3),
    ("rollouts halt", ("absent", "--reason", "bad"), 3),
    ("rollouts halt", ("digest-v2",), 2),
    ("rollouts halt", ("digest-v2", "--reason", "bad"), 5),
    ("rollouts resume", ("digest-v2", "--reason", "fixed"), 5),
    ("rollouts finish", ("digest-v2", "--reason", "good"), 5),
    ("rollouts undo", ("absent", "--reason", "bad"), 3),
    ("runs why", ("--org", "org_acme", "--definition", "tick", "--at", "noon"), 2),
    ("runs retry", (RUN, "--canary", "1"), 2),
    ("runs retry", ("--org", "absent"), 3),
    ("runs retry", (RUN,), 3),
    ("runs retry", ("--state", "waiting"), 2),
    ("runs cancel", (RUN, "--dry-run"), 2),
    ("runs cancel", (RUN,), 3),
    ("runs cancel", ("--org", "absent"), 3),
    ("runs list", ("--state", "lost"), 2),
    ("runs list", ("--limit", "1001"), 2),
    ("runs list", ("--org", "absent"), 3),
    ("runs show", (RUN,), 3),
    ("runs show", ("not-an-id",), 3),
    ("runs logs", (RUN,), 3),
    ("skips list", ("--org", "absent"), 3),
    ("skips list", ("--limit", "0"), 2),
    ("audit list", ("--org", "absent"), 3),
    ("handlers list", ("--limit", "0"), 2),
    ("handlers show", ("absent",), 3),
    ("handlers forget", ("absent",), 3),
    ("pools approvals", ("absent",), 3),
    ("pools approve", ("absent", "acme.note", "1-0"), 3),
    ("pools revoke", ("absent", "acme.note"), 3),
    # SQLite has no logins.
    ("product allow", ("shop", "org_acme"), 78),
    ("product revoke", ("shop",), 78),
    ("budgets list", ("--org", "absent"), 3),
    ("budgets list", ("--limit", "0"), 2),
    ("budgets raise", ("absent", "llm_tokens", "--by", "1"), 3),
    ("budgets raise", ("org_acme", "llm_tokens", "--by", "1"), 3),
    ("budgets raise", ("org_acme", "llm_tokens", "--by", "0"), 2),
    ("budgets raise", ("org_acme", "llm_tokens", "--by", "1", "--per", "year"), 2),
    ("budgets remove", (RUN,), 3),
    ("budgets remove", ("not-an-id",), 3),
    ("usage list", ("--org", "absent"), 3),
    ("usage list", ("--limit", "0"), 2),
    ("usage list", ("--by", "week"), 2),
    ("usage list", ("--by", "org,week"), 2),
    ("prices list", ("--limit", "0"), 2),
    ("prices list", ("--provider", "absent"), 3),
    ("prices show", ("absent-model",), 3),
    ("prices show", ("two words",), 2),
    ("prices show", ("gpt-5-mini", "--org", "absent"), 3),
    ("prices update", ("absent.json",), 2),
    ("budgets raise", ("org_acme", "money", "--by", "5"), 2),
    ("usage list", ("--since", "2020-01-01"), 2),
    ("keys generate", (), 5),
    ("keys rekey", ("--batch", "0"), 2),
    ("keys remove", ("k00000000",), 3),
]


@pytest.mark.parametrize(("command", "more", "code"), [line for line in WRONG if is_here(line[0])])
def test_what_is_wrong_exits_with_its_own_code(
    site: CommandLine, keyring: None, command: str, more: tuple[str, ...], code: int
):
    failing(site, command, *more, code=code)


@pytest.fixture(scope="module")
def keyring(site: CommandLine) -> None:
    site("keys", "generate", check=False)


@pytest.mark.parametrize(
    "command", ["runs retry", "runs cancel", "definitions next", "runs why", "orgs check"]
)
def test_a_command_that_names_nothing_exits_2(site: CommandLine, command: str):
    done = site(*command.split(), "-o", "json", check=False)

    assert (done.code, done.out) == (2, "")
    assert json.loads(done.err)["error"]["fix"]


def test_an_output_that_is_not_known_exits_2_in_words(site: CommandLine):
    done = site("runs", "list", "-o", "yaml", check=False)

    assert (done.code, done.out) == (2, "")
    assert "fix: " in done.err


def test_a_run_that_has_ended_is_not_cancelled_again(site: CommandLine, ended: str):
    failing(site, "runs cancel", ended, code=5)


def test_a_file_that_says_nothing_of_use_exits_78(site: CommandLine):
    for text in (
        "[[definition",
        "nonsense = 1",
        definition("org_absent", "tick", "acme.note"),
        definition("org_acme", "tick", "acme.absent"),
        definition("org_acme", "tick", "acme.note", "0 0 31 2 *"),
        definition("org_acme", "tick", "acme.note", timeout="soon"),
        definition("org_acme", "tick", "acme.note", retry="1"),
    ):
        failing(site, "apply", "-", code=78, stdin=text)


@pytest.mark.feature("calendars")
def test_a_file_whose_calendar_says_nothing_of_use_exits_78(site: CommandLine):
    for text in (
        definition("org_acme", "tick", "acme.note", calendar="absent"),
        '[[calendar]]\nname = "holidays"\nics = "absent.ics"',
    ):
        failing(site, "apply", "-", code=78, stdin=text)


def test_a_line_that_cannot_be_imported_exits_2_and_never_shows_the_secret(site: CommandLine):
    for text in (
        LINE[:-1],
        "[]",
        LINE.replace('"main"', '"absent"'),
        f"{LINE}\n{LINE}",
        LINE.replace("b", ""),
    ):
        failing(site, "orgs import", "-", code=2, stdin=text)


def test_without_the_key_ring_nothing_sealed_is_touched(tmp_path: Path, site: CommandLine):
    site("orgs", "import", "-", stdin=LINE)
    shutil.copy(site.settings.parent / "worker.db", tmp_path / "worker.db")
    lost = elsewhere(tmp_path, f"sqlite:///{tmp_path / 'worker.db'}")
    for command in ("keys rekey", "keys add", "keys remove", "keys generate", "run", "credentials add"):
        failing(lost, command, code=78)
