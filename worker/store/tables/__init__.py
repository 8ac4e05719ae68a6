"""The tables, with named constraints; a column's meaning is its `doc`, which the reference shows.

Here are the tables of orgs, definitions, workers, audit and alerts; `tables/runs.py` has those of runs,
`tables/budgets.py` those of budgets and spends, `tables/prices.py` those of what models cost,
`tables/limits.py` those of limits at other services, `tables/starts.py` those of starts by a product,
`tables/batches.py` those of batches of model requests,
`tables/access.py` those of credentials and logins.
The migrations also make views, triggers and functions: `tests/migrations/ddl.py` shows their current form.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DefaultClause,
    ForeignKey,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    false,
)

from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.access import OPERATOR_ROLES as OPERATOR_ROLES
from worker.store.tables.access import access_tokens as access_tokens
from worker.store.tables.access import applications as applications
from worker.store.tables.access import credentials as credentials
from worker.store.tables.access import login_transactions as login_transactions
from worker.store.tables.access import operators as operators
from worker.store.tables.access import org_secrets as org_secrets
from worker.store.tables.access import plans as plans
from worker.store.tables.access import sessions as sessions
from worker.store.tables.batches import OPEN_BATCH as OPEN_BATCH
from worker.store.tables.batches import OPEN_ITEM as OPEN_ITEM
from worker.store.tables.batches import batch_items as batch_items
from worker.store.tables.batches import batch_leases as batch_leases
from worker.store.tables.batches import batches as batches
from worker.store.tables.budgets import budget_raises as budget_raises
from worker.store.tables.budgets import budgets as budgets
from worker.store.tables.budgets import meter_days as meter_days
from worker.store.tables.budgets import meters as meters
from worker.store.tables.budgets import org_properties as org_properties
from worker.store.tables.budgets import spends as spends
from worker.store.tables.budgets import tree_spends as tree_spends
from worker.store.tables.limits import limit_shares as limit_shares
from worker.store.tables.limits import limits as limits
from worker.store.tables.limits import origin_pauses as origin_pauses
from worker.store.tables.prices import model_days as model_days
from worker.store.tables.prices import model_spends as model_spends
from worker.store.tables.prices import price_lists as price_lists
from worker.store.tables.rollouts import ROLLOUT_SIDES as ROLLOUT_SIDES
from worker.store.tables.rollouts import rollout_days as rollout_days
from worker.store.tables.rollouts import rollout_orgs as rollout_orgs
from worker.store.tables.rollouts import rollouts as rollouts
from worker.store.tables.rollouts import run_versions as run_versions
from worker.store.tables.runs import ATTEMPT_OUTCOMES as ATTEMPT_OUTCOMES
from worker.store.tables.runs import FINAL_STATES as FINAL_STATES
from worker.store.tables.runs import HOT, UPDATED, count, one_of, partial, required, table
from worker.store.tables.runs import NEVER as NEVER
from worker.store.tables.runs import OPEN as OPEN
from worker.store.tables.runs import UNFINISHED as UNFINISHED
from worker.store.tables.runs import UNSTARTED as UNSTARTED
from worker.store.tables.runs import WAITING_REASONS as WAITING_REASONS
from worker.store.tables.runs import attempts as attempts
from worker.store.tables.runs import checkpoints as checkpoints
from worker.store.tables.runs import children as children
from worker.store.tables.runs import live_runs as live_runs
from worker.store.tables.runs import metadata as metadata
from worker.store.tables.runs import parents as parents
from worker.store.tables.runs import run_egress as run_egress
from worker.store.tables.runs import run_ends as run_ends
from worker.store.tables.runs import run_logs as run_logs
from worker.store.tables.runs import run_words as run_words
from worker.store.tables.runs import runs as runs
from worker.store.tables.runs import skips as skips
from worker.store.tables.runs import steps as steps
from worker.store.tables.runs import waits as waits
from worker.store.tables.starts import START_STATES as START_STATES
from worker.store.tables.starts import product_logins as product_logins
from worker.store.tables.starts import starts as starts

ORG_STATES = ("active", "paused", "suspended", "removed")

orgs = table(
    "orgs",
    "The customer organisations.",
    Column("id", Id, primary_key=True),
    required("code", Text, "The `org_code` of its tokens.", unique=True),
    required("name", Text, "For people."),
    required("issuer", Text, "A table `[issuers.NAME]` of worker.toml."),
    required("state", Text, "`active`, `paused`, `suspended` or `removed`.", server_default="active"),
    Column("state_by", Text, doc="Who set the state."),
    Column("state_at", Instant, doc="When."),
    Column("state_note", Text, doc="Why, in their words."),
    count("max_concurrent_runs", "Its limit of concurrent runs, over all workers.", "10"),
    count("weight", "Its share of the slots, relative to other orgs.", "1"),
    required("tags", json_type(), "What templates select by."),
    Column("timezone", Text, doc="Of its definitions that do not name one; default UTC."),
    count("templates_seen", "The newest template change applied to it; 0: apply all.", type_=BigInteger),
    required("created_at", Instant),
    required("updated_at", Instant),
    Column("pool", Text, doc="Of its runs whose definition and handler do not name one."),
    Index("ix_orgs_templates_seen", "templates_seen", "id"),
    CheckConstraint(one_of("state", ORG_STATES), name="state"),
    CheckConstraint("max_concurrent_runs >= 1", name="max_concurrent_runs"),
    CheckConstraint("weight >= 1", name="weight"),
    readers="orgs",
)

org_words = table(
    "org_words",
    "The words of the orgs' names and codes, for the search by their beginnings.",
    Column(
        "word",
        Text().with_variant(Text(collation="C"), "postgresql"),
        primary_key=True,
        doc="Without case and accents.",
    ),
    Column("org_id", Id, ForeignKey("orgs.id"), primary_key=True),
    Index("ix_org_words_org_id_word", "org_id", "word"),
    readers="orgs",
)

templates = table(
    "templates",
    "One definition for many orgs.",
    Column("id", Id, primary_key=True),
    required("name", Text, "Also the name of the definitions that it makes.", unique=True),
    required("revision", Integer),
    required("selector", json_type(), "The orgs that it applies to."),
    required("spec", json_type(), "The keys of the definition."),
    required("change", BigInteger, "Its number among the changes of all templates."),
    count("orgs_total", "The number of orgs to apply its last change to."),
    count("orgs_done", "The number of those already done."),
    Column("materialised_at", Instant, doc="When all were done."),
    required("created_at", Instant),
    required("updated_at", Instant),
    required("updated_by", Text),
    Column("closed_at", Instant, doc="When it was closed: it makes no more definitions."),
    readers="orgs",
)

calendars = table(
    "calendars",
    "Dates on which nothing runs; the definitions that name one have its dates.",
    Column("id", Id, primary_key=True),
    required("name", Text, "What definitions and templates name as their `calendar`.", unique=True),
    required("dates", json_type(), "The dates, sorted."),
    required("days", Integer, "The number of its dates."),
    Column("first_date", Date, doc="The first of its dates."),
    Column("last_date", Date, doc="The last of its dates."),
    required("created_at", Instant),
    required("updated_at", Instant, "When its dates were changed."),
    required("updated_by", Text, "Who changed them."),
    readers="operators",
)

definitions = table(
    "definitions",
    "What an org asked for. Its keys are in `definition_revisions`.",
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    required("name", Text, "Unique within the org."),
    required("revision", Integer, "The revision in force."),
    required("enabled", Boolean, "While false, nothing is due."),
    Column("paused_at", Instant, doc="Nothing is due from then on, until it is resumed."),
    Column("paused_by", Text, doc="Who paused it."),
    Column("pause_note", Text, doc="Why, in their words."),
    count("consecutive_failures", "Runs in a row that failed or were refused."),
    Column("template_id", Id, ForeignKey("templates.id"), doc="The template that made it."),
    Column("template_revision", Integer, doc="The revision of the template."),
    required("created_at", Instant),
    required("updated_at", Instant),
    Column("closed_at", Instant, doc="When it was closed: nothing runs any more. Rows are never deleted."),
    Column("calendar", Text, doc="The calendar that its revision in force names."),
    UniqueConstraint("org_id", "name"),
    Index("ix_definitions_template_id", "template_id", **partial("template_id IS NOT NULL")),
    Index("ix_definitions_name_id", "name", "id"),
    Index("ix_definitions_calendar", "calendar", **partial("calendar IS NOT NULL")),
    Index("ix_definitions_paused_id", "id", **partial("paused_at IS NOT NULL AND closed_at IS NULL")),
    readers="orgs",
)

definition_states = table(
    "definition_states",
    "What definitions remember between their runs: handlers with `@job(state=True)`.",
    Column("definition_id", Id, primary_key=True),
    required("org_id", Id),
    required("data", json_type(), "The JSON object that its handler gets as `ctx.state`."),
    required("version", Integer, "Counts its changes, from 1."),
    required("updated_at", Instant, "When it was changed."),
    required("updated_by", Text, "Who changed it; `worker` for a run."),
    Column("run_id", Id, doc="The run whose success changed it; null for a change by hand."),
    Index("ix_definition_states_org_id", "org_id"),
    postgresql_with=UPDATED,
    readers="orgs",
)

failing_definitions = table(
    "failing_definitions",
    "Definitions that may be broken. Triggers add one when a run fails; a chore of the "
    "worker removes those that work again.",
    Column("definition_id", Id, primary_key=True),
    required("org_id", Id),
    required("run_id", Id, "The run that failed or was refused last."),
    Index("ix_failing_definitions_org_id", "org_id"),
    readers="orgs",
)

deadlines = table(
    "deadlines",
    "Scheduled times that must be done by a time and are not known to be; a worker takes those that pass.",
    Column("definition_id", Id, primary_key=True),
    Column("deadline_at", Instant, primary_key=True, doc="The earlier of `done_by` and `done_within`."),
    required("org_id", Id),
    required("scheduled_for", Instant, "The last scheduled time with this deadline."),
    Index("ix_deadlines_deadline_at", "deadline_at"),
    Index("ix_deadlines_org_id", "org_id"),
    postgresql_with=HOT,
    readers="orgs",
)

late_definitions = table(
    "late_definitions",
    "The late definitions: a deadline passed, and no run for that scheduled time or a later one succeeded.",
    Column("definition_id", Id, primary_key=True),
    required("org_id", Id),
    required(
        "scheduled_for", Instant, "The last scheduled time whose deadline passed: it ends with that one."
    ),
    required("late_at", Instant, "The first deadline that passed."),
    Index("ix_late_definitions_org_id", "org_id"),
    readers="orgs",
)

definition_revisions = table(
    "definition_revisions",
    "Each change of a definition.",
    Column("definition_id", Id, ForeignKey("definitions.id"), primary_key=True),
    Column("revision", Integer, primary_key=True),
    required("spec", json_type(), "The keys of the definition, as `apply` reads them."),
    required("at", Instant, "When it was changed."),
    required("by", Text, "Who changed it."),
    readers="orgs",
)

schedule = table(
    "schedule",
    "The next scheduled time of each active definition.",
    Column("definition_id", Id, primary_key=True),
    required("org_id", Id),
    Column("next_scheduled_for", Instant, doc="The nominal time; null when nothing is due any more."),
    Column("next_fire_at", Instant, doc="The same plus spread: when it is fired."),
    Index("ix_schedule_next_fire_at", "next_fire_at", **partial("next_fire_at IS NOT NULL")),
    postgresql_with=UPDATED,
    readers="orgs",
)

backfills = table(
    "backfills",
    "Ranges of past scheduled times that run again.",
    Column("id", Id, primary_key=True),
    Column("org_id", Id, ForeignKey("orgs.id"), nullable=False),
    Column("definition_id", Id, ForeignKey("definitions.id"), nullable=False),
    required("revision", Integer),
    required("range_from", Instant, "The start of the range, inclusive."),
    required("range_until", Instant, "The end of the range, exclusive."),
    Column("next_scheduled_for", Instant, doc="The first scheduled time without a run, or null."),
    count("max_concurrent", "The limit of its unfinished runs.", "1"),
    required("instants", BigInteger, "The number of scheduled times in the range."),
    count("made", "The number of those that have a run.", type_=BigInteger),
    required("created_at", Instant),
    required("created_by", Text),
    Column("cancelled_at", Instant, doc="When it was cancelled."),
    Column("finished_at", Instant, doc="When all its runs had ended."),
    UniqueConstraint("definition_id", "range_from", "range_until"),
    Index("ix_backfills_unfinished", "id", **partial("finished_at IS NULL")),
    readers="orgs",
)


workers = table(
    "workers",
    "One row for each start of a worker or host. Its lease is its right to the runs that it owns.",
    Column("id", Id, primary_key=True),
    required("host", Text, "The machine."),
    required("pid", Integer, "The process."),
    required("version", Text, "The version of orgworker."),
    required("started_at", Instant, "When it started."),
    required("renewed_at", Instant, "When its lease was last renewed."),
    required("lease_until", Instant, "The end of its lease, until which it owns its runs."),
    Column("ended_at", Instant, doc="When it stopped, or when a worker found its lease expired."),
    required("handlers", json_type(), "The handlers that it offers."),
    required("capacity", json_type(), "Its slots: `children`, `inline`."),
    required("pools", json_type(), "The pools that it serves.", server_default='["default"]'),
    Column("host_id", Id, doc="The host of which this is an incarnation; null for a worker."),
    Column(
        "offers",
        json_type(),
        doc="What this incarnation of a host declares of each handler; null for a worker.",
    ),
    Column(
        "outcome",
        Text,
        doc="How it ended: `stopped` (it said so), `crashed` (lease expired) or `removed` (with its host); "
        "null while it lives, and if the previous release wrote its end.",
    ),
    count("recovered_runs", "Its runs that others took over after its end."),
    Column("recovered_by", Id, doc="The worker that found its lease expired, or took over its first run."),
    Index("ix_workers_crashed", "ended_at", **partial("outcome = 'crashed'")),
    Index("ix_workers_lease_until", "lease_until", **partial("ended_at IS NULL")),
    postgresql_with=UPDATED,
    readers="operators",
)

hosts = table(
    "hosts",
    "The machines that run handlers over the attempt API. No org reads it.",
    Column("id", Id, primary_key=True),
    required("name", Text, "For people; unique among the hosts that are not removed."),
    required("pool", Text, "The only pool that it takes runs of."),
    required("token_sha256", Text, "The SHA-256 of its token.", unique=True),
    required("created_at", Instant),
    required("created_by", Text),
    Column("removed_at", Instant, doc="When it was removed: its token is refused since."),
    Column("seen_at", Instant, doc="When it last started."),
    Index("ix_hosts_name", "name", unique=True, **partial("removed_at IS NULL")),
    readers="operators",
)

catalogue = table(
    "catalogue",
    "What the plug-ins of the workers offer.",
    Column("name", Text, primary_key=True, doc="The handler's name."),
    Column("distribution", Text, primary_key=True, doc="The plug-in."),
    required("version", Text, "The plug-in's version."),
    required("entry_point", Text, "Where its code is."),
    required("isolation", Text, "`child` or `inline`, as `@job` says.", server_default="child"),
    required("scopes", json_type(), "The scopes that its token must have."),
    Column("params_schema", json_type(), doc="The JSON Schema of its params."),
    Column("settings_schema", json_type(), doc="The JSON Schema of its settings."),
    Column("timeout", Text, doc="The time limit of an attempt."),
    Column("max_attempts", Integer, doc="The number of attempts that may fail."),
    Column("memory", Text, doc="The memory limit of a run."),
    Column("max_concurrent", Integer, doc="The limit of the handler's concurrent runs, over all workers."),
    Column("error", Text, doc="Why it does not load."),
    required("seen_at", Instant, "When a worker last looked."),
    required("state", Boolean, "Whether it uses `ctx.state`, as `@job` says.", server_default=false()),
    Column("pool", Text, doc="The pool of its runs, as `@job` says."),
    required("secrets", json_type(), "The org's secrets that it gets, as `@job` says.", server_default="[]"),
    Column(
        "of_worker",
        Boolean,
        doc="True: a worker or command of this release read it. Null: written by the previous release, maybe "
        "for a host; it counts if a worker lists the handler.",
    ),
    Column("description", Text, doc="The first sentence of its docstring."),
    Column(
        "egress", json_type(), doc="What its runs may reach, as `@job` says; null if it declares nothing."
    ),
    required(
        *("audiences", json_type(), "The audiences for which it may ask for a token, as `@job` says."),
        server_default="[]",
    ),
    required("children", json_type(), "The handlers that it may start, as `@job` says.", server_default="[]"),
    readers="orgs",
)


def like(column: Column[Any]) -> Column[Any]:
    """A column of another table with the type, default and meaning of this one."""
    default = column.server_default
    given: Any = default.arg if isinstance(default, DefaultClause) else None
    return Column(column.name, column.type, nullable=column.nullable, server_default=given, doc=column.doc)


# Columns that both tables of handlers got last.
_LATER = ("description", "egress", "audiences", "children")

host_handlers = table(
    "host_handlers",
    "What the plug-ins of hosts declare. It places no run and grants nothing: see `pool_approvals`.",
    Column("pool", Text, primary_key=True, doc="The pool of the host."),
    Column("name", Text, primary_key=True, doc="The handler's name."),
    Column("distribution", Text, primary_key=True, doc="The plug-in."),
    Column("host_id", Id, primary_key=True, doc="The host that declares it."),
    *(
        like(of)
        for of in catalogue.c
        if of.name not in ("name", "distribution", "pool", "of_worker", "seen_at", *_LATER)
    ),
    required("bytes", Integer, "The size of this row's declaration."),
    required("seen_at", Instant, "When the host last declared it, or was last seen running it."),
    *(like(catalogue.c[name]) for name in _LATER),
    Index("ix_host_handlers_host_id", "host_id"),
    readers="orgs",
)

pool_approvals = table(
    "pool_approvals",
    "What handlers that hosts declare may get in a pool beyond the defaults.",
    Column("pool", Text, primary_key=True, doc="The pool whose hosts may run the handler so."),
    Column("handler", Text, primary_key=True, doc="The handler's name."),
    required("digest", Text, "The digest that was approved."),
    required("ceiling", json_type(), "What was approved, with the version of its form."),
    required("approved_at", Instant, "When an administrator approved it."),
    required("approved_by", Text, "The administrator."),
    readers="operators",
)

placements = table(
    "placements",
    "Admitted runs that an engine offers to the hosts of a pool, until one takes them.",
    Column("run_id", Id, primary_key=True),
    required("fencing_token", BigInteger, "The fencing token that it was placed under."),
    required("worker_id", Id, "The worker that placed it and owns it until a host takes it."),
    required("pool", Text, "The pool whose hosts may take it."),
    required(
        "ticket_sha256", Text, "The hash of its ticket: a host that has the ticket takes the run, once."
    ),
    required("placed_at", Instant, "When it was placed."),
    postgresql_with=UPDATED,
    readers="operators",
)

pools = table(
    "pools",
    "The rules of pools, as the worker that started last with `[pools.NAME]` has them.",
    Column("name", Text, primary_key=True, doc="The name of the pool."),
    required("requires", json_type(), "The properties that a token must have, with their values."),
    required("changed_at", Instant, "When a worker stored other rules than before."),
    required("changed_by", Text, "That worker's machine."),
    readers="operators",
)

facts = table(
    "facts",
    "Facts about the whole database, such as the tzdata release in use.",
    Column("name", Text, primary_key=True, doc="The name of the fact."),
    required("value", Text, "Its value."),
    readers="orgs",
)


audit = table(
    "audit",
    "Who changed what. `org_id` is null if the change concerns no org, or all.",
    Column("id", Id, primary_key=True),
    required("at", Instant, "When."),
    required("actor", Text, "The user of the operating system, or the caller of the API."),
    required("action", Text, "What was done."),
    Column("org_id", Id),
    required("subject", Text, "What it was done to."),
    Column("detail", json_type(), doc="The values; never a secret."),
    Index("ix_audit_org_id_id", "org_id", "id"),
    readers="orgs",
)

rollup_days = table(
    "rollup_days",
    "Sums by UTC day and org. They are kept when the runs are deleted.",
    Column("day", Date, primary_key=True, doc="The UTC day on which they ended."),
    Column("org_id", Id, primary_key=True),
    count("runs", "Runs that ended.", type_=BigInteger),
    count("attempts", "Attempts that ended.", type_=BigInteger),
    count("handler_seconds", "The total time of their handlers.", type_=BigInteger),
    postgresql_with=UPDATED,
    readers="orgs",
)

rollup_hours = table(
    "rollup_hours",
    "Sums by hour, org and state, without children. They are kept when the runs are deleted.",
    Column("hour", Instant, primary_key=True, doc="The hour in which they ended."),
    Column("org_id", Id, primary_key=True),
    Column("state", Text, primary_key=True, doc="Their final state."),
    count("runs", "Runs that ended.", type_=BigInteger),
    postgresql_with=UPDATED,
    readers="orgs",
)

ALERT_KINDS = (
    *("failed", "refused", "overdue", "paused", "credential_dead", "provisioning_failed", "waiting"),
    *("files_opened", "files_changeable", "egress_denied", "late", "unpriced", "forecast", "rollout"),
)

alerts = table(
    "alerts",
    "One row per cause of trouble, shared by all workers, until its end is delivered.",
    Column("cause", Text, primary_key=True, doc="The cause of the trouble."),
    required("id", Text, "The `id` in its posts."),
    required(
        "kind",
        Text,
        "`failed`, `refused`, `overdue`, `paused`, `credential_dead`, `provisioning_failed`, `waiting`, "
        "`files_opened`, `files_changeable`, `egress_denied`, `late`, `unpriced`, `forecast` or `rollout`.",
    ),
    required("summary", Text, "A sentence for people."),
    required("fields", json_type(), "The fields of the first event."),
    required("since", Instant, "When it first occurred."),
    required("struck_at", Instant, "When it last occurred."),
    required("count", BigInteger, "How often it occurred."),
    Column("over_at", Instant, doc="When it was resolved."),
    Column("over_how", Text, doc="How it was resolved."),
    Column("told", Text, doc="What was delivered: `firing`, or null for nothing yet."),
    count("tries", "Posts that failed."),
    Column("try_at", Instant, doc="When to deliver it; null if there is nothing to deliver."),
    CheckConstraint(one_of("kind", ALERT_KINDS), name="kind"),
    CheckConstraint("told IS NULL OR told = 'firing'", name="told"),
    CheckConstraint("(over_at IS NULL) = (over_how IS NULL)", name="over"),
    readers="operators",
)

alert_strikes = table(
    "alert_strikes",
    "The definitions or orgs that a cause affects.",
    Column("cause", Text, primary_key=True, doc="A row of `alerts`."),
    Column("subject_id", Id, primary_key=True, doc="A definition or an org."),
    required("struck_at", Instant, "When it was last affected."),
    required("well", Boolean, "Whether it has recovered since."),
    readers="operators",
)
