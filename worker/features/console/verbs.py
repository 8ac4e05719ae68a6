"""`serve`, `login` and `operators`: the web side alone, who works for all orgs, and a link that logs in."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import typer

from worker.errors import ConfigurationError
from worker.kit.options import argument, option
from worker.kit.output import Format, say
from worker.kit.session import Invocation, session_of, verb

if TYPE_CHECKING:
    from worker.settings.sections import WebSettings

app = typer.Typer(help="People and programs that work for all orgs, each with a token.")

COLUMNS = ("name", "role", "source", "created_at", "created_by")
NameArgument = Annotated[str, argument("NAME", "The name in the audit: 1 to 100 characters without a colon.")]


RoleOption = Annotated[
    Literal["starter", "viewer", "operator", "admin"],
    option(
        "--role",
        "starter starts runs and reads those; viewer reads; operator also changes runs; admin sees all.",
    ),
]


@verb(app, "add")
def add(session: Invocation, name: NameArgument, role: RoleOption = "viewer") -> None:
    """Add an operator and print its token, once; exit 5 if the name is taken.

    Only the token's hash is stored. Every process accepts the token within 2 s.
    """
    from worker.features.console.operators import add_operator

    taken = [operator.name for operator in session.settings.web.operators]
    session.change(add_operator, name, role, taken=taken, key="token")
    if session.output is Format.TABLE:
        say("the token is not stored and cannot be shown again")


@verb(app, "list")
def list_(session: Invocation) -> None:
    """List the operators of the database and those of [[web.operators]] in worker.toml."""
    from worker.features.console.operators import list_operators

    with session.database() as database:
        rows = [{**row, "source": "database"} for row in list_operators(database)]
    unknown = {"id": None, "created_at": None, "created_by": None, "source": "worker.toml"}
    rows += [{**unknown, "name": one.name, "role": one.role} for one in session.settings.web.operators]
    session.print_rows(sorted(rows, key=lambda row: str(row["name"])), COLUMNS, key="name")


@verb(app, "mcp-token")
def mcp_token(
    session: Invocation,
    name: NameArgument,
    remove: Annotated[bool, option("--remove", "Remove the token, and make no other one.")] = False,
) -> None:
    """Make the token for an operator's MCP client and print it, once; the former one is refused at once.

    With it a client reads what the operator may read, and plans changes, which the operator confirms in the
    console. It opens neither the API nor the console. Exit 3 if the operator is unknown.
    """
    from worker.features.console.operators import make_client_token

    configured = [operator.name for operator in session.settings.web.operators]
    key = "name" if remove else "token"
    session.change(make_client_token, name, remove=remove, configured=configured, key=key)
    if session.output is Format.TABLE and not remove:
        say("the token is not stored and cannot be shown again")


@verb(app, "remove")
def remove(session: Invocation, name: NameArgument) -> None:
    """Remove an operator and end its sessions; the token is refused within 2 s. Exit 3 if it is unknown."""
    from worker.features.console.operators import remove_operator

    configured = [operator.name for operator in session.settings.web.operators]
    session.change(remove_operator, name, configured=configured, key="name")


def serve(context: typer.Context) -> None:
    """Serve API, console and health on web.listen, and run no jobs; SIGTERM or Ctrl-C stops it.

    A worker serves them too. This is for a separate machine, next to workers whose
    web.listen is "". /readyz says whether the database answers.
    """
    from worker.engine.runners.child.linux import ProcessName, name_process
    from worker.features.console.wiring import serve as serve_web

    name_process(ProcessName.SERVE)
    session = session_of(context)
    session.require_database()
    raise typer.Exit(serve_web(session.settings))


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
