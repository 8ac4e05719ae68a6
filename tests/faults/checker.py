"""Judges a history: what the documented columns, the handlers' journal and the faults say together.

It shares no code with the product, and knows of it only what is promised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal

Row = Mapping[str, Any]

FINAL = {"succeeded", "failed", "cancelled", "refused", "skipped"}
# How much two clocks readings of one machine may disagree: a line is written after it is stamped.
BLUR = timedelta(milliseconds=20)
# What a worker admits before it has noticed that its zygote is dead is lost as well.
NOTICED = timedelta(milliseconds=200)
# As is what a worker starts for a host whose call it is answering while the host dies.
ANSWERED = timedelta(seconds=1)


@dataclass(frozen=True)
class Fault:
    """What befell one worker, or with no `worker` the database or engine of all; it lasts until `until`.

    kill and stop are SIGKILL and SIGSTOP of a process of that incarnation; terminate ends
    one of its sessions, partition holds all that it and the database say to each other,
    outage is the database's own absence.
    """

    kind: Literal["kill", "stop", "terminate", "partition", "outage"]
    target: Literal["worker", "zygote", "child", "session", "database", "engine"]
    worker: str
    at: datetime
    until: datetime | None = None


@dataclass(frozen=True)
class History:
    """All that a checker may know. `by_lease` is false where a lock decides, which falls with its holder.

    `periods` give each definition's distance between two instants, in seconds; a
    definition that is started by hand only has none. `placing` is how long an engine may keep a run of
    a pool from its hosts: it may give one to a host that hangs.
    """

    runs: Sequence[Row]
    attempts: Sequence[Row]
    skips: Sequence[Row]
    workers: Sequence[Row]
    checkpoints: Sequence[Row]
    journal: Sequence[Row]
    lease: timedelta
    poll: timedelta
    by_lease: bool = True
    faults: Sequence[Fault] = ()
    periods: Mapping[str, float] = field(default_factory=dict)
    placing: Mapping[str, timedelta] = field(default_factory=dict)


def judge(history: History) -> list[str]:
    """Every objection to a history, in words; none means that it keeps all promises."""
    return [
        *unfinished(history),
        *holes(history),
        *falling_tokens(history),
        *two_owners(history),
        *late_writes(history),
        *slow_recoveries(history),
        *wrong_instants(history),
    ]


def unfinished(history: History) -> Iterator[str]:
    """Nothing is left unfinished, and nothing failed that only faults befell."""
    for run in history.runs:
        if run["state"] not in FINAL:
            yield f"run {run['id']} is left {run['state']} ({run['reason']})"
        elif run["state"] != "succeeded":
            yield f"run {run['id']} ended {run['state']} ({run['reason']}, {run['detail']})"


def holes(history: History) -> Iterator[str]:
    """The attempts of a run are 1, 2, 3 … without a hole, and only the last one succeeded."""
    attempts = by_run(history.attempts)
    for run in history.runs:
        found = [attempt["attempt"] for attempt in attempts[run["id"]]]
        if found != list(range(1, (run["attempt"] or 0) + 1)):
            yield f"run {run['id']} is at attempt {run['attempt']} and has attempts {found}"
        outcomes = [attempt["outcome"] for attempt in attempts[run["id"]]]
        if "succeeded" in outcomes[:-1]:
            yield f"run {run['id']} went on after it had succeeded: {outcomes}"


def falling_tokens(history: History) -> Iterator[str]:
    """Fencing tokens rise with the attempts, and the result carries the last."""
    attempts = by_run(history.attempts)
    for run in history.runs:
        tokens = [attempt["fencing_token"] for attempt in attempts[run["id"]]]
        if any(later <= earlier for earlier, later in pairwise(tokens)):
            yield f"the fencing tokens of run {run['id']} do not rise: {tokens}"
        if run["state"] in FINAL and tokens and run["result_fencing_token"] != tokens[-1]:
            yield f"run {run['id']} has a result under {run['result_fencing_token']}, attempts under {tokens}"


def two_owners(history: History) -> Iterator[str]:
    """Attempts of one run do not overlap: not in their rows, and not in what their processes did."""
    for run_id, attempts in by_run(history.attempts).items():
        for earlier, later in pairwise(attempts):
            if later["started_at"] < earlier["ended_at"]:
                yield f"run {run_id}: attempt {later['attempt']} began before the one before it had ended"
    lines: dict[tuple[str, int], list[datetime]] = defaultdict(list)
    for line in history.journal:
        lines[line["run"], line["attempt"]].append(line["at"])
    last: dict[str, datetime] = {}
    for (run_id, attempt), instants in sorted(lines.items()):
        if run_id in last and min(instants) < last[run_id]:
            late = (last[run_id] - min(instants)).total_seconds()
            yield f"run {run_id}: an earlier attempt still acted {late:.3f} s after attempt {attempt} began"
        last[run_id] = max(instants)


def late_writes(history: History) -> Iterator[str]:
    """No save of an attempt counts once a later attempt has begun, and none that counted is forgotten."""
    begun = {(attempt["run_id"], attempt["attempt"]): attempt for attempt in history.attempts}
    saved: dict[str, int] = {}
    asked: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for line in history.journal:
        run_id = line["run"]
        if line["who"] == "start":
            if not saved.get(run_id, 0) <= line["first"] <= asked.get(run_id, 0):
                yield (
                    f"run {run_id}: attempt {line['attempt']} began from step {line['first']}, with "
                    f"{saved.get(run_id, 0)} saved and {asked.get(run_id, 0)} asked for"
                )
        elif line["who"] == "saving":
            asked[run_id] = max(asked.get(run_id, 0), line["step"])
        elif line["who"] == "saved":
            saved[run_id] = max(saved.get(run_id, 0), line["step"])
            tokens[run_id] = max(tokens.get(run_id, 0), line["fencing_token"])
            later = begun.get((run_id, line["attempt"] + 1))
            if later is not None and line["at"] > later["started_at"] + BLUR:
                yield f"run {run_id}: attempt {line['attempt']} saved after the next one had begun"
    for checkpoint in history.checkpoints:
        run_id = checkpoint["run_id"]
        if checkpoint["fencing_token"] < tokens.get(run_id, 0):
            yield (
                f"run {run_id}: the checkpoint under fencing token {tokens[run_id]} was overwritten late "
                f"under {checkpoint['fencing_token']}"
            )
        elif checkpoint["data"]["step"] < saved.get(run_id, 0):
            yield f"run {run_id}: step {saved[run_id]} was saved, step {checkpoint['data']['step']} is kept"


def slow_recoveries(history: History) -> Iterator[str]:
    """A lost run starts again within lease + poll + 1 s, and no run is lost without a cause.

    Counted from the later of the death and the start of a survivor's unbroken contact.
    """
    attempts = by_run(history.attempts)
    pools = {run["id"]: run.get("pool", "") for run in history.runs}
    hosts = hosts_of(history)
    for lost in history.attempts:
        if lost["outcome"] != "lost":
            continue
        unnoticed = ANSWERED if lost["worker_id"] in hosts else NOTICED
        causes = [
            fault.at
            for fault in history.faults
            if fault.worker == lost["worker_id"]
            and fault.target in ("worker", "zygote")
            and lost["started_at"] - unnoticed <= (fault.until or fault.at)
            and fault.at <= lost["ended_at"]
        ]
        if not causes:
            befell = [fault for fault in history.faults if fault.worker == lost["worker_id"]]
            yield (
                f"run {lost['run_id']}: attempt {lost['attempt']} was lost from {lost['started_at']} to "
                f"{lost['ended_at']}, and nothing had happened to {lost['worker_id']} but {befell}"
            )
            continue
        since = max(max(causes), earliest_contact(history, lost["ended_at"]))
        found = lost["ended_at"] - (history.lease if history.by_lease else timedelta(0))
        again = [a["started_at"] for a in attempts[lost["run_id"]] if a["attempt"] == lost["attempt"] + 1]
        waits = [("found", found, since)]
        for at in again:
            # The contact may break once more after the run was found.
            pool = pools.get(lost["run_id"], "")
            counted = max(
                since,
                earliest_contact(history, at),
                earliest_contact(history, at, pool),
                last_fault_of_control(history, at),
            )
            placing = history.placing.get(pool, timedelta(0))
            if placing:
                # Each host that hangs may have been given the run, and one that still does more than once.
                hung = [
                    (fault.at, fault.until)
                    for fault in history.faults
                    if fault.worker in hosts and fault.until
                ]
                counted = max([counted, *(end for _, end in hung if end < at)])
                if any(begun < at <= end for begun, end in hung):
                    placing *= 3
            waits.append(("started again", at - history.lease - placing, counted))
        for what, at, since in waits:
            late = (at - since - history.poll).total_seconds()
            if late > 1.0:
                yield (
                    f"run {lost['run_id']}: attempt {lost['attempt']} was {what} {late:.2f} s late; "
                    f"{lost['worker_id']} was lost at {max(causes)}, counted from {since}"
                )


def earliest_contact(history: History, at: datetime, pool: str = "") -> datetime:
    """Since when the survivor longest in unbroken contact at `at` has had it.

    Of the hosts of a pool, if it has any; else of the workers, since a host recovers nothing.
    """
    ended = {fault.worker: fault.at for fault in history.faults if is_death(fault)}
    since: list[datetime] = []
    hosts = {worker["id"] for worker in history.workers if pool and worker.get("pool") == pool}
    for worker in history.workers:
        if worker["id"] not in hosts if hosts else worker.get("host_id") is not None:
            continue
        breaks = [
            fault.until or fault.at
            for fault in history.faults
            if fault.worker in (worker["id"], "")
            and fault.target in ("worker", "session", "database")
            and not is_death(fault)
            and fault.at < at
        ]
        alive = worker["started_at"] <= at and ended.get(worker["id"], at) >= at
        if alive and (worker["ended_at"] is None or worker["ended_at"] >= at):
            since.append(max([worker["started_at"], *breaks]))
    return min(since, default=at)


def last_fault_of_control(history: History, before: datetime) -> datetime:
    """When the last fault ended of a worker or an engine, without which hosts are given no run.

    With hosts only: a worker that dies while it places a run delays it for its lease.
    """
    hosts = hosts_of(history)
    faults = [fault for fault in history.faults if hosts and fault.worker not in hosts]
    ends = [fault.until or fault.at for fault in faults if fault.at < before]
    return max(ends, default=history.workers[0]["started_at"])


def hosts_of(history: History) -> set[Any]:
    """The incarnations of hosts."""
    return {worker["id"] for worker in history.workers if worker.get("host_id") is not None}


def is_death(fault: Fault) -> bool:
    return fault.kind == "kill" and fault.target == "worker"


def wrong_instants(history: History) -> Iterator[str]:
    """From the first to the last, each instant of a schedule is one run or stands in one skip."""
    for name, seconds in history.periods.items():
        period = timedelta(seconds=seconds)
        instants = [
            run["scheduled_for"]
            for run in history.runs
            if run["definition"] == name and run["origin"] == "schedule"
        ]
        for skip in history.skips:
            if skip["definition"] == name:
                span = [skip["skipped_from"] + n * period for n in range(skip["count"])]
                if span[-1] != skip["skipped_until"]:
                    yield f"{name}: a skip of {skip['count']} from {span[0]} ends at {skip['skipped_until']}"
                instants += span
        instants.sort()
        if not instants:
            yield f"{name}: nothing was ever due"
        for earlier, later in pairwise(instants):
            if later == earlier:
                yield f"{name}: {later} came twice"
            elif later != earlier + period:
                yield f"{name}: nothing between {earlier} and {later}"


def by_run(attempts: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for attempt in sorted(attempts, key=lambda row: (row["run_id"], row["attempt"])):
        found[attempt["run_id"]].append(attempt)
    return found
