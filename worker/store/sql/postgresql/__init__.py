"""The hot statements on PostgreSQL: batches as arrays, and locks before counts."""

from worker.store.sql.postgresql.admit import admit_choose as admit_choose
from worker.store.sql.postgresql.admit import admit_crowd as admit_crowd
from worker.store.sql.postgresql.admit import admit_ring as admit_ring
from worker.store.sql.postgresql.children import put_children as put_children
from worker.store.sql.postgresql.finish import add_rollups as add_rollups
from worker.store.sql.postgresql.finish import append_logs as append_logs
from worker.store.sql.postgresql.finish import finish as finish
from worker.store.sql.postgresql.finish import promote as promote
from worker.store.sql.postgresql.finish import save_checkpoint as save_checkpoint
from worker.store.sql.postgresql.finish import write_progress as write_progress
from worker.store.sql.postgresql.fire import fire_first as fire_first
from worker.store.sql.postgresql.fire import fire_lock as fire_lock
from worker.store.sql.postgresql.fire import fire_skips as fire_skips
from worker.store.sql.postgresql.fire import fire_write as fire_write
from worker.store.sql.postgresql.leases import recover_lock as recover_lock
from worker.store.sql.postgresql.leases import renew as renew
from worker.store.sql.postgresql.leases import renew_as_json as renew_as_json
from worker.store.sql.postgresql.steps import open_wait as open_wait
from worker.store.sql.postgresql.steps import store_steps as store_steps
from worker.store.sql.postgresql.steps import wake_due as wake_due
