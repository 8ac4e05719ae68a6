"""Tracebacks for people: frames of libraries are folded, those of the handler's own code stay. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

_FRAME = re.compile(r'\s*File "(?P<path>[^"]*)", line \d+')
_PACKAGES = re.compile(r"/(?:site|dist)-packages/([^/.]+)")
_STANDARD = re.compile(r"/lib(?:64)?/python3(?:\.\d+)?/([^/.]+)|^<frozen ([^>.]+)")
_OURS = "/worker/"


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive lines of a traceback; `libraries` names those whose `frames` they are, if any."""

    text: str
    libraries: tuple[str, ...] = ()
    frames: int = 0


@dataclass(frozen=True, slots=True)
class _Piece:
    """One frame with its source lines, or one other line."""

    lines: tuple[str, ...]
    library: str = ""


def parts_of(trace: str) -> list[Part]:
    """The traceback in parts: the handler's own frames and all other lines as text, libraries apart."""
    parts = []
    for is_library, group in groupby(_pieces(trace), key=lambda piece: bool(piece.library)):
        pieces = list(group)
        text = "\n".join(line for piece in pieces for line in piece.lines)
        names = tuple(dict.fromkeys(piece.library for piece in pieces)) if is_library else ()
        parts.append(Part(text, names, len(pieces) if is_library else 0))
    return parts


def _pieces(trace: str) -> Iterator[_Piece]:
    own: str | None = None
    frame: list[str] = []
    library = ""
    for line in trace.rstrip("\n").split("\n"):
        found = _FRAME.match(line)
        if found is None and frame and line.startswith("    "):
            # Its source, and the marks below it.
            frame.append(line)
            continue
        if frame:
            yield _Piece(tuple(frame), library)
            frame = []
        if found is None:
            yield _Piece((line,))
            continue
        package = _package_of(found["path"])
        if own is None:
            # A trace begins at the handler, which may be an installed package itself.
            own = package
        library = "" if package == own else package
        frame = [line]
    if frame:
        yield _Piece(tuple(frame), library)


def _package_of(path: str) -> str:
    """The package that a file belongs to; empty for code that is not installed."""
    for pattern in (_PACKAGES, _STANDARD):
        if found := pattern.search(path):
            return str(next(filter(None, found.groups())))
    return "orgworker" if _OURS in path else ""
