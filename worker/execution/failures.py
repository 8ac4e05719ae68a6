"""Failures: which definitions that pause after failures have had a run end, until somebody counts them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from worker.execution.holdings import Held
from worker.ids import DefinitionId, OrgId
from worker.runs.firing import Recovered
from worker.runs.outcome import EndedAttempt

Key = tuple[OrgId, DefinitionId]

# Ends that say whether a definition works; a cancelled or skipped run says nothing of it.
TELLING = frozenset({"succeeded", "failed", "refused"})
# Definitions that are known to have no failures; the set begins anew when it is full.
BOUND = 100_000


class FailureWatch:
    """Costs nothing where a definition does not ask for it, nor while its runs succeed."""

    def __init__(self) -> None:
        self._uncounted: set[Key] = set()
        self._sound: set[Key] = set()

    def ended(self, ended: EndedAttempt, held: Held | None) -> None:
        """Take note of an end that is written."""
        plan = None if held is None else held.plan
        if plan is None or plan.definition.pause_after_failures is None or ended.state not in TELLING:
            return
        if held is not None and held.run.origin == "backfill":
            return
        key = (ended.org_id, ended.definition_id)
        if ended.state == "succeeded" and key in self._sound:
            return
        self._uncounted.add(key)

    def recovered(self, recovered: Sequence[Recovered]) -> None:
        """Take note of runs that failed because their worker was lost too often."""
        self.put_back((run.org_id, run.definition_id) for run in recovered if run.state == "failed")

    def take(self) -> list[Key]:
        """Those to count now; they are forgotten here."""
        taken, self._uncounted = sorted(self._uncounted), set()
        return taken

    def put_back(self, keys: Iterable[Key]) -> None:
        """Remember some again that could not be counted."""
        self._uncounted.update(keys)

    def counted(self, key: Key, failures: int) -> None:
        """A definition has so many failures: none, then its successes need not be counted."""
        if failures:
            self._sound.discard(key)
            return
        if len(self._sound) >= BOUND:
            self._sound.clear()
        self._sound.add(key)

    def forget_sound(self) -> None:
        """Count each definition's next success again: another worker may have seen failures meanwhile."""
        self._sound.clear()
