"""Agents whose model requests go into batches, over fakes of the providers, with workers that are killed."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_runs import alive
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.model_apis import ModelApis, serving
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.provider import Provider

ORGS = [f"org_batch{number}" for number in range(4)]
TURNS = 3
EXECUTION = """lease = "4s"
renew = "500ms"
poll = "100ms"
"""


def reply(body: dict[str, Any]) -> Any:
    """A tool call at each turn but the last; then the org that the request names."""
    text = json.dumps(body)
    answered = text.count("function_call_output")
    [org] = set(re.findall(r"org_batch\d", text))
    return ("look_up", {"topic": f"{org}-{answered}"}) if answered < TURNS - 1 else f"report of {org}"


@pytest.fixture
def apis() -> ModelApis:
    return ModelApis(now=time.time, takes=lambda: random.uniform(0.3, 1.5), reply=reply)


@pytest.fixture
def batch_site(tmp_path: Path, provider: Provider, migrated_url: str, apis: ModelApis) -> Iterator[Site]:
    with serving(apis) as url, opened(Site(tmp_path, migrated_url, provider)) as site:
        batches = f"""
[batches.openai]
provider = "openai"
base_url = "{url}"
every = "500ms"
poll = "200ms"
"""
        site.configure(execution=EXECUTION, extra=batches)
        site.settings.write_text(
            re.sub(
                r"^secrets_dir = .*$",
                f'secrets_dir = "{site.secrets}"',
                site.settings.read_text(),
                flags=re.M,
            )
        )
        (site.secrets / "model_key__openai").write_text("sk-operator-0001")
        install_handlers(site.plugins)
        if not (site.secrets / "keyring").exists():
            site.cli("keys", "generate")
        site.cli("db", "upgrade")
        site.add_orgs(*(application(org) for org in ORGS))
        # A fork of pytest starts slowly on a busy machine.
        site.may_fork = False
        site.url = url  # type: ignore[attr-defined]
        yield site


def begin(site: Site, handler: str, **keys: Any) -> None:
    params = {"journal": str(site.out / "journal"), "url": site.url}  # type: ignore[attr-defined]
    for org in ORGS:
        site.apply(
            definition(org, "digest", handler, params=params, model_requests="batch", egress=["open"], **keys)
        )
        site.cli("definitions", "run", org, "digest")


def ended(site: Site) -> list[dict[str, Any]] | None:
    runs = site.runs(definition="digest")
    return runs if all(run["state"] not in ("waiting", "running") for run in runs) else None


def test_agents_of_many_orgs_share_batches_and_killed_workers_pay_nothing_twice(
    batch_site: Site, apis: ModelApis
) -> None:
    site = batch_site
    worker = site.start_worker()
    begin(site, "acme.batched_agent", batch_within="8h")
    wait_until(lambda: apis.batches, "a batch", timeout=60)
    seen = None
    for _ in range(4):
        time.sleep(random.uniform(0.3, 2.0))
        seen = seen or next((run for run in site.runs(definition="digest") if run["reason"] == "batch"), None)
        worker.kill()
        worker.wait()
        worker = site.start_worker()

    runs = wait_until(lambda: ended(site), "the ends of all runs", timeout=150)

    assert {run["state"] for run in runs} == {"succeeded"}, runs
    for run in runs:
        assert site.cli("runs", "show", run["id"], "-o", "json").json()["result"] == {
            "output": f"report of {run['org']}"
        }
    assert apis.twice == 0 and apis.alone == []
    # The orgs share batches: fewer than one for each turn of each org.
    assert len(apis.batches) < TURNS * len(ORGS)
    assert sum(apis.paid.values()) == TURNS * len(ORGS)
    wait_until(lambda: not apis.files, "the deletion of all files", timeout=30)
    assert not [entry for entry in read_journal(site.out / "journal") if alive(entry["pid"])]


def test_a_request_of_a_plain_handler_waits_in_a_batch_and_says_why(
    batch_site: Site, apis: ModelApis
) -> None:
    site = batch_site
    apis.takes = lambda: 6.0
    apis.reply = lambda body: f"echo {body['input']}"
    site.start_worker()
    begin(site, "acme.completing")

    def parked() -> list[dict[str, Any]]:
        return [run for run in site.runs(definition="digest") if run["reason"] == "batch"]

    def sent() -> bool:
        return any("sent" in site.cli("runs", "why", run["id"]).out for run in parked())

    wait_until(sent, "a run whose request was sent", timeout=60)
    runs = wait_until(lambda: ended(site), "the ends of all runs", timeout=60)

    results = {run["org"]: site.cli("runs", "show", run["id"], "-o", "json").json()["result"] for run in runs}
    assert results == {org: {"text": f"echo of {org}"} for org in ORGS}
    usage = site.cli("usage", "list", "-o", "json").json()
    assert sum(row["used"] for row in usage if row["meter"] == "llm_tokens") == 120 * len(ORGS)
