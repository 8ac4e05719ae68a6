"""Sealed runs of a host: its broker has what their workers give it, and they get what it has counted."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from tests.acceptance.test_egress_faults import CLOSED_WITHIN, HANDLERS, frozen_at, prepared, run_process
from tests.fakes.handlers import read_journal
from tests.fakes.hosts import opened_hosts
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until
from tests.fakes.traffic import traffic
from tests.faults.proxy import Proxy
from worker.engine.runners.child import linux

pytestmark = [pytest.mark.feature("egress"), pytest.mark.feature("hosts"), pytest.mark.feature("org_secrets")]
KEY = "sk-canary-of-acme-0123456789"
LEASE = 4.0
EXECUTION = f'lease = "{LEASE:g}s"\nrenew = "300ms"\nmax_children = 0\nmax_inline = 0'
TIMES = 20
SOURCE = """
import json, socket, time
from worker import Context, job

@job("acme.asks", egress=["api", "MODEL"], secrets={"openai"}, max_attempts=1)
async def asks(ctx: Context):
    key = ctx.secret("openai")
    answer = await ctx.http.get(f"{ctx.params['model']}/model", headers={"X-Key": key})
    began = time.monotonic()
    for number in range(ctx.params["times"]):
        await ctx.http.get(f"{ctx.params['api']}/api/{number}")
    seconds = time.monotonic() - began
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError as error:
        refused = type(error).__name__
    with open(ctx.params["journal"], "a") as file:
        told = {"key": key, "token": (await ctx.token()).reveal(), "echo": answer.text, "socket": refused}
        file.write(json.dumps(told) + "\\n")
    await ctx.http.get("https://evil.example.com/")
    return {"seconds": seconds}
"""


def test_a_host_sends_what_its_sealed_runs_may_and_its_workers_record_it(
    site_on_either: Site, tmp_path: Path
) -> None:
    """Also the limit of an origin, which the workers share out."""
    site, port = site_on_either, free_port()
    with traffic() as api, traffic() as model, opened_hosts(site, port) as hosts:
        site.configure(execution=EXECUTION, extra=f'[attempts]\nlisten = "127.0.0.1:{port}"')
        site.environment["WORKER_EXECUTION__PRIVATE_ORIGINS"] = model.url
        site.start_worker()
        site.wait_for_handlers("acme.note")
        # Only the host has it, not even the commands.
        plugins = make_plugin(
            tmp_path / "plugins-of-the-host",
            dist="acme-asks",
            modules={"acme_asks": SOURCE.replace("MODEL", model.url)},
            entry_points={"acme.asks": "acme_asks:asks"},
        )
        path = os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])
        hosts.start("h1", "eu", environment={"PYTHONPATH": path})
        wait_until(lambda: "acme.asks" in site.cli("handlers", "list").out, "the host's handlers")
        site.add_orgs(application("org_acme"))
        site.cli("secrets", "add", "org_acme", "openai", "--for", model.url, stdin=f"{KEY}\n")
        journal = site.out / "journal"
        params = {"journal": str(journal), "api": api.url, "model": model.url, "times": TIMES}
        limit = f'[[limit]]\norigin = "{api.url}"\nper = "org"\nrate = "10/s"\nburst = 5\n'
        keys = {"params": params, "pool": "eu", "api_origins": [api.url]}
        site.apply(definition("org_acme", "asks", "acme.asks", **keys) + limit)
        run_id = site.cli("definitions", "run", "org_acme", "asks", "-o", "id").out.strip()

        # Its list goes beyond the org's API, and it wants a secret.
        waiting = wait_until(
            lambda: next((run for run in site.runs() if run["reason"] == "not_approved"), None),
            "the approval to be missing",
        )
        assert api.seen == model.seen == []
        [listed] = site.cli("pools", "approvals", "eu", "-o", "json").json()
        assert (listed["secrets"], listed["egress"]) == (["openai"], ["api", model.url])
        site.cli("pools", "approve", "eu", "acme.asks", listed["digest"])
        ended = site.wait_for_end("org_acme", "asks", timeout=60)

        assert (waiting["id"], ended["state"]) == (ended["id"], "failed")
        assert "EgressDenied" in json.dumps(ended["error"])
        [asked] = model.seen
        assert asked.headers["x-key"] == KEY
        assert "authorization" not in asked.headers
        token = api.seen[0].headers["authorization"].removeprefix("Bearer ")
        assert token.count(".") == 2
        [told] = read_journal(journal)
        assert told["socket"] == "PermissionError"
        assert told["key"].startswith("orgworker-placeholder-")
        assert told["token"].startswith("orgworker-placeholder-")
        written = [path.read_bytes() for path in site.folder.rglob("*") if path.is_file()]
        assert not [text for text in written if token.encode() in text or KEY.encode() in text]
        # What is beyond the burst and a second's share waits.
        sent_in = api.seen[-1].at - api.seen[0].at
        assert sent_in > (TIMES - 5) / 10 - 1

        shown = site.cli("runs", "show", run_id, "-o", "json").json()
        rows = {row["origin"]: row for row in shown["egress"]}
        counted = {origin: (row["requests"], row["denied"]) for origin, row in rows.items()}
        assert counted == {api.url: (TIMES, 0), model.url: (1, 0), "https://evil.example.com": (0, 1)}
        assert rows[api.url]["waited_seconds"] > 0


def test_a_host_that_no_worker_answers_closes_what_its_runs_have_open(site_on_either: Site) -> None:
    """Its runs go on once one answers again."""
    site, port = site_on_either, free_port()
    done = site.out / "done"
    with traffic() as api, traffic() as limited, Proxy(port) as way, opened_hosts(site, way.port) as hosts:
        site.configure(execution=EXECUTION, extra=f'[attempts]\nlisten = "127.0.0.1:{port}"')
        prepared(site)
        params = {"url": api.url, "limited": limited.url, "until": str(done)}
        params["journal"] = str(site.out / "journal")
        origins = [api.url, limited.url]
        site.apply(
            definition("org_acme", "traffic", "acme.traffic", params=params, api_origins=origins)
            + f'[[limit]]\norigin = "{limited.url}"\nper = "org"\nrate = "2/s"\nmax_wait = "1h"\n',
            "--allow-unknown-handlers",
        )
        site.start_worker()
        site.wait_for_handlers(*HANDLERS)
        host = hosts.start("h1")
        site.cli("definitions", "run", "org_acme", "traffic")
        wait_until(lambda: api.open_streams and len(api.seen) > 20 and limited.seen, "traffic")
        children = {child.name() for child in psutil.Process(host.pid).children()}
        assert linux.ProcessName.BROKER in children

        way.become("hang")
        froze = frozen_at(run_process(site), LEASE + 1)
        wait_until(lambda: api.streams, "the end of the stream")
        time.sleep(0.1 * LEASE)
        before_thaw, at = time.monotonic(), len(api.seen)
        way.become("pass")
        wait_until(lambda: len(api.seen) > at + 20, "requests after the thaw")
        done.touch()
        ended = site.wait_for_end("org_acme", "traffic", timeout=60)

        [closed] = list(api.streams.values())[:1]
        assert closed < froze + CLOSED_WITHIN
        sent = [each.at for each in (*api.seen, *limited.seen)]
        assert not [at for at in sent if froze + CLOSED_WITHIN < at < before_thaw]
        assert (ended["state"], ended["attempt"]) == ("succeeded", 1)
