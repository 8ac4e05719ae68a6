"""The hot statements on SQLite: with one writer, what a transaction reads still holds when it writes."""

from worker.store.sql.sqlite.admit import admit_choose as admit_choose
from worker.store.sql.sqlite.admit import admit_crowd as admit_crowd
from worker.store.sql.sqlite.admit import admit_ring as admit_ring
from worker.store.sql.sqlite.children import put_children as put_children
from worker.store.sql.sqlite.finish import add_rollups as add_rollups
from worker.store.sql.sqlite.finish import append_logs as append_logs
from worker.store.sql.sqlite.finish import finish as finish
from worker.store.sql.sqlite.finish import promote as promote
from worker.store.sql.sqlite.finish import save_checkpoint as save_checkpoint
from worker.store.sql.sqlite.finish import write_progress as write_progress
from worker.store.sql.sqlite.fire import fire_first as fire_first
from worker.store.sql.sqlite.fire import fire_lock as fire_lock
from worker.store.sql.sqlite.fire import fire_skips as fire_skips
from worker.store.sql.sqlite.fire import fire_write as fire_write
from worker.store.sql.sqlite.leases import recover_lock as recover_lock
from worker.store.sql.sqlite.leases import renew as renew
from worker.store.sql.sqlite.leases import renew_as_json as renew_as_json
from worker.store.sql.sqlite.steps import open_wait as open_wait
from worker.store.sql.sqlite.steps import store_steps as store_steps
from worker.store.sql.sqlite.steps import wake_due as wake_due
