"""`credentials add` requests a token with what it has stored."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.ports import free_port
from worker.demo.provider import Application, Provider, serve_provider

AUDIENCE = "https://api.acme.com"
ADD = ("credentials", "add", "org_acme", "--client-id", "m2m", "--secret-file", "-")


@pytest.fixture
def provider() -> Iterator[Provider]:
    made, thread = serve_provider([Application("org_acme", "m2m", "right", audiences=(AUDIENCE,))])
    with thread:
        yield made


@pytest.fixture
def cli(own_cli: CommandLine, provider: Provider) -> CommandLine:
    issuer_at(own_cli, provider.url)
    own_cli("orgs", "add", "org_acme", "--name", "Acme", "--issuer", "main")
    return own_cli


def issuer_at(cli: CommandLine, url: str) -> None:
    before = cli.settings.read_text()
    issuer = f'[issuers.main]\nurl = "{url}"\naudience = "{AUDIENCE}"\n'
    cli.settings.write_text(before[: before.index("[issuers.main]")] + issuer)


def stored(cli: CommandLine) -> int:
    return len(cli("credentials", "list", "org_acme", "-o", "json").json())


def test_a_secret_that_works_is_stored_and_verified(cli: CommandLine, provider: Provider):
    done = cli(*ADD, "-o", "json", stdin="right\n")

    assert json.loads(done.out)["generation"] == 1
    assert done.err == "verified: issuer main gives a usable token for generation 1\n"
    assert provider.token_requests["m2m"] == 1


def test_a_secret_that_is_rejected_stays_stored_and_exits_1(cli: CommandLine, provider: Provider):
    done = cli(*ADD, "-o", "json", stdin="wrong", check=False)

    assert done.code == 1
    assert json.loads(done.out)["generation"] == 1
    assert "rejects the credentials of org org_acme" in done.err
    assert "generation 1 is stored; `credentials retire org_acme 1` undoes it" in done.err
    assert "wrong" not in done.err
    assert stored(cli) == 1


def test_no_verify_sends_nothing(cli: CommandLine, provider: Provider):
    """The control: the same wrong secret is only stored."""
    done = cli(*ADD, "--no-verify", stdin="wrong")

    assert done.err == ""
    assert not provider.token_requests
    assert stored(cli) == 1


def test_an_issuer_that_does_not_respond_is_a_warning(cli: CommandLine):
    issuer_at(cli, f"http://127.0.0.1:{free_port()}")

    done = cli(*ADD, stdin="right")

    assert done.code == 0
    assert "warning: stored, but not verified: issuer main does not respond" in done.err
    assert "`credentials verify org_acme 1`" in done.err
    assert stored(cli) == 1
