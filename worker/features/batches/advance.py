"""One batch, from its rows to the deletion of its files; each call does what is next, under a lease."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from worker.features.batches.accounts import Accounts, Ledger
from worker.features.batches.remote import (
    BatchApi,
    Declined,
    Failure,
    Line,
    Missing,
    Remote,
    SlowDown,
)
from worker.features.batches.sealing import Sealer
from worker.model.batches import Fallback, ModelApi, Result, usage_of
from worker.store import batch_requests, batches
from worker.store.batch_requests import CHANGED, Counted, StoredResult
from worker.store.batches import PoolLease
from worker.store.database import Database
from worker.store.dialect import Row, database_now
from worker.telemetry.events import emit
from worker.telemetry.mask_in_turn import mask_each

# How far a provider's clock may differ from the database's, and how long a submission may be under way.
SKEW = timedelta(minutes=5)
GRACE = timedelta(minutes=2)
# When a batch that has not ended is given up: providers end theirs after a day.
LONGEST = timedelta(hours=26)
# Unknown batches whose results are looked at to find a lost one.
CANDIDATES = 20


class LeaseGone(Exception):
    """The lease of the pool is lost: nothing more is sent or written."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a lost submission is looked for; see `SKEW` and `GRACE`."""

    skew: timedelta = SKEW
    grace: timedelta = GRACE
    longest: timedelta = LONGEST


@dataclass(eq=False)
class Advance:
    """Advances the batches of a pool. `check` raises LeaseGone once the lease may have expired.

    `polls` has the seconds between two looks at a batch, by API.
    """

    database: Database
    accounts: Accounts
    sealer: Sealer
    ledger: Ledger
    apis: Mapping[str, ModelApi]
    polls: Mapping[str, float]
    lease: PoolLease
    check: Callable[[], None]
    on_woken: Callable[[], object]
    patience: Patience = field(default_factory=Patience)

    async def next(self, row: Row) -> None:
        """Do what is next for a batch. Raises LeaseGone, Unavailable."""
        api = await self.accounts.open(row["api"], row["org_id"])
        try:
            if row["state"] in ("new", "uploaded") and await self._is_too_old(row):
                await self._give_up(row, "expired", "too_old")
            elif api is None:
                await self._without_key(row)
            elif row["state"] == "new":
                await self._prepare(row, api)
            elif row["state"] == "uploaded":
                await self._create(row, api, row["file_id"], ())
            elif row["state"] == "creating":
                await self._find(row, api)
            elif row["state"] == "sent":
                await self._poll(row, api)
            else:
                await self._tidy(row, api)
        except SlowDown as error:
            await self._later(row, error.code, error.after)
        except Failure as error:
            await self._later(row, error.code)

    async def _is_too_old(self, row: Row) -> bool:
        """Whether its provider must have ended it, or it was not submitted for as long."""
        began = row["creating_at"] if row["state"] == "creating" else row["sent_at"] or row["created_at"]
        now = await self.database.call_autocommit(database_now)
        return bool(now > began + self.patience.longest)

    async def _later(self, row: Row, error: str | None, seconds: float | None = None) -> None:
        """Look again after a while; give up one that was submitted and should have ended."""
        if row["state"] not in ("new", "uploaded") and await self._is_too_old(row):
            await self._give_up(row, "expired", "too_old")
        else:
            await self._change(row, error=error, wait=seconds or self._poll_seconds(row))

    async def _without_key(self, row: Row) -> None:
        if row["state"] in ("new", "uploaded"):
            await self._give_up(row, "no_key", "no_key")
        else:
            await self._later(row, "no_key")

    # --- Submission. ---

    async def _prepare(self, row: Row, api: BatchApi) -> None:
        if row["tries"]:
            await self._delete_uploads(row, api)
        lines = await self._lines(row)
        if not lines:
            await self._fail(row, "empty", apart=row["apart"])
            return
        if not api.takes_file:
            await self._create(row, api, None, lines)
            return
        await self._change(row, tries=row["tries"] + 1)
        row["tries"] += 1
        self.check()
        file_id = await api.upload(_file_name(row), row["path"], lines)
        await self._change(row, state="uploaded", file_id=file_id, requests=len(lines))
        await self._create(row, api, file_id, ())

    async def _delete_uploads(self, row: Row, api: BatchApi) -> None:
        """Delete uploads whose answers were lost, or that were fenced."""
        for file_id in await api.find_files(_file_name(row)):
            await api.delete_file(file_id)

    async def _create(self, row: Row, api: BatchApi, file_id: str | None, lines: Sequence[Line]) -> None:
        """Submit a batch. That it may have been is stored before."""
        counted: dict[str, Any] = (
            {} if api.takes_file else {"requests": len(lines), "tries": row["tries"] + 1}
        )
        await self._change(row, state="creating", creating_at=True, **counted)
        row |= counted
        self.check()
        try:
            remote = await api.create(row["path"], row["betas"], file_id, lines)
        except SlowDown as error:
            # It has not been done.
            before = "uploaded" if api.takes_file else "new"
            wait = error.after or self._poll_seconds(row)
            await self._change(row, state=before, error=error.code, wait=wait)
        except Declined as error:
            if file_id is not None:
                await api.delete_file(file_id)
            await self._refused(row, error.code)
        except Failure as error:
            emit("batch.unsure", batch=row["id"], api=row["api"], error=error.code)
            await self._change(row, error=error.code, wait=self._soon(row))
        else:
            await self._sent(row, remote)

    async def _sent(self, row: Row, remote: Remote) -> None:
        wait = self._poll_seconds(row)
        await self._change(row, state="sent", provider_id=remote.id, sent_at=True, error=None, wait=wait)
        emit("batch.sent", batch=row["id"], api=row["api"], model=row["model"], requests=row["requests"])

    async def _find(self, row: Row, api: BatchApi) -> None:
        """Find a batch whose submission has no known answer."""
        if api.takes_file:
            await self._find_by_file(row, api)
        else:
            await self._find_by_results(row, api)

    async def _find_by_file(self, row: Row, api: BatchApi) -> None:
        if (found := await api.made_of(row["file_id"])) is None:
            # From here on a submission of that file that comes late is refused.
            await api.delete_file(row["file_id"])
            found = await api.made_of(row["file_id"])
        if found is not None:
            await self._sent(row, found)
        else:
            await self._change(row, state="new", file_id=None, wait=0)

    async def _find_by_results(self, row: Row, api: BatchApi) -> None:
        """Without an idempotency key only its results say which batch it is."""
        is_open = False
        # Before the list: what arrives in time is in it.
        now = await self.database.call_autocommit(database_now)
        for remote in await self._unknown(row, api, row["creating_at"]):
            if remote.requests != row["requests"]:
                continue
            if remote.state == "open":
                is_open = True
            elif await self._is_ours(row, api, remote):
                await self._sent(row, remote)
                return
        if is_open or now < row["creating_at"] + self.patience.grace:
            await self._later(row, row["error"], self._soon(row))
        else:
            await self._change(row, state="new", wait=0)

    async def _unknown(self, row: Row, api: BatchApi, since: datetime) -> list[Remote]:
        """The batches since then, within the time of a submission, that this installation does not know."""
        listed = await api.since(since - self.patience.skew)
        last = row["creating_at"] + self.patience.grace + self.patience.skew
        near = [remote for remote in listed if remote.created_at <= last]
        known = await self.database.call_autocommit(batches.known_ids, [remote.id for remote in near])
        return [remote for remote in near if remote.id not in known][:CANDIDATES]

    async def _is_ours(self, row: Row, api: BatchApi, remote: Remote) -> bool:
        results = api.results(remote)
        try:
            async for result in results:
                return await self.database.call_autocommit(batches.are_of_batch, row["id"], [result.id])
        finally:
            await results.aclose()
        return False

    async def _refused(self, row: Row, code: str) -> None:
        """The provider refused the whole batch: one of its requests may be the cause."""
        again = not row["apart"] and row["org_id"] is None and row["requests"] > 1
        emit(
            "batch.failed",
            batch=row["id"],
            api=row["api"],
            model=row["model"],
            requests=row["requests"],
            error=code,
        )
        if not again:
            await self._give_up(row, "refused", code)
            return
        await self._fail(row, code, apart=True)

    async def _fail(self, row: Row, code: str, *, apart: bool) -> None:
        """End a batch whose requests wait for another one."""
        if not await self.database.call(batches.fail, self.lease, row["id"], code, apart=apart):
            raise LeaseGone

    async def _give_up(self, row: Row, reason: Fallback, code: str) -> None:
        """Let the requests of a batch that are not over be sent on their own."""
        if row["file_id"] and row["state"] == "uploaded" and (api := await self._api(row)) is not None:
            await api.delete_file(row["file_id"])
        await self._fall_back(row, reason)
        await self._change(row, state="failed", error=code)

    async def _api(self, row: Row) -> BatchApi | None:
        return await self.accounts.open(row["api"], row["org_id"])

    async def _fall_back(self, row: Row, reason: Fallback) -> None:
        await self._send_alone(await self.database.call_autocommit(batches.open_of, row["id"]), reason)

    async def _send_alone(self, ids: Sequence[str], reason: Fallback) -> None:
        for begin in range(0, len(ids), CHANGED):
            self.check()
            count = await self.database.call(batch_requests.fall_back, ids[begin : begin + CHANGED], reason)
            emit("batch.fell_back", reason=reason, requests=count)
        if ids:
            self.on_woken()

    async def _lines(self, row: Row) -> list[Line]:
        """The requests of a batch whose runs are unfinished; one that does not open is sent on its own."""
        lines, unreadable = [], []
        for one in await self.database.call_autocommit(batches.requests_of, row["id"]):
            place = {"item": one["id"], "org": one["org_id"], "run": one["run_id"]}
            text = self.sealer.open("request", one["body"], **place)
            if text is None:
                unreadable.append(one["id"])
            else:
                lines.append(Line(one["id"], text.encode()))
        await self._send_alone(unreadable, "unreadable")
        return lines

    # --- Results. ---

    async def _poll(self, row: Row, api: BatchApi) -> None:
        try:
            remote = await api.get(row["provider_id"])
        except Missing:
            # Of another project's key, or deleted by hand: it may come back with the key.
            await self._later(row, "missing")
            return
        if remote.state == "open":
            await self._later(row, None)
        elif remote.state == "refused":
            if remote.file_id:
                await api.delete_file(remote.file_id)
            await self._refused(row, remote.error or "refused")
        else:
            counted = await self._store(row, api, remote)
            await self._fall_back(row, "expired")
            files = ",".join(remote.files) or None
            ended = {"state": "read", "ended_at": True, "results": files, "error": None, "wait": 0}
            await self._change(row, **ended, late=row["late"] + counted.late)
            self._report(row, counted)

    async def _store(self, row: Row, api: BatchApi, remote: Remote) -> Counted:
        """Store the results of a batch, some at a time; each counts once however often they are read."""
        total = Counted()
        async for part in in_parts(api, remote):
            self.check()
            results = await self._sealed(row, part)
            storing = asyncio.create_task(self._store_part(row, remote, results))
            try:
                counted = await asyncio.shield(storing)
            except asyncio.CancelledError:
                # By a drain: nothing would report what is stored now.
                await asyncio.wait({storing})
                raise
            total = Counted(total.stored + counted.stored, total.late + counted.late)
            for reason, count in counted.failed.items():
                emit("batch.fell_back", reason=reason, requests=count)
            if counted.stored:
                self.on_woken()
        return total

    async def _store_part(self, row: Row, remote: Remote, results: Sequence[StoredResult]) -> Counted:
        prices = await self.ledger.prices()
        counted = await self.database.call(
            batch_requests.store_results, row["id"], remote.id, results, prices
        )
        self.ledger.report(counted.spends)
        return counted

    async def _sealed(self, row: Row, part: Sequence[Result]) -> list[StoredResult]:
        ids = [result.id for result in part]
        places = await self.database.call_autocommit(batch_requests.places_of, row["id"], ids)
        # What is not of this batch reaches no run, whatever the provider says.
        mine = [result for result in part if result.id in places]
        answers = [(result.answer(), places[result.id][0]) for result in mine]
        masked = await mask_each(answers)
        provider = self.apis[row["api"]].provider
        stored = []
        for result, text in zip(mine, masked, strict=True):
            org, run = places[result.id]
            used = usage_of(provider, row["model"], result.response(provider))
            if result.status != "succeeded":
                reason: Any = "failed" if result.status == "errored" else "expired"
                stored.append(StoredResult(result.id, None, used, reason))
                continue
            sealed = self.sealer.seal("result", text, item=result.id, org=org, run=run)
            fallback: Any = None if sealed is not None else "unreadable"
            stored.append(StoredResult(result.id, sealed, used, fallback))
        return stored

    async def _tidy(self, row: Row, api: BatchApi) -> None:
        """Delete what the provider keeps of a batch whose results are stored."""
        if not api.takes_file and row["tries"] > 1 and not await self._count_twice(row, api):
            await self._change(row, wait=self._poll_seconds(row))
            return
        files = [row["file_id"], *(row["results"] or "").split(",")]
        for file_id in files:
            if file_id:
                await api.delete_file(file_id)
        if row["tries"] > 1:
            # One may have arrived late.
            await self._delete_uploads(row, api)
        await api.forget(row["provider_id"])
        await self._change(row, state="done")

    async def _count_twice(self, row: Row, api: BatchApi) -> bool:
        """Count what was paid twice, if a late submission made another batch; False while one is open."""
        for remote in await self._unknown(row, api, row["created_at"]):
            if remote.state == "open":
                return False
            if await self._is_ours(row, api, remote):
                counted = await self._store(row, api, remote)
                await self._change(row, late=row["late"] + counted.late)
                self._report(row, counted)
                await api.forget(remote.id)
        return True

    def _report(self, row: Row, counted: Counted) -> None:
        emit(
            "batch.ended",
            batch=row["id"],
            api=row["api"],
            model=row["model"],
            requests=counted.stored,
            seconds=0.0 if row["sent_at"] is None else (row["next_at"] - row["sent_at"]).total_seconds(),
            late=counted.late,
        )

    async def _change(self, row: Row, **values: Any) -> None:
        if not await self.database.call(batches.change, self.lease, row["id"], values):
            raise LeaseGone
        row |= {name: value for name, value in values.items() if name in row and value is not True}

    def _poll_seconds(self, row: Row) -> float:
        return self.polls[row["api"]]

    def _soon(self, row: Row) -> float:
        return min(self._poll_seconds(row), self.patience.grace.total_seconds() / 4)


def _file_name(row: Row) -> str:
    return f"orgworker-{row['id']}.jsonl"


async def in_parts(api: BatchApi, remote: Remote) -> AsyncIterator[list[Result]]:
    """The results of a batch, as many at a time as one transaction stores."""
    part: list[Result] = []
    async for result in api.results(remote):
        part.append(result)
        if len(part) == CHANGED:
            yield part
            part = []
    if part:
        yield part
