"""`login`: a fresh link that logs in to this installation's console once."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from worker.errors import ConfigurationError
from worker.kit.output import Format, say
from worker.kit.session import Invocation

if TYPE_CHECKING:
    from worker.settings.sections import WebSettings

# Seconds to wait for a console to accept a connection.
PATIENCE = 1.0
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound


def login(session: Invocation) -> None:
    """Print a link that logs in to the console once, within ten minutes, as an administrator.

    The console is that of a worker or of `serve`, at web.public_url, else at web.listen. Needs
    the rights of `operators add`. The link is a secret until it is used.
    """
    from worker.features.console.operators import LINK_LASTS, make_link

    origin = console_of(session.settings.web)
    with session.database() as database:
        at = session.clock.now()
        path = make_link(database, session.actor, at=at)
    row = {"url": origin + path, "until": at + LINK_LASTS}
    if session.output is Format.TABLE:
        print(row["url"])
    else:
        session.print_row(row, key="url")
    if not _answers(origin):
        say(f"nothing answers at {origin} from here: start a worker or `serve`, and then open the link")


def console_of(web: WebSettings) -> str:
    """The console's address: `public_url`, else `listen`, by the loopback interface if it is everywhere.

    Raises:
        ConfigurationError: there is neither, or only a port that changes.
    """
    if web.public_url:
        return web.public_url.rstrip("/")
    host, _, port = web.listen.rpartition(":")
    if not port or port == "0":
        raise ConfigurationError(
            f'the console has no known address: [web] listen is "{web.listen}"',
            fix="call it with the settings of a process that serves the console, or set [web] public_url",
        )
    return f"http://{'127.0.0.1' if host.strip('[]') in _EVERYWHERE else host}:{port}"


def _answers(origin: str) -> bool:
    parts = urlsplit(origin)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=PATIENCE).close()
    except OSError:
        return False
    return True
