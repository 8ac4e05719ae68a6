"""What batches of model requests must keep: each is paid once, for its own run, and counted as it was paid.

It knows what the APIs charged, what the handlers got, and the documented columns.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.simulation import jobs
from tests.simulation.batch_plan import MODEL_BUDGETS
from tests.simulation.entries import Action
from tests.simulation.models import PATIENCE, PRICES, Charge, Models, units_of
from worker.handlers.completions import STEP
from worker.handlers.model_usage import LLM_TOKENS
from worker.model.definitions.budgets import MONEY

Row = Mapping[str, Any]
METERS = (LLM_TOKENS, MONEY)


class Batches:
    """Judges the requests of runs. By `by_clock` the times in the rows are those of one clock."""

    def __init__(
        self, models: Models, faults: Sequence[Action], rows: Mapping[str, Sequence[Row]], *, by_clock: bool
    ) -> None:
        self._models = models
        self._late_uploads = any(
            fault.where.endswith("POST /v1/files") and not fault.kind.startswith("lose") for fault in faults
        )
        self._by_clock = by_clock
        self._runs = {run["id"]: run for run in rows["runs"]}
        self._batches = {row["id"]: row for row in rows["batches"]}
        self._items = {row["id"]: row for row in rows["batch_items"]}
        self._of_turn = {(row["run_id"], row["key"]): row for row in self._items.values()}
        self._said = {
            id_: f"{self._runs[row['run_id']]['org']} {row['run_id']} {row['key']}"
            for id_, row in self._items.items()
        }
        self._paid = self._models.paid_in_batches
        self._alone = Counter(charge.said for charge in self._models.charged if not charge.batch)
        self._stored = {(row["run_id"], row["key"]) for row in rows["steps"] if row["name"] == STEP}
        self._spent = {
            (row["run_id"], row["meter"], row["key"]): row["amount"]
            for row in rows["spends"]
            if row["meter"] in METERS
        }
        self._days, self._meters = rows["meter_days"], rows["meters"]

    def objections(self) -> Iterator[str]:
        yield from self._left()
        yield from self._paid_once()
        yield from self._own_results()
        yield from self._late_results()
        yield from self._sent_alone()
        yield from self._settled()
        yield from self._totals()

    def _left(self) -> Iterator[str]:
        """At the end no request and no batch is open, and the provider keeps no file."""
        for id_, row in self._items.items():
            if row["state"] in ("pending", "sent"):
                yield f"request {id_} of run {row['run_id']} is left {row['state']}"
        for id_, row in self._batches.items():
            if row["state"] not in ("done", "failed"):
                yield f"batch {id_} is left {row['state']} ({row['error']})"
        for id_, (_, name, _, at) in self._models.files.items():
            batch = self._batches.get(name.removeprefix("orgworker-").removesuffix(".jsonl"))
            ended_at = None if batch is None else batch["ended_at"]
            # One that arrives later than all is read stays.
            if not self._late_uploads or (self._by_clock and ended_at and at < ended_at.timestamp()):
                yield f"the file {id_} is left at the provider: {name}"

    def _paid_once(self) -> Iterator[str]:
        """OpenAI is paid once for a request in batches, Anthropic once for each submission of its batch."""
        for id_, charges in self._paid.items():
            item = self._items.get(id_)
            if item is None:
                yield f"the request {id_} was paid, and there is no such row"
                continue
            for charge in charges:
                if charge.said != self._said[id_]:
                    yield f"the request {id_} is {self._said[id_]!r}; paid under its id was {charge.said!r}"
            batch = self._batches.get(item["batch_id"])
            most = 1 if charges[0].provider == "openai" or batch is None else batch["tries"]
            if len(charges) > most:
                names = [charge.batch for charge in charges]
                yield f"the request {id_} of run {item['run_id']} was paid in {names}, and {most} at most"
        for said, count in Counter(
            charge.said for charges in self._paid.values() for charge in charges[:1]
        ).items():
            if count > 1:
                yield f"the request {said!r} was paid under {count} ids"

    def _own_results(self) -> Iterator[str]:
        """A handler gets the response to its own request, the same one in each attempt."""
        given: dict[tuple[str, int], set[str]] = defaultdict(set)
        for line in jobs.JOURNAL.lines:
            if line["who"] != "completed":
                continue
            run, turn, text = line["run"], line["turn"], line["text"]
            given[run, turn].add(line["id"])
            item = self._of_turn.get((run, str(turn)))
            state = "missing" if item is None else item["state"]
            said = f"{self._runs[run]['org']} {run} {turn}"
            wanted = {"done": f"to {said}", "sync": f"alone to {said}"}.get(state)
            if text != wanted:
                yield f"run {run} got {text!r} for {said!r}, which is {state}"
        for (run, turn), ids in given.items():
            if len(ids) > 1:
                yield f"the attempts of run {run} got the responses {sorted(ids)} to turn {turn}"

    def _late_results(self) -> Iterator[str]:
        """A result that comes after its run has ended, or sent the request itself, is counted as late."""
        for id_, item in self._items.items():
            done, seen = item["state"] == "done", self._seen(item)
            if done + item["late"] != len(seen):
                yield (
                    f"the request {id_} of run {item['run_id']} is {item['state']}, with {item['late']} late "
                    f"results, and was paid in {[charge.batch for charge in seen]}"
                )
            ended_at = self._runs[item["run_id"]]["finished_at"]
            if done and self._by_clock and ended_at is not None and item["ended_at"] > ended_at:
                yield f"the request {id_} got its result after run {item['run_id']} had ended"

    def _sent_alone(self) -> Iterator[str]:
        """What is sent on its own is in no batch any more, and a result of it was paid."""
        for (run, turn), item in self._of_turn.items():
            said = self._said[item["id"]]
            if self._alone[said] and item["state"] != "sync":
                yield f"the request {said!r} was sent on its own, and is {item['state']}"
            if item["state"] == "sync" and (run, turn) in self._stored and not self._alone[said]:
                yield f"the request {said!r} has a result, and was not sent"

    def _settled(self) -> Iterator[str]:
        """Each request has spent what was paid for it in batches: nothing stays reserved."""
        for id_, item in self._items.items():
            seen = self._seen(item)
            for charge in self._paid.get(id_, ()):
                if charge not in seen and not self._may_be_unseen(charge, item):
                    yield f"the request {id_} was paid in {charge.batch}, which is not counted"
            for meter in METERS:
                wanted = sum(_cost(charge, meter) for charge in seen)
                found = self._spent.get((item["run_id"], meter, f"batch:{id_}"), 0)
                if found != wanted:
                    yield (
                        f"the request {id_} ({item['state']}, {item['reason']}) has spent {found} of "
                        f"{meter}, and {wanted} was paid"
                    )

    def _totals(self) -> Iterator[str]:
        """What an org has spent is what the APIs charged, in batches and for what it has stored of others."""
        for meter in METERS:
            wanted: Counter[str] = Counter()
            for id_, item in self._items.items():
                org = self._runs[item["run_id"]]["org"]
                wanted[org] += sum(_cost(charge, meter) for charge in self._seen(item))
                if item["state"] == "sync" and (item["run_id"], item["key"]) in self._stored:
                    said = self._said[id_]
                    wanted[org] += _cost(Charge("", said, units_of(said)), meter)
            yield from self._differ(f"meter_days of {meter}", self._counted(self._days, meter), wanted)
            limited = {org for org, of in MODEL_BUDGETS if of == meter}
            if self._by_clock:
                counted = self._counted(self._meters, meter)
                limited = limited if "all" not in limited else counted.keys() | wanted.keys()
                yield from self._differ(
                    f"meters of {meter}",
                    {org: counted[org] for org in limited},
                    {org: wanted[org] for org in limited},
                )

    def _differ(self, what: str, found: Mapping[str, int], wanted: Mapping[str, int]) -> Iterator[str]:
        for org in sorted(found.keys() | wanted.keys()):
            if found.get(org, 0) != wanted.get(org, 0):
                yield f"{org}: the {what} say {found.get(org, 0)}, and {wanted.get(org, 0)} was paid"

    def _counted(self, rows: Sequence[Row], meter: str) -> Counter[str]:
        codes = {run["org_id"]: run["org"] for run in self._runs.values()}
        counted: Counter[str] = Counter()
        for row in rows:
            if row["meter"] == meter and row["org_id"] in codes:
                counted[codes[row["org_id"]]] += row["used"]
        return counted

    def _seen(self, item: Row) -> list[Charge]:
        """What was paid for a request in batches whose results were read."""
        seen = item["seen"].split(",")
        return [charge for charge in self._paid.get(item["id"], ()) if charge.batch in seen]

    def _may_be_unseen(self, charge: Charge, item: Row) -> bool:
        """Whether a batch came too late to be found: without an idempotency key, after all was read."""
        if charge.provider == "openai":
            return False
        if not self._by_clock:
            return True  # a batch is looked for by the time of its submission
        made_at = self._models.batches[charge.batch].created_at
        of, all_ = item["batch_id"], self._batches.values()
        # A request whose run ended is in no batch any more once that has failed as empty.
        rows = [self._batches[of]] if of else [row for row in all_ if _is_empty(row)]
        # One whose requests have all left it ends without results, once it was looked for.
        looked_until = [
            row["ended_at"] or row["creating_at"] + PATIENCE.grace for row in rows if row["creating_at"]
        ]
        return any(made_at > float(until.timestamp()) for until in looked_until)


def _is_empty(batch: Row) -> bool:
    return (batch["api"], batch["error"]) == ("anthropic", "empty")


def _cost(charge: Charge, meter: str) -> int:
    """Tokens, or nano-units."""
    if meter != MONEY:
        return sum(charge.units)
    rates = PRICES["batch" if charge.batch else "standard"]
    return sum(units * rate for units, rate in zip(charge.units, rates, strict=True))
