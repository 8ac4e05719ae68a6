"""The link that a worker prints on a terminal, which logs in once."""

from __future__ import annotations

import sys
from datetime import datetime
from ipaddress import ip_address
from urllib.parse import urlsplit

from worker.operations.operators import make_link, os_user
from worker.store.database import Database


def local_origin(public_url: str, address: str, port: int) -> str | None:
    """The console's address on the loopback interface, or None."""
    host = urlsplit(public_url).hostname
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        # A form from another address than public_url would be refused.
        return None
    if host is not None:
        return public_url.rstrip("/")
    bound = ip_address(address)
    if not (bound.is_loopback or bound.is_unspecified):
        return None
    shown = "127.0.0.1" if bound.is_unspecified else str(bound)
    return f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"


def print_login_link(database: Database, origin: str | None, *, at: datetime) -> None:
    """Print the link of this OS user if there is an origin and a terminal."""
    if origin is None or not sys.stderr.isatty():
        return
    path = make_link(database, os_user(), at=at)
    print(f"log in once, within ten minutes, on this machine: {origin}{path}", file=sys.stderr, flush=True)
