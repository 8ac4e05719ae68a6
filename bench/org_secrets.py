"""Measures secrets of orgs: what an attempt costs more whose handler declares some.

    .venv/bin/python -m bench.org_secrets [--database sqlite|postgresql|both] [--orgs N] [--secrets N]

Attempts of 50 orgs at a time, as a worker starts them, each with two secrets: they are read, opened and
masked until the attempt ends. Prints processor time of this process, and the statements that were sent.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from sqlalchemy import Engine, event

from bench.calendars import empty
from worker.features.org_secrets.operations import add_secret
from worker.model.orgs import OrgEntry, OrgRef
from worker.operations.orgs import add_org
from worker.store.database import Database
from worker.telemetry.masking import masker
from worker.tokens.sealing import KeyRing
from worker.wiring.secrets import OpenedSecrets

ROUNDS = 40


async def cost(source: OpenedSecrets, orgs: list[OrgRef], names: list[str]) -> float:
    """Processor seconds of an attempt."""

    async def attempt(org: OrgRef) -> None:
        found = await source.of(org, names)
        for each in found.values():
            masker.hold(each.value, org.id, private=True)
        for each in found.values():
            masker.release(each.value, org.id, private=True)

    async def burst() -> None:
        await asyncio.gather(*(attempt(org) for org in orgs))

    await burst()
    began = time.process_time()
    for _ in range(ROUNDS):
        await burst()
    return (time.process_time() - began) / (ROUNDS * len(orgs))


def measure(database: Database, orgs: int, secrets: int) -> tuple[float, float]:
    """Processor seconds of an attempt, and statements of a burst of all orgs."""
    with tempfile.TemporaryDirectory() as folder:
        ring = KeyRing.generate(Path(folder) / "keyring")
        names = [f"secret{number}" for number in range(secrets)]
        refs = []
        for number in range(orgs):
            code = f"org_{number}"
            refs.append(OrgRef(add_org(database, OrgEntry(code, code, "main"), actor="bench")["id"], code))
            for name in names:
                add_secret(database, ring, code, name, f"sk-{number}-{name}-0123456789", actor="bench")
        masker.clear()
        source, sent = OpenedSecrets(database, lambda _: ring), 0

        def count(*_: object) -> None:
            nonlocal sent
            sent += 1

        event.listen(Engine, "before_cursor_execute", count)
        seconds = asyncio.run(cost(source, refs, names))
        return seconds, sent / (ROUNDS + 1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--database", choices=["sqlite", "postgresql", "both"], default="both")
    options.add_argument("--orgs", type=int, default=50)
    options.add_argument("--secrets", type=int, default=2)
    given = options.parse_args()
    for dialect in ("sqlite", "postgresql") if given.database == "both" else (given.database,):
        with empty(dialect) as database:
            seconds, statements = measure(database, given.orgs, given.secrets)
        print(f"{dialect}: {seconds * 1e6:.0f} us an attempt, {statements:.1f} statements a burst")


if __name__ == "__main__":
    main()
