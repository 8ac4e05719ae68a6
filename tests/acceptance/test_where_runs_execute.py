"""One suite for every place where a run executes: the same outcome, log, checkpoint, steps and limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hosts import opened_hosts
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from tests.fakes.site import FINAL, Site, application, definition, opened, wait_until
from tests.fakes.temporal import DevServer
from worker.demo.provider import Provider
from worker.store import schema

pytestmark = pytest.mark.feature("hosts")

SOURCE = Path(__file__).with_name("form_jobs.py")
HANDLERS = (
    "succeeds",
    "continues",
    "fails",
    "snoozes",
    "cancels",
    "waits",
    "remembers",
    "renews",
    "lasts",
    "grows",
)
# Those of hosts, the second one placed by Temporal.
POOLS = ("eu", "gpu")


@dataclass(frozen=True)
class Form:
    """A place where runs execute: a pool, None for that of the workers, and how they are isolated there."""

    name: str
    pool: str | None = None
    inline: bool = False

    @property
    def org(self) -> str:
        return f"org_{self.name}"

    @property
    def brief(self) -> str:
        """An org whose tokens live for some seconds."""
        return f"{self.org}_brief"

    def define(self, name: str, handler: str, *, org: str = "", **keys: Any) -> str:
        placed = keys if self.pool is None else keys | {"pool": self.pool}
        return definition(org or self.org, name, f"form.{handler}{'.inline' * self.inline}", **placed)


FORMS = [
    Form("child"),
    Form("inline", inline=True),
    Form("host", "eu"),
    Form("host_inline", "eu", inline=True),
    Form("temporal", "gpu"),
]


@pytest.fixture(scope="module")
def everywhere(
    tmp_path_factory: pytest.TempPathFactory, postgres_server: Server, provider: Provider
) -> Iterator[Site]:
    """A worker, a host in each pool, and Temporal."""
    folder = tmp_path_factory.mktemp("everywhere")
    with ExitStack() as stack:
        engine = DevServer(folder)
        engine.start()
        stack.callback(engine.stop)
        migrated = postgres_server.template("migrated", schema.upgrade)
        url = stack.enter_context(postgres_server.new_database(migrated))
        site = stack.enter_context(opened(Site(folder, url, provider)))
        port = free_port()
        inline = 'inline = ["form-jobs"]'
        site.configure(
            execution=inline,
            extra=f'[attempts]\nlisten = "127.0.0.1:{port}"\n[pools.gpu]\nplacer = "temporal"\n'
            f'[temporal]\naddress = "{engine.address}"\n',
        )
        make_plugin(
            site.plugins,
            dist="form-jobs",
            modules={"form_jobs": SOURCE.read_text()},
            entry_points={f"form.{name}": f"form_jobs:{name}_child" for name in HANDLERS}
            | {f"form.{name}.inline": f"form_jobs:{name}_inline" for name in HANDLERS},
        )
        site.migrate()
        site.start_worker()
        hosts = stack.enter_context(opened_hosts(site, port))
        for pool in POOLS:
            hosts.start(pool, pool, inline)
        site.wait_for_handlers("form.succeeds")
        properties = {"model": "small"}
        orgs = [application(form.org, properties=properties, flags={"agent-v2": True}) for form in FORMS]
        site.add_orgs(*orgs, *(application(form.brief, lifetime=6) for form in FORMS))
        site.apply("".join(text(form) for form in FORMS))
        yield site


def text(form: Form) -> str:
    """The definitions of one form."""
    quick = {"retry_backoff": "10ms"}
    return "".join(
        [
            form.define("succeeds", "succeeds", params={"number": 7}),
            form.define("continues", "continues", **quick),
            form.define("fails", "fails"),
            form.define("snoozes", "snoozes"),
            form.define("cancels", "cancels"),
            form.define("waits", "waits"),
            form.define("renews", "renews", org=form.brief),
            form.define("remembers", "remembers"),
            form.define("cancelled", "lasts", cancel_grace="2s"),
            form.define("timed_out", "lasts", timeout="1s", cancel_grace="1s", max_attempts=1),
            *([] if form.inline else [form.define("grows", "grows")]),
        ]
    )


def run_of(site: Site, form: Form, name: str) -> dict[str, Any]:
    return site.runs(form.org, name)[-1]


def start(site: Site, form: Form, *names: str) -> None:
    for name in names:
        site.cli("definitions", "run", form.org, name)


def ended(site: Site, form: Form, name: str, number: int = 1) -> dict[str, Any]:
    """The newest run of a definition, once `number` runs of it have ended."""

    def found() -> dict[str, Any] | None:
        runs = site.runs(form.org, name)
        all_ended = len(runs) == number and all(run["state"] in FINAL for run in runs)
        return runs[-1] if all_ended else None

    run = wait_until(found, f"{number} ended run(s) of {form.org}/{name}; log:\n{site.log_text()[-3000:]}")
    assert run is not None
    return run


def outcomes(site: Site, run: dict[str, Any]) -> list[str]:
    return [row["outcome"] for row in site.attempts(run["id"])]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_outcomes_are_the_same_everywhere(everywhere: Site, form: Form):
    site = everywhere
    start(site, form, "succeeds", "continues", "fails", "snoozes", "cancels", "remembers")
    site.cli("definitions", "run", form.brief, "renews")

    succeeded = ended(site, form, "succeeds")
    assert succeeded["state"] == "succeeded", succeeded["error"]
    assert succeeded["result"] == {
        "org": [form.org, form.org],
        "params": {"number": 7},
        "settings": {"model": "small"},
        "flag": True,
        "attempt": 1,
    }
    assert outcomes(site, succeeded) == ["succeeded"]
    assert succeeded["progress"] == {"done": 1, "total": 2, "note": "half"}
    lines = site.query("SELECT level, source, text FROM run_logs WHERE run_id = ?", succeeded["id"])
    assert [tuple(line.values()) for line in lines] == [("warning", "log", f"logged by {form.org}")]

    continued = ended(site, form, "continues")
    assert continued["result"] == {"done": 1, "first": {"attempt": 1}}
    assert outcomes(site, continued) == ["retry", "succeeded"]
    steps = site.query("SELECT name, result FROM steps WHERE run_id = ?", continued["id"])
    assert [step["name"] for step in steps] == ["draw"]

    failed = ended(site, form, "fails")
    assert (failed["state"], failed["reason"]) == ("failed", "error")
    assert failed["error"]["message"] == f"no use for {form.org}"

    assert ended(site, form, "snoozes")["result"] == "awake"
    cancelled = ended(site, form, "cancels")
    assert (cancelled["state"], cancelled["reason"]) == ("cancelled", "by_handler")
    assert cancelled["detail"] == "not needed"

    renewed = wait_until(lambda: site.runs(form.brief, "renews")[-1]["result"], "a run with a second token")
    assert renewed == "renewed"

    assert ended(site, form, "remembers")["result"] == 1
    start(site, form, "remembers")
    assert ended(site, form, "remembers", 2)["result"] == 2
    usage = json.loads(site.cli("usage", "list", "--org", form.org, "-o", "json").out)
    assert [row["used"] for row in usage if row["meter"] == "form_calls"] == [6]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_wait_an_end_on_request_and_limits_are_the_same_everywhere(everywhere: Site, form: Form):
    site = everywhere
    start(site, form, "waits", "cancelled", "timed_out", *([] if form.inline else ["grows"]))

    wait_until(lambda: run_of(site, form, "waits")["reason"] == "answer", "the run to wait for its answer")
    run = str(run_of(site, form, "waits")["id"])
    site.cli("runs", "answer", run, "approval", "--data", '{"yes": true}')
    answered = ended(site, form, "waits")
    assert answered["result"] == {"answer": {"yes": True}}
    assert outcomes(site, answered) == ["parked", "succeeded"]

    lasting = run_of(site, form, "cancelled")
    wait_until(
        lambda: site.query("SELECT text FROM run_logs WHERE run_id = ?", lasting["id"]), "its first line"
    )
    site.cli("runs", "cancel", str(lasting["id"]))
    cancelled = ended(site, form, "cancelled")
    assert (cancelled["state"], cancelled["reason"]) == ("cancelled", "requested")

    late = ended(site, form, "timed_out")
    assert (late["state"], late["reason"]) == ("failed", "timed_out")

    if not form.inline:
        grown = ended(site, form, "grows")
        assert (grown["state"], grown["reason"]) == ("failed", "out_of_memory"), grown["error"]

    executed_by = site.query(
        "SELECT DISTINCT h.pool FROM attempts a JOIN workers w ON w.id = a.worker_id "
        "JOIN orgs o ON o.id = a.org_id LEFT JOIN hosts h ON h.id = w.host_id WHERE o.code IN (?, ?)",
        form.org,
        form.brief,
    )
    assert [row["pool"] for row in executed_by] == [form.pool]
