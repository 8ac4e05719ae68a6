"""Skips: the instants that never became a run, as few rows as tell the truth. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from worker.ids import DefinitionId
from worker.runs.firing import NewSkip


@dataclass(frozen=True, slots=True)
class StoredSkip:
    """A definition's last row of `skips`."""

    id: str
    skip: NewSkip


@dataclass(frozen=True, slots=True)
class SkipChanges:
    """What to write: rows that grow, with their new end and count, and new rows."""

    grown: Sequence[StoredSkip]
    new: Sequence[NewSkip]


def fold(
    skips: Iterable[NewSkip],
    last: Mapping[DefinitionId, StoredSkip],
    ran_before: Mapping[tuple[DefinitionId, datetime], datetime | None],
) -> SkipChanges:
    """Grow each definition's last row as far as it may, and begin new ones after that.

    A row grows while reason, revision and UTC day stay and no scheduled run lies
    between its end and what follows. `ran_before` names, for a definition and the
    start of a skip, the last scheduled instant before it that became a run.
    """
    open_rows: dict[DefinitionId, StoredSkip | NewSkip] = dict(last)
    grown: dict[DefinitionId, StoredSkip] = {}
    new: list[NewSkip] = []
    for skip in sorted(skips, key=lambda skip: (skip.definition_id, skip.skipped_from)):
        row = open_rows.get(skip.definition_id)
        so_far = row.skip if isinstance(row, StoredSkip) else row
        ran_at = ran_before.get((skip.definition_id, skip.skipped_from))
        if so_far is None or not _continues(so_far, skip, ran_at):
            open_rows[skip.definition_id] = skip
            new.append(skip)
            continue
        longer = replace(so_far, skipped_until=skip.skipped_until, count=so_far.count + skip.count)
        if isinstance(row, StoredSkip):
            open_rows[skip.definition_id] = grown[skip.definition_id] = StoredSkip(row.id, longer)
        else:
            open_rows[skip.definition_id] = longer
            new[new.index(so_far)] = longer
    return SkipChanges(list(grown.values()), new)


def _continues(row: NewSkip, skip: NewSkip, ran_at: datetime | None) -> bool:
    return (
        row.reason == skip.reason
        and row.revision == skip.revision
        and row.skipped_until < skip.skipped_from
        and row.skipped_from.astimezone(UTC).date() == skip.skipped_until.astimezone(UTC).date()
        and (ran_at is None or ran_at <= row.skipped_until)
    )
