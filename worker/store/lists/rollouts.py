"""One rollout: its state, the numbers of its verdict, its curves, and the orgs that have moved."""

from __future__ import annotations

from typing import cast

from sqlalchemy import Connection

from worker.ids import ALL_ORGS
from worker.store import rollout_sums, rollouts
from worker.store.lists.rows import RolloutDetail, RolloutRow, columns_of


def rollout(connection: Connection, name: str) -> RolloutDetail:
    """One rollout; raises NotFound."""
    row = rollouts.require(connection, name)
    count, moved = rollout_sums.moved(connection, ALL_ORGS, row["id"])
    days = [
        {"day": day["day"].isoformat(), "side": day["side"], "metrics": _means(day["sums"])}
        for day in rollout_sums.curves(connection, row["id"])
    ]
    return cast(
        RolloutDetail,
        {
            **{column: row[column] for column in columns_of(RolloutRow)},
            "share": row["steps"][row["step"] - 1] if row["step"] else None,
            "orgs_in_all": rollout_sums.org_count(connection, ALL_ORGS, row["id"]),
            "orgs_moved": count,
            "moved": moved,
            "metrics": row["verdict"],
            "evidence": row["evidence"],
            "days": days,
        },
    )


def _means(sums: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {
        metric: {"runs": int(runs), "mean": round(total / runs, 6)}
        for metric, (runs, total, _) in sums.items()
        if runs
    }
