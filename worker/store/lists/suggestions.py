"""Suggestions for the words and names of a query that are unknown."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from worker.ids import AllOrgs, OrgScope, Scope
from worker.search import Query, folded, ids_of, near
from worker.store import orgs, tables
from worker.store.dialect import in_scope
from worker.store.lists.matching import begins
from worker.store.lists.read import handler_names
from worker.store.names import around

# Words compared for a suggestion.
NEAR = 3_000
_words, _definitions = tables.org_words, tables.definitions


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A word that no org's name or code has, or the unknown name of a `kind`; and the nearest known ones."""

    word: str
    near: list[str]
    kind: str = "org"

    @property
    def what(self) -> str:
        """What is wrong, as the beginning of a sentence."""
        if self.kind == "org":
            return f"no org has a word that begins with {self.word!r}"
        return f"there is no {self.kind} {self.word!r}"


def suggestions(connection: Connection, scope: OrgScope, query: Query) -> list[Suggestion]:
    """The query's words that no visible org has, and its unknown names; each with the nearest known ones.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    wanted = [*query.words, *(query.org or "").split()]
    wrong = [word for word in wanted if ids_of(word) is None and not _is_known(connection, org_id, word)]
    found = [Suggestion(word, _near(connection, org_id, folded(word))) for word in wrong]
    if query.definition is not None:
        found += _of_definition(connection, org_id, query.definition)
    if query.handler is not None:
        known = connection.execute(handler_names(org_id).limit(NEAR)).scalars().all()
        # Before a worker has reported its handlers, none is known.
        if known and query.handler not in known:
            found.append(Suggestion(query.handler, near(query.handler, known), "handler"))
    return found


def _of_definition(connection: Connection, scope: Scope, name: str) -> list[Suggestion]:
    names = select(_definitions.c.name).where(*in_scope(_definitions.c.org_id, scope))
    if connection.execute(names.where(_definitions.c.name == name).limit(1)).first() is not None:
        return []
    if isinstance(scope, AllOrgs):
        known = around(connection, "definition", name)
    else:
        known = iter(connection.execute(names.limit(NEAR)).scalars())
    return [Suggestion(name, near(name, known), "definition")]


def _is_known(connection: Connection, scope: Scope, word: str) -> bool:
    some = select(_words.c.word).where(begins(word), *in_scope(_words.c.org_id, scope))
    return connection.execute(some.limit(1)).first() is not None


def _near(connection: Connection, scope: Scope, word: str) -> list[str]:
    """Known words with the same beginning that are most like this one."""
    for length in (3, 2, 1):
        mine = (begins(word[:length]), *in_scope(_words.c.org_id, scope))
        beginning = select(_words.c.word).distinct().where(*mine).order_by(_words.c.word)
        known = connection.execute(beginning.limit(NEAR)).scalars().all()
        if found := near(word, known):
            return found
    return []
