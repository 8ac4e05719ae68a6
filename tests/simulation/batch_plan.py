"""Definitions whose model requests go into batches, and what befalls them."""

from __future__ import annotations

from random import Random

from tests.simulation.entries import ALL, LAST_FAULT, LENGTHS, Action, Entry
from tests.simulation.world import LEASE

# The handler whose requests go into batches, what orgs may spend on them, and the calls of the APIs at which
# something goes wrong.
COMPLETES = "sim.completes"
# The first is reached, and raised; the second has room for all, but not for what requests reserve. The third
# is never reached: it shares the counter of the first.
MODEL_BUDGETS = {("org_0", "llm_tokens"): 500, ("org_2", "money"): 6_000_000, ("all", "llm_tokens"): 100_000}
# Tokens that a request may use for its answer, which are reserved, by org.
MOST_OUTPUT = (60, 60, 800)
MODEL_CALLS = {
    "openai": (
        *("POST /v1/batches", "POST /v1/batches", "POST /v1/files"),
        *("GET /v1/files/ID/content", "GET /v1/batches", "DELETE /v1/files/ID"),
    ),
    "anthropic": (
        *("POST /v1/messages/batches", "POST /v1/messages/batches"),
        *("GET /v1/messages/batches/ID/results", "DELETE /v1/messages/batches/ID"),
    ),
}


def asking_entries(chance: Random) -> tuple[Entry, ...]:
    """Definitions of three orgs whose model requests go into batches; two of the orgs have budgets."""
    found = []
    for org, via in enumerate(chance.choice((("openai", "openai", "anthropic"), ("openai",) * 3))):
        # With a deadline some requests are sent on their own, also while they are in a batch.
        within = chance.choice(("", "", "", "100s", "150s", "190s"))
        keys = f'{ALL}model_requests = "batch"\n'
        keys += f'batch_within = "{within}"\n' if within else ""
        params = {"turns": chance.choice((1, 2, 2)), "via": via, "most": MOST_OUTPUT[org]}
        period = chance.choice((30, 40, 55))
        found.append(Entry(org, "completes", COMPLETES, period, keys=keys, params=params))
    return tuple(found)


def acts_on_batches(chance: Random, asking: tuple[Entry, ...]) -> list[Action]:
    """What people do while requests are in a batch: cancel, raise a budget, pause an org."""
    kinds = ["cancel", "cancel", "cancel", "raise tokens", "raise tokens"]
    kinds += chance.choices(("cancel", "retry", "pause org", "suspend", "raise tokens"), k=2)
    found = []
    for kind in kinds:
        entry = chance.choice(asking)
        since = entry.period * chance.randint(1, int(LAST_FAULT / entry.period) - 1)
        at = since + chance.uniform(2, 25) if kind == "cancel" else chance.uniform(15, LAST_FAULT)
        found.append(Action(at, kind, f"{entry.org}/{entry.name}", chance.uniform(2, 20)))
    return found


def faults_of_batches(chance: Random, workers: int, asking: tuple[Entry, ...]) -> list[Action]:
    """What befalls a worker as it sends batches, and what it sends."""
    who = [f"w{number}" for number in range(1, workers + 1)]
    kinds = ("lose model answer", "lose model answer", "late model request", "cut models")
    kinds += ("kill at", "kill at", "freeze at")
    found = []
    for _ in range(chance.randint(4, 7)):
        kind, at = chance.choice(kinds), chance.uniform(15, LAST_FAULT)
        target, size = "*", 0.0
        where = chance.choice(MODEL_CALLS[chance.choice(asking).params["via"]])
        if kind == "cut models":
            target, where, size = chance.choice((*who, "*")), "", chance.uniform(3, 30)
        elif kind == "late model request":
            # Also later than it is waited for.
            size = chance.choice((1.0, 8.0, 20.0, 40.0))
        elif kind.endswith(" at"):
            where = f"models.{chance.choice(('sent', 'done'))} {where}"
            size = chance.choice(LENGTHS[2:]) * LEASE if kind == "freeze at" else 0.0
        found.append(Action(at, kind, target, size, where))
    return found
