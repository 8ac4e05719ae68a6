"""The hot statements on SQLite: one writer at a time, so what was read still holds when it is written."""

from worker.store.sql.sqlite.admit import admit_choose, admit_ring
from worker.store.sql.sqlite.finish import (
    add_rollups,
    append_logs,
    finish,
    promote,
    save_checkpoint,
    write_progress,
)
from worker.store.sql.sqlite.fire import fire_first, fire_lock, fire_skips, fire_write
from worker.store.sql.sqlite.recover import recover_lock
from worker.store.sql.sqlite.renew import renew

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
