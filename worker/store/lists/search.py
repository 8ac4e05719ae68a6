"""Runs and orgs by a query of `worker.search`, newest first, in pages by key; never a count.

Each statement reads a bounded part of an index. A search that finds too little in the newest runs stops
after `WINDOWS` windows, and `page_of` says from where to continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Select,
    and_,
    exists,
    false,
    func,
    literal,
    or_,
    select,
    text,
    union_all,
)

from worker.ids import AllOrgs, OrgId, OrgScope, RunId, highest_id, lowest_id
from worker.search import Query, folded, ids_of, near
from worker.store import failing, orgs, tables
from worker.store.dialect import all_rows
from worker.store.lists import DEFAULT_LIMIT, Org, Page, Run, columns_of
from worker.store.lists import runs as run_lists

# Runs examined by one statement: few first, since most searches find a page among the newest runs.
WINDOW = 10_000
WINDOWS = (500, WINDOW, WINDOW)
# Runs that are looked up one by one, from an index without their columns.
AMONG = 2_500
# Matching orgs whose runs are read org by org; with more, the newest runs of all orgs are read.
FEW_ORGS = 20
# Different causes that are compared, and used.
CAUSES = 2_000
FEW_CAUSES = 50
# Words compared for a suggestion.
NEAR = 3_000

# Ended runs in a rare state of which the newest by id are examined.
ENDS = 50_000
RARE = frozenset({"failed", "refused", "cancelled", "skipped"})

_runs, _live, _ends, _attempts = tables.runs, tables.live_runs, tables.run_ends, tables.attempts
_orgs, _words, _definitions = tables.orgs, tables.org_words, tables.definitions
_EXAMINED = tuple(
    _runs.c[name]
    for name in ("id", "org_id", "definition_id", "handler", "origin", "state", "reason", "created_at")
)
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
# Other names, for conditions within statements that read these tables.
_named, _unended, _tried = _definitions.alias("named"), _live.alias("unended"), _attempts.alias("tried")
Condition = ColumnElement[bool]
FIRST_PAGE = Page()
# Greater than every letter.
_LAST = "\U0010ffff"


class Found(NamedTuple):
    """A page of runs. `next` is the id to continue after; None if there are no more."""

    runs: list[Run]
    next: RunId | None


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A word that no org's name or code has, and the nearest words that some org has."""

    word: str
    near: list[str]


def runs_of(connection: Connection, scope: OrgScope, query: Query, page: Page = FIRST_PAGE) -> list[Run]:
    """A page of the runs that match, newest first; see `page_of` for long searches.

    Raises:
        NotFound: there is no org of the scope.
    """
    return page_of(connection, scope, query, page).runs


def page_of(connection: Connection, scope: OrgScope, query: Query, page: Page = FIRST_PAGE) -> Found:
    """A page of the runs that match, and the key of the next one. It may have fewer rows than fit.

    `definition`, `state` and `since` of the page narrow the query.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    limit = page.limit or DEFAULT_LIMIT
    search = _Search(connection, org_id, query, page, limit)
    ids = search.ids()
    return Found(run_lists.rows_of(connection, org_id, ids), search.next_of(ids))


def orgs_of(connection: Connection, scope: OrgScope, query: Query, page: Page = FIRST_PAGE) -> list[Org]:
    """A page of the orgs that the words and `org:` match, newest first.

    `state`, `since` and `broken` of the page narrow them.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    statement = select(*(_orgs.c[name] for name in columns_of(Org)))
    few = _few_orgs(connection, org_id, query)
    if few is not None and len(few) <= FEW_ORGS:
        statement = statement.where(_orgs.c.id.in_(few))
    else:
        statement = statement.where(*orgs_that_match(connection, org_id, query, _orgs.c.id))
    if page.broken:
        statement = statement.where(failing.broken_orgs(org_id))
    if page.states:
        statement = statement.where(_orgs.c.state.in_(page.states))
    if page.since is not None:
        statement = statement.where(_orgs.c.created_at >= page.since)
    if page.after is not None:
        statement = statement.where(_orgs.c.id < page.after)
    statement = statement.order_by(_orgs.c.id.desc()).limit(page.limit or DEFAULT_LIMIT)
    return cast(list[Org], all_rows(connection, statement))


def suggestions(connection: Connection, scope: OrgScope, query: Query) -> list[Suggestion]:
    """The words of the query that no visible org has, each with the nearest known ones.

    Raises:
        NotFound: there is no org of the scope.
    """
    org_id = orgs.scope_of(connection, scope)
    wanted = [*query.words, *(query.org or "").split()]
    wrong = [word for word in wanted if ids_of(word) is None and not _is_known(connection, org_id, word)]
    return [Suggestion(word, _near(connection, org_id, folded(word))) for word in wrong]


def _is_known(connection: Connection, scope: OrgId | AllOrgs, word: str) -> bool:
    some = _in_scope(select(_words.c.word).where(_begins(word)), _words.c.org_id, scope).limit(1)
    return connection.execute(some).first() is not None


def _near(connection: Connection, scope: OrgId | AllOrgs, word: str) -> list[str]:
    """Known words with the same beginning that are most like this one."""
    for length in (3, 2, 1):
        begins = _in_scope(
            select(_words.c.word).distinct().where(_begins(word[:length])), _words.c.org_id, scope
        )
        known = connection.execute(begins.order_by(_words.c.word).limit(NEAR)).scalars().all()
        if found := near(word, known):
            return found
    return []


def _begins(word: str, column: ColumnElement[Any] = _words.c.word) -> Condition:
    """The words that begin with this one."""
    start = folded(word)
    return and_(column >= start, column < start + _LAST)


def _in_scope(statement: Select[Any], org_id: ColumnElement[Any], scope: OrgId | AllOrgs) -> Select[Any]:
    return statement if isinstance(scope, AllOrgs) else statement.where(org_id == scope)


def _has_words(org_id: ColumnElement[Any], words: Sequence[str]) -> list[Condition]:
    """Conditions on the id of an org: each word begins one of its name or code."""
    own = _words.alias("own")
    return [exists().where(own.c.org_id == org_id, _begins(word, own.c.word)) for word in words]


def orgs_that_match(
    connection: Connection, scope: OrgId | AllOrgs, query: Query, org_id: ColumnElement[Any]
) -> list[Condition]:
    """Conditions on the id of an org; the code of `org:` wins over names that begin so."""
    found = _has_words(org_id, query.words)
    if not isinstance(scope, AllOrgs):
        found.append(org_id == scope)
    if query.org is not None:
        named = _org_with_code(connection, scope, query.org)
        found += _has_words(org_id, query.org.split()) if named is None else [org_id == named]
    return found


def _org_with_code(connection: Connection, scope: OrgId | AllOrgs, code: str) -> OrgId | None:
    statement = _in_scope(select(_orgs.c.id).where(_orgs.c.code == code), _orgs.c.id, scope).limit(1)
    return connection.execute(statement).scalar_one_or_none()


def _few_orgs(connection: Connection, scope: OrgId | AllOrgs, query: Query) -> list[OrgId] | None:
    """The ids of the orgs that match if they are few, else one more than that; None if every org does."""
    if query.org is None and not query.words:
        return None if isinstance(scope, AllOrgs) else [scope]
    conditions = orgs_that_match(connection, scope, query, _orgs.c.id)
    statement = select(_orgs.c.id).where(*conditions)
    of_code = query.org is not None and _org_with_code(connection, scope, query.org) is not None
    if isinstance(scope, AllOrgs) and not of_code:
        # From the words in the order of their index, which stops as soon as there are many.
        longest = max([*query.words, *(query.org or "").split()], key=len)
        conditions = orgs_that_match(connection, scope, query, _words.c.org_id)
        statement = select(_words.c.org_id).distinct().where(_begins(longest), *conditions)
    return [OrgId(id_) for id_ in connection.execute(statement.limit(FEW_ORGS + 1)).scalars()]


class _Search:
    """One page of one search."""

    def __init__(
        self, connection: Connection, scope: OrgId | AllOrgs, query: Query, page: Page, limit: int
    ) -> None:
        states = frozenset(page.states) & query.states if query.states else frozenset(page.states)
        self.is_empty = bool(page.states) and not states
        since = max(filter(None, (query.since, page.since)), default=None)
        self.query = replace(query, states=states or query.states, since=since)
        self.connection, self.scope, self.limit = connection, scope, limit
        self.definition = None if page.definition is None else Query(definition=page.definition)
        self.after = page.after
        # Where the ids of a word are, and the orgs that match if they are few.
        self.span: tuple[str, str] | None = None
        self.of_orgs: list[OrgId] | None = None
        # Where the search stopped, if it did before the end.
        self.stopped: RunId | None = None

    def next_of(self, ids: Sequence[RunId]) -> RunId | None:
        """The id to continue after: the last row of a full page, or where the search stopped."""
        return ids[-1] if len(ids) == self.limit else self.stopped

    def ids(self) -> list[RunId]:
        """The ids of the page."""
        if self.is_empty:
            return []
        self._take_id()
        org_ids = _few_orgs(self.connection, self.scope, self.query)
        if org_ids is not None and not org_ids:
            return []
        self.of_orgs = None if org_ids is None or len(org_ids) > FEW_ORGS else org_ids
        if self.of_orgs is None or self.span is not None:
            found, self.stopped = self._of_many()
        else:
            found, self.stopped = self._by_org(self.of_orgs)
        return found

    def _take_id(self) -> None:
        """Take a word that begins a run's id as that; it is then no longer a word of an org."""
        for word in self.query.words:
            if (span := ids_of(word)) is None:
                continue
            some = select(_runs.c.id).where(_runs.c.id.between(*span))
            if self._ids(_in_scope(some, _runs.c.org_id, self.scope).limit(1)):
                words = tuple(other for other in self.query.words if other != word)
                self.query, self.span = replace(self.query, words=words), span
                return

    def _by_org(self, org_ids: Sequence[OrgId]) -> tuple[list[RunId], RunId | None]:
        """The newest runs of a few orgs."""
        most = max(WINDOW // len(org_ids), self.limit)
        windows = [min(window, most) for window in WINDOWS]
        parts = [self._scan([_runs.c.org_id == org_id], windows) for org_id in org_ids]
        # Below the place where the first of them stopped, runs of that org can be missing.
        stopped = max((stop for _, stop in parts if stop is not None), default=None)
        found = sorted((id_ for ids, _ in parts for id_ in ids), reverse=True)
        return [id_ for id_ in found if stopped is None or id_ >= stopped][: self.limit], stopped

    def _of_many(self) -> tuple[list[RunId], RunId | None]:
        """The newest runs of many orgs, or of all."""
        query = self.query
        if query.states and query.states <= tables.UNFINISHED.keys():
            live = select(_live.c.id).where(_live.c.state.in_(_kept(query.states)))
            return self._among(live.where(*self._bounds(_live.c.id, self.after)))
        within = [] if self.span is None else [_runs.c.id.between(*self.span)]
        by_cause = query.cause is not None and isinstance(self.scope, AllOrgs)
        is_rare = bool(query.states) and query.states <= RARE
        if within or not (by_cause or is_rare):
            return self._scan(within, WINDOWS)
        found, stopped = self._scan(within, WINDOWS[:1])
        if stopped is None:
            return found, None
        if query.cause is not None and by_cause:
            return self._among(self._with_cause(query.cause))
        ended = select(_ends.c.run_id.label("id")).where(
            _ends.c.state.in_(query.states), *self._bounds(_ends.c.run_id, self.after)
        )
        if query.since is not None:
            ended = ended.where(_ends.c.finished_at >= query.since)
        return self._among(ended.order_by(_ends.c.finished_at.desc()).limit(ENDS))

    def _scan(self, within: Sequence[Condition], windows: Sequence[int]) -> tuple[list[RunId], RunId | None]:
        """The newest runs that match, and where the search stopped if it did not reach the end.

        The conditions `within` come with an index in the order of ids.
        """
        found: list[RunId] = []
        after = None if self.after is None else RunId(self.after)
        for window in windows:
            some = select(*_EXAMINED).where(*within, *self._bounds(_runs.c.id, after))
            part = some.order_by(_runs.c.id.desc()).limit(window).subquery("part")
            matching = select(part.c.id).where(*self._that_match(part.c))
            found += self._ids(matching.order_by(part.c.id.desc()).limit(self.limit - len(found)))
            if len(found) == self.limit:
                return found, None
            size, after = self._end_of(part)
            if size < window:
                return found, None
        return found, after

    def _among(self, source: Select[Any]) -> tuple[list[RunId], RunId | None]:
        """As `_scan`, among the runs whose ids `source` selects: the newest by id are examined."""
        some = source.subquery("some")
        part = select(some.c.id).distinct().order_by(some.c.id.desc()).limit(AMONG).subquery("part")
        # A limit keeps the planner from looking for the other conditions first.
        rows = select(*_EXAMINED).join(part, part.c.id == _runs.c.id)
        run = rows.order_by(_runs.c.id.desc()).limit(AMONG).subquery("run").c
        matching = select(run.id).where(*self._that_match(run))
        found = self._ids(matching.order_by(run.id.desc()).limit(self.limit))
        if len(found) == self.limit:
            return found, None
        size, last = self._end_of(part)
        return found, last if size == AMONG else None

    def _with_cause(self, text: str) -> Select[Any]:
        """The newest attempts of the causes that contain the text."""
        causes = [
            cause
            for cause in self.connection.execute(_ALL_CAUSES, {"limit": CAUSES}).scalars()
            if folded(text) in folded(cause)
        ][:FEW_CAUSES]
        parts = [
            select(_attempts.c.run_id.label("id"))
            .where(_attempts.c.error_cause == cause, *self._bounds(_attempts.c.run_id, self.after))
            .order_by(_attempts.c.ended_at.desc())
            .limit(max(WINDOW // len(causes), self.limit))
            .subquery()
            for cause in causes
        ]
        if not parts:
            return select(_attempts.c.run_id.label("id")).where(false())
        return select(union_all(*(select(part.c.id) for part in parts)).subquery("newest").c.id)

    def _end_of(self, part: FromClause) -> tuple[int, RunId | None]:
        """The number of runs that were examined, and the last of them."""
        size = self.connection.execute(select(func.count()).select_from(part)).scalar_one()
        last = select(part.c.id).order_by(part.c.id).limit(1)
        return size, self.connection.execute(last).scalar()

    def _that_match(self, run: Any) -> list[Condition]:
        """What the query and the page say of the columns of a run."""
        found = conditions(self.scope, self.query, run)
        if self.definition is not None:
            found += conditions(self.scope, self.definition, run)
        if self.span is not None:
            found.append(run.id.between(*self.span))
        if self.of_orgs is not None:
            found.append(run.org_id.in_(self.of_orgs))
        else:
            found += orgs_that_match(self.connection, self.scope, self.query, run.org_id)
        return found

    def _ids(self, statement: Select[Any]) -> list[RunId]:
        return [RunId(id_) for id_ in self.connection.execute(statement).scalars()]

    def _bounds(self, id_: ColumnElement[Any], after: str | None) -> list[Condition]:
        """Bounds of the ids, which sort by creation time."""
        bounds: list[Condition] = [] if after is None else [id_ < after]
        if self.query.since is not None:
            bounds.append(id_ >= lowest_id(self.query.since))
        if self.query.until is not None:
            bounds.append(id_ < highest_id(self.query.until))
        return bounds


def conditions(scope: OrgId | AllOrgs, query: Query, run: Any) -> list[Condition]:
    """What the keys of a query, but `org:`, say of the columns of a run."""
    found: list[Condition] = []
    if query.definition is not None:
        name = select(_named.c.name).where(_named.c.id == run.definition_id).limit(1)
        name = _in_scope(name, _named.c.org_id, scope)
        found.append(name.scalar_subquery() == query.definition)
    if query.handler is not None:
        found.append(run.handler == query.handler)
    if query.origin is not None:
        found.append(run.origin == query.origin)
    if query.since is not None:
        found.append(run.created_at >= query.since)
    if query.until is not None:
        found.append(run.created_at < query.until)
    if query.reason is not None:
        found.append(or_(run.reason == query.reason, _is_live(run, _unended.c.reason == query.reason)))
    if query.states:
        ended = run.state.in_(query.states & set(tables.FINAL_STATES))
        found.append(or_(ended, _is_live(run, _unended.c.state.in_(_kept(query.states)))))
    if query.cause is not None:
        cause = func.lower(_tried.c.error_cause).contains(query.cause.lower(), autoescape=True)
        found.append(_is_any(_tried.c.run_id == run.id, _tried.c.org_id == run.org_id, cause))
    return found


def _kept(states: Iterable[str]) -> list[str]:
    """The states of `live_runs` that these states of runs stand for."""
    return [kept for state in states for kept in tables.UNFINISHED.get(state, ())]


def _is_live(run: Any, condition: Condition) -> Condition:
    """The run is unfinished, and its row in `live_runs` meets the condition."""
    return and_(
        run.state.is_(None), _is_any(_unended.c.id == run.id, _unended.c.org_id == run.org_id, condition)
    )


def _is_any(*conditions: Condition) -> Condition:
    """As EXISTS; but looked up row by row, where PostgreSQL would rather read the whole other table."""
    return select(literal(1)).where(*conditions).limit(1).scalar_subquery().is_not(None)
