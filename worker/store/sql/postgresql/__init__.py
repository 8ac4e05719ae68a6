"""The hot statements on PostgreSQL: whole batches as arrays, locks taken before anything is counted."""

from worker.store.sql.postgresql.admit import admit_choose, admit_ring
from worker.store.sql.postgresql.finish import add_rollups, finish, promote
from worker.store.sql.postgresql.fire import fire_first, fire_lock, fire_skips, fire_write
from worker.store.sql.postgresql.recover import recover_lock
from worker.store.sql.postgresql.renew import renew
from worker.store.sql.postgresql.save import append_logs, save_checkpoint, write_progress

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
