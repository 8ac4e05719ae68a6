"""How long history is kept: `[retention]` as the loop that deletes it needs it."""

from __future__ import annotations

from worker.execution.retention import Ages
from worker.settings.sections import RetentionSettings


def ages_of(settings: RetentionSettings) -> Ages:
    """How long each thing is kept, as `[retention]` says."""
    failed = settings.failed
    runs = {
        "succeeded": settings.succeeded,
        "failed": failed,
        "refused": failed,
        "cancelled": failed,
        "skipped": settings.skipped,
    }
    return Ages(runs=runs, skips=settings.skipped, logs=settings.logs)
