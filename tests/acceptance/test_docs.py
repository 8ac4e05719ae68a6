"""Every page with shell blocks, executed as it stands: tests/fakes/pages.py says how they are written."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.conftest import copied
from tests.fakes import curl, forked
from tests.fakes.cli import CommandLine
from tests.fakes.environments import make_environment
from tests.fakes.kinde.server import MANAGER, serve_kinde
from tests.fakes.pages import PAGES, ROOT, Block, blocks, missing_lines
from tests.fakes.ports import free_port
from tests.fakes.site import definition, wait_until
from worker.demo.provider import Application, serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of

pytestmark = pytest.mark.feature("checkout")

RUN = [page for page in PAGES if any(block.language == "sh" for block in blocks(page.read_text()))]
# Addresses that pages name; here each is a free port.
PORTS = ("8460", "8470", "8480", "8490", "9000")
AUDIENCE = "https://api.example.com"
ORGS = ("acme", "globex")
NEW = "new-secret-of-both"
# Pages for people who have no account anywhere.
ALONE = (ROOT / "docs" / "migration.md", ROOT / "docs" / "first-handler.md")
# Whoever opens a connection to another machine, or asks for its address, gets an error.
ONLY_THIS_MACHINE = """\
import sys

def refuse(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
        raise RuntimeError(f"{event} {arguments[1][0]} in a test that needs no account")
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", b"127.0.0.1", "localhost", None):
        raise RuntimeError(f"{event} {arguments[0]} in a test that needs no account")

sys.addaudithook(refuse)
"""


def commands(page: list[Block], tmp_path: Path) -> str:
    """PATH with `python`, and if the page calls `pip` that of an environment that may be added to."""
    real = Path(sys.executable).parent
    if any(block.language == "sh" and "pip install" in block.text for block in page):
        real = make_environment(tmp_path / "venv")
    if not forked.is_possible():
        return str(real)
    return f"{forked.commands(tmp_path / 'bin', str(real / 'python'))}:{real}"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, migrated_sqlite_file: Path):
    text = page.read_text(encoding="utf-8")
    ports = {port: str(free_port()) for port in PORTS}
    for port, free in ports.items():
        text = text.replace(port, free)
    folder, out = tmp_path / "page", tmp_path / "out"
    folder.mkdir()
    out.mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    curl.install(tools)
    environment = {
        "PATH": f"{commands(blocks(text), tmp_path)}:{tools}:{os.defpath}",
        "HOME": str(tmp_path),
        "WORKER_WEB__LISTEN": f"127.0.0.1:{ports['8470']}",
    }

    if page in ALONE:
        environment["PYTHONPATH"] = str(only_this_machine(tmp_path))

    with contextlib.ExitStack() as stack:
        stack.callback(stop_what_is_left, tmp_path)
        if "<!-- provider: kinde -->" in text:
            text = stack.enter_context(kinde(text, tmp_path, environment))
        if "<!-- installation: acme -->" in text:
            copied(migrated_sqlite_file, folder)
            stack.enter_context(installation(folder, environment))
        code = run(script(blocks(text), folder, out), folder, environment, out / "shell")
    printed = {int(file.name): file.read_text() for file in out.glob("[0-9]*")}

    last = max(printed)
    assert code == 0, f"{page.name}:{last} ended with {code}:\n{printed[last]}{log_of(folder)}"
    for before, block in zip(blocks(text), blocks(text)[1:], strict=False):
        if block.language == "text" and before.language == "sh":
            missing = missing_lines(block.text, printed[before.line])
            assert missing == [], f"{page.name}:{before.line} printed\n{printed[before.line]}"
    assert "secret-of" not in log_of(folder) + "".join(printed.values())


def only_this_machine(folder: Path) -> Path:
    """A folder in which Python finds the rule that no other machine is reached."""
    made = folder / "alone"
    made.mkdir()
    (made / "sitecustomize.py").write_text(ONLY_THIS_MACHINE)
    return made


def test_a_page_for_people_without_an_account_reaches_no_other_machine(tmp_path: Path):
    """The control of the pages above: what they are executed under refuses a connection."""
    outside = "import socket; socket.create_connection(('192.0.2.1', 9), timeout=1)"
    environment = {"PYTHONPATH": str(only_this_machine(tmp_path))}

    done = subprocess.run([sys.executable, "-c", outside], env=environment, capture_output=True, text=True)

    assert done.returncode == 1
    assert "needs no account" in done.stderr


@contextlib.contextmanager
def kinde(text: str, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The page with the addresses of a Kinde environment with two orgs, and of an API.

    `management-secret` beside the page's folder has the secret of the client that the page names.
    """
    listener = bind_loopback()
    healthy = Starlette(routes=[Route("/health", lambda request: JSONResponse({"ok": True}))])
    api = url_of(listener)
    environment["WORKER_EXECUTION__PRIVATE_ORIGINS"] = json.dumps([api])
    with serve_kinde() as served, ServerThread(healthy, listener):
        served.api.add_api("Acme's API", api, ("read:kb",))
        served.api.application_properties.add("model_version")
        for code, name in (("org_1a2b3c4d", "Acme"), ("org_5e6f7a8b", "Globex")):
            served.api.add_org(code, name)
        manager = served.provider.applications[MANAGER]
        named = re.search(r'client_id = "([0-9a-f]{32})"', text)
        assert named is not None
        served.provider.add(replace(manager, client_id=named[1]))
        (folder / "management-secret").write_text(served.secret)
        yield text.replace("https://acme.kinde.com", served.url).replace("https://api.acme.com", api)
        assert served.undocumented() == []


@contextlib.contextmanager
def installation(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """The installation in the pages, in a folder with a migrated database.

    It has two orgs, a nightly export each that has failed once, and a worker.

    The API returns 503 while the folder has a file `outage`. The file `new-secret` has the secret of each
    org's second application.
    """
    applications = [
        Application(f"org_{org}", client, secret, ("read:kb",), (AUDIENCE,))
        for org in ORGS
        for client, secret in ((f"m2m-{org}", f"secret-of-{org}"), (f"m2m-{org}-2", NEW))
    ]

    def export(request: Request) -> Response:
        down = (folder / "outage").exists()
        return Response(status_code=503) if down else JSONResponse({"exported": 12})

    provider, provider_thread = serve_provider(applications)
    listener = bind_loopback()
    with provider_thread, ServerThread(Starlette(routes=[Route("/export", export)]), listener):
        line = CommandLine(folder, f"sqlite:///{folder}/worker.db")
        line.settings.write_text(
            f'[database]\nurl = "sqlite:///{folder}/worker.db"\n\n[issuers.main]\nprofile = "kinde"\n'
            f'url = "{provider.url}"\naudience = "{AUDIENCE}"\nmax_requests_per_second = 100\n'
            f'\n[execution]\nprivate_origins = ["{url_of(listener)}"]\n'
        )
        (folder / "outage").touch()
        (folder / "new-secret").write_text(NEW)
        keys = {
            "timezone": "Europe/Berlin",
            "params": {"url": f"{url_of(listener)}/export"},
            "scopes": ["read:kb"],
            "max_attempts": 1,
        }
        (folder / "definitions.toml").write_text(
            "\n".join(
                definition(f"org_{org}", "nightly-export", "http.request", "0 3 * * *", **keys)
                for org in ORGS
            )
        )
        orgs = [
            {"code": app.org_code, "issuer": "main", "client_id": app.client_id}
            | {"client_secret": app.client_secret}
            for app in applications
            if app.client_secret != NEW
        ]
        line("orgs", "import", "-", stdin="\n".join(map(json.dumps, orgs)))
        line("apply", str(folder / "definitions.toml"))
        for org in ORGS:
            line("definitions", "run", f"org_{org}", "nightly-export")
        with (folder / "worker.log").open("wb") as log:
            command = [sys.executable, "-m", "worker", "run"]
            worker = forked.start(command, cwd=folder, env=environment, output=log)
        try:
            with contextlib.closing(sqlite3.connect(folder / "worker.db", timeout=10)) as connection:
                failed = "SELECT COUNT(*) FROM runs WHERE state = 'failed'"
                wait_until(
                    lambda: connection.execute(failed).fetchone()[0] == len(ORGS),
                    f"the exports to fail; the worker's log is {folder}/worker.log",
                    timeout=180,
                )
            yield
        finally:
            worker.kill()
            worker.wait()


def script(page: list[Block], folder: Path, out: Path) -> str:
    """One shell script of the blocks; each writes to a file of `out` named by its line."""
    lines = ["set -euo pipefail", "set -m"]
    for block in page:
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.language == "sh":
            lines.append(f"exec >{out}/{block.line} 2>&1")
            if block.exit_code:
                lines.append(f"code=0; (\n{block.text}) || code=$?; [ $code = {block.exit_code} ]")
            else:
                lines.append(block.text)
    return "\n".join(lines)


def run(text: str, folder: Path, environment: dict[str, str], shown: Path) -> int:
    with shown.open("wb") as stream:
        return subprocess.run(
            ["bash", "-c", text],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            timeout=300,
        ).returncode


def log_of(folder: Path) -> str:
    file = folder / "worker.log"
    return file.read_text() if file.exists() else ""


def stop_what_is_left(folder: Path) -> None:
    """Kill whatever still works in the folder: pages start things in the background."""
    for process in _inside(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _inside(folder: Path) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(folder):
                yield int(process.name)
