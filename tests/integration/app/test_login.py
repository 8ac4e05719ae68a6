"""`login` prints a link to this installation's console."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.fakes.cli import CommandLine
from tests.fakes.ports import free_port
from worker.errors import ConfigurationError
from worker.features.console.verbs import console_of
from worker.settings import load
from worker.settings.sections import WebSettings
from worker.store import sign_in
from worker.wiring import open_database


@pytest.mark.parametrize(
    ("web", "origin"),
    [
        ({}, "http://127.0.0.1:8470"),
        ({"listen": "0.0.0.0:9000"}, "http://127.0.0.1:9000"),
        ({"listen": "[::]:9000"}, "http://127.0.0.1:9000"),
        ({"listen": "[::1]:9000"}, "http://[::1]:9000"),
        ({"listen": "10.0.0.5:9000"}, "http://10.0.0.5:9000"),
        ({"listen": "", "public_url": "https://jobs.acme.com"}, "https://jobs.acme.com"),
    ],
)
def test_the_link_goes_to_the_console_of_the_settings(web: dict[str, str], origin: str):
    assert (
        console_of(WebSettings.model_construct(**{"public_url": "", "listen": "127.0.0.1:8470", **web}))
        == origin
    )


@pytest.mark.parametrize("listen", ["", "127.0.0.1:0"])
def test_a_console_without_an_address_is_refused(listen: str):
    with pytest.raises(ConfigurationError, match="the console has no known address"):
        console_of(WebSettings.model_construct(listen=listen, public_url=""))


def test_each_link_logs_in_once_as_the_person_at_the_terminal(own_cli: CommandLine):
    """The control is the second use of the same code."""
    cli = own_cli
    listening = socket.create_server(("127.0.0.1", 0))
    listen = f"127.0.0.1:{listening.getsockname()[1]}"
    with listening:
        first = cli("--set", f"web.listen={listen}", "login")
        second = cli("--set", f"web.listen={listen}", "login", "-o", "json").json()

    links = [first.out.strip(), second["url"]]
    assert first.err == ""
    assert links[0] != links[1]
    assert all(link.startswith(f"http://{listen}/login/once/") for link in links)
    settings = load(str(cli.settings), {}, {})
    database = open_database(settings)
    try:
        for link in links:
            key = sign_in.sha256(urlsplit(link).path.rpartition("/")[2])
            with database.transaction() as connection:
                now = database.now(connection)
                used = sign_in.use_login(connection, key, kind="link", at=now)
                again = sign_in.use_login(connection, key, kind="link", at=now)
            assert used is not None and used["client"].endswith(" (terminal)")
            assert again is None
    finally:
        database.close()


def test_a_console_that_is_down_is_said(own_cli: CommandLine):
    done = own_cli("--set", f"web.listen=127.0.0.1:{free_port()}", "login")

    assert "start a worker or `serve`, and then open the link" in done.err
