"""No command shows a password of a URL or a secret path, however the URL is malformed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.cli import CommandLine, Completed
from tests.unit.telemetry.test_shown_url import MALFORMED

CANARY = "hunter2"  # too short for the masker to know it: nothing but what shows URLs keeps it back
DATABASES = (
    *(url for url in MALFORMED if not url.startswith("https")),
    "postgresql://worker:hunter2@127.0.0.1:1/w",
    "postgresql://worker:hunter2@127.0.0.1:port/w",
    "postgresql://127.0.0.1:1/w?user=worker&password=hunter2",
    "postgresql://worker:hunter2@[::1/w",
    "postgresql://worker:hunter2@",
    "postgresql+asyncpg://worker:hunter2@127.0.0.1:1/w",
)
ADDRESSES = (
    "https://ada:hunter2@127.0.0.1:1/x",
    "https://ada:p@hunter2@127.0.0.1:1/x",
    "https://hunter2@127.0.0.1:1/x",
    "https://127.0.0.1:1/x?key=hunter2",
    "https://127.0.0.1:hunter2/x",
    "https://ada:hunter2℀@127.0.0.1/x",
    "https://[hunter2]/x",
    "https://[hunter2/x",
    "https://127.0.0.1/x#hunter2",
    "https:/hunter2",
    "//ada:hunter2@127.0.0.1",
    "hunter2",
)
SECRET_PATH = "https://127.0.0.1:1/services/hunter2"
WEBHOOK_SECRET = "alerts.webhook_secret=0123456789abcdef"


@pytest.fixture
def cli(tmp_path: Path, migrated_sqlite_url: str) -> CommandLine:
    return CommandLine(tmp_path, migrated_sqlite_url)


def all_of(done: Completed) -> str:
    return done.out + done.err


@pytest.mark.parametrize("url", DATABASES)
def test_no_command_shows_the_password_of_the_database(cli: CommandLine, url: str):
    for setting, commands in {
        "database.url": (
            ["orgs", "list"],
            ["db", "check"],
            ["db", "upgrade"],
            ["doctor"],
            ["run"],
            ["serve"],
        ),
        "database.owner_url": (["db", "upgrade"],),
    }.items():
        for arguments in (["config", "show"], ["config", "show", "-o", "json"], *commands):
            done = cli("--set", f"{setting}={url}", *arguments, check=False)

            assert CANARY not in all_of(done), arguments
            assert "Traceback" not in done.err
            assert "unexpected" not in done.err, "it is refused in words of ours"


@pytest.mark.parametrize("url", [*ADDRESSES, SECRET_PATH])
@pytest.mark.parametrize(
    "setting",
    [
        *("alerts.webhook_url", "alerts.deadman_url", "tracing.endpoint", "tracing.dashboard_url"),
        *("issuers.main.url", "issuers.main.token_endpoint", "issuers.main.keys_url"),
        "issuers.main.api_origins",
    ],
)
def test_no_command_shows_a_secret_of_an_address(cli: CommandLine, tmp_path: Path, setting: str, url: str):
    if url == SECRET_PATH and not setting.startswith(("alerts.", "tracing.endpoint")):
        return  # the path of an issuer is no secret
    if url == CANARY and setting == "issuers.main.api_origins":
        return  # nor is a host whose scheme is missing
    given = ("--set", WEBHOOK_SECRET, "--set", f"{setting}={url}")
    bundle = tmp_path / "bundle.json"

    for arguments in (
        ["config", "show"],
        ["config", "show", "-o", "json"],
        ["doctor", "--bundle", str(bundle)],
        ["check"],
    ):
        done = cli(*given, *arguments, check=False)

        assert CANARY not in all_of(done), arguments
        assert "unexpected" not in done.err
    assert not bundle.exists() or CANARY not in bundle.read_text()


def test_what_is_no_setting_is_not_quoted(cli: CommandLine):
    for text in ("postgresql://worker:hunter2@127.0.0.1/w", "worker:hunter2@127.0.0.1"):
        assert CANARY not in cli("--set", text, "config", "show", check=False).err


def test_an_origin_of_a_definition_shows_no_password(cli: CommandLine, tmp_path: Path):
    for url in ADDRESSES[:-1]:
        file = tmp_path / "definitions.toml"
        file.write_text(
            '[[definition]]\norg = "org_a"\nname = "one"\nhandler = "http.request"\nschedule = "@daily"\n'
            f"api_origins = [{json.dumps(url)}]\n"
        )

        done = cli("apply", str(file), check=False)

        assert done.code != 0
        assert CANARY not in all_of(done), url
