"""Sealed runs of a real worker (docs/egress.md): what reaches services, what is recorded, and limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.plugins import make_plugin
from tests.fakes.site import Site, application, definition, wait_until
from tests.fakes.traffic import Seen, traffic

pytestmark = [pytest.mark.feature("egress"), pytest.mark.feature("org_secrets")]
KEY = "sk-canary-of-acme-0123456789"
SOURCE = """
import json, socket
from worker import BlockingContext, Context, job

def write(ctx, **fields):
    with open(ctx.params["journal"], "a") as file:
        file.write(json.dumps(fields) + "\\n")

@job("acme.sealed", egress=["api", "http://127.0.0.1:*"], secrets={"openai"}, max_attempts=1)
async def sealed(ctx: Context):
    for url in ctx.params["urls"]:
        response = await ctx.http.get(url, headers={"X-Key": ctx.secret("openai")})
        write(ctx, url=url, status=response.status_code, text=response.text)
    write(ctx, token=(await ctx.token()).reveal(), secret=ctx.secret("openai"))
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError as error:
        write(ctx, socket=type(error).__name__)
    await ctx.http.get("https://evil.example.com/")
"""


class Refusing:
    """Answers with the headers that it got, or so many times with 429 and a pause of two seconds."""

    times = 0

    def __call__(self, seen: Seen) -> tuple[int, dict[str, str], bytes]:
        body = json.dumps(seen.headers).encode()
        if self.times:
            self.times -= 1
            return 429, {"Retry-After": "2"}, body
        return 200, {}, body


def prepared(site: Site, *origins: str) -> None:
    """The handlers, and an org with a secret for the first origin."""
    source = SOURCE.replace('"http://127.0.0.1:*"', ", ".join(json.dumps(each) for each in origins))
    make_plugin(
        site.plugins,
        dist="acme-sealed",
        modules={"acme_sealed": source},
        entry_points={"acme.sealed": "acme_sealed:sealed"},
    )
    site.add_orgs(application("org_acme"))
    site.cli("secrets", "add", "org_acme", "openai", "--for", origins[0], stdin=f"{KEY}\n")


def test_a_sealed_run_reaches_its_list_and_holds_neither_token_nor_secret(site: Site, journal: Path) -> None:
    with traffic() as api, traffic() as model:
        prepared(site, model.url)
        params = {"journal": str(journal), "urls": [f"{api.url}/a", f"{model.url}/b"]}
        site.apply(definition("org_acme", "sealed", "acme.sealed", params=params, api_origins=[api.url]))
        site.environment["WORKER_EXECUTION__PRIVATE_ORIGINS"] = model.url
        site.start_worker()
        site.wait_for_handlers("acme.sealed")

        run_id = site.cli("definitions", "run", "org_acme", "sealed", "-o", "id").out.strip()
        ended = wait_until(
            lambda: next((row for row in site.runs() if row["id"] == run_id and row["finished_at"]), None),
            "the end of the sealed run",
        )

        assert ended["state"] == "failed"
        assert "EgressDenied" in json.dumps(ended["error"], default=str)
        token = api.seen[0].headers["authorization"].removeprefix("Bearer ")
        assert token.count(".") == 2
        assert model.seen[0].headers["x-key"] == KEY
        assert "authorization" not in model.seen[0].headers
        told = journal.read_text()
        assert token not in told
        assert KEY not in told
        *_, held, refused = read_journal(journal)
        assert held["token"].startswith("orgworker-placeholder-")
        assert held["secret"].startswith("orgworker-placeholder-")
        assert refused == {"socket": "PermissionError"}

        shown = site.cli("runs", "show", run_id, "-o", "json").json()
        rows = {row["origin"]: (row["requests"], row["denied"]) for row in shown["egress"]}
        assert rows == {api.url: (1, 0), model.url: (1, 0), "https://evil.example.com": (0, 1)}


BUSY = """
import time
from worker import Context, job

@job("acme.busy", max_attempts=1)
async def busy(ctx: Context):
    began = time.monotonic()
    for _ in range(ctx.params["times"]):
        await ctx.http.get(ctx.params["url"])
    return {"seconds": time.monotonic() - began}
"""


def ended_run(site: Site, run_id: str) -> dict[str, Any]:
    return wait_until(
        lambda: next((row for row in site.runs() if row["id"] == run_id and row["finished_at"]), None),
        f"the end of run {run_id}",
    )


def test_a_limit_holds_back_requests_and_a_429_pauses_the_org(site: Site) -> None:
    refusing = Refusing()
    with traffic(refusing) as api:
        make_plugin(
            site.plugins,
            dist="acme-busy",
            modules={"acme_busy": BUSY},
            entry_points={"acme.busy": "acme_busy:busy"},
        )
        site.add_orgs(application("org_acme"))
        params = {"url": f"{api.url}/a", "times": 30}
        limit = f'[[limit]]\norigin = "{api.url}"\nper = "org"\nrate = "20/s"\nburst = 5\n'
        site.apply(definition("org_acme", "busy", "acme.busy", params=params, api_origins=[api.url]) + limit)
        site.start_worker()
        site.wait_for_handlers("acme.busy")

        run_id = site.cli("definitions", "run", "org_acme", "busy", "-o", "id").out.strip()
        ended = ended_run(site, run_id)

        assert ended["state"] == "succeeded"
        # 25 requests beyond the burst, and at most one second in advance.
        assert ended["result"]["seconds"] > 25 / 20 - 1
        [row] = site.cli("runs", "show", run_id, "-o", "json").json()["egress"]
        assert row["requests"] == 30
        assert row["waited_seconds"] > 0
        assert "waited" in site.cli("runs", "show", run_id).out

        refusing.times = 1
        run_id = site.cli("definitions", "run", "org_acme", "busy", "-o", "id").out.strip()
        assert ended_run(site, run_id)["state"] == "succeeded"
        [row] = site.cli("runs", "show", run_id, "-o", "json").json()["egress"]
        assert row["statuses"] == {"200": 29, "429": 1}
        assert row["waited_seconds"] > 1.5
