"""The command line: one file a noun; it talks to the database and names the OS user as actor."""

from worker.cli.app import main

__all__ = ["main"]
