"""Which release of the time zone database this machine computes with."""

from __future__ import annotations

import zoneinfo
from hashlib import sha256
from importlib import import_module
from pathlib import Path

# A file that each set of zones has; the first folder that has it is the one in use.
_PROBE = "Europe/Berlin"


def zone_data_version() -> str:
    """The release, such as `2026a`; a fingerprint of the files where they do not say."""
    for folder in map(Path, zoneinfo.TZPATH):
        if (folder / _PROBE).is_file():
            return _of_folder(folder)
    version: str = import_module("tzdata").IANA_VERSION
    return version


def _of_folder(folder: Path) -> str:
    for name, prefix in (("tzdata.zi", "# version "), ("+VERSION", "")):
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                first = lines.readline().strip()
            if first.startswith(prefix) and first != prefix.strip():
                return first.removeprefix(prefix)
    digest = sha256()
    for key in sorted(zoneinfo.available_timezones()):
        path = folder / key
        if path.is_file():
            digest.update(key.encode() + b"\0" + path.read_bytes())
    return f"sha256:{digest.hexdigest()[:16]}"
