"""The log of an attempt on a host: as long as a local one at most, whichever workers the host sends it to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from worker.execution.hosts.wire_calls import LAST_LINE, LineRow
from worker.execution.runners.output import CAP, LINE_COST, LINE_LIMIT
from worker.ids import RunId
from worker.runs.run import AdmittedRun

# Bytes of a log. The host has cut it to `CAP` already, beside a line that says so and that of an error.
MOST = CAP + LINE_LIMIT
# Bytes that a worker counts by itself before it asks the database, where other workers append as well.
TRUSTED = 32 * 1024
TOO_MUCH = f"the host sent more than {CAP // 1024} KiB of log: the rest was dropped"


class LogSizes(Protocol):
    async def log_size(self, run_id: RunId, attempt: int, seqs: Sequence[int]) -> tuple[int, int, set[int]]:
        """The lines of an attempt's stored log, their bytes, and which of these are stored."""


@dataclass(slots=True)
class AttemptLog:
    """What this worker knows of one log: its bytes, and those that it has counted since it last asked."""

    used: int = 0
    unread: int = 0
    is_full: bool = False

    async def accept(
        self, run: AdmittedRun, rows: Sequence[LineRow], sizes: LogSizes, now: datetime
    ) -> list[LineRow]:
        """Those of the rows that fit; after the first that does not, a line that says so."""
        if self.is_full:
            return []
        size = sum(map(cost, rows))
        if self.used + size > MOST or self.unread + size > TRUSTED:
            # Lines that are sent again count once.
            lines, size, stored = await sizes.log_size(run.id, run.attempt, [row.seq for row in rows])
            self.used, self.unread = size + LINE_COST * lines, 0
            rows = [row for row in rows if row.seq not in stored]
        return list(self._fitting(rows, now))

    def _fitting(self, rows: Sequence[LineRow], now: datetime) -> Iterator[LineRow]:
        for row in rows:
            size = cost(row)
            if self.used + size > MOST:
                self.is_full = True
                key = row.run_id, row.fencing_token
                yield LineRow(*key, seq=LAST_LINE, at=now, level="warning", source="log", text=TOO_MUCH)
                return
            self.used += size
            self.unread += size
            yield row


def cost(row: LineRow) -> int:
    """The bytes that a line counts for; a byte that was not UTF-8 has become a character of three."""
    return len(row.text.encode()) - 2 * row.text.count("\ufffd") + LINE_COST
