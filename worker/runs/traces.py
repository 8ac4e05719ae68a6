"""Traces of errors for people: the frames of the handler, with those of libraries counted. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_FRAME = re.compile(r'  File "(?P<path>[^"]*)", line \d+')
# A package's folder below one of these is a library's.
_INSTALLED = re.compile(r"/(?:site|dist)-packages/(?P<package>[^/]+)")
_STANDARD = re.compile(r"/lib(?:64)?/python3[^/]*/|^<frozen |^<string>$")
_OURS = f"{Path(__file__).parents[1]}/"
# Python marks the lines between two exceptions of a chain by their beginnings.
_LINKS = ("Traceback (most recent call last)", "The above exception", "During handling of")


def trimmed(trace: str) -> str:
    """A trace in which consecutive frames of libraries are one line: `  … 7 frames of httpx, httpcore`.

    The package of the handler is never a library: it is that of the first frame of the last exception,
    where the trace begins. A trace without frames of its own stays as it is.
    """
    parts = list(_parts(trace))
    paths = [path for path, _ in parts]
    home = _home(parts)
    kept = [path is None or _library(path, home) is None for path in paths]
    if not any(keep for path, keep in zip(paths, kept, strict=True) if path is not None):
        return trace
    lines: list[str] = []
    libraries: list[str] = []
    for (path, part), keep in zip([*parts, (None, [])], [*kept, True], strict=True):
        if not keep and path is not None:
            libraries.append(_library(path, home) or "")
            continue
        if libraries:
            lines.append(_summary(libraries))
            libraries = []
        lines += part
    return "\n".join(lines)


def _parts(trace: str) -> Iterator[tuple[str | None, list[str]]]:
    """Each frame with its path and its lines, and the lines between frames without a path."""
    path: str | None = None
    part: list[str] = []
    for line in trace.splitlines():
        frame = _FRAME.match(line)
        if frame is None and (path is None or line.startswith(("    ", "  ["))):
            part.append(line)
            continue
        if part:
            yield path, part
        path, part = (None if frame is None else frame["path"]), [line]
    if part:
        yield path, part


def _home(parts: list[tuple[str | None, list[str]]]) -> str | None:
    """The installed package of the handler, or None if it is not in a folder of installed packages."""
    first: str | None = None
    is_new = True
    for path, lines in parts:
        if path is None:
            is_new = is_new or any(line.startswith(_LINKS) for line in lines)
        elif is_new:
            first, is_new = path, False
    installed = None if first is None else _INSTALLED.search(first)
    return None if installed is None else installed["package"]


def _library(path: str, home: str | None) -> str | None:
    """The library of a frame, or None for a frame of the handler."""
    installed = _INSTALLED.search(path)
    if installed is not None:
        package = installed["package"]
        name = "orgworker" if package == "worker" else package.removesuffix(".py")
        return None if package == home else name
    if path.startswith(_OURS):
        return "orgworker"
    return "Python" if _STANDARD.search(path) else None


def _summary(libraries: list[str]) -> str:
    number = "1 frame" if len(libraries) == 1 else f"{len(libraries)} frames"
    return f"  … {number} of {', '.join(dict.fromkeys(libraries))}"
