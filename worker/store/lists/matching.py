"""Conditions that a search (`worker.model.search`) puts on orgs and runs; the orgs that match, if few."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    true,
)
from sqlalchemy import cast as sql_cast

from worker.ids import AllOrgs, GivenId, OrgId, Scope, given_id
from worker.model.search import Query, folded, pieces_of
from worker.store import tables
from worker.store.dialect import in_scope

# Matching orgs whose runs are read one by one; with more, the newest runs of all are read.
FEW = 20
Condition = ColumnElement[bool]
_orgs, _words, _run_words = tables.orgs, tables.org_words, tables.run_words
# Other names, for conditions within statements that read these tables.
_named, _unended = tables.definitions.alias("named"), tables.live_runs.alias("unended")
_tried, _its = tables.attempts.alias("tried"), tables.run_words.alias("its")
_acting, _links = tables.workers.alias("acting"), tables.children.alias("links")
# At least this much of the end of a worker's id.
_TAIL = re.compile(r"[0-9a-f-]{4,}")
# Greater than every letter.
_LAST = "\U0010ffff"


def orgs_that_match(
    connection: Connection, scope: Scope, query: Query, org_id: ColumnElement[Any]
) -> list[Condition]:
    """Conditions on the id of an org; the code of `org:` wins over names that begin so."""
    found = [*_has_words(org_id, query.words), *in_scope(org_id, scope)]
    if query.org is not None:
        named = _org_with_code(connection, scope, query.org)
        found += _has_words(org_id, query.org.split()) if named is None else [org_id == named]
    return found


def few_orgs(connection: Connection, scope: Scope, query: Query) -> list[OrgId] | None:
    """The ids of the orgs that `org:` and the words match; None if they are many."""
    if query.org is None and not query.words:
        return None if isinstance(scope, AllOrgs) else [scope]
    conditions = orgs_that_match(connection, scope, query, _orgs.c.id)
    statement = select(_orgs.c.id).where(*conditions)
    of_code = query.org is not None and _org_with_code(connection, scope, query.org) is not None
    if isinstance(scope, AllOrgs) and not of_code:
        # From the words in the order of their index, which stops as soon as there are many.
        longest = max([*query.words, *(query.org or "").split()], key=len)
        conditions = orgs_that_match(connection, scope, query, _words.c.org_id)
        statement = select(_words.c.org_id).distinct().where(begins(longest), *conditions)
    ids = [OrgId(id_) for id_ in connection.execute(statement.limit(FEW + 1)).scalars()]
    return ids if len(ids) <= FEW else None


def conditions(scope: Scope, query: Query, run: Any) -> list[Condition]:
    """What the words and keys of a query, but `org:`, say of the columns of a run."""
    found = [_has_word(scope, word, run) for word in query.words]
    if query.definition is not None:
        its = (_named.c.id == run.definition_id, *in_scope(_named.c.org_id, scope))
        name = select(_named.c.name).where(*its).limit(1)
        found.append(name.scalar_subquery() == query.definition)
    if query.handler is not None:
        found.append(run.handler == query.handler)
    if query.origin is not None:
        found.append(run.origin == query.origin)
    if query.pool is not None:
        found.append(run.pool == query.pool)
    if query.revision is not None:
        found.append(run.revision == query.revision)
    if query.worker is not None:
        running = _is_live(run, _is_worker(_unended.c.worker_id, query.worker))
        found.append(or_(_is_worker(run.worker_id, query.worker), running))
    if query.since is not None:
        found.append(run.created_at >= query.since)
    if query.until is not None:
        found.append(run.created_at < query.until)
    if query.reason is not None:
        found.append(or_(run.reason == query.reason, _is_live(run, _unended.c.reason == query.reason)))
    if query.states:
        ended, kept = query.states & set(tables.FINAL_STATES), kept_states(query.states)
        each = [run.state.in_(ended)] if ended else []
        found.append(or_(*each, *([_is_live(run, _unended.c.state.in_(kept))] if kept else [])))
    if query.parent is not None:
        found.append(_is_any(_links.c.run_id == run.id, _links.c.parent_id == query.parent))
    if query.cause is not None:
        cause = func.lower(_tried.c.error_cause).contains(query.cause.lower(), autoescape=True)
        found.append(_is_any(_tried.c.run_id == run.id, _tried.c.org_id == run.org_id, cause))
    return found


def words_beginning(piece: str, *which: Condition) -> Select[Any]:
    """The different words of runs that begin with a piece, each by one look into the index."""
    first = select(func.min(_run_words.c.word)).where(begins(piece, _run_words.c.word), *which)
    found = first.cte("found", recursive=True)
    later = first.where(_run_words.c.word > found.c[0]).correlate(found).scalar_subquery()
    found = found.union_all(select(later).where(found.c[0].is_not(None)))
    return select(found.c[0]).where(found.c[0].is_not(None))


def seen_words(scope: Scope, words: Any = _run_words.c) -> list[Condition]:
    """Those words of runs, columns of `run_words`, by which this scope finds runs."""
    return [] if isinstance(scope, AllOrgs) else [words.org_id == scope, words.shown]


def has_id(given: GivenId, id_: ColumnElement[Any]) -> Condition:
    """The id begins and ends as given."""
    ends = sql_cast(id_, Text).endswith(given.tail) if given.tail else true()
    return and_(id_.between(given.first, given.last), ends)


def _has_word(scope: Scope, word: str, run: Any) -> Condition:
    """A word begins one of the org's name or code, each piece a word of the run; or it is its id."""
    seen = (_its.c.run_id == run.id, *seen_words(scope, _its.c))
    pieces = [_is_any(begins(piece, _its.c.word), *seen) for piece in pieces_of(word)]
    given = given_id(word)
    return or_(
        *_has_words(run.org_id, [word]),
        *([and_(*pieces)] if pieces else []),
        *([] if given is None else [has_id(given, run.id)]),
    )


def begins(word: str, column: ColumnElement[Any] = _words.c.word) -> Condition:
    """The words that begin with this one."""
    start = folded(word)
    return and_(column >= start, column < start + _LAST)


def kept_states(states: Iterable[str]) -> list[str]:
    """The states of `live_runs` that these states of runs stand for."""
    return [kept for state in states for kept in tables.UNFINISHED.get(state, ())]


def shown_state(state: ColumnElement[Any]) -> ColumnElement[Any]:
    """A state of `live_runs` for people: held and parked runs are waiting."""
    return case((state.in_(tables.UNSTARTED), "waiting"), else_=state)


def _has_words(org_id: ColumnElement[Any], words: Sequence[str]) -> list[Condition]:
    """Conditions on the id of an org: each word begins one of its name or code."""
    own = _words.alias("own")
    return [exists().where(own.c.org_id == org_id, begins(word, own.c.word)) for word in words]


def _org_with_code(connection: Connection, scope: Scope, code: str) -> OrgId | None:
    statement = select(_orgs.c.id).where(_orgs.c.code == code, *in_scope(_orgs.c.id, scope))
    return connection.execute(statement.limit(1)).scalar_one_or_none()


def _is_worker(id_: ColumnElement[Any], text: str) -> Condition:
    """The worker has this id, or it is of this machine, or its id ends so."""
    if (exact := _uuid_of(text)) is not None:
        return id_ == exact
    named = _acting.c.host == text
    if _TAIL.fullmatch(text.lower()) is not None:
        named = or_(named, sql_cast(_acting.c.id, Text).endswith(text.lower()))
    return _is_any(_acting.c.id == id_, named)


def _uuid_of(text: str) -> str | None:
    try:
        return str(UUID(text)) if len(text) in (32, 36) else None
    except ValueError:
        return None


def _is_live(run: Any, condition: Condition) -> Condition:
    """The run is unfinished, and its row in `live_runs` meets the condition."""
    return and_(
        run.state.is_(None), _is_any(_unended.c.id == run.id, _unended.c.org_id == run.org_id, condition)
    )


def _is_any(*conditions: Condition) -> Condition:
    """As EXISTS; but looked up row by row, where PostgreSQL would rather read the whole other table."""
    return select(literal(1)).where(*conditions).limit(1).scalar_subquery().is_not(None)
