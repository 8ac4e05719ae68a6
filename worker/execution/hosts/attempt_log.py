"""What an attempt on a host tells: its progress, and its log, as long as a local one at most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Protocol

from worker.execution.hosts.wire import Fence, ShownProgress
from worker.execution.runners.output import CAP, LINE_COST, LINE_LIMIT
from worker.handlers.parts import Count, OneOf, Text, When, row_of
from worker.ids import RunId
from worker.runs.run import AdmittedRun
from worker.runs.worker_ends import LOST_LINE

# The number of the last line of a log, which is the worker's own. Those of hosts are lower, also than that of
# the line that says why an attempt was lost.
LAST_LINE = 2**31 - 1
LEVELS = ("debug", "info", "warning", "error", "critical")
SOURCES = ("log", "stdout", "stderr")

# Bytes of a log. The host has cut it to `CAP` already, beside a line that says so and that of an error.
MAX_BYTES = CAP + LINE_LIMIT
# Bytes that a worker counts by itself before it asks the database, where other workers append as well.
TRUSTED = 32 * 1024
TOO_MUCH = f"the host sent more than {CAP // 1024} KiB of log: the rest was dropped"


@dataclass(frozen=True, slots=True)
class ProgressRow(Fence):
    """The progress of one of a host's runs."""

    progress: Annotated[Mapping[str, Any], ShownProgress()]


@dataclass(frozen=True, slots=True)
class LineRow(Fence):
    """A line of the log of one of a host's runs; `at` is by the host's clock."""

    seq: Annotated[int, Count(LOST_LINE - 1)]
    at: Annotated[datetime, When()]
    level: Annotated[str, OneOf(LEVELS)]
    source: Annotated[str, OneOf(SOURCES)]
    text: Annotated[str, Text(LINE_LIMIT)]


PROGRESS = row_of(ProgressRow)
LINE = row_of(LineRow)


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
        if self.used + size > MAX_BYTES or self.unread + size > TRUSTED:
            # Lines that are sent again count once.
            lines, size, stored = await sizes.log_size(run.id, run.attempt, [row.seq for row in rows])
            self.used, self.unread = size + LINE_COST * lines, 0
            rows = [row for row in rows if row.seq not in stored]
        return list(self._fitting(rows, now))

    def _fitting(self, rows: Sequence[LineRow], now: datetime) -> Iterator[LineRow]:
        for row in rows:
            size = cost(row)
            if self.used + size > MAX_BYTES:
                self.is_full = True
                yield LineRow(*row.key, LAST_LINE, now, level="warning", source="log", text=TOO_MUCH)
                return
            self.used += size
            self.unread += size
            yield row


def cost(row: LineRow) -> int:
    """The bytes that a line counts for; a byte that was not UTF-8 has become a character of three."""
    return len(row.text.encode()) - 2 * row.text.count("\ufffd") + LINE_COST
