"""Rotation of the fleet: a second application for each org, and an end to the first, without a failed run.

Providers such as Kinde cannot change the secret of an application. Every step is decided by the rows, so the
next call continues wherever one was interrupted. Of an org's two applications:

    making → made → announced → active                    the new one
    active → overlapping      → retired → deleted         the old one, once the new one is active

A retired one is deleted when no token of it can be in use: no run of the org is running that began before
its tokens were dropped, or the last token has expired.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypedDict

from worker.diagnosis.requirements import load_org
from worker.errors import Conflict, WorkerError
from worker.features.provisioning.application_rights import name_of
from worker.features.provisioning.provisioning import Provisioned, Provisioner, applications_in
from worker.ids import OrgId
from worker.kit.walks import for_each, rows_of
from worker.model.definitions.units import format_duration
from worker.store import applications
from worker.store.dialect import Row
from worker.telemetry.events import emit
from worker.tokens.credentials import READ_AGAIN

PAGE = 500
# Orgs whose new application is begun at a time: few, so that what is due meanwhile does not wait for long.
WINDOW = 16
# From when a credential is retired until no attempt begins with a token of it: workers read credentials
# again after `READ_AGAIN`, and a token request that was under way may last ten seconds more.
DROPPED = timedelta(seconds=READ_AGAIN + 10)
# Clocks of issuers and APIs may differ by as much when they decide whether a token has expired.
LEEWAY = timedelta(seconds=60)
# Seconds between two looks at what is due, and at runs that still use an old token.
LONGEST_WAIT = 15.0
LOOK = 1.0
# The share of the issuer's rate at which credentials are exchanged: each makes workers request new tokens.
EXCHANGED_SHARE = 0.5


class Candidate(TypedDict):
    """An org whose credential is old enough; `created_at` is when its `client_id` was made."""

    org_id: OrgId
    org: str
    client_id: str
    created_at: datetime


@dataclass(slots=True)
class Rotated:
    """What became of one org's rotation.

    `client_id` replaces the client `replaces`; None if nothing was rotated. `is_over` if the old
    application is deleted.
    """

    org: str
    replaces: str | None
    client_id: str | None = None
    is_over: bool = False
    error: WorkerError | None = None

    @property
    def is_left(self) -> bool:
        return not self.is_over and self.error is None


@dataclass(slots=True, repr=False)
class Fleet:
    """Rotates the credentials that orgworker made for one issuer's orgs; call it within `exclusive`.

    `per_second` is the issuer's rate. An org that failed is left to the next `Fleet`.
    """

    provisioner: Provisioner
    announce: timedelta
    overlap: timedelta
    per_second: float
    report: Callable[[int, int], None] = lambda done, total: None
    say: Callable[[str], None] = lambda text: None
    results: dict[str, Rotated] = field(default_factory=dict, init=False)
    _waiting: list[Candidate] = field(default_factory=list, init=False)
    _said: frozenset[str] = field(default=frozenset(), init=False)

    def candidates(self, older_than: timedelta, limit: int | None = None) -> tuple[list[Candidate], int]:
        """The orgs to rotate, oldest credential first, and how many have one that a person added.

        Only active and paused orgs whose newest active credential is older than that.
        """
        found: list[Candidate] = []
        by_hand = 0
        for row in self._rotatable(older_than):
            if row["application_id"] is None:
                by_hand += not row["begun"]
            elif not row["begun"] and (limit is None or len(found) < limit):
                found.append(
                    Candidate(
                        org_id=row["org_id"],
                        org=row["org"],
                        client_id=row["client_id"],
                        created_at=row["created_at"],
                    )
                )
        return found, by_hand

    async def rotate(self, chosen: Sequence[Candidate]) -> list[Rotated]:
        """Rotate these orgs, and finish what earlier calls have begun; returns when all of it is over.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError: as `Provisioner.provision`; the next
                call continues.
        """
        self.choose(chosen)
        while (seconds := await self.advance()) is not None:
            self.report(sum(not each.is_left for each in self.results.values()), len(self.results))
            await self.provisioner.clock.sleep(seconds)
        return list(self.results.values())

    def choose(self, chosen: Sequence[Candidate]) -> None:
        """Let `advance` begin to rotate these orgs, a few at each call."""
        self._waiting += chosen
        self.results |= {each["org"]: Rotated(each["org"], each["client_id"]) for each in chosen}

    async def advance(self) -> float | None:
        """Do all that is due now; returns the seconds until more is, or None if all is over or failed.

        Raises:
            ProviderUnavailable, ProviderRefused, ConfigurationError: as `Provisioner.provision`.
        """
        database, provisioner = self.provisioner.database, self.provisioner
        earlier, now = await database.run(self._unfinished)
        making = [row for row in earlier if _is_making(row)][:WINDOW]
        used = [row for row in earlier if not _is_making(row)]
        room = WINDOW - len(making)
        chosen, self._waiting = self._waiting[:room], self._waiting[room:]
        fresh = await database.run(self._begin, chosen)
        try:
            async with asyncio.TaskGroup() as group:
                made = group.create_task(provisioner.complete(fresh, making, announce=self.announce))
                group.create_task(self._exchange(used, now))
        except BaseExceptionGroup as errors:
            raise next(
                (each for each in errors.exceptions if isinstance(each, WorkerError)), errors
            ) from None
        for outcome in made.result():
            self._note(outcome)
        rows, now = await database.run(self._unfinished)
        left = {row["org"] for row in rows} | {each["org"] for each in self._waiting}
        for org, result in self.results.items():
            result.is_over = org not in left and result.error is None
        self._tell(rows, now)
        if self._waiting:
            return 0.0
        return min((self._seconds(row, now) for row in rows), default=None)

    def _rotatable(
        self, older_than: timedelta = timedelta(), org_ids: Sequence[OrgId] | None = None
    ) -> Iterator[Row]:
        database = self.provisioner.database
        with database.autocommit() as connection:
            before = database.now(connection) - older_than
        issuer = self.provisioner.issuer
        return rows_of(
            database,
            lambda connection, after, limit: applications.rotatable(
                connection, issuer, before=before, org_ids=org_ids, after=after, limit=limit
            ),
            limit=PAGE,
        )

    def _begin(self, chosen: Sequence[Candidate]) -> list[Row]:
        """Insert the rows of new applications, for the orgs that still use the same credential."""
        if not chosen:
            return []
        clients = {each["client_id"] for each in chosen}
        still = [
            (OrgId(row["org_id"]), row["org"])
            for row in self._rotatable(org_ids=[each["org_id"] for each in chosen])
            if row["client_id"] in clients and not row["begun"]
        ]
        with self.provisioner.database.transaction() as connection:
            return self.provisioner.begin(connection, still)

    def _unfinished(self) -> tuple[list[Row], datetime]:
        """The rows of rotations that are not over and did not fail, and the time."""
        states = (*applications.UNFINISHED, "overlapping", "retired")
        database, issuer = self.provisioner.database, self.provisioner.issuer
        rows = list(applications_in(database, issuer, states))
        with database.autocommit() as connection:
            now = database.now(connection)
        beginning = {row["org"] for row in rows if row["state"] in applications.UNFINISHED}
        for row in rows:
            known = self.results.get(row["org"])
            if known is not None and known.client_id and row["org"] not in beginning and _is_back(row):
                known.error = Conflict(
                    f"the new credential of org {row['org']} was retired; the old one stays in use",
                    fix="the next call makes another",
                )
        rows = [row for row in rows if _is_rotated(row) and not self._has_failed(row)]
        for row in rows:
            is_new = row["state"] in applications.UNFINISHED
            old, new = ("replaces", "client_id") if is_new else ("client_id", "replaced_by")
            result = self.results.setdefault(row["org"], Rotated(row["org"], row[old]))
            result.client_id = row[new] or result.client_id
        return rows, now

    def _has_failed(self, row: Row) -> bool:
        known = self.results.get(row["org"])
        return known is not None and known.error is not None

    async def _exchange(self, rows: Sequence[Row], now: datetime) -> None:
        """Activate, retire and delete what is due; paced, since workers then request new tokens."""
        steps, database = self.provisioner.steps, self.provisioner.database
        pause = 1 / (EXCHANGED_SHARE * self.per_second)
        for row in rows:
            if row["state"] == "retired" or self._due_at(row) > now:
                continue
            try:
                if row["org_state"] == "removed" and row["state"] != "overlapping":
                    await database.run(steps.abandon, row["id"])
                elif row["state"] == "overlapping":
                    await database.run(steps.retire, row["id"])
                else:
                    await database.run(steps.activate, row["id"], self.overlap)
            except WorkerError as error:
                await self._failed(row, error)
            tokens = await database.run(self._tokens, row) if row["state"] == "overlapping" else 1
            await self.provisioner.clock.sleep(pause * tokens)

        async def delete(row: Row) -> None:
            if await database.run(self._is_unused, row, now):
                await self._delete(row)

        retired = [row for row in rows if row["state"] == "retired"]
        await for_each(retired, delete, concurrency=self.provisioner.concurrency)

    def _tokens(self, row: Row) -> int:
        """How many tokens of an org each worker requests when its credential is retired, at most."""
        with self.provisioner.database.autocommit() as connection:
            definitions = load_org(connection, row["org"]).definitions
        return max(1, len({(each.audience, each.handler, each.scopes) for each in definitions}))

    def _due_at(self, row: Row) -> datetime:
        """When the next step of a row may be taken, at the earliest."""
        if row["state"] == "retired":
            retired_at: datetime = row["retired_at"] or row["updated_at"]
            return retired_at + DROPPED
        at: datetime = row["updated_at"]
        return at if row["org_state"] == "removed" else row["not_before"] or at

    def _is_unused(self, row: Row, now: datetime) -> bool:
        """Whether no token of a retired application can be in use."""
        dropped_at = self._due_at(row)
        if now < dropped_at:
            return False
        last_used_at, seconds = row["last_used_at"], row["token_seconds"]
        if last_used_at is None or (
            seconds and now >= last_used_at + timedelta(seconds=seconds) + DROPPED + LEEWAY
        ):
            return True
        with self.provisioner.database.autocommit() as connection:
            return not applications.has_running(connection, OrgId(row["org_id"]), dropped_at)

    async def _delete(self, row: Row) -> None:
        """Delete an application at the provider; the adapter first checks its name and org."""
        steps, management = self.provisioner.steps, self.provisioner.management
        try:
            if row["application_id"] is not None:
                await management.delete(row["application_id"], org=row["org"], name=name_of(row))
            await self.provisioner.database.run(steps.deleted, row["id"])
        except WorkerError as error:
            await self._failed(row, error)

    async def _failed(self, row: Row, error: WorkerError) -> None:
        self.results[row["org"]].error = error
        await self.provisioner.database.run(self.provisioner.steps.note_error, row["id"], error)
        emit("provisioning.failed", org=row["org"], issuer=self.provisioner.issuer, error=error.code)

    def _note(self, outcome: Provisioned) -> None:
        result = self.results.setdefault(outcome.org, Rotated(outcome.org, None))
        result.client_id = outcome.client_id or result.client_id
        result.error = outcome.error

    def _seconds(self, row: Row, now: datetime) -> float:
        """How long to wait for a row before the next look."""
        if _is_making(row):
            return 0.0
        wait = (self._due_at(row) - now).total_seconds()
        return min(max(wait, LOOK if row["state"] == "retired" else 0.0), LONGEST_WAIT)

    def _tell(self, rows: Sequence[Row], now: datetime) -> None:
        """Say what it waits for, if that is something else than before; numbers may differ."""
        phases: dict[str, list[Row]] = {}
        for row in rows:
            phases.setdefault(_PHASES[row["state"]], []).append(row)
        if not phases or phases.keys() == self._said:
            return
        if not self._said:
            self.say("waits until the old applications are deleted; if interrupted, the next call continues")
        self._said = frozenset(phases)
        parts = []
        for phase, found in phases.items():
            left = round((max(self._due_at(row) for row in found) - now).total_seconds())
            is_timed = left > 0 and all(row["state"] in ("announced", "overlapping") for row in found)
            span = f", for {format_duration(timedelta(seconds=left))} at most" if is_timed else ""
            parts.append(f"{len(found)} org{'s' * (len(found) != 1)}: {phase}{span}")
        self.say("; ".join(parts))


_PHASES = {
    "making": "the new application is to be made",
    "made": "the new application is to be verified",
    "announced": "the new client is announced, and not used yet",
    "overlapping": "the old credential stays usable",
    "retired": "the old application is deleted once no run uses its token",
}


def _is_rotated(row: Row) -> bool:
    """Whether a rotation goes on with a row."""
    if row["state"] not in applications.UNFINISHED:
        return not _is_back(row)
    # One without a predecessor belongs to `orgs sync --provision`, and one of a removed org that may not even
    # be there to `orgs sync --orphans`.
    if row["org_state"] == "removed":
        return bool(row["state"] != "making")
    return row["replaces"] is not None


def _is_back(row: Row) -> bool:
    """Whether an application in its overlap is the newest again: the new credential was retired by hand."""
    is_active: bool = row["state"] == "overlapping" and row["credential_state"] == "active"
    return is_active and row["replaced_by"] is None


def _is_making(row: Row) -> bool:
    """Whether the provisioner has to complete a row; also one whose credential was retired by hand."""
    if row["org_state"] == "removed" or row["state"] not in applications.UNFINISHED:
        return False
    is_waiting: bool = row["state"] == "announced" and row["credential_state"] == "pending"
    return not is_waiting
