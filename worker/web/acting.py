"""The database as a caller may use it: the web side's only way to it, for reads and writes alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection

from worker.store import roles
from worker.store.database import Database
from worker.web.access import Caller

P = ParamSpec("P")
T = TypeVar("T")


class Acting:
    """Hands out the database in the scope of a caller, and in no other.

    On PostgreSQL the server itself then keeps an org to its own rows, and operators from
    secrets. On SQLite, which has no roles, each store function is given the org.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def as_caller(self, caller: Caller) -> Database:
        """The database in the caller's role, for its org if it is one."""
        return self._database.acting(scope_of(caller))

    async def read(self, caller: Caller, work: Callable[[Connection], T]) -> T:
        """Run `work` in a thread of the database, on rows that this caller may see.

        On SQLite without a transaction, which would hold up the writers.
        """
        return await self.as_caller(caller).call_autocommit(work)

    async def do(
        self,
        caller: Caller,
        operation: Callable[Concatenate[Database, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an operation as this caller, in a thread of the database."""
        database = self.as_caller(caller)
        return await database.run(operation, database, *args, **kwargs)


def scope_of(caller: Caller) -> roles.Scope:
    """The caller's role, and its org.

    Raises:
        ValueError: an org whose row was not looked up.
    """
    if caller.org is None:
        return roles.ALL_ORGS
    if caller.org_id is None:
        raise ValueError(f"org {caller.org} has no id here: its caller was not confirmed")
    return roles.Scope.of_org(caller.org_id)
