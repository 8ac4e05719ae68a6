"""`credentials rotate --older-than`: the rotation of the fleet."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from worker.cli.output import say
from worker.cli.progress import ProgressBar
from worker.cli.session import Invocation
from worker.cli.sync import FAILED, only_issuer, with_provisioner

if TYPE_CHECKING:
    from worker.operations.fleet import Rotated
    from worker.operations.provisioning import Provisioner

COLUMNS = ("org", "state", "replaces", "client_id", "error")
PLANNED_COLUMNS = ("org", "state", "replaces", "created_at")


def rotate_fleet(
    session: Invocation,
    issuer: str | None,
    older_than: timedelta,
    *,
    limit: int | None,
    overlap: timedelta | None,
    dry_run: bool,
) -> int:
    """Rotate what orgworker made longer ago, print a row for each org, and return the exit code."""
    name = issuer or only_issuer(session)
    with ProgressBar("rotations") as progress:

        def tell(text: str) -> None:
            progress.close()
            say(text)

        async def work(provisioner: Provisioner) -> list[dict[str, Any]]:
            from worker.wiring.provisioning import fleet_of

            fleet = fleet_of(session.settings, provisioner, overlap=overlap)
            fleet.report, fleet.say = progress.at, tell
            chosen, by_hand = await provisioner.database.run(fleet.candidates, older_than, limit)
            if by_hand:
                tell(
                    f"{by_hand} org{'s' * (by_hand != 1)} with an older credential that a person added:"
                    " `credentials rotate ORG` rotates these"
                )
            if dry_run:
                return [
                    {
                        "org": each["org"],
                        "state": "planned",
                        "replaces": each["client_id"],
                        "created_at": each["created_at"],
                    }
                    for each in chosen
                ]
            return [_row_of(each) for each in await fleet.rotate(chosen)]

        rows = with_provisioner(session, name, work, changes=not dry_run, seals=not dry_run)
    session.print_rows(rows, PLANNED_COLUMNS if dry_run else COLUMNS, key="org")
    for row in rows:
        if row.get("error"):
            say(f"{row['org']}: {row['error']}")
        if row.get("fix"):
            say(f"fix: {row['fix']}")
    return FAILED if any(row.get("error") for row in rows) else 0


def _row_of(result: Rotated) -> dict[str, Any]:
    state = "failed" if result.error else "rotated" if result.client_id else "unchanged"
    return {
        "org": result.org,
        "state": state,
        "replaces": result.replaces,
        "client_id": result.client_id,
        "error": result.error.message if result.error else None,
        "fix": (result.error.fix if result.error else None) or None,
    }
