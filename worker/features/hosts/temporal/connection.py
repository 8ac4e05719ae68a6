"""What a worker and a host need to connect to Temporal."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from worker.errors import ConfigurationError
from worker.features.hosts.temporal import TlsFiles
from worker.features.hosts.wire import TemporalPlace
from worker.settings.sections import TemporalSettings

INSTALL = "install orgworker with its extra temporal (the documentation's page Install)"


def require_client(why: str) -> None:
    """Raise ConfigurationError if the client of Temporal is not installed."""
    if find_spec("temporalio") is None:
        raise ConfigurationError(f"{why}, but temporalio is not installed", fix=INSTALL)


def tls_of(settings: TemporalSettings, *, tls: bool) -> TlsFiles | None:
    """The contents of the TLS files; None without TLS. Raises ConfigurationError."""
    if not tls:
        return None
    found: dict[str, bytes | None] = {}
    for name in ("ca_file", "certificate", "key"):
        path = getattr(settings, name)
        try:
            found[name] = Path(path).read_bytes() if path else None
        except OSError as error:
            raise ConfigurationError(
                f"temporal.{name}: {path} cannot be read: {error.strerror}",
                fix="name a PEM file that this process's user can read",
            ) from None
    return TlsFiles(**found)


def place_of(told: TemporalPlace, settings: TemporalSettings) -> TemporalPlace:
    """Where a host finds Temporal: as its workers say, unless its own `[temporal]` has an address."""
    return replace(told, address=settings.address, tls=settings.tls) if settings.address else told
