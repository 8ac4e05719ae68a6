"""From `[relay]` to a relay: the product's database by SQLAlchemy, and the API by the client."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from worker.client import AsyncClient, ClientError, Outbox
from worker.client import ConfigurationError as ClientConfigurationError
from worker.client.statements import Dialect
from worker.errors import ConfigurationError, NotFound, StoreUnavailable, Unavailable
from worker.settings import Settings
from worker.settings.sections import RelaySettings
from worker.settings.token_files import read_token
from worker.store.dialect import Row
from worker.telemetry import logs
from worker.telemetry.events import emit
from worker.telemetry.vitals import Notifier

DIALECTS: dict[str, Dialect] = {
    "postgresql": "postgresql",
    "mysql": "mysql",
    "mariadb": "mysql",
    "sqlite": "sqlite",
}
EXIT_OK = 0
EXIT_LATER = 75


def run(settings: Settings, *, once: bool) -> int:
    """Relay until SIGTERM or SIGINT, or with `once` what is due; returns the exit code of the process.

    Raises:
        ConfigurationError: `[relay]` is incomplete, or its token, certificate or driver cannot be used.
        StoreUnavailable: with `once`: the product's database does not answer.
    """
    relay = settings.relay
    logs.configure(settings.log.style or None, level=settings.log.level)
    for name in ("api", "token_file", "outbox_url"):
        if not getattr(relay, name):
            raise _lacking(name)
    # An unusable file ends the start; later on the relay waits until it is back.
    _token(relay)
    read = partial(_token_for_client, relay)
    try:
        client = AsyncClient(relay.api, read, ca_file=relay.ca_file, plain_http=relay.plain_http)
    except ClientConfigurationError as error:
        raise ConfigurationError(f"relay: {error.message}", fix=error.fix) from None
    with _engine(relay) as engine:
        try:
            return asyncio.run(_relay(client, _outbox(relay, engine), once=once, key_holds=relay.key_holds))
        except engine.dialect.loaded_dbapi.Error as error:
            raise _unavailable(error) from None


async def _relay(client: AsyncClient, outbox: Outbox, *, once: bool, key_holds: timedelta) -> int:
    stop, notifier = asyncio.Event(), Notifier()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    notifier.ready(f"relays {outbox.table}")
    async with client:
        try:
            await client.relay(outbox, once=once, stop=stop, report=emit, key_holds=key_holds)
        except ClientError:
            # The event relay.waiting has said why.
            return EXIT_LATER
    return EXIT_OK


def ddl_of(dialect: Dialect, table: str) -> Sequence[str]:
    """The statements that make the table; raises ConfigurationError for an invalid name."""
    try:
        return [f"{statement};" for statement in Outbox(dialect, table=table).ddl]
    except ClientConfigurationError as error:
        raise ConfigurationError(error.message, fix=error.fix) from None


def rows(settings: Settings, state: str, limit: int) -> list[Row]:
    """The newest rows in a state. Raises ConfigurationError and StoreUnavailable."""
    with _connected(settings.relay) as (outbox, connection):
        return [_shown(row) for row in outbox.show(connection, state, limit=limit)]


def retry(settings: Settings, row_id: int) -> Row:
    """Let a refused row wait again, and return it. Raises NotFound, and as `rows`."""
    with _connected(settings.relay) as (outbox, connection):
        found = outbox.again(connection, row_id)
        connection.commit()
    if found is None:
        raise NotFound(f"no row {row_id} of the outbox was refused", fix="`outbox list` lists those")
    return _shown({**found, "state": "waiting"})


def _shown(row: Row) -> Row:
    times = {
        name: None if row[name] is None else datetime.fromtimestamp(row[name] / 1000, UTC)
        for name in ("created_at", "ended_at")
    }
    return {**row, **times}


@contextmanager
def _connected(relay: RelaySettings) -> Iterator[tuple[Outbox, Any]]:
    if not relay.outbox_url:
        raise _lacking("outbox_url")
    with _engine(relay) as engine:
        try:
            with engine.connect() as connection:
                yield _outbox(relay, engine), connection
        except DBAPIError as error:
            raise _unavailable(error.orig) from None


@contextmanager
def _engine(relay: RelaySettings) -> Iterator[Engine]:
    """SQLAlchemy's engine for the product's database, without a pool."""
    fix = "such as postgresql://USER@HOST/DATABASE, mysql+pymysql://… or sqlite:///FILE"
    try:
        url = make_url(relay.outbox_url)
        if url.get_backend_name() not in DIALECTS:
            raise ConfigurationError(
                f"relay.outbox_url: there is no outbox for {url.get_backend_name()}", fix=fix
            )
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        engine = create_engine(url, poolclass=NullPool, hide_parameters=True)
    except ImportError as error:
        raise ConfigurationError(
            f"relay.outbox_url: the driver {error.name} is not installed", fix=f"pip install {error.name}"
        ) from None
    except (ArgumentError, NoSuchModuleError):
        raise ConfigurationError("relay.outbox_url is not the URL of a database", fix=fix) from None
    try:
        yield engine
    finally:
        engine.dispose()


def _outbox(relay: RelaySettings, engine: Engine) -> Outbox:
    try:
        return Outbox(DIALECTS[engine.dialect.name], table=relay.table, connect=engine.raw_connection)
    except ClientConfigurationError as error:
        raise ConfigurationError(f"relay.table: {error.message}", fix=error.fix) from None


def _token(relay: RelaySettings) -> str:
    """Raises ConfigurationError."""
    made_by = "operators add NAME --role starter"
    return read_token(relay.token_file, setting="relay.token_file", made_by=made_by)


def _token_for_client(relay: RelaySettings) -> str:
    """Read for each request, since it may be replaced. Raises the client's ConfigurationError."""
    try:
        return _token(relay)
    except ConfigurationError as error:
        raise ClientConfigurationError(error.message, fix=error.fix) from None


def _lacking(name: str) -> ConfigurationError:
    return ConfigurationError(f"relay.{name} is not set", fix=f"set {name} in [relay] of worker.toml")


def _unavailable(error: BaseException | None) -> Unavailable:
    return StoreUnavailable(
        f"the outbox's database answers with an error: {type(error).__name__}",
        fix="check relay.outbox_url and relay.table; `outbox ddl` prints the table",
    )
