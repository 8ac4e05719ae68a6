"""Measures nine o'clock: many orgs whose definitions are all due at one instant.

    .venv/bin/python -m bench.nine [--orgs N] [--per-org K] [--workers N] [--database postgresql|sqlite]
        [--cold|--warm|--restart|--ahead] [--provider-rate N] [--others N] [-o table|json]

Each org has a credential and K definitions of a template with one crontab line; their handler is inline and
does nothing. The workers are processes, the issuer is another. Where the tokens are at that instant:

    --cold      nowhere: each run's token is requested from the issuer (the default)
    --warm      in the memory of every worker, which has verified all of them a moment before
    --restart   in the database: the first instant after a restart of all workers
    --ahead     nowhere, but the workers have `--within` seconds to request them ahead of time

`--provider-rate` is what the issuer allows and the workers keep to, 0 is no limit. Meanwhile `--others`
definitions of other orgs are due each second; those due at the instant itself, which have no precedence, are
counted separately, and so are those that wait until such a run of their own definition is fired. Times
are from the instant until the handler is called.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, func, select

from bench.crowd import HANDLER, OTHER, Crowd, crowd, warm_handler
from bench.installation import Workers
from bench.server import processor_time
from worker.store import tables

MODES = ("cold", "warm", "restart", "ahead")
MINUTE = 60.0
# Without tokens the definitions are changed this long before the instant, as each worker looks once a second:
# nothing is then requested ahead of time.
EARLY = 1.2
# Token requests a second that the workers make at least, if the issuer has no limit.
COLD_RATE = 150
# Seconds between two looks at the progress, and until it is printed again.
LOOK = 0.5
SHOW = 10.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of processor time so far, and the resident memory of each worker in MiB."""

    workers: float
    server: float
    issuer: float
    memory: tuple[float, ...]

    @classmethod
    def of(cls, made: Crowd, working: Workers) -> Usage:
        memory = tuple(psutil.Process(each.pid).memory_info().rss / 2**20 for each in working.processes)
        used = sum(processor_time(each.pid) for each in working.processes)
        return cls(used, made.installation.server_cpu(), processor_time(made.issuer.pid), memory)


Say = Callable[[str], None]


def measure(given: argparse.Namespace, say: Say) -> dict[str, Any]:
    """The figures of one instant."""
    is_ahead = given.mode == "ahead"
    with crowd(
        given.database,
        workers=given.workers,
        slots=given.slots,
        rate=given.provider_rate,
        ahead=given.within if is_ahead else MINUTE,
    ) as (made, plugins):
        say(f"adding {given.orgs} orgs and {given.others} others")
        made.add(given.orgs, given.per_org, others=given.others)
        if given.mode in ("warm", "restart"):
            say("storing their tokens")
            made.store_tokens()
        with made.installation.workers(plugins=plugins, profile=given.profile) as working:
            wait(made, lambda connection: given.workers - ready(connection), say, "workers to start")
            if given.mode == "warm":
                made.add_backlog([warm_handler(number) for number in range(given.workers)])
                wait(made, unfinished(warm_handler(0)[:-1]), say, "tokens for every worker to verify")
                made.forget_history()
            at = make_due(made, given, say)
            before = Usage.of(made, working)
            time.sleep(max(0.0, at.timestamp() - time.time()))
            try:
                wait(made, unfinished(HANDLER, at), say, "runs to end", seconds=given.timeout)
            finally:
                after = Usage.of(made, working)
        say("reading the figures")
        return figures(made, given, at, before, after)


def make_due(made: Crowd, given: argparse.Namespace, say: Say) -> datetime:
    """Make all definitions due at a full second, and return it shortly before that."""
    # The update takes some 30 us a definition.
    need = 3 + given.orgs * given.per_org / 15_000
    # With tokens at hand the workers look ahead before the instant, and find nothing to request.
    leave = need + {"ahead": given.within, "cold": 0.0}.get(given.mode, MINUTE + 10)
    now = datetime.now(UTC)
    at = (now + timedelta(seconds=leave)).replace(microsecond=0) + timedelta(seconds=1)
    say(f"all are due at {at:%H:%M:%S}")
    if given.mode == "cold":
        sleep_until(at, need + EARLY)
    with made.making_due(at):
        if given.mode == "cold":
            sleep_until(at, EARLY)
    if given.mode in ("warm", "restart"):
        # Definitions that were due a day ago have been vacuumed since.
        made.settle()
    sleep_until(at, 1.0)
    if time.time() > at.timestamp():
        raise SystemExit("the definitions could not be made due in time; give fewer, or a quieter machine")
    return at


def sleep_until(at: datetime, before: float) -> None:
    time.sleep(max(0.0, at.timestamp() - before - time.time()))


def ready(connection: Connection) -> int:
    """How many live workers offer the handlers."""
    workers = tables.workers
    found = connection.execute(select(workers.c.handlers).where(workers.c.ended_at.is_(None))).scalars()
    return sum(HANDLER in handlers for handlers in found)


def unfinished(prefix: str, at: datetime | None = None) -> Callable[[Connection], int]:
    """How many runs of handlers with this prefix have not ended, and are due at `at` but not fired."""
    live, schedule = tables.live_runs, tables.schedule

    runs = select(func.count()).select_from(live).where(live.c.handler.startswith(prefix))
    due = select(func.count()).select_from(schedule).where(schedule.c.next_fire_at == at)

    def count(connection: Connection) -> int:
        parts = [runs] if at is None else [runs, due]
        return sum(int(connection.execute(part).scalar_one()) for part in reversed(parts))

    return count


def wait(
    made: Crowd, left: Callable[[Connection], int], say: Say, what: str, *, seconds: float = 3600
) -> None:
    """Wait until nothing is left; looks rarely, so as not to distort the measurement."""
    until, shown_at = time.monotonic() + seconds, 0.0
    while True:
        made.installation.check()
        with made.installation.database.autocommit() as connection:
            count = left(connection)
        if not count:
            return
        if time.monotonic() > until:
            say(f"given up after {seconds:.0f} s: {count} {what}")
            return
        if time.monotonic() - shown_at > SHOW:
            shown_at = time.monotonic()
            say(f"{count} {what}")
        time.sleep(LOOK)


def figures(
    made: Crowd, given: argparse.Namespace, at: datetime, before: Usage, after: Usage
) -> dict[str, Any]:
    """What was measured, by name; times in seconds, memory in MiB."""
    runs, attempts = tables.runs, tables.attempts
    query = (
        select(
            runs.c.handler,
            runs.c.org_id,
            runs.c.definition_id,
            runs.c.scheduled_for,
            runs.c.created_at,
            runs.c.state,
            runs.c.finished_at,
            attempts.c.handler_started_at,
        )
        .outerjoin(attempts, (attempts.c.run_id == runs.c.id) & (attempts.c.attempt == runs.c.attempt))
        .where(runs.c.scheduled_for >= at)
    )
    with made.database.autocommit() as connection:
        rows = connection.execute(query).all()
        now = made.database.now(connection)
    ours = [row for row in rows if row.handler == HANDLER]
    started = sorted((row.handler_started_at, row.org_id) for row in ours if row.handler_started_at)
    if not started:
        raise SystemExit("no run has started; the worker's log may say why")
    late = [(start - at).total_seconds() for start, _ in started]
    ends = [row.finished_at for row in ours if row.finished_at]
    last_end = max(ends, default=now)
    theirs = [row for row in rows if row.handler == OTHER and row.scheduled_for <= last_end]
    fired_at = {row.definition_id: row.created_at for row in theirs if row.scheduled_for == at}
    others, together, behind = (
        [
            ((row.handler_started_at or now) - row.scheduled_for).total_seconds()
            for row in theirs
            if group_of(row, at, fired_at) == group
        ]
        for group in ("later", "together", "behind")
    )
    requests, refused = made.issuer.counts()
    count, minute = given.orgs * given.per_org, int(at.timestamp())
    used = {
        name: round(getattr(after, name) - getattr(before, name), 2)
        for name in ("workers", "server", "issuer")
    }
    return {
        "orgs": given.orgs,
        "per_org": given.per_org,
        "workers": given.workers,
        "mode": given.mode,
        "provider_rate": given.provider_rate,
        "database": given.database,
        "started": len(started),
        "not_succeeded": sum(row.state != "succeeded" for row in ours) + count - len(ours),
        "first_start": round(late[0], 3),
        "all_started": round(late[-1], 3),
        "all_ended": round((last_end - at).total_seconds(), 3),
        "starts_per_second": round(len(late) / late[-1]),
        "late_p50": spread(late)[0],
        "late_p99": spread(late)[1],
        "others": len(others),
        "others_late_p50": spread(others)[0],
        "others_late_p99": spread(others)[1],
        "others_late_max": round(max(others, default=0.0), 3),
        "together": len(together),
        "together_late_p50": spread(together)[0],
        "together_late_max": round(max(together, default=0.0), 3),
        "behind": len(behind),
        "behind_late_max": round(max(behind, default=0.0), 3),
        "most_ahead": most_ahead([org for _, org in started], {row.org_id for row in ours}),
        "token_requests": sum(requests.values()),
        "token_requests_in_the_minute": sum(requests.get(minute + second, 0) for second in range(60)),
        "token_requests_refused": refused,
        "processor": used,
        "processor_us_per_run": {name: round(1e6 * value / count, 1) for name, value in used.items()},
        "memory_before": [round(each, 1) for each in before.memory],
        "memory_after": [round(each, 1) for each in after.memory],
        "load": round(os.getloadavg()[0], 1),
    }


def group_of(row: Any, at: datetime, fired_at: dict[str, datetime]) -> str:
    """Whether another run was due with the crowd, later, or later behind such a run of its own definition."""
    if row.scheduled_for == at:
        return "together"
    return "behind" if row.scheduled_for < fired_at.get(row.definition_id, at) else "later"


def spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    if len(seconds) < 2:
        return (0.0, 0.0)
    cuts = statistics.quantiles(seconds, n=100)
    return round(cuts[49], 3), round(cuts[98], 3)


def most_ahead(starts: Iterable[str], orgs: Iterable[str]) -> int:
    """How many starts one org was ahead of another at most, in the order of starts; even shares give 1."""
    counts = dict.fromkeys(orgs, 0)
    having = Counter(counts.values())
    least = most = worst = 0
    for org in starts:
        having[counts[org]] -= 1
        counts[org] += 1
        having[counts[org]] += 1
        most = max(most, counts[org])
        if not having[least]:
            least += 1
        worst = max(worst, most - least)
    return worst


def table(found: dict[str, Any]) -> str:
    used, each = found["processor"], found["processor_us_per_run"]
    memory = zip(found["memory_before"], found["memory_after"], strict=True)
    rate = f"{found['provider_rate']:g}/s" if found["provider_rate"] else "no limit"
    lines = (
        (f"{found['orgs']} orgs x {found['per_org']}", f"{found['workers']} workers, {found['database']}"),
        ("tokens; the issuer allows", f"{found['mode']}; {rate}"),
        ("first start, all started, all ended", seconds(found, "first_start", "all_started", "all_ended")),
        ("starts a second", f"{found['starts_per_second']}"),
        ("late p50, p99", seconds(found, "late_p50", "late_p99")),
        (
            f"{found['others']} other runs, due later: late p50, p99, max",
            seconds(found, "others_late_p50", "others_late_p99", "others_late_max"),
        ),
        (
            f"{found['together']} other runs, due with them: late p50, max",
            seconds(found, "together_late_p50", "together_late_max"),
        ),
        (
            f"{found['behind']} other runs, behind one of those: late max",
            seconds(found, "behind_late_max"),
        ),
        ("an org ahead of another by at most", f"{found['most_ahead']} starts"),
        (
            "token requests: all, in the minute, refused",
            f"{found['token_requests']}, {found['token_requests_in_the_minute']}, "
            f"{found['token_requests_refused']}",
        ),
        *(
            (f"processor of {name}: a run", f"{used[name]:.1f} s: {each[name]:.0f} us")
            for name in ("workers", "server", "issuer")
        ),
        ("memory of each worker, before and after", ", ".join(f"{a:.0f} to {b:.0f} MiB" for a, b in memory)),
        ("started, not succeeded", f"{found['started']}, {found['not_succeeded']}"),
        ("load, date", f"{found['load']}, {datetime.now(UTC):%Y-%m-%d}"),
    )
    return "\n".join(f"{name:<46} {value}" for name, value in lines)


def seconds(found: dict[str, Any], *names: str) -> str:
    return ", ".join(f"{found[name]:.2f} s" for name in names)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--orgs", type=int, default=10_000)
    parser.add_argument("--per-org", type=int, default=1, help="definitions of each org")
    parser.add_argument("--workers", type=int, default=4, help="on PostgreSQL")
    parser.add_argument("--slots", type=int, default=1000, help="inline, of each worker")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), default="postgresql")
    for mode in MODES:
        parser.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    parser.set_defaults(mode="cold")
    parser.add_argument("--within", type=float, default=0, help="[tokens] ahead, in seconds, for --ahead")
    parser.add_argument("--provider-rate", type=float, default=0, help="token requests a second; 0: no limit")
    parser.add_argument("--others", type=int, default=50, help="definitions that are due each second")
    parser.add_argument("--timeout", type=float, default=0, help="seconds until all runs have ended")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="cProfile's output of one worker")
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    given = parser.parse_args()
    if given.database == "sqlite" or given.profile:
        given.workers = 1
    pace = min(given.provider_rate or COLD_RATE, COLD_RATE)
    given.within = max(MINUTE, given.within or 1.3 * given.orgs / pace)
    given.timeout = given.timeout or 300 + 2 * given.orgs / pace
    return given


def main() -> None:
    given, began = arguments(), time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {what}", file=sys.stderr, flush=True)

    # As Ctrl-C: everything that was started ends, and every file is removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    say(f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.platform()}")
    try:
        found = measure(given, say)
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None
    print(json.dumps(found) if given.output == "json" else table(found))


if __name__ == "__main__":
    main()
