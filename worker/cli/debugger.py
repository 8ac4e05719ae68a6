"""The debugger of `try --pdb`, opened in the handler's own code rather than in what that called."""

from __future__ import annotations

import pdb
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType

from worker.cli.output import say


def opened_at(entry_point: str) -> Callable[[Exception], None]:
    """What opens the debugger for an error out of the handler that the entry point names."""

    def debug(error: Exception) -> None:
        say(f"{type(error).__name__}: {error}")
        debugger = _AtHandler(_home(entry_point.partition(":")[0]))
        debugger.reset()
        debugger.interaction(None, error.__traceback__)

    return debug


class _AtHandler(pdb.Pdb):
    """Stands in the innermost frame of the handler's own files; `down` leads to where the error arose."""

    def __init__(self, home: str) -> None:
        super().__init__()
        self._home = home

    def get_stack(
        self, f: FrameType | None, t: TracebackType | None
    ) -> tuple[list[tuple[FrameType, int]], int]:
        stack, innermost = super().get_stack(f, t)
        own = [at for at, (frame, _) in enumerate(stack) if frame.f_code.co_filename.startswith(self._home)]
        return stack, own[-1] if own else innermost


def _home(module: str) -> str:
    """The folder of the handler's package, or its one file."""
    top = sys.modules[module.partition(".")[0]]
    paths = list(getattr(top, "__path__", ()))
    return f"{Path(paths[0])}/" if paths else str(top.__file__)
