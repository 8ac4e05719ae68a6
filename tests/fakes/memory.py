"""Where a text is in what a process has: its memory, environment, descriptors and files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

# Bytes that are read at once.
_CHUNK = 16 * 2**20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def places_of(pid: int, needles: Sequence[bytes]) -> list[str]:
    """Where a process has a needle: in all memory that it can read, or in the files of its folder."""
    home, found = Path(f"/proc/{pid}"), []
    with (home / "mem").open("rb", buffering=0) as memory:
        for line in (home / "maps").read_text().splitlines():
            addresses, rights, *file = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in addresses.split("-"))
            name = file[-1] if len(file) == 4 else "anonymous"
            # The last is the kernel's, at an address that no offset reaches.
            if rights.startswith("r") and name != "[vsyscall]" and _has(memory.fileno(), start, end, needles):
                found.append(f"memory {name}")
    for name in ("environ", "cmdline"):
        if _is_in(needles, (home / name).read_bytes()):
            found.append(name)
    for descriptor in (home / "fd").iterdir():
        with contextlib.suppress(OSError):
            if descriptor.is_file() and _is_in(needles, descriptor.read_bytes()):
                found.append(f"descriptor {os.readlink(descriptor)}")
    for path in (home / "cwd").rglob("*"):
        if path.is_file() and _is_in(needles, path.read_bytes()):
            found.append(f"file {path.name}")
    return found


def _has(memory: int, start: int, end: int, needles: Sequence[bytes]) -> bool:
    overlap, at, tail = max(map(len, needles)), start, b""
    while at < end:
        try:
            data = os.pread(memory, min(_CHUNK, end - at), at)
        except OSError:  # beyond the end of the file that is mapped
            data = b""
        if _is_in(needles, tail + data):
            return True
        at, tail = at + (len(data) or _PAGE), data[-overlap:]
    return False


def _is_in(needles: Sequence[bytes], data: bytes) -> bool:
    return any(needle in data for needle in needles)
