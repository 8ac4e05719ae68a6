"""Measures agents whose model requests go into batches, and the same agents without batches.

    .venv/bin/python -m bench.batches [--database sqlite|postgresql] [--orgs N] [--turns N] [--workers N]
        [--provider openai|anthropic] [--minute SECONDS] [--within TEXT] [--alone]
        [--kills N] [--run-kills N] [--outages N] [--lost N]

Each org has one run of an agent that calls a tool at each turn but the last. The API is the demo's, whose
batches take 1 to 40 minutes here, scaled: `--minute` is one of them in seconds. Meanwhile `--kills` workers
and `--run-kills` processes of runs are killed, PostgreSQL ends `--outages` times at once, and of the
requests that make a file or a batch `--lost` arrive without an answer or do not arrive. With `--alone` the
agents run a second time, without batches; the difference in processor time is what a parked turn costs, of
workers and all their processes, which are not killed then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import psutil
from sqlalchemy import func, select, text, update

from bench.installation import Installation, installation
from worker.demo.model_apis import ModelApis, serving
from worker.engine.runners.child import linux
from worker.model.definitions.units import parse_duration
from worker.model.prices import TOKEN_KINDS
from worker.store import tables

CHANCE = random.Random()  # noqa: S311 - of faults and times, not of secrets
PLACES = ("POST /v1/files", "POST /v1/batches", "POST /v1/messages/batches")
HANDLERS = {"openai": "bench.agent", "anthropic": "bench.plain_agent"}
# Minutes that a batch takes, and for which a request waits for others.
BATCH = (1.0, 40.0)
EVERY = 10.0


def reply_of(turns: int) -> Any:
    """A tool call at each turn but the last; then the org that the request names."""

    def reply(body: dict[str, Any]) -> Any:
        said = json.dumps(body)
        answered = said.count('"function_call_output"') + said.count('"tool_result"')
        [org] = set(re.findall(r"org_\d+", said))
        return ("look_up", {"topic": f"{org}-{answered}"}) if answered < turns - 1 else f"report of {org}"

    return reply


def configure(made: Installation, url: str, args: argparse.Namespace) -> None:
    made.configure(
        slots=0,
        children=args.children,
        extra=f"""\
lease = "10s"
renew = "2s"
preload = ["worker.handlers.warm_openai", "orgworker_bench"]
[batches.{args.provider}]
provider = "{args.provider}"
base_url = "{url}"
every = "{max(0.1, EVERY * args.minute):g}s"
poll = "{max(0.1, args.minute):g}s"
""",
    )
    (made.folder / "plugins" / "models.txt").write_text(f"{url}/v1")
    (made.folder / "secrets" / f"model_key__{args.provider}").write_text("sk-operator-0001")


class Killed:
    """Workers of which some are killed: the same number runs at any time."""

    def __init__(self, made: Installation, count: int) -> None:
        command = [sys.executable, "-m", "worker", "--config", str(made.folder / "worker.toml"), "run"]
        self._start = lambda: subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(made.folder / "plugins")},
            stdout=subprocess.DEVNULL,
            stderr=(made.folder / "worker.log").open("ab"),
            cwd=made.folder,
        )
        self.processes = [self._start() for _ in range(count)]

    def kill(self) -> None:
        place = CHANCE.randrange(len(self.processes))
        self.processes[place].kill()
        self.processes[place].wait()
        self.processes[place] = self._start()

    def kill_run(self) -> bool:
        """Kill the process of a run, if there is one."""
        workers = [psutil.Process(process.pid) for process in self.processes]
        found = [each for worker in workers for each in worker.children(recursive=True)]
        runs = [each for each in found if each.name() == linux.ProcessName.RUN]
        if runs:
            CHANCE.choice(runs).kill()
        return bool(runs)

    def processor_time(self) -> float:
        """Seconds of the workers and of all processes that they have or had."""
        total = 0.0
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                whole = psutil.Process(process.pid)
                for each in (whole, *whole.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += sum(each.cpu_times()[:4])
        return total

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout=60)


class Faults:
    """All faults that were asked for, at random times; `done` counts those that have come."""

    def __init__(
        self, made: Installation, apis: ModelApis, workers: Killed, args: argparse.Namespace
    ) -> None:
        self._made, self._apis, self._workers, self._every = made, apis, workers, args.every_fault
        counts = {"worker": args.kills, "run": args.run_kills, "database": args.outages, "answer": args.lost}
        self._left = [what for what, count in counts.items() for _ in range(count)]
        CHANCE.shuffle(self._left)
        self.done = Counter[str]()
        self._wait()

    def _wait(self) -> None:
        self._next = time.monotonic() + CHANCE.uniform(0.2, 2.0) * self._every

    def come(self) -> None:
        """Let the next fault come, if it is time."""
        if not self._left or time.monotonic() < self._next:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            match self._left[-1]:
                case "worker":
                    self._workers.kill()
                case "run" if not self._workers.kill_run():
                    return
                case "database":
                    self._made.restart_server()
                case "answer":
                    with self._apis.lock:
                        lost = CHANCE.choice((self._apis.lose_answers, self._apis.lose_requests))
                        lost[CHANCE.choice(PLACES)] += 1
            self.done[self._left.pop()] += 1
            self._wait()


@dataclass
class Measured:
    seconds: float
    processor: float


def run(made: Installation, apis: ModelApis, args: argparse.Namespace, *, faults: bool) -> Measured:
    """Run the agents of all orgs once more; returns what that took."""
    ended = made.ended()
    workers = Killed(made, args.workers)
    try:
        # Tokens, plans and the imports of the zygotes.
        time.sleep(args.warm)
        cpu, began = workers.processor_time(), time.monotonic()
        made.add_backlog(args.orgs, HANDLERS[args.provider], "child", vacuum=False)
        disturbances = Faults(made, apis, workers, args)
        come = disturbances.come if faults else lambda: None
        made.wait_for_end(ended + args.orgs, timeout=args.timeout, meanwhile=come)
        if faults:
            print(f"faults: {dict(disturbances.done)}")
        return Measured(time.monotonic() - began, workers.processor_time() - cpu)
    finally:
        workers.stop()


def check(made: Installation, apis: ModelApis, args: argparse.Namespace, limit: float) -> None:
    """Print what has become of the runs, and exit with 1 if one of them is wrong."""
    runs, orgs, days, items = tables.runs, tables.orgs, tables.model_days, tables.batch_items
    with made.database.autocommit() as connection:
        columns = (orgs.c.code, runs.c.state, runs.c.result, runs.c.scheduled_for, runs.c.finished_at)
        found = connection.execute(select(*columns).join(orgs, orgs.c.id == runs.c.org_id)).all()
        of_tokens = select(days.c.tariff, func.sum(days.c.units)).where(days.c.kind.in_(TOKEN_KINDS))
        tokens = {tariff: int(units) for tariff, units in connection.execute(of_tokens.group_by("tariff"))}
        by_reason = select(items.c.reason, func.count()).group_by(items.c.reason)
        reasons = {str(reason): count for reason, count in connection.execute(by_reason)}
        late = int(connection.execute(select(func.coalesce(func.sum(items.c.late), 0))).scalar_one())
        batches = int(connection.execute(select(func.count()).select_from(tables.batches)).scalar_one())
    wrong = [row for row in found if row.state != "succeeded" or row.result != f"report of {row.code}"]
    tardy = [row for row in found if (row.finished_at - row.scheduled_for).total_seconds() > limit]
    share = tokens.get("batch", 0) / max(1, sum(tokens.values()))
    print(f"runs: {len(found)}, of another org or failed: {len(wrong)}, after batch_until: {len(tardy)}")
    print(f"tokens at batch price: {100 * share:.2f} % of {sum(tokens.values())}")
    print(f"batches: {batches}, items by reason: {reasons}, requests on their own: {len(apis.alone)}")
    print(f"paid twice at the fake: {apis.twice}, shown as late: {late}")
    if wrong or tardy or late < apis.twice:
        raise SystemExit(f"wrong: {wrong[:3]} {tardy[:3]}")


def stored(made: Installation) -> None:
    """Print the bytes of a request beyond its compressed body and result, with indexes and dead rows."""
    if made.database.dialect != "postgresql":
        return
    sizes = text(
        "SELECT pg_total_relation_size('batch_items') + pg_total_relation_size('waits'), count(*), "
        "sum(coalesce(octet_length(body), 0) + coalesce(octet_length(result), 0)), "
        "avg(octet_length(result)) FROM batch_items"
    )
    with made.database.autocommit() as connection:
        whole, count, bodies, result = connection.execute(sizes).one()
    print(
        f"stored: {(whole - bodies) / count / 1024:.2f} KiB a request beyond bodies and results, "
        f"a result {result:.0f} bytes; {count} requests"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--provider", choices=["openai", "anthropic"], default="openai")
    parser.add_argument("--orgs", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--children", type=int, default=8)
    parser.add_argument("--minute", type=float, default=0.5, metavar="SECONDS")
    parser.add_argument("--within", default="8h")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--run-kills", type=int, default=0, metavar="N")
    parser.add_argument("--outages", type=int, default=0, metavar="N")
    parser.add_argument("--lost", type=int, default=0)
    parser.add_argument("--every-fault", type=float, default=3.0, metavar="SECONDS")
    parser.add_argument("--warm", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--timeout", type=float, default=3600.0, metavar="SECONDS")
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    apis = ModelApis(
        now=time.time,
        takes=lambda: CHANCE.uniform(*BATCH) * args.minute,
        reply=reply_of(args.turns),
    )
    with serving(apis) as url, installation(args.database, orgs=args.orgs) as made:
        configure(made, url, args)
        keys = {"params": {"url": url}, "isolation": "child", "egress": ["open"], "timeout": "10m"}
        batched = {"model_requests": "batch", "batch_within": args.within}
        made.define(HANDLERS[args.provider], spec={**keys, **batched})
        faults = args.kills + args.run_kills + args.outages + args.lost
        took = run(made, apis, args, faults=faults > 0)
        turns = args.orgs * args.turns
        print(
            f"{args.orgs} agents of {args.turns} turns: {took.seconds:.0f} s, load {os.getloadavg()[0]:.1f}"
        )
        check(made, apis, args, parse_duration(args.within).total_seconds())
        stored(made)
        if not faults:
            print(f"processor: {1e3 * took.processor / turns:.1f} ms a turn in batches")
        if args.alone:
            with made.database.transaction() as connection:
                spec = {"handler": HANDLERS[args.provider], "schedule": "every 1h", **keys}
                connection.execute(update(tables.definition_revisions).values(spec=spec))
            alone = run(made, apis, args, faults=False)
            print(
                f"the same without batches: {1e3 * alone.processor / turns:.1f} ms a turn; "
                f"a parked turn costs {1e3 * (took.processor - alone.processor) / turns:.1f} ms more"
            )


if __name__ == "__main__":
    main()
