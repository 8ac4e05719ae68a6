"""Runs and orgs by a query of `worker.model.search`, newest first, in pages by key; never a count.

Each statement reads a bounded part of an index. A search that finds too little in the newest runs stops
after `WINDOWS` windows, and `runs_of` says from where to continue. Words and names of a query that are
unknown have suggestions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Text,
    func,
    literal_column,
    select,
    text,
    union_all,
)
from sqlalchemy import cast as sql_cast

from worker.ids import AllOrgs, OrgScope, RunId, Scope, given_id, highest_id, lowest_id
from worker.model.search import Query, folded, near, pieces_of
from worker.store import deadlines, failing, orgs, tables
from worker.store.dialect import below, in_scope, rows_as
from worker.store.lists import DEFAULT_LIMIT, FIRST_PAGE, MAX_LIMIT, FoundRows, Page
from worker.store.lists import runs as run_lists
from worker.store.lists.handlers import handler_names
from worker.store.lists.matching import (
    Condition,
    begins,
    conditions,
    few_orgs,
    kept_states,
    orgs_that_match,
    seen_words,
    words_beginning,
)
from worker.store.lists.rows import OrgRow, Run, columns_of
from worker.store.lists.run_ids import fitting
from worker.store.names import around

# Runs examined by one statement: few first, since most searches find a page among the newest runs.
WINDOWS = (500, 2_000, 3_000)
# Definitions of one name whose runs are read one by one; with more, the newest runs of all are read.
FEW = 20
# Different causes that are compared, and used.
CAUSES = 2_000
FEW_CAUSES = 50

_runs, _live, _ends, _attempts = tables.runs, tables.live_runs, tables.run_ends, tables.attempts
_orgs, _definitions, _words = tables.orgs, tables.definitions, tables.org_words
_run_words, _links = tables.run_words, tables.children
_EXAMINED = tuple(
    _runs.c[name]
    for name in (
        *("id", "org_id", "definition_id", "handler", "origin", "state", "reason", "created_at", "pool"),
        *("revision", "worker_id"),
    )
)
# As the indexes say it: with a parameter, SQLite would not use one.
_IS_RARE = _ends.c.state != literal_column("'succeeded'")
# Each step is one look into the index, however many attempts have the same cause.
_ALL_CAUSES = text("""
WITH RECURSIVE causes (cause) AS (
  SELECT min(error_cause) FROM attempts WHERE error_cause IS NOT NULL
  UNION ALL
  SELECT (SELECT min(a.error_cause) FROM attempts a WHERE a.error_cause > causes.cause) FROM causes
  WHERE causes.cause IS NOT NULL
)
SELECT cause FROM causes WHERE cause IS NOT NULL LIMIT :limit
""")
# Words compared for a suggestion.
NEAR = 3_000


def runs_of(connection: Connection, scope: OrgScope, query: Query, page: Page = FIRST_PAGE) -> FoundRows[Run]:
    """A page of the runs that match, newest first. It may have fewer rows than fit.

    `definition`, `state` and `since` of the page narrow the query.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    limit = page.limit or DEFAULT_LIMIT
    search = _Search(connection, org_id, query, page, limit)
    ids = search.ids()
    return FoundRows(run_lists.rows_of(connection, org_id, ids), search.next_of(ids))


def orgs_of(connection: Connection, scope: OrgScope, query: Query, page: Page = FIRST_PAGE) -> list[OrgRow]:
    """A page of the orgs that the words and `org:` match, newest first.

    `state`, `since`, `broken` and `late` of the page narrow them.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    statement = select(*(_orgs.c[name] for name in columns_of(OrgRow)))
    few = few_orgs(connection, org_id, query)
    if few is None:
        statement = statement.where(*orgs_that_match(connection, org_id, query, _orgs.c.id))
    else:
        statement = statement.where(_orgs.c.id.in_(few))
    if page.broken:
        statement = statement.where(failing.broken_orgs(org_id))
    if page.late:
        statement = statement.where(deadlines.late_orgs(org_id))
    if page.states:
        statement = statement.where(_orgs.c.state.in_(page.states))
    if page.since is not None:
        statement = statement.where(_orgs.c.created_at >= page.since)
    statement = statement.where(*below(_orgs.c.id, page.after))
    statement = statement.order_by(_orgs.c.id.desc()).limit(page.limit or DEFAULT_LIMIT)
    return rows_as(OrgRow, connection, statement)


class _Source(NamedTuple):
    """Ids that an index has in their order: those of a table's rows that meet a condition."""

    id: ColumnElement[Any]
    conditions: tuple[Condition, ...] = ()

    @property
    def is_of_runs(self) -> bool:
        """Whether its rows have the columns that are examined."""
        return self.id is _runs.c.id


class _Search:
    """One page of one search."""

    def __init__(self, connection: Connection, scope: Scope, query: Query, page: Page, limit: int) -> None:
        states = frozenset(page.states) & query.states if query.states else frozenset(page.states)
        since = max(filter(None, (query.since, page.since)), default=None)
        definition = query.definition or page.definition
        self.is_empty = (bool(page.states) and not states) or page.definition not in (None, definition)
        # What is left to compare: the sources have only runs that match the rest.
        self.query = replace(query, states=states or query.states, since=since, definition=definition)
        # A search by the id of a child finds it.
        self.has_children = query.has_children
        self.connection, self.scope, self.limit, self.after = connection, scope, limit, page.after
        # Where the search stopped, if it did before the end.
        self.stopped: RunId | None = None

    def next_of(self, ids: Sequence[RunId]) -> RunId | None:
        """The id to continue after: the last row of a full page, or where the search stopped."""
        return ids[-1] if len(ids) == self.limit else self.stopped

    def ids(self) -> list[RunId]:
        """The ids of the page: of the newest runs of all sources together, those that match."""
        sources = [] if self.is_empty else self._sources()
        found: list[RunId] = []
        after = None if self.after is None else RunId(self.after)
        for window in WINDOWS if sources else ():
            each = max(window // len(sources), self.limit)
            stop = self._stop_of(sources, after, each)
            run = self._examined(sources, after, each).c
            matching = select(run.id).distinct().where(*self._that_match(run))
            if stop is not None:
                matching = matching.where(run.id >= stop)
            found += self._ids(matching.order_by(run.id.desc()).limit(self.limit - len(found)))
            if len(found) == self.limit or stop is None:
                return found
            after = stop
        self.stopped = after if sources else None
        return found

    def _sources(self) -> list[_Source]:
        """Where the runs that match are, in the index that leaves out most others; no longer in the query."""
        query = self.query
        if (fits := self._take_id()) is not None:
            self.has_children = True
            return [_Source(_runs.c.id, (fits,))]
        if query.parent is not None:
            self.query = replace(query, parent=None)
            return [_Source(_links.c.run_id, (_links.c.parent_id == query.parent,))]
        for word in sorted(query.words, key=len, reverse=True):
            if (worded := self._of_a_word(word)) is not None:
                return worded
        of_code = replace(query, words=())
        if (org_ids := few_orgs(self.connection, self.scope, of_code)) is not None:
            self.query = replace(query, org=None)
            return [_Source(_runs.c.id, (_runs.c.org_id == org_id,)) for org_id in org_ids]
        if query.definition is not None and (named := self._few_definitions(query.definition)) is not None:
            self.query = replace(query, definition=None)
            return [_Source(_runs.c.id, (_runs.c.definition_id == id_,)) for id_ in named]
        if query.cause is not None and (causes := self._few_causes(query.cause)) is not None:
            self.query = replace(query, cause=None)
            return [_Source(_attempts.c.run_id, (_attempts.c.error_cause == cause,)) for cause in causes]
        # `run_ends` has no children.
        if not query.states or "succeeded" in query.states or self.has_children:
            return [_Source(_runs.c.id)]
        self.query = replace(query, states=frozenset())
        ended = query.states & set(tables.FINAL_STATES)
        sources = [_Source(_ends.c.run_id, (_ends.c.state == state, _IS_RARE)) for state in sorted(ended)]
        if kept := kept_states(query.states):
            sources.append(_Source(_live.c.id, (_live.c.state.in_(kept),)))
        return sources

    def _of_a_word(self, word: str) -> list[_Source] | None:
        """The runs of the orgs that the word matches, and those that have it themselves.

        None if these orgs, or the words that begin with it, are many. The rest stays in the query.
        """
        query = self.query
        pieces = sorted(pieces_of(word), key=len)
        matched = few_orgs(self.connection, self.scope, replace(query, words=(word,)))
        if not pieces or matched is None:
            return None
        within = few_orgs(self.connection, self.scope, replace(query, words=()))
        sources = [_Source(_runs.c.id, (_runs.c.org_id == org_id,)) for org_id in matched]
        for org_ids in [()] if within is None else [(org_id,) for org_id in within]:
            those = [*seen_words(self.scope), *(_run_words.c.org_id == org_id for org_id in org_ids)]
            for found in self._ids(words_beginning(pieces[-1], *those).limit(FEW + 1)):
                sources.append(_Source(_run_words.c.run_id, (_run_words.c.word == found, *those)))
            if len(sources) > FEW + len(matched):
                return None
        self.query = replace(
            query,
            words=tuple(other for other in query.words if other != word or len(pieces) > 1),
            org=query.org if within is None else None,
        )
        return sources

    def _take_id(self) -> Condition | None:
        """The condition of a word that fits the id of a run; it is then no longer a word of an org."""
        for word in self.query.words:
            if (given := given_id(word)) is None:
                continue
            if found := fitting(self.connection, self.scope, given, MAX_LIMIT if given.tail else 1):
                words = tuple(other for other in self.query.words if other != word)
                self.query = replace(self.query, words=words)
                return _runs.c.id.in_(found) if given.tail else _runs.c.id.between(given.first, given.last)
        return None

    def _few_definitions(self, name: str) -> Sequence[str] | None:
        """The ids of the definitions with this name; None if they are many."""
        mine = (_definitions.c.name == name, *in_scope(_definitions.c.org_id, self.scope))
        found = self._ids(select(_definitions.c.id).where(*mine).limit(FEW + 1))
        return found if len(found) <= FEW else None

    def _few_causes(self, text: str) -> list[str] | None:
        """The causes that contain the text; None if they are many, or too many to look at them all."""
        every = self.connection.execute(_ALL_CAUSES, {"limit": CAUSES}).scalars().all()
        causes = [cause for cause in every if folded(text) in folded(cause)]
        return causes if len(every) < CAUSES and len(causes) <= FEW_CAUSES else None

    def _newest(
        self, sources: Sequence[_Source], after: RunId | None, each: int, *columns: Any
    ) -> FromClause:
        """The newest ids of each source, with its number, or with `columns` of its rows."""
        parts = [
            select(source.id.label("id"), *(columns or (literal_column(str(number)).label("number"),)))
            .where(*source.conditions, *self._bounds(source.id, after), *self._listed(source.id.table))
            .order_by(source.id.desc())
            .limit(each)
            for number, source in enumerate(sources)
        ]
        if len(parts) == 1:
            return parts[0].subquery("newest")
        return union_all(*(part.subquery().select() for part in parts)).subquery("newest")

    def _stop_of(self, sources: Sequence[_Source], after: RunId | None, each: int) -> RunId | None:
        """The last id above which no source has more than `each`; None if they all have less."""
        newest = self._newest(sources, after, each).c
        # PostgreSQL has no min(uuid) before version 18.
        last = func.min(sql_cast(newest.id, Text))
        stops = select(last).group_by(newest.number).having(func.count() == each)
        return next(iter(self._ids(stops.order_by(last.desc()).limit(1))), None)

    def _examined(self, sources: Sequence[_Source], after: RunId | None, each: int) -> FromClause:
        """The columns of the newest runs of each source."""
        if all(source.is_of_runs for source in sources):
            return self._newest(sources, after, each, *_EXAMINED[1:])
        newest = self._newest(sources, after, each)
        rows = select(*_EXAMINED).join(newest, newest.c.id == _runs.c.id)
        # A limit keeps the planner from looking for the other conditions first.
        return rows.order_by(_runs.c.id.desc()).limit(each * len(sources)).subquery("run")

    def _that_match(self, run: Any) -> list[Condition]:
        """What the rest of the query says of the columns of a run."""
        of_code = replace(self.query, words=())
        of_org = orgs_that_match(self.connection, self.scope, of_code, run.org_id)
        listed = [] if self.has_children else [run.origin != "child"]
        return [*conditions(self.scope, self.query, run), *of_org, *listed]

    def _listed(self, rows: FromClause) -> list[Condition]:
        """A condition that leaves children out of a source, whose newest rows may be a large tree."""
        return [run_lists.is_listed(rows)] if rows in (_runs, _live) and not self.has_children else []

    def _ids(self, statement: Select[Any]) -> list[RunId]:
        return [RunId(id_) for id_ in self.connection.execute(statement).scalars()]

    def _bounds(self, id_: ColumnElement[Any], after: str | None) -> list[Condition]:
        """Bounds of the ids, which sort by creation time."""
        bounds = [*below(id_, after)]
        if self.query.since is not None:
            bounds.append(id_ >= lowest_id(self.query.since))
        if self.query.until is not None:
            bounds.append(id_ < highest_id(self.query.until))
        return bounds


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A word that finds nothing, or the unknown name of a `kind`; and the nearest known ones."""

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
    wrong = [word for word in wanted if given_id(word) is None and not _is_known(connection, org_id, word)]
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
    """Whether an org or a run is found by the word, or by a piece of it."""
    of_orgs = select(_words.c.word).where(begins(word), *in_scope(_words.c.org_id, scope))
    of_runs = [
        select(_run_words.c.word).where(begins(piece, _run_words.c.word), *seen_words(scope))
        for piece in pieces_of(word)
    ]
    return any(connection.execute(some.limit(1)).first() is not None for some in (of_orgs, *of_runs))


def _near(connection: Connection, scope: Scope, word: str) -> list[str]:
    """Known words with the same beginning that are most like this one."""
    for length in (3, 2, 1):
        mine = (begins(word[:length]), *in_scope(_words.c.org_id, scope))
        beginning = select(_words.c.word).distinct().where(*mine).order_by(_words.c.word)
        known = connection.execute(beginning.limit(NEAR)).scalars().all()
        if found := near(word, known):
            return found
    return []
