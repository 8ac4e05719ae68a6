"""`serve`: a process that shows an installation and runs nothing of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping

import httpx
import psycopg
import pytest

from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from tests.fakes.site import AUDIENCE, Site, application, definition, wait_until
from worker.ids import new_id
from worker.store import roles

pytestmark = pytest.mark.feature("console")

Process = subprocess.Popen[str]


@pytest.fixture
def port(site_on_either: Site) -> int:
    port = free_port()
    site_on_either.configure(web=f'listen = "127.0.0.1:{port}"')
    return port


@pytest.fixture
def served(site_on_either: Site, port: int) -> Iterator[Process]:
    with serving(site_on_either) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def serving(site: Site, environment: Mapping[str, str] | None = None) -> Process:
    return subprocess.Popen(
        site.command("serve"),
        cwd=site.folder,
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@contextlib.contextmanager
def ended(process: Process) -> Iterator[Process]:
    """A process that is gone afterwards."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def status(port: int, path: str) -> int | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}").status_code
    except httpx.TransportError:
        return None


def test_it_shows_what_is_there_and_runs_nothing(site_on_either: Site, port: int, served: Process):
    site = site_on_either
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "tick", "acme.note", schedule="every 1s"))
    site.cli("definitions", "run", "org_acme", "tick")

    wait_until(lambda: status(port, "/readyz") == 200, "readiness")

    assert status(port, "/livez") == 200
    assert status(port, "/metrics") == 200
    assert status(port, "/api/v1/runs") == 401
    served.send_signal(signal.SIGTERM)
    assert served.wait(timeout=20) == 0
    assert [run["state"] for run in site.runs()] == ["waiting"]
    assert site.query("SELECT id FROM workers") == []


def test_a_port_that_is_taken_exits_75_though_it_is_the_default(site_on_either: Site, port: int):
    with socket.create_server(("127.0.0.1", port)):
        done = site_on_either.process("serve", check=False)

    assert done.code == 75
    assert f"another process has 127.0.0.1:{port}" in done.err
    assert "fix: " in done.err


def test_with_nowhere_to_listen_it_exits_78(site: Site):
    site.configure(web='listen = ""')

    done = site.process("serve", check=False)

    assert done.code == 78
    assert "web.listen=127.0.0.1:8470" in done.err


@pytest.mark.parametrize("migrated_url", ["postgresql"], indirect=True)
class TestItsOwnLogin:
    """On PostgreSQL: a NOINHERIT member of the web side's two roles and of nothing else."""

    @pytest.fixture
    def login(self, postgres_server: Server, site_on_either: Site) -> Iterator[str]:
        name = f"serve_{new_id()[-12:]}"
        for statement in (
            f"CREATE ROLE {name} LOGIN NOINHERIT",
            f"GRANT {roles.WEB}, {roles.OPERATOR} TO {name}",
        ):
            postgres_server.execute(statement)
        yield name
        with psycopg.connect(site_on_either.database_url, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {name}".encode())
        postgres_server.execute(f"DROP ROLE {name}")

    @pytest.fixture
    def as_login(self, site_on_either: Site, login: str) -> dict[str, str]:
        """The environment of `serve`."""
        url = site_on_either.database_url.replace("postgres@", f"{login}@")
        return {**os.environ, **site_on_either.environment, "WORKER_DATABASE__URL": url}

    def test_it_answers_operators_and_orgs_in_reads_and_writes(
        self, site_on_either: Site, port: int, as_login: dict[str, str]
    ):
        site, token = site_on_either, "an-operators-token"
        digest = hashlib.sha256(token.encode()).hexdigest()
        operator = f'[[web.operators]]\nname = "ada"\nrole = "operator"\ntoken_sha256 = "{digest}"'
        site.configure(web=f'listen = "127.0.0.1:{port}"\norg_role = "operator"', extra=operator)
        acme = application("org_acme")
        site.add_orgs(acme, application("org_other"))
        site.apply(definition("org_acme", "note", "acme.note") + definition("org_other", "note", "acme.note"))
        form = {"grant_type": "client_credentials", "client_id": acme.client_id}
        form |= {"client_secret": acme.client_secret, "audience": AUDIENCE}
        granted = httpx.post(f"{site.provider.url}/oauth2/token", data=form).json()["access_token"]

        def ask(path: str, bearer: str, method: str = "GET") -> httpx.Response:
            url, headers = f"http://127.0.0.1:{port}/api/v1/{path}", {"authorization": f"Bearer {bearer}"}
            return httpx.request(method, url, headers=headers)

        with ended(serving(site, as_login)):
            wait_until(lambda: status(port, "/readyz") == 200, "readiness")
            ours = ask("definitions/org_acme/note/run", granted, "POST")
            assert ours.status_code == 201, ours.text
            assert ask(f"runs/{ours.json()['id']}/cancel", granted, "POST").json()["state"] == "cancelled"
            assert ask(f"runs/{ours.json()['id']}/retry", granted, "POST").status_code == 201
            theirs = ask("definitions/org_other/note/run", token, "POST")
            assert theirs.status_code == 201, theirs.text
            assert ask(f"runs/{theirs.json()['id']}/cancel", granted, "POST").status_code == 404
            assert {run["org"] for run in ask("runs", granted).json()} == {"org_acme"}
            assert {run["org"] for run in ask("runs", token).json()} == {"org_acme", "org_other"}
            assert ask("credentials", granted).json()[0]["client_id"] == acme.client_id

    def test_a_role_that_is_taken_from_it_makes_it_unready(
        self, site_on_either: Site, port: int, login: str, as_login: dict[str, str], postgres_server: Server
    ):
        with ended(serving(site_on_either, as_login)):
            wait_until(lambda: status(port, "/readyz") == 200, "readiness")
            postgres_server.execute(f"REVOKE {roles.OPERATOR} FROM {login}")
            wait_until(lambda: status(port, "/readyz") == 503, "a look at the roles")
            lacking = httpx.get(f"http://127.0.0.1:{port}/readyz").json()["lacking"]
            assert lacking == ["roles"]
            postgres_server.execute(f"GRANT {roles.OPERATOR} TO {login}")
            wait_until(lambda: status(port, "/readyz") == 200, "readiness again")

    def test_without_a_role_it_exits_78_and_names_the_grant(
        self, site_on_either: Site, port: int, login: str, as_login: dict[str, str], postgres_server: Server
    ):
        postgres_server.execute(f"REVOKE {roles.WEB} FROM {login}")

        with ended(serving(site_on_either, as_login)) as process:
            _, said = process.communicate(timeout=30)

        assert process.returncode == 78
        assert f"may not act as {roles.WEB}" in said
        assert f"fix: GRANT {roles.WEB}, {roles.OPERATOR} TO " in said
