"""Agents whose model requests go into batches, over fakes of the providers, with workers that are killed."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_runs import alive
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.model_apis import ModelApis, serving
from worker.demo.provider import Provider

pytestmark = pytest.mark.feature("batches")

ORGS = [f"org_batch{number}" for number in range(4)]
PROVIDERS = ("openai", "anthropic")
TURNS = 3
KILLS = 5
EXECUTION = """lease = "4s"
renew = "500ms"
poll = "100ms"
"""


def reply(body: dict[str, Any]) -> Any:
    """A tool call at each turn but the last; then the org that the request names."""
    text = json.dumps(body)
    answered = text.count("function_call_output") + text.count('"tool_result"')
    [org] = set(re.findall(r"org_batch\d", text))
    return ("look_up", {"topic": f"{org}-{answered}"}) if answered < TURNS - 1 else f"report of {org}"


@pytest.fixture
def apis() -> ModelApis:
    return ModelApis(now=time.time, takes=lambda: random.uniform(0.3, 1.5), reply=reply)


@pytest.fixture
def batch_site(tmp_path: Path, provider: Provider, migrated_url: str, apis: ModelApis) -> Iterator[Site]:
    with serving(apis) as url, opened(Site(tmp_path, migrated_url, provider)) as site:
        batches = [
            f"""
[batches.{name}]
provider = "{name}"
base_url = "{url}"
every = "500ms"
poll = "200ms"
"""
            for name in PROVIDERS
        ]
        site.configure(execution=EXECUTION, extra="".join(batches))
        site.settings.write_text(
            re.sub(
                r"^secrets_dir = .*$",
                f'secrets_dir = "{site.secrets}"',
                site.settings.read_text(),
                flags=re.M,
            )
        )
        for name in PROVIDERS:
            (site.secrets / f"model_key__{name}").write_text("sk-operator-0001")
        install_handlers(site.plugins)
        if not (site.secrets / "keyring").exists():
            site.cli("keys", "generate")
        site.cli("db", "upgrade")
        site.add_orgs(*(application(org) for org in ORGS))
        # A fork of pytest starts slowly on a busy machine.
        site.may_fork = False
        site.url = url  # type: ignore[attr-defined]
        yield site


def begin(
    site: Site,
    handler: str,
    orgs: Sequence[str] = ORGS,
    *,
    more: Mapping[str, Any] | None = None,
    **keys: Any,
) -> None:
    params = {"journal": str(site.out / "journal"), "url": site.url, **(more or {})}  # type: ignore[attr-defined]
    given = {"params": params, "model_requests": "batch", "egress": ["open"], **keys}
    site.apply("".join(definition(org, "digest", handler, **given) for org in orgs))
    for org in orgs:
        site.cli("definitions", "run", org, "digest")


def ended(site: Site) -> list[dict[str, Any]] | None:
    runs = site.runs(definition="digest")
    return runs if all(run["state"] not in ("waiting", "running") for run in runs) else None


def result_of(site: Site, run: dict[str, Any]) -> Any:
    return site.cli("runs", "show", str(run["id"]), "-o", "json").json()["result"]


@pytest.mark.timeout(400)
def test_runs_of_many_orgs_share_batches_and_killed_workers_pay_nothing_twice(
    batch_site: Site, apis: ModelApis
) -> None:
    site = batch_site
    apis.reply = lambda body: f"{body['input'].split()[1]}-{len(body['input'].split()) - 2}"
    worker = site.start_worker()
    begin(site, "acme.completing", more={"turns": TURNS}, batch_within="8h")
    killed, total = 0, TURNS * len(ORGS)
    while killed < KILLS and ended(site) is None:
        began = len(apis.asked)
        wait_until(
            lambda: len(apis.asked) > began + 3 or sum(apis.paid.values()) == total,  # noqa: B023
            "requests of a worker, or all of them",
            timeout=90,
        )
        time.sleep(random.uniform(0, 1))
        worker.kill()
        worker.wait()
        worker, killed = site.start_worker(), killed + 1

    runs = wait_until(lambda: ended(site), "the ends of all runs", timeout=200)

    assert {run["state"] for run in runs} == {"succeeded"}, runs
    for run in runs:
        assert result_of(site, run) == {"said": [f"{run['org']}-{turn}" for turn in range(TURNS)]}
    assert apis.twice == 0 and apis.alone == []
    assert sum(apis.paid.values()) == total
    # The orgs share batches: fewer than one for each turn of each org.
    assert len(apis.batches) < total
    wait_until(lambda: not apis.files, "the deletion of all files", timeout=30)
    assert not [entry for entry in read_journal(site.out / "journal") if alive(entry["pid"])]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("provider_name", PROVIDERS)
def test_an_agent_waits_in_batches_without_a_change_of_its_code(
    batch_site: Site, apis: ModelApis, provider_name: str
) -> None:
    site, orgs = batch_site, ORGS[:2]
    site.start_worker()
    begin(site, "acme.batched_agent", orgs, more={"provider": provider_name})

    runs = wait_until(lambda: ended(site), "the ends of all runs", timeout=350)

    assert {run["org"]: result_of(site, run) for run in runs} == {
        org: {"output": f"report of {org}"} for org in orgs
    }
    assert apis.twice == 0 and apis.alone == []
    tools = read_journal(site.out / "journal", "tool")
    assert sorted(entry["topic"] for entry in tools) == [
        f"{org}-{turn}" for org in orgs for turn in range(TURNS - 1)
    ]


@pytest.mark.timeout(400)
def test_a_request_that_waits_says_why_and_its_tokens_count(batch_site: Site, apis: ModelApis) -> None:
    site = batch_site
    apis.takes = lambda: 15.0
    apis.reply = lambda body: f"echo {body['input']}"
    site.start_worker()
    begin(site, "acme.completing", ORGS[:1])

    def parked() -> list[dict[str, Any]]:
        return [run for run in site.runs(definition="digest") if run["reason"] == "batch"]

    def sent() -> str:
        said = [site.cli("runs", "why", str(run["id"])).out for run in parked()]
        return next((text for text in said if "sent 20" in " ".join(text.split())), "")

    said = wait_until(sent, "a run whose request was sent", timeout=90)
    assert "in a batch of openai" in " ".join(said.split())
    [run] = wait_until(lambda: ended(site), "the end of the run", timeout=90)

    assert result_of(site, run) == {"said": [f"echo of {ORGS[0]}"]}
    usage = site.cli("usage", "list", "-o", "json").json()
    assert sum(row["used"] for row in usage if row["meter"] == "llm_tokens") == 120
