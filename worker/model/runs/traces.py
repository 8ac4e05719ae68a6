"""Tracebacks for people: the frames of the handler stay, those of libraries are folded. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

_FRAME = re.compile(r'  File "(?P<path>[^"]*)", line \d+')
# A package's folder below one of these is a library's.
_INSTALLED = re.compile(r"/(?:site|dist)-packages/(?P<package>[^/]+)")
_STANDARD = re.compile(r"/lib(?:64)?/python3[^/]*/|^<frozen |^<string>$")
_OURS = f"{Path(__file__).parents[2]}/"
# Python marks the lines between two exceptions of a chain by their beginnings.
_LINKS = ("Traceback (most recent call last)", "The above exception", "During handling of")


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive lines of a traceback; `libraries` names those whose `frames` they are, if any."""

    text: str
    libraries: tuple[str, ...] = ()
    frames: int = 0


class _Piece(NamedTuple):
    """One frame with its source lines, or the lines between two frames."""

    path: str | None
    lines: list[str]


def parts_of(trace: str) -> list[Part]:
    """A traceback in parts: consecutive frames of libraries, and all else as text.

    The package of the handler is never a library: it is that of the first frame of the last
    exception, where the trace begins. A trace without frames of its own is one part.
    """
    pieces = list(_pieces(trace.rstrip("\n")))
    home = _home(pieces)
    parts = []
    is_own = False
    for is_library, group in groupby(pieces, key=lambda piece: _library(piece.path, home) is not None):
        found = list(group)
        is_own = is_own or (not is_library and any(piece.path is not None for piece in found))
        text = "\n".join(line for piece in found for line in piece.lines)
        names = dict.fromkeys(_library(piece.path, home) or "" for piece in found) if is_library else ()
        parts.append(Part(text, tuple(names), len(found) if is_library else 0))
    return parts if is_own else [Part(trace.rstrip("\n"))]


def trimmed(trace: str) -> str:
    """A trace in which a part of libraries is one line: `  … 7 frames of httpx, httpcore`."""
    parts = parts_of(trace)
    if not any(part.libraries for part in parts):
        return trace
    return "\n".join(_summary(part) if part.libraries else part.text for part in parts)


def _pieces(trace: str) -> Iterator[_Piece]:
    piece = _Piece(None, [])
    for line in trace.split("\n"):
        frame = _FRAME.match(line)
        if frame is None and (piece.path is None or line.startswith(("    ", "  ["))):
            piece.lines.append(line)
            continue
        if piece.lines:
            yield piece
        piece = _Piece(None if frame is None else frame["path"], [line])
    yield piece


def _home(pieces: Iterable[_Piece]) -> str | None:
    """The installed package of the handler, or None if it is not in a folder of installed packages."""
    first: str | None = None
    is_new = True
    for path, lines in pieces:
        if path is None:
            is_new = is_new or any(line.startswith(_LINKS) for line in lines)
        elif is_new:
            first, is_new = path, False
    installed = None if first is None else _INSTALLED.search(first)
    return None if installed is None else installed["package"]


def _library(path: str | None, home: str | None) -> str | None:
    """The library of a frame; None for a frame of the handler, and for other lines."""
    if path is None:
        return None
    if (installed := _INSTALLED.search(path)) is not None:
        package = installed["package"]
        name = "orgworker" if package == "worker" else package.removesuffix(".py")
        return None if package == home else name
    if path.startswith(_OURS):
        return "orgworker"
    return "Python" if _STANDARD.search(path) else None


def _summary(part: Part) -> str:
    number = "1 frame" if part.frames == 1 else f"{part.frames} frames"
    return f"  … {number} of {', '.join(part.libraries)}"
