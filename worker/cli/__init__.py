"""The command line: one file a noun; it talks to the database and names the OS user as actor."""

import gc
import sys

# A command imports much, lets go of little and ends: each look of the collector at all of it
# is for nothing, and together they are a tenth of a list. The worker sets its own.
gc.set_threshold(100_000)

__all__ = ["main"]


def main() -> None:
    """Run the command that the process was started with, and exit with its code.

    First of all it hides memory and environment, which may hold the database's password, from other
    processes of the same user. `--help` reads no secret, and imports nothing for this.
    """
    if "--help" not in sys.argv:
        from worker.execution.runners.child.linux import hide_memory

        hide_memory()
    from worker.cli.app import main as run

    run()
