"""The command line: one module a noun; it uses the database directly, with the OS user as actor."""

import gc
import sys

# A short command frees little, and collections would take a tenth of a list's time. The worker sets its own.
gc.set_threshold(100_000)

__all__ = ["main"]


def main() -> None:
    """Run this process's command, and exit with its code.

    First hides memory and environment, which can hold the database's password, from other processes of
    the same user, and sets the name that `ps` shows. `--help` and `-h` read no secrets and skip the import.
    """
    if not {"-h", "--help"} & set(sys.argv):
        from worker.engine.runners.child.linux import ProcessName, hide_memory, name_process

        hide_memory()
        name_process(ProcessName.WORKER)
    from worker.app.shell import main as run

    run()
