"""The tables of runs, and what all tables share.

`runs` holds identity and outcome. It is written twice, at fire and at finish: its `state` is null until the
run has ended and never changes after. `live_runs` holds the unfinished runs only, narrow and hot. The view
`run_view` joins both for screens; `run_ends` finds ended runs by state and time. Hot tables have no foreign
keys: one module writes them, and `doctor` checks that exactly the unfinished runs have a live row.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.schema import SchemaItem

from worker.model.definitions.pools import DEFAULT_POOL
from worker.store.dialect import Id, Instant, exact_json_type, json_type

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# Rows of these tables come and go all the time: vacuum by count, not by share of the table,
# and without pauses. Free room on each page lets an update stay on it.
HOT = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "5000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "20000",
}
UPDATED = HOT | {"fillfactor": "70"}


# Who reads a table through the web side: each org its own rows, or operators only. A role has no right that
# follows from neither.
Readers = Literal["orgs", "operators"]


def table(name: str, meaning: str, *parts: SchemaItem, readers: Readers, **options: Any) -> Table:
    """A table; `meaning` is for the reference."""
    return Table(name, metadata, *parts, info={"meaning": meaning, "readers": readers}, **options)


def required(name: str, type_: Any, doc: str | None = None, **options: Any) -> Column[Any]:
    """A column that is never null."""
    return Column(name, type_, nullable=False, doc=doc, **options)


def count(name: str, doc: str, default: str = "0", *, type_: Any = Integer) -> Column[Any]:
    """A number with a default."""
    return required(name, type_, doc, server_default=default)


def one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def partial(where: str) -> dict[str, Any]:
    """Options that make an index a partial one on both databases."""
    return {"postgresql_where": text(where), "sqlite_where": text(where)}


def unique(name: str, columns: tuple[str, ...], where: str) -> Index:
    """An index that allows each value of the columns once where the condition holds."""
    return Index(name, *columns, unique=True, **partial(where))


ORIGINS = ("schedule", "manual", "backfill", "retry", "child")
FINAL_STATES = ("succeeded", "failed", "cancelled", "refused", "skipped")
# A condition on runs that have ended, and few did so. Indexes have it, word for word.
RARE = "state <> 'succeeded'"
# A condition on waits: the handler has waited, and nothing has ended the wait.
OPEN = "answered_at IS NULL AND timed_out_at IS NULL"

runs = table(
    "runs",
    "Identity and outcome of each run: written when it is fired and when it ends.",
    Column("id", Id, primary_key=True),
    required("org_id", Id),
    required("definition_id", Id),
    required("revision", Integer),
    required("handler", Text, "The definition's; an attempt may use a variant."),
    required("origin", Text, "`schedule`, `manual`, `backfill`, `retry` or `child`."),
    required("scheduled_for", Instant, "The nominal time."),
    required("created_at", Instant),
    Column("created_by", Text),
    Column("request_key", Text, doc="Of a manual run: the same key makes one run only."),
    Column("backfill_id", Id, doc="The backfill that made it."),
    Column("retry_of", Id, doc="The run that it retries."),
    required("idempotency_key", Id, "The same for all attempts and retries."),
    Column("params", json_type(), doc="Of a manual run: the definition's and those given; else null."),
    Column("state", Text, doc="Null, then `succeeded`, `failed`, `cancelled`, `refused` or `skipped`."),
    Column("reason", Text, doc="Why, from a fixed set."),
    Column("detail", Text, doc="Why, in detail."),
    Column("available_at", Instant, doc="The earliest start of its last attempt."),
    Column("started_at", Instant, doc="When its last attempt was admitted."),
    Column("finished_at", Instant, doc="When it ended."),
    Column("attempt", Integer, doc="The number of attempts."),
    Column("result_fencing_token", BigInteger, doc="The fencing token of its outcome."),
    Column("worker_id", Id, doc="The worker that ended it."),
    Column("progress", json_type(), doc="The handler's last report: `done`, `total`, `note`."),
    Column("result", json_type(), doc="What the handler returned."),
    Column("error", json_type(), doc="`type` and `message` of the last error."),
    required("pool", Text, "Where it may execute.", server_default=DEFAULT_POOL),
    CheckConstraint(one_of("origin", ORIGINS), name="origin"),
    CheckConstraint(f"state IS NULL OR {one_of('state', FINAL_STATES)}", name="state"),
    CheckConstraint("(state IS NULL) = (finished_at IS NULL)", name="finished"),
    unique("uq_runs_definition_id_scheduled_for", ("definition_id", "scheduled_for"), "origin = 'schedule'"),
    unique("uq_runs_backfill_id_scheduled_for", ("backfill_id", "scheduled_for"), "backfill_id IS NOT NULL"),
    unique("uq_runs_definition_id_request_key", ("definition_id", "request_key"), "request_key IS NOT NULL"),
    Index("ix_runs_org_id_id", "org_id", "id"),
    Index("ix_runs_definition_id_id", "definition_id", "id"),
    Index("ix_runs_retry_of", "retry_of", **partial("retry_of IS NOT NULL")),
    # Pages of all runs pass over large trees. It grows at its end only; one by org would cost more.
    Index("ix_runs_listed_id", "id", **partial("origin <> 'child'")),
    # On PostgreSQL no index contains the outcome of a run: its update then stays on its page.
    Index("ix_runs_state_finished_at", "state", "finished_at", sqlite_where=text("state IS NOT NULL")).ddl_if(
        dialect="sqlite"
    ),
    Index("ix_runs_rare_state_id", "state", "id", sqlite_where=text(RARE)).ddl_if(dialect="sqlite"),
    # The end of a run makes its row larger by half, and both versions fit on the page.
    postgresql_with={"fillfactor": "40"},
    readers="orgs",
)

run_ends = table(
    "run_ends",
    "The ended runs without children, by state and time. Triggers maintain it; on SQLite it is a view.",
    Column("state", Text, primary_key=True, doc="As in `runs`."),
    Column("finished_at", Instant, primary_key=True, doc="As in `runs`."),
    Column("run_id", Id, primary_key=True),
    required("org_id", Id),
    required("definition_id", Id),
    Index("ix_run_ends_rare_state_run_id", "state", "run_id", postgresql_where=text(RARE)).ddl_if(
        dialect="postgresql"
    ),
    readers="orgs",
)

LIVE_STATES = ("waiting", "running", "held", "parked")
# The states of an unfinished run for people, and those of `live_runs` that they stand for.
UNFINISHED = {"waiting": ("waiting", "held", "parked"), "running": ("running",)}
# Those of them that no process belongs to.
UNSTARTED = UNFINISHED["waiting"]
WAITING_REASONS = (
    *("due", "held", "retry", "snoozed", "handed_back", "recovered", "no_token", "no_handler", "no_pool"),
    *("not_approved", "unplaced", "asleep", "answer", "budget", "children", "batch", "window", "resumed"),
)
# When a parked run goes on that waits without a deadline.
NEVER = datetime(9999, 12, 31, tzinfo=UTC)

# Running rows are counted by org and by definition. On PostgreSQL also by worker, and along the workers by
# handler; on SQLite all belong to the one worker. The conditions mean the same, as the constraints ensure.
# They differ so that PostgreSQL's planner, whose statistics of this table are always old, cannot mistake
# one index for another. On PostgreSQL an admission writes an entry to each index, so there are few. On
# SQLite it writes to the changed ones only, so an index that no admission changes is separate.
ON_POSTGRESQL = (
    Index(
        "ix_live_runs_running_worker_id_handler",
        "worker_id",
        "handler",
        postgresql_where=text("worker_id IS NOT NULL"),
    ),
    Index("ix_live_runs_definition_id_started_at", "definition_id", "started_at"),
)
ON_SQLITE = (
    Index("ix_live_runs_definition_id", "definition_id"),
    Index("ix_live_runs_running_definition_id", "definition_id", sqlite_where=text("started_at IS NOT NULL")),
)

live_runs = table(
    "live_runs",
    "The unfinished runs only: what admission and running need, narrow and hot.",
    Column("id", Id, primary_key=True),
    required("org_id", Id),
    required("definition_id", Id),
    required("revision", Integer),
    required("handler", Text, "The definition's."),
    Column(
        "variant_handlers", json_type(), doc="All handlers that an attempt may use, if there are variants."
    ),
    required("isolation", Text, "`child` or `inline`."),
    required("origin", Text, "As in `runs`."),
    required("scheduled_for", Instant, "As in `runs`."),
    required("idempotency_key", Id, "As in `runs`."),
    Column("params", json_type(), doc="As in `runs`."),
    Column("backfill_id", Id, doc="As in `runs`."),
    Column("max_concurrent", Integer, doc="The definition's."),
    count("priority", "The definition's."),
    required(
        "serial", Boolean, "Whether its definition has at most one such unfinished run, and a held one."
    ),
    required("state", Text, "`waiting`, `held`, `parked` or `running`."),
    Column("reason", Text, doc="What it waits for; null while it runs."),
    Column("detail", Text, doc="What it waits for, in detail."),
    required("available_at", Instant, "Its earliest start; of a parked run the first deadline of its waits."),
    Column("start_by", Instant, doc="If its handler has not started by then, it is skipped (`expired`)."),
    count("attempt", "The number of the current or last attempt."),
    count("failures", "Attempts that count against `max_attempts`."),
    count("recoveries", "Attempts that count against `max_recoveries`."),
    count("fencing_token", "Grows with each admission; every write compares it.", type_=BigInteger),
    Column("worker_id", Id, doc="The worker that owns it, while it runs."),
    Column(
        "started_at",
        Instant,
        doc="When it was admitted; kept while it is parked if it counts against limits (`parked_counts`).",
    ),
    Column("progress", json_type(), doc="As in `runs`."),
    Column("cancel_requested_at", Instant, doc="When its cancellation was requested."),
    Column("cancel_reason", Text, doc="Why: `requested`, `replaced`, `closed` or `parent`."),
    required("pool", Text, "As in `runs`.", server_default=DEFAULT_POOL),
    Column("parent_id", Id, doc="Of a child: the run that started it."),
    Column("place", Integer, doc="Of a child: as in `children`."),
    CheckConstraint(one_of("state", LIVE_STATES), name="state"),
    CheckConstraint(one_of("isolation", ("child", "inline")), name="isolation"),
    CheckConstraint("(state = 'running') = (worker_id IS NOT NULL)", name="owner"),
    CheckConstraint("state = 'parked' OR (state = 'running') = (started_at IS NOT NULL)", name="started"),
    CheckConstraint("(state = 'running') = (reason IS NULL)", name="reason"),
    Index(
        "ix_live_runs_waiting",
        "org_id",
        text("priority DESC"),
        "available_at",
        "id",
        **partial("state = 'waiting'"),
    ),
    Index("ix_live_runs_running_org_id", "org_id", **partial("state = 'running'")),
    *(index.ddl_if(dialect="postgresql") for index in ON_POSTGRESQL),
    *(index.ddl_if(dialect="sqlite") for index in ON_SQLITE),
    Index("ix_live_runs_start_by", "start_by", **partial("state = 'waiting' AND start_by IS NOT NULL")),
    Index("ix_live_runs_backfill_id", "backfill_id", **partial("backfill_id IS NOT NULL")),
    unique("uq_live_runs_serial", ("definition_id",), "serial AND state IN ('waiting', 'running', 'parked')"),
    Index("ix_live_runs_parked_available_at", "available_at", **partial("state = 'parked'")),
    Index("ix_live_runs_parked_handler", "handler", **partial("state = 'parked' AND started_at IS NOT NULL")),
    unique("uq_live_runs_held", ("definition_id",), "state = 'held'"),
    # The first unfinished child of a run says whether it waits on.
    Index("ix_live_runs_parent_id_place", "parent_id", "place", **partial("parent_id IS NOT NULL")),
    Index("ix_live_runs_parked_children", "id", **partial("state = 'parked' AND reason = 'children'")),
    postgresql_with=HOT,
    readers="orgs",
)


ATTEMPT_OUTCOMES = (
    "succeeded",
    "failed",
    "retry",
    "snoozed",
    "cancelled",
    "timed_out",
    "lost",
    "handed_back",
    "refused",
    "no_token",
    "gated",
    "parked",
)

attempts = table(
    "attempts",
    "One row per attempt, written when it ends.",
    Column("run_id", Id, primary_key=True),
    Column("attempt", Integer, primary_key=True, doc="1 for the first, then counting up."),
    required("org_id", Id),
    required("worker_id", Id, "The worker that ran it."),
    required("fencing_token", BigInteger, "The fencing token that it ran under."),
    required("handler", Text, "The handler that ran."),
    required("started_at", Instant, "When it was admitted."),
    Column("token_ready_at", Instant, doc="When it had its token."),
    Column("handler_started_at", Instant, doc="When its handler was called."),
    required("ended_at", Instant, "When it ended."),
    required("outcome", Text, "How it ended: see the states of a run."),
    Column("error", json_type(), doc="`type` and `message`."),
    Column(
        "error_cause", Text, doc="The error without numbers, ids and quoted texts: equal for equal causes."
    ),
    Column(
        "claims",
        json_type(),
        doc="The redacted claims of its token, with a keyed digest per property and flag.",
    ),
    Column("flags", json_type(), doc="The value of each feature flag in its token."),
    Column("jti", Text, doc="The token's id."),
    Column("claims_hash", Text, doc="Keyed; equal for equal claims."),
    Column("peak_memory", BigInteger, doc="The largest memory use of one of its processes, in bytes."),
    CheckConstraint(one_of("outcome", ATTEMPT_OUTCOMES), name="outcome"),
    Index(
        "ix_attempts_error_cause_ended_at", "error_cause", "ended_at", **partial("error_cause IS NOT NULL")
    ),
    Index("ix_attempts_error_cause_run_id", "error_cause", "run_id", **partial("error_cause IS NOT NULL")),
    readers="orgs",
)

WAIT_KINDS = ("sleep", "answer", "budget", "children", "batch")

waits = table(
    "waits",
    "What runs wait for: sleeps, children, batches, and answers of people, with those answers.",
    Column("run_id", Id, primary_key=True),
    Column(
        "name", Text, primary_key=True, doc="As the handler calls it; `sleep` for a sleep without a name."
    ),
    Column("occurrence", Integer, primary_key=True, doc="1 for the first wait of that name in the run."),
    required("org_id", Id),
    required("kind", Text, "`sleep`, `answer`, `budget`, `children` or `batch`."),
    Column("ask", json_type(), doc="What the handler asks, for people."),
    Column("opened_at", Instant, doc="When the handler first waited; null if the answer came earlier."),
    Column("until", Instant, doc="Its deadline; null without one."),
    Column("pending_attempt", Integer, doc="The last attempt that waited for it; null once it is over."),
    Column("answered_at", Instant, doc="When it was answered."),
    Column("answered_by", Text, doc="The person or program that answered."),
    Column("answer", json_type(), doc="The answer's data."),
    Column("timed_out_at", Instant, doc="When the handler learned that the deadline had passed."),
    Column("options", json_type(), doc="The list of the only answers that it takes; null for any."),
    Column("refused", json_type(), doc="With `answer`: one that was kept before, and is not an option."),
    Column(
        "children",
        json_type(),
        doc="Which children: `spans` has the first and last place of each row of them; with `any` the next "
        "one that ends.",
    ),
    CheckConstraint(one_of("kind", WAIT_KINDS), name="kind"),
    CheckConstraint("answered_at IS NULL OR timed_out_at IS NULL", name="over"),
    Index("ix_waits_open_org_id", "org_id", "run_id", **partial(OPEN)),
    readers="orgs",
)

parents = table(
    "parents",
    "The runs that started others, and what those may have at most.",
    Column("run_id", Id, primary_key=True),
    required("org_id", Id),
    required("root_id", Id, "The run at the top of its tree; itself, if no run started it."),
    required("depth", Integer, "Levels below that run."),
    required("cap", json_type(), "What its handler declares: `scopes`, `secrets`, `egress`, `audiences`."),
    required("keep", Boolean, "Whether its children go on if it fails."),
    count("started", "The children that it started."),
    count("seen", "Those of them that `ctx.as_ended` gave."),
    count("tree", "Of the run at the top: the runs below it."),
    Column(
        "windows",
        json_type(),
        doc="By `ctx.map_runs`: its `concurrency`; negative once its runs are not held in order.",
    ),
    postgresql_with=UPDATED,
    readers="orgs",
)

children = table(
    "children",
    "Which run started which: one child for each handler, key and occurrence of a run.",
    Column("parent_id", Id, primary_key=True, doc="The run that started it, or took it up as a retry."),
    Column("place", Integer, primary_key=True, doc="Its place among the children of that run, from 1."),
    required("run_id", Id, "The child."),
    required("org_id", Id),
    required("root_id", Id, "As in `parents`."),
    required("depth", Integer, "Levels below the run at the top, from 1."),
    required("handler", Text, "The name passed to `ctx.start`."),
    required("key", Text, "The key passed with it; empty without one."),
    required("occurrence", Integer, "Which use of that handler and key it is, from 1."),
    Column("seen", Integer, doc="Its place among those that `ctx.as_ended` gave."),
    Column("map", Integer, doc="The number of its `ctx.map_runs`, from 1."),
    UniqueConstraint("parent_id", "handler", "key", "occurrence"),
    Index("ix_children_run_id", "run_id"),
    Index("ix_children_root_id_depth", "root_id", "depth"),
    readers="orgs",
)

checkpoints = table(
    "checkpoints",
    "The last checkpoint of an unfinished or retried run.",
    Column("run_id", Id, primary_key=True),
    required("org_id", Id),
    required("attempt", Integer, "The attempt that saved it."),
    required("fencing_token", BigInteger, "The fencing token that it was saved under."),
    required("saved_at", Instant, "When it was saved."),
    required("data", json_type(), "The data passed to `ctx.save`."),
    Column("handler", Text, doc="The handler that saved first: the run keeps it."),
    count("number", "Which save of the attempt it is, from 1; 0 if unknown."),
    readers="orgs",
)

steps = table(
    "steps",
    "The stored results of the steps of each run.",
    Column("run_id", Id, primary_key=True),
    Column("seq", Integer, primary_key=True, doc="Its place among the stored steps of the run, from 1."),
    required("org_id", Id),
    required("name", Text, "The name passed to `ctx.step` or `ctx.map`."),
    Column("key", Text, doc="The key passed with it; of an item without a key, a digest of the item."),
    required("occurrence", Integer, "Which use of that name and key it is, from 1."),
    required("attempt", Integer, "The attempt that called the function."),
    required(
        "fencing_token", BigInteger, "The fencing token that it was stored under; 0: a retry copied it."
    ),
    required("handler", Text, "The handler of that attempt; the run keeps the first one."),
    required("started_at", Instant, "When the function was called."),
    required("ended_at", Instant, "When it returned."),
    required("size", Integer, "Bytes of the result."),
    required("result", exact_json_type(), "What the function returned, as JSON."),
    readers="orgs",
)

run_logs = table(
    "run_logs",
    "The lines of the runs' logs.",
    Column("run_id", Id, primary_key=True),
    Column("attempt", Integer, primary_key=True, doc="The attempt that wrote it."),
    Column("seq", Integer, primary_key=True, doc="Its number in the attempt's log."),
    required("org_id", Id),
    required("at", Instant, "When it was written."),
    required("level", Text, "`debug` to `critical`."),
    required("source", Text, "`log`, `stdout` or `stderr`; `worker` for a line of the worker itself."),
    required("text", Text, "Without the secrets that the worker knows."),
    Index("ix_run_logs_at", "at"),
    readers="orgs",
)

run_words = table(
    "run_words",
    "The words of the errors and names of runs that failed, were refused or wait, for the search.",
    Column(
        "word",
        Text().with_variant(Text(collation="C"), "postgresql"),
        primary_key=True,
        doc="Letters and digits without case and accents.",
    ),
    Column("run_id", Id, primary_key=True),
    required("org_id", Id),
    required("shown", Boolean, "Whether the org itself finds the run by it."),
    Index("ix_run_words_org_id_word_run_id", "org_id", "word", "run_id"),
    Index("ix_run_words_run_id", "run_id"),
    readers="orgs",
)

run_egress = table(
    "run_egress",
    "What each run sent, by origin, without paths and bodies.",
    Column("run_id", Id, primary_key=True),
    Column(
        "origin",
        Text,
        primary_key=True,
        doc="As in `https://api.example.com`; `others` for those beyond 100 of a run.",
    ),
    required("org_id", Id),
    required("attempt", Integer, "The last attempt that is counted in it."),
    count("requests", "Requests that were sent.", type_=BigInteger),
    count("bytes_out", "Bytes that were sent.", type_=BigInteger),
    count("bytes_in", "Bytes that were received.", type_=BigInteger),
    count("denied", "Requests that were not sent, since the run may not reach the origin.", type_=BigInteger),
    required("statuses", json_type(), "The number of responses by status; `others` beyond 20 statuses."),
    required("waited_seconds", Float, "How long its requests waited for a limit."),
    readers="orgs",
)

skips = table(
    "skips",
    "Consecutive scheduled times that never became a run.",
    Column("id", Id, primary_key=True),
    required("org_id", Id),
    required("definition_id", Id),
    required("revision", Integer),
    required("skipped_from", Instant, "The first scheduled time."),
    required("skipped_until", Instant, "The last scheduled time."),
    required("count", Integer, "The number of scheduled times."),
    required("reason", Text, "`missed`, `overlap` or `calendar`."),
    CheckConstraint(one_of("reason", ("missed", "overlap", "calendar")), name="reason"),
    CheckConstraint("count >= 1", name="count"),
    UniqueConstraint("definition_id", "skipped_from"),
    Index("ix_skips_org_id_id", "org_id", "id"),
    Index("ix_skips_skipped_until", "skipped_until"),
    readers="orgs",
)
