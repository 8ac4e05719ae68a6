"""The installation that pages speak of: two orgs, a nightly export each, and a night with an API down."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.fakes.cli import CommandLine
from tests.fakes.site import wait_until
from worker.demo.provider import Application, serve_provider
from worker.demo.serving import ServerThread, bind_loopback, url_of

AUDIENCE = "https://api.example.com"
ORGS = ("acme", "globex")
NEW = "new-secret-of-both"
DEFINITION = """\
[[definition]]
org = "org_{org}"
name = "nightly-export"
handler = "http.request"
schedule = "0 3 * * *"
timezone = "Europe/Berlin"
params = {{ url = "{api}/export" }}
scopes = ["read:kb"]
max_attempts = 1
"""
LINE = (
    '{{"code": "org_{org}", "issuer": "main", "client_id": "m2m-{org}", "client_secret": "secret-of-{org}"}}'
)


@contextlib.contextmanager
def installation(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """Make it in the folder, let the exports fail once, and keep its worker up.

    The API answers 503 as long as the folder has a file `outage`.
    """
    # Each org has a second application, whose secret is in the file `new-secret`.
    secrets = [(f"m2m-{org}", f"secret-of-{org}") for org in ORGS] + [(f"m2m-{org}-2", NEW) for org in ORGS]
    applications = [
        Application(f"org_{client.split('-')[1]}", client, secret, ("read:kb",), (AUDIENCE,))
        for client, secret in secrets
    ]
    provider, provider_thread = serve_provider(applications)
    listener = bind_loopback()
    with provider_thread, ServerThread(_api(folder / "outage"), listener):
        line = CommandLine(folder, f"sqlite:///{folder}/worker.db")
        line.settings.write_text(
            f'[database]\nurl = "sqlite:///{folder}/worker.db"\n\n[issuers.main]\nprofile = "kinde"\n'
            f'url = "{provider.url}"\naudience = "{AUDIENCE}"\nmax_requests_per_second = 100\n'
            f'\n[execution]\nprivate_origins = ["{url_of(listener)}"]\n'
        )
        (folder / "outage").touch()
        (folder / "new-secret").write_text(NEW)
        (folder / "definitions.toml").write_text(
            "\n".join(DEFINITION.format(org=org, api=url_of(listener)) for org in ORGS)
        )
        line("db", "upgrade")
        line("orgs", "import", "-", stdin="\n".join(LINE.format(org=org) for org in ORGS))
        line("apply", str(folder / "definitions.toml"))
        for org in ORGS:
            line("definitions", "run", f"org_{org}", "nightly-export")
        with _worker(folder, environment):
            wait_until(
                lambda: len(line("runs", "list", "--state", "failed", "-o", "id").out.split()) == len(ORGS),
                f"the exports to fail; the worker's log is {folder}/worker.log",
                timeout=180,
            )
            yield


@contextlib.contextmanager
def _worker(folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (folder / "worker.log").open("wb") as log:
        command = [sys.executable, "-m", "worker", "run"]
        worker = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            yield
        finally:
            worker.kill()
            worker.wait()


def _api(outage: Path) -> Starlette:
    def export(request: Request) -> Response:
        return Response(status_code=503) if os.path.exists(outage) else JSONResponse({"exported": 12})

    return Starlette(routes=[Route("/export", export)])
