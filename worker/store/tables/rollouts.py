"""The tables of rollouts: what was asked for, the version of each run, and the sums that are compared."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Date,
    Float,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    false,
)

from worker.model.rollouts.rollout import STATES
from worker.store.dialect import Id, Instant, json_type
from worker.store.tables.runs import UPDATED, count, one_of, partial, required, table

ROLLOUT_SIDES = ("from", "to")

rollouts = table(
    "rollouts",
    "Rollouts of new versions of handlers, step by step.",
    Column("id", Id, primary_key=True),
    required("name", Text, "Names it in commands."),
    required("definitions", Text, "The name of a template, or of definitions of several orgs."),
    required("from_handler", Text, "Their handler."),
    required("to_handler", Text, "The handler that orgs move to."),
    required("orgs", json_type(), "Which orgs may get it, as in `templates`."),
    Column("flag", json_type(), doc="`flag` and `equals`: an org whose token lacks it keeps `from_handler`."),
    required("steps", json_type(), "Shares of the orgs, such as `5%`."),
    required("auto", Boolean, "Whether a step ends by itself once it has shown what it must."),
    required("watch", json_type(), "What each metric may lose."),
    required("state", Text, "`planned`, `running`, `halted`, `finished` or `undone`."),
    count("step", "The step that it is at, from 1; 0 before the first."),
    Column("step_began_at", Instant, doc="When that step began."),
    Column("began_at", Instant, doc="When its first step began: what ended earlier is the time before."),
    required("ready", Boolean, "Whether the step has shown what it must.", server_default=false()),
    required("stalled", Boolean, "Whether a side has stopped running.", server_default=false()),
    Column("judged_at", Instant, doc="When it was last evaluated."),
    required("unjudged", Boolean, "Whether runs were counted since.", server_default=false()),
    Column("verdict", json_type(), doc="The numbers of the last evaluation, by metric."),
    Column("halted_at", Instant, doc="When it was halted."),
    Column("halted_by", Text, doc="Who halted it; `worker` if a metric did."),
    Column("reason", Text, doc="Why its state was last changed."),
    Column(
        "evidence", json_type(), doc="The numbers for which a metric halted it, and the last run counted."
    ),
    required("created_at", Instant),
    required("updated_at", Instant),
    required("updated_by", Text, "Who changed it last."),
    UniqueConstraint("name"),
    CheckConstraint(one_of("state", STATES), name="state"),
    readers="operators",
)

rollout_orgs = table(
    "rollout_orgs",
    "The orgs of a rollout: their runs before it, and since its step began.",
    Column("rollout_id", Id, primary_key=True, doc="A row of `rollouts`."),
    Column("org_id", Id, primary_key=True),
    required("definition_id", Id),
    Column("before", json_type(), doc="Runs, sum and sum of squares by metric, before it; null until read."),
    Column("slow", Float, doc="Seconds above which a run counts as slow."),
    Column(
        "from_sums",
        json_type(),
        doc="As `before`, of runs of the old version that started since the step began.",
    ),
    Column("to_sums", json_type(), doc="The same of the new version."),
    Column("moved_step", Integer, doc="The step in which its first run of the new version started."),
    Column("moved_at", Instant, doc="When that was."),
    Index("ix_rollout_orgs_unread", "rollout_id", "org_id", **partial("before IS NULL")),
    Index("ix_rollout_orgs_org_id", "org_id"),
    postgresql_with=UPDATED,
    readers="operators",
)

rollout_days = table(
    "rollout_days",
    "The curves of a rollout: sums by day and side.",
    Column("rollout_id", Id, primary_key=True, doc="A row of `rollouts`."),
    Column("day", Date, primary_key=True, doc="The UTC day on which the runs ended."),
    Column("side", Text, primary_key=True, doc="`from` or `to`."),
    required("sums", json_type(), "As in `rollout_orgs`, of all orgs."),
    CheckConstraint(one_of("side", ROLLOUT_SIDES), name="side"),
    postgresql_with=UPDATED,
    readers="operators",
)

run_versions = table(
    "run_versions",
    "The version of each run that a rollout decided on, from its first start on.",
    Column("run_id", Id, primary_key=True),
    required("org_id", Id),
    required("rollout_id", Id, "A row of `rollouts`."),
    required("handler", Text, "The handler that it got."),
    required("side", Text, "`from` or `to`."),
    required("why", Text, "`step`, `flag`, `halted`, `finished` or `stored` (by its checkpoint)."),
    required("step", Integer, "The step of the rollout then."),
    required("started_at", Instant, "When its first attempt got it."),
    required("compared", Boolean, "Whether it counts for the comparison."),
    required("counted", Boolean, "Whether it has ended and was counted.", server_default=false()),
    CheckConstraint(one_of("side", ROLLOUT_SIDES), name="side"),
    Index("ix_run_versions_uncounted", "rollout_id", "run_id", **partial("compared AND NOT counted")),
    postgresql_with=UPDATED,
    readers="orgs",
)
