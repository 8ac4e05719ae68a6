"""`python -m tests.faults.launcher …`: the worker with the fence taken out of one statement."""

from __future__ import annotations

from worker.cli import main
from worker.store.sql.postgresql import save

FENCE = " AND fencing_token = %(token)s"


def take_out_the_fence() -> None:
    """Change only the text of the statement that saves a checkpoint."""
    if FENCE not in save.SAVE:
        raise LookupError(f"SAVE has no fence {FENCE!r}")
    save.SAVE = save.SAVE.replace(FENCE, "", 1)


if __name__ == "__main__":
    take_out_the_fence()
    main()
