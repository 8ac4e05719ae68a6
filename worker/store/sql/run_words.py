"""The words by which the search finds runs that failed, were refused or wait: of their errors and names.

They are written with the end of an attempt, as rows of `run_words`, and stay with the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from worker.ids import DefinitionId, OrgId, RunId
from worker.model.runs.outcome import EndedAttempt
from worker.model.search import pieces_of
from worker.store import redaction

# Words of one attempt, and the characters of a text that they are taken from.
MAX_WORDS = 40
MAX_TEXT = 600
# An attempt that was cut short by a drain or a dead worker says nothing about its run.
_SILENT = frozenset({"handed_back", "recovered"})


class RunWord(NamedTuple):
    """A word of a run by an attempt; `shown`: the org itself reads it, and so may search for it."""

    word: str
    run_id: RunId
    org_id: OrgId
    shown: bool
    attempt: int
    fencing_token: int


def telling(attempts: Iterable[EndedAttempt]) -> list[EndedAttempt]:
    """The attempts that ended their runs as failed or refused, or left them waiting with something to say."""
    return [
        attempt
        for attempt in attempts
        if attempt.state in ("failed", "refused")
        or (not attempt.final and attempt.reason not in _SILENT and (attempt.error or attempt.detail))
    ]


def words_of(attempts: Iterable[EndedAttempt], names: Mapping[DefinitionId, str]) -> list[RunWord]:
    """The words of errors, details and names, each once a run. `names` are those of the definitions."""
    found: dict[tuple[RunId, str], RunWord] = {}
    for attempt in attempts:
        reason = {"reason": attempt.reason}
        own = (names.get(attempt.definition_id), attempt.trail.handler)
        known = (*own, *_parts(attempt.error), attempt.detail)
        # As the org reads them: it must not find out by a search what it may not read.
        seen = redaction.error(attempt.error, reason, ""), redaction.detail(attempt.detail, reason, "")
        shown = _pieces((*own, *_parts(seen[0]), seen[1]))
        for word in (*shown, *_pieces(known)):
            key = attempt.run_id, attempt.org_id, word in shown, attempt.attempt, attempt.fencing_token
            found.setdefault((attempt.run_id, word), RunWord(word, *key))
    return [*found.values()]


def _parts(error: Mapping[str, str] | None) -> Sequence[str | None]:
    return (error.get("type"), error.get("message")) if error else ()


def _pieces(texts: Iterable[str | None]) -> Collection[str]:
    pieces = dict.fromkeys(piece for text in texts if text for piece in pieces_of(text[:MAX_TEXT]))
    return [*pieces][:MAX_WORDS]
