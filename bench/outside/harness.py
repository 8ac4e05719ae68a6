"""Drives the outside harness, without Docker; run by the Python of the peers' virtual environment.

    VENV/bin/python -m bench.outside.harness --harness DIR --python FILE --provider URL --out DIR

Its code runs as it is, from its own checkout. Replaced are the parts that call Docker: the start of adapters,
and the server, which is the one of our tests, stopped and started by signals. A cell has a new database.
Plots are left out, and so is `pgstattuple`, which this server does not have.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bench.outside.cells import SCENARIOS, Cell, Job, Mark, Scenario, figures, from_summary
from tests.fakes.postgres import Server

ROOT = Path(__file__).parents[2]
SAMPLE_SECONDS = 2
# Of our adapters; the harness has the one of Procrastinate.
TABLES = {
    "orgworker": ["public.live_runs", "public.runs", "public.attempts"],
    "pgqueuer": ["public.pgqueuer", "public.pgqueuer_log"],
}
# Of each job: when it was put in, when it succeeded, how often it was started, whether a worker owns it.
JOBS = {
    "orgworker": """
        SELECT extract(epoch FROM r.created_at),
            CASE r.state WHEN 'succeeded' THEN extract(epoch FROM r.finished_at) END,
            coalesce(r.attempt, l.attempt, 0), coalesce(l.state = 'running', false)
        FROM runs AS r LEFT JOIN live_runs AS l USING (id)""",
    "pgqueuer": """
        SELECT extract(epoch FROM min(created) FILTER (WHERE status = 'queued')),
            extract(epoch FROM min(created) FILTER (WHERE status = 'successful')),
            count(*) FILTER (WHERE status = 'picked'),
            job_id IN (SELECT id FROM pgqueuer WHERE status = 'picked')
        FROM pgqueuer_log GROUP BY job_id""",
    "procrastinate": """
        SELECT extract(epoch FROM min(at) FILTER (WHERE type = 'deferred')),
            extract(epoch FROM min(at) FILTER (WHERE type = 'succeeded')),
            count(*) FILTER (WHERE type = 'started'),
            job_id IN (SELECT id FROM procrastinate_jobs WHERE status = 'doing')
        FROM procrastinate_events GROUP BY job_id""",
}
# For all adapters alike: they pace themselves, since the harness's pacer does not know of its phases.
ENVIRONMENT = {"PRODUCER_PACING": "adapter", "PRODUCER_BATCH_MAX": "128", "PRODUCER_BATCH_MS": "25"}


class Harness:
    """The harness's modules, changed to run on our server."""

    def __init__(self, given: argparse.Namespace, server: Server, keeper: ThreadPoolExecutor) -> None:
        sys.path.insert(0, str(given.harness))
        from bench_harness import adapters, orchestrator, phases, writers

        self._given, self._server = given, server
        self._orchestrator, self._phases, self._writers = orchestrator, phases, writers
        self._marks: list[Mark] = []
        self._folder = given.out
        for module in (adapters, orchestrator):
            module.pg_url = lambda database, host="": server.url(database)

        def nothing(*_: object, **__: object) -> None:
            pass

        def wait(call: Callable[..., object], *arguments: object) -> None:
            # The server dies with the thread that started it.
            keeper.submit(call, *arguments).result()

        orchestrator.start_postgres = orchestrator.stop_postgres = nothing
        orchestrator.render_all = orchestrator.write_interactive_report = nothing
        orchestrator._compose_stop_postgres = lambda image: wait(server.stop, signal.SIGINT)
        orchestrator._compose_start_postgres = lambda image: wait(server.start)
        orchestrator.preflight_database = self._new_database
        orchestrator.RESULTS_ROOT = given.out
        orchestrator.PhaseTracker = _recording(orchestrator.PhaseTracker, self._marks)
        self._entries = {
            name: adapters.AdapterEntry(
                bench_dir=given.harness / f"{name}-bench", builder=nothing, launcher=launcher
            )
            for name, launcher in self._launchers(adapters).items()
        }
        adapters.ADAPTERS.update(self._entries)
        for name, tables in TABLES.items():
            self._entries[name].bench_dir = folder = given.out / f"{name}-bench"
            folder.mkdir(exist_ok=True)
            described = {"system": name, "db_name": f"{name}_bench", "event_tables": tables}
            (folder / "adapter.json").write_text(json.dumps(described))

    def _launchers(self, adapters: Any) -> dict[str, Callable[..., Any]]:
        commands = {
            "orgworker": [str(self._given.python), "-m", "bench.outside.orgworker"],
            "pgqueuer": [sys.executable, "-m", "bench.outside.pgqueuer"],
            "procrastinate": [sys.executable, str(self._given.harness / "procrastinate-bench" / "main.py")],
        }

        def launcher(command: list[str]) -> Callable[..., Any]:
            def launch(manifest: Any, overrides: dict[str, str]) -> Any:
                ours = {"BENCH_PROVIDER": self._given.provider, "BENCH_FOLDER": str(self._folder)}
                env = adapters._base_env(manifest, overrides) | ours
                return adapters.LaunchSpec(argv=command, env=env, cwd=str(ROOT))

            return launch

        return {name: launcher(command) for name, command in commands.items()}

    def _new_database(self, manifest: Any, *, recreate: bool = False) -> None:
        self._server.execute(f'DROP DATABASE IF EXISTS "{manifest.db_name}" WITH (FORCE)')
        self._server.execute(f'CREATE DATABASE "{manifest.db_name}"')

    def run(self, system: str, scenario: Scenario) -> Cell:
        """One cell; an adapter that ends before its time ends only this one."""
        self._marks.clear()
        cell = Cell(system, scenario.name, died=None)
        phases = self._phases.resolve_scenario(None, scenario.specs(self._given.scale))
        self._folder = tempfile.mkdtemp(prefix=f"{scenario.name}-{system}-", dir=self._given.out)
        try:
            self._drive(system, scenario, phases)
        except (RuntimeError, psycopg.Error) as error:
            cell.died = str(error)
        until = min(time.time(), self._marks[-1].at + phases[len(self._marks) - 1].duration_s)
        figures(cell, self._jobs(system), self._marks, until)
        raw = max(self._given.out.glob(f"{scenario.name}-*/raw.csv"), key=lambda path: path.stat().st_mtime)
        summary = self._writers.compute_summary(raw, run_id="", scenario=scenario.name, phases=phases)
        from_summary(cell, summary)
        return cell

    def _drive(self, system: str, scenario: Scenario, phases: Sequence[Any]) -> None:
        self._orchestrator.drive(
            systems=[system],
            scenario=scenario.name,
            phases=phases,
            pg_image="",
            fast=True,
            skip_build=True,
            sample_every_s=SAMPLE_SECONDS,
            producer_rate=scenario.rate or 50_000,
            producer_mode="fixed" if scenario.rate else "depth-target",
            target_depth=scenario.depth,
            worker_count=scenario.workers,
            high_load_multiplier=1.5,
            awa_completion_batch_size=None,
            replicas=scenario.replicas,
            cli_args=sys.argv,
        )

    def _jobs(self, system: str) -> list[Job]:
        with psycopg.connect(self._server.url(f"{system}_bench")) as connection:
            found = connection.execute(JOBS[system]).fetchall()
        return [
            Job(float(made), None if ended is None else float(ended), starts, held)
            for made, ended, starts, held in found
        ]


def _recording(tracker: type, marks: list[Mark]) -> type:
    """The harness's tracker of phases, which also notes when each began."""

    class Recording(tracker):  # type: ignore[misc]
        def set(self, label: str, type_: str) -> None:
            # It sets the first one before the replicas start, and again when they have.
            if marks and marks[-1].label == label:
                marks.pop()
            marks.append(Mark(label, type_, time.time()))
            super().set(label, type_)

    return Recording


@contextmanager
def running_server() -> Iterator[tuple[Server, ThreadPoolExecutor]]:
    """A server that syncs to disk, and the thread that starts it and stays."""
    with tempfile.TemporaryDirectory(prefix="orgworker-bench-") as folder, ThreadPoolExecutor(1) as keeper:
        # The server runs as another user if the caller is root.
        Path(folder).chmod(0o755)
        server = Server(Path(folder) / "pg", durable=True, shared_buffers="256MB")
        keeper.submit(server.start).result()
        try:
            yield server, keeper
        finally:
            keeper.submit(server.stop, signal.SIGQUIT).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--harness", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True, help="of orgworker")
    parser.add_argument("--provider", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--systems", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--scenarios", nargs="+", default=[scenario.name for scenario in SCENARIOS])
    given = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with running_server() as (server, keeper):
        harness = Harness(given, server, keeper)
        for scenario in SCENARIOS:
            for system in given.systems if scenario.name in given.scenarios else ():
                cell = harness.run(system, scenario)
                with (given.out / "cells.jsonl").open("a") as file:
                    file.write(json.dumps(cell.as_json()) + "\n")


if __name__ == "__main__":
    main()
