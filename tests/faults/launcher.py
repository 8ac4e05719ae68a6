"""`python -m tests.faults.launcher …`: the worker with the fence taken out of one statement."""

from __future__ import annotations

from importlib import import_module

from worker.app import main

FENCE = " AND fencing_token = %(token)s"

# The package exports a function of the same name.
statements = import_module("worker.store.sql.postgresql.finish")


def take_out_the_fence() -> None:
    """Change only the text of the statement that saves a checkpoint."""
    if FENCE not in statements.SAVE:
        raise LookupError(f"SAVE has no fence {FENCE!r}")
    statements.SAVE = statements.SAVE.replace(FENCE, "", 1)


if __name__ == "__main__":
    take_out_the_fence()
    main()
