"""What the steps of a run spent, by step. Here the prices of spends join the run's page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, select

from worker.ids import OrgId, RunId
from worker.store import tables
from worker.store.sums import CappedSum

# Meters of a run that are shown by step, the first by name.
MAX_METERS = 20
_spends = tables.spends


def spends_of_steps(
    connection: Connection, org_id: OrgId, run_id: RunId, seqs: Sequence[int], meters: Sequence[str]
) -> Mapping[int, dict[str, int]]:
    """What these steps of a run spent of these meters, by `seq` and meter; at most `MAX_METERS` of them."""
    found: defaultdict[int, dict[str, int]] = defaultdict(dict)
    if seqs and meters:
        keys = {f"step:{seq}": seq for seq in seqs}
        query = (
            select(_spends.c.meter, _spends.c.key, CappedSum(_spends.c.amount))
            # Each meter by itself: a run may have 100,000 spends outside of steps.
            .where(_spends.c.run_id == run_id, _spends.c.org_id == org_id)
            .where(_spends.c.meter.in_(sorted(meters)[:MAX_METERS]), _spends.c.key.in_(keys))
            .group_by(_spends.c.meter, _spends.c.key)
            .order_by(_spends.c.meter)
        )
        for meter, key, amount in connection.execute(query):
            found[keys[key]][meter] = int(amount)
    return found
