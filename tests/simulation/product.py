"""A product that starts runs in its own transactions, and what must become of them; on PostgreSQL.

It dies, rolls back, leaves a transaction open, and uses its keys again.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from tests.simulation.database import PRODUCT, PostgresServer
from tests.simulation.entries import Action
from tests.simulation.loop import SimulatedProcess, Thread
from tests.simulation.world import World
from worker.errors import StoreUnavailable
from worker.store import starts
from worker.store.database import Database

Row = Mapping[str, Any]

# Seconds for which its sessions may be idle in a transaction.
IDLE = 60.0
# Seconds by which the notes of the simulation and the rows of the database may differ.
BLUR = 0.5
START = text("SELECT orgworker_start(:org, :definition, CAST(:params AS jsonb), :key)")
# Why a run is refused that a product has started.
REFUSED = ("org_inactive", "definition_closed", "params_invalid", "overlap")


class RolledBack(Exception):
    """The product changes its mind."""


@dataclass
class Transaction:
    """`ids` are what its starts have returned, by org, definition and key; `state` says how it ended."""

    number: str
    state: str = "open"
    ended_at: float = 0.0
    ids: dict[tuple[str, str, str], str] = field(default_factory=dict)


class Product:
    """The process of the product, and its transactions."""

    def __init__(self, world: World) -> None:
        self.transactions: list[Transaction] = []
        # When a worker began to take each start, for the last time.
        self.taken: dict[str, float] = {}
        self._world = world
        self._process: SimulatedProcess | None = None
        self._database: Database | None = None

    def transact(self, action: Action, *, commits: bool) -> None:
        """Begin a transaction that starts what the action names, and stays open for its size in seconds."""
        world = self._world
        if self._process is None or not self._process.alive:
            self._process = SimulatedProcess(world.loop, PRODUCT)
            url = world.settings.database.url
            self._database = Database.open(url, clock=world.clock, own_reads=True, idle=IDLE)
            # The first connection holds a real lock while it asks the server: it must not park.
            self._process.context.run(_connect, self._database)
        made = Transaction(action.where)
        self.transactions.append(made)
        self._process.context.run(
            world.loop.run_in_executor, None, self._work, self._database, action, made, commits
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note when workers take what was started."""

        def lock(*given: Any) -> Any:
            at = self._world.loop.time()
            locked, taken = real(*given)
            self.taken.update((str(start.id), at) for start in taken)
            return locked, taken

        real = starts.lock
        with patch.object(starts, "lock", lock):
            yield

    def kill(self) -> None:
        process = self._process
        if process is not None and process.alive:
            process.kill()
            if isinstance(self._world.server, PostgresServer):
                self._world.server.end_sessions(process)

    stop = kill

    def _work(self, database: Database, action: Action, made: Transaction, commits: bool) -> None:
        try:
            with database.transaction() as connection:
                for said in action.target.split("; "):
                    place, key, what = said.split()
                    number, _, definition = place.partition("/")
                    org = f"org_{number}"
                    given = {"number": int(made.number) if what == "right" else "many"}
                    values = {"org": org, "definition": definition, "params": json.dumps(given), "key": key}
                    id_ = connection.execute(START, values).scalar_one()
                    made.ids[org, definition, key] = str(id_)
                thread = Thread.current()
                if action.size and thread is not None:
                    thread.park(action.size)
                if not commits:
                    raise RolledBack
                made.state = "committing"
            made.state = "committed"
        except RolledBack:
            made.state = "rolled back"
        except DBAPIError:
            made.state = "rolled back"  # it is of no definition that is there
        except StoreUnavailable:
            # Whether it was committed is in the database only.
            made.state = "rolled back" if made.state == "open" else "unknown"
        made.ended_at = self._world.loop.time()


def _connect(database: Database) -> None:
    with database.transaction():
        pass


class Starts:
    """Judges what became of the starts of a product. `runs` have `org` and `definition`."""

    def __init__(self, product: Product, rows: Mapping[str, Sequence[Row]]) -> None:
        self._transactions, self._taken = product.transactions, product.taken
        self._starts = rows["starts"]
        self._runs = rows["runs"]
        self._closed_at = {row["id"]: row["closed_at"] for row in rows["definitions"]}

    def objections(self) -> Iterator[str]:
        yield from self._keys()
        yield from self._one_each()
        yield from self._order()

    def _keys(self) -> Iterator[str]:
        """Each key has one run, from each transaction that committed; without one there is none."""
        stored = {row["id"] for row in self._starts}
        ids: dict[tuple[str, str, str], set[str]] = defaultdict(set)
        may_be = set[str]()
        for made in self._transactions:
            if made.state == "committed":
                for key, id_ in made.ids.items():
                    ids[key].add(id_)
            if made.state != "rolled back":
                may_be.update(made.ids.values())
        for key, found in ids.items():
            if len(found) > 1:
                yield f"the starts {key} got several runs: {sorted(found)}"
            for id_ in found - stored:
                yield f"the start {id_} of {key} was committed, and is gone"
        for id_ in stored - may_be:
            yield f"the start {id_} was rolled back, and is there"

    def _one_each(self) -> Iterator[str]:
        """Each start is exactly one run."""
        by_product = [run for run in self._runs if (run["created_by"] or "").startswith("product:")]
        of_product = {run["id"]: run for run in by_product}
        counted = Counter(
            str(run["idempotency_key"]) for run in of_product.values() if run["retry_of"] is None
        )
        for start in self._starts:
            run = of_product.get(start["id"])
            if start["state"] != "made" or run is None:
                yield f"the start {start['id']} is {start['state']}; its run is {run and run['state']}"
            elif counted[start["id"]] != 1:
                yield f"the start {start['id']} is {counted[start['id']]} runs"
            elif self._is_closed(start) and run["state"] != "refused":
                yield f"the start {start['id']} of a closed definition is {run['state']}"
        for id_ in of_product.keys() - {start["id"] for start in self._starts}:
            yield f"run {id_} is of no start"

    def _is_closed(self, start: Row) -> bool:
        """Whether its definition was closed for good before its run was made."""
        closed_at = self._closed_at[start["definition_id"]]
        return closed_at is not None and (start["made_at"] - closed_at).total_seconds() > BLUR

    def _order(self) -> Iterator[str]:
        """Of one definition, what was committed before another was taken is made before it."""
        committed: dict[str, float] = {}
        for made in self._transactions:
            if made.state == "committed":
                for id_ in made.ids.values():
                    committed[id_] = min(made.ended_at, committed.get(id_, made.ended_at))
        rows = [row for row in self._starts if row["made_at"] is not None and row["id"] in committed]
        for earlier in rows:
            for later in rows:
                if later["definition_id"] != earlier["definition_id"] or later["id"] <= earlier["id"]:
                    continue
                in_time = committed[earlier["id"]] < self._taken[later["id"]]
                if in_time and earlier["made_at"] > later["made_at"]:
                    yield (
                        f"the start {later['id']} was made at {later['made_at']}, before {earlier['id']} of "
                        f"{earlier['made_at']}"
                    )
