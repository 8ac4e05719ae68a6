"""The command line: one file a noun; it talks to the database and names the OS user as actor."""

import gc

# A command imports much, lets go of little and ends: each look of the collector at all of it
# is for nothing, and together they are a tenth of a list. The worker sets its own.
gc.set_threshold(100_000)

from worker.cli.app import main  # noqa: E402

__all__ = ["main"]
