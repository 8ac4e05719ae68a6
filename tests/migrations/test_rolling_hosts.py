"""Hosts and workers of two releases work together, under load: either side may be upgraded first.

The other release is the tree of the commit that added the suite over every place where runs execute. It is
the oldest that speaks version 1 of the attempt API, and is kept as long as that version is.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.handlers import install_handlers
from tests.fakes.history import git
from tests.fakes.hosts import opened_hosts
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import FINAL, Site, application, definition, opened, wait_until
from tests.migrations.test_rolling_deploy import ROOT, start
from worker.demo.provider import serve_provider

pytestmark = pytest.mark.feature("checkout")

# A handler that only hosts have.
ONLY = """
from worker import job

@job("gpu.only")
async def only(ctx) -> int:
    return 1
"""
FIRST = "tests/acceptance/test_where_runs_execute.py"
ORGS = 3


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the first release with this version of the attempt API."""
    folder = tmp_path_factory.mktemp("older")
    added = git(ROOT, "log", "--diff-filter=A", "--format=%H", "--", FIRST).split()
    assert added, f"no commit adds {FIRST}: the clone lacks its history (git fetch --unshallow)"
    archive = folder / "tree.tar"
    git(ROOT, "archive", "--output", str(archive), added[-1])
    with tarfile.open(archive) as tree:
        tree.extractall(folder, filter="data")
    return folder


@contextmanager
def fleet(folder: Path, database_url: str, port: int) -> Iterator[Site]:
    """An installation whose workers serve hosts on a port, with definitions due each second in pool eu."""
    provider, thread = serve_provider()
    with thread, opened(Site(folder, database_url, provider)) as site:
        site.configure(
            execution='lease = "10s"\nrenew = "1s"\npools = []\npoll = "500ms"',
            extra=f'[attempts]\nlisten = "127.0.0.1:{port}"\n',
        )
        install_handlers(site.plugins)
        plugin = {"modules": {"gpu_jobs": ONLY}, "entry_points": {"gpu.only": "gpu_jobs:only"}}
        make_plugin(site.folder / "gpu", "gpu-jobs", **plugin)
        site.migrate()
        site.add_orgs(*(application(f"org_{number}") for number in range(ORGS)))
        params = {"journal": str(site.out / "journal"), "steps": 3}
        keys = {"pool": "eu", "overlap": "allow", "max_attempts": 1}
        names = ("acme.note", "acme.steps", "gpu.only")
        site.apply(
            "".join(
                definition(
                    f"org_{number}",
                    handler,
                    handler,
                    "every 1s",
                    **keys | ({} if handler == "gpu.only" else {"params": params}),
                )
                for number in range(ORGS)
                for handler in names
            ),
            "--allow-unknown-handlers",
        )
        yield site


@pytest.mark.timeout(240)
@pytest.mark.parametrize("upgraded", ["worker", "host"])
def test_runs_go_on_while_one_side_is_of_the_other_release(
    tmp_path: Path, migrated_postgres_url: str, older: Path, upgraded: str
):
    port = free_port()
    with fleet(tmp_path, migrated_postgres_url, port) as site, opened_hosts(site, port) as hosts:
        worker = start(site, older, "run")
        # It compiles the older tree for the host as well.
        wait_until(site.log_text, "the worker's first event")
        host = hosts.start("h1", "eu", tree=older, environment=with_gpu(site, older))
        succeeded(site, 10)

        if upgraded == "worker":
            worker.terminate()
            assert worker.wait(timeout=60) == 0, site.log_text()[-3000:]
            worker = start(site, ROOT, "run")
        else:
            host.terminate()
            assert host.wait(timeout=60) == 0, hosts.log("h1").read_text()[-3000:]
            host = hosts.start("h1", "eu", environment=with_gpu(site))
        succeeded(site, 30)

        for process in (host, worker):
            process.terminate()
            assert process.wait(timeout=60) == 0
        ended = [run for run in site.runs() if run["state"] in FINAL]
        assert {run["state"] for run in ended} == {"succeeded"}, [run["error"] for run in ended]
        assert {row["outcome"] for row in site.query("SELECT outcome FROM attempts")} <= {
            "succeeded",
            "handed_back",
        }


def with_gpu(site: Site, *trees: Path) -> dict[str, str]:
    """The environment of a host that has a plug-in which no worker has."""
    folders = (*trees, site.plugins, site.folder / "gpu")
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def succeeded(site: Site, more: int) -> None:
    """Wait until that many runs more have succeeded, and some of each handler."""
    count = "SELECT handler, count(*) AS n FROM runs WHERE state = 'succeeded' GROUP BY handler"

    def counted() -> Counter[str]:
        return Counter({row["handler"]: row["n"] for row in site.query(count)})

    before = counted()

    def grown() -> bool:
        new = counted() - before
        return new.total() >= more and len(new) == 3

    wait_until(grown, f"{more} more runs", timeout=60)
