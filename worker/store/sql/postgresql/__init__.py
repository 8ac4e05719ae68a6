"""The hot statements on PostgreSQL: batches as arrays, and locks before counts."""

from worker.store.sql.postgresql.admit import admit_choose, admit_ring
from worker.store.sql.postgresql.finish import (
    add_rollups,
    append_logs,
    finish,
    promote,
    save_checkpoint,
    write_progress,
)
from worker.store.sql.postgresql.fire import fire_first, fire_lock, fire_skips, fire_write
from worker.store.sql.postgresql.recover import recover_lock
from worker.store.sql.postgresql.renew import renew

__all__ = [
    "add_rollups",
    "admit_choose",
    "admit_ring",
    "append_logs",
    "finish",
    "fire_first",
    "fire_lock",
    "fire_skips",
    "fire_write",
    "promote",
    "recover_lock",
    "renew",
    "save_checkpoint",
    "write_progress",
]
