"""The tables of batches: model requests that wait for their result, and the batches that they are in."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Index,
    Integer,
    LargeBinary,
    Text,
    UniqueConstraint,
)

from worker.store.dialect import Id, Instant
from worker.store.tables.runs import UPDATED, count, one_of, partial, required, table

# `sync`: it was or is sent on its own. `over`: its run ended, or the org was removed.
ITEM_STATES = ("pending", "sent", "done", "sync", "over")
# `new`: has requests. `uploaded`: has a file. `creating`: the provider may have it. `sent`: it has.
# `read`: its results are stored, its files not deleted. `done` and `failed` are final.
BATCH_STATES = ("new", "uploaded", "creating", "sent", "read", "done", "failed")
# Conditions on requests that are not over, and on batches that have something to do.
OPEN_ITEM = "state IN ('pending', 'sent')"
OPEN_BATCH = "state NOT IN ('done', 'failed')"

batch_items = table(
    "batch_items",
    "Model requests of runs, each for a step, that are sent in batches. Deleted with the run.",
    Column("id", Id, primary_key=True, doc="Random; the `custom_id` at the provider."),
    required("org_id", Id),
    required("run_id", Id),
    required("definition_id", Id),
    required("pool", Text, "The pool of the run: a worker of it sends the request."),
    required("name", Text, "The step's name."),
    required("key", Text, "The step's key; empty without one."),
    required("occurrence", Integer, "Which use of that name and key it is, from 1."),
    required("api", Text, "The NAME of `[batches.NAME]`."),
    required("own_key", Boolean, "Whether the org's own key sends it; else the operator's."),
    required("path", Text, "The endpoint, such as `/v1/responses`."),
    required("model", Text, "The model, as the request names it."),
    required("betas", Text, "Of Anthropic: the beta flags, separated by commas."),
    required("size", Integer, "Bytes of the request."),
    required("state", Text, "`pending`, `sent`, `done`, `sync` or `over`."),
    Column("reason", Text, doc="Why it is `sync` or `over`."),
    Column("batch_id", Id, doc="The batch that it is in, or was in last."),
    required("apart", Boolean, "Whether it shares a batch with requests of its org only."),
    required("opened_at", Instant, "When the run asked for it."),
    Column("sent_at", Instant, doc="When its batch was submitted."),
    Column("fall_back_at", Instant, doc="When it is sent on its own at the latest; null without a deadline."),
    Column("ended_at", Instant, doc="When it left the states `pending` and `sent`."),
    Column("body", LargeBinary, doc="The request, compressed and sealed; null once it has ended."),
    Column("result", LargeBinary, doc="The result, compressed and sealed."),
    Column("meter", Text, doc="What counts its tokens; null for nothing."),
    count("reserved", "Tokens that were reserved.", type_=BigInteger),
    count("tokens", "Tokens of its results.", type_=BigInteger),
    required("seen", Text, "The provider's ids of the batches whose results it has.", server_default=""),
    count("late", "Results that came when the request was not `sent` any more: paid twice, or of no use."),
    UniqueConstraint("run_id", "name", "key", "occurrence"),
    Index("ix_batch_items_pool_pending", "pool", "opened_at", **partial("state = 'pending'")),
    Index("ix_batch_items_batch_id", "batch_id"),
    Index("ix_batch_items_fall_back_at", "fall_back_at", **partial(OPEN_ITEM)),
    Index("ix_batch_items_org_id", "org_id"),
    CheckConstraint(one_of("state", ITEM_STATES), name="state"),
    postgresql_with=UPDATED,
    readers="orgs",
)

batches = table(
    "batches",
    "Batches of model requests at a provider.",
    Column("id", Id, primary_key=True),
    required("pool", Text, "The pool whose worker submits it."),
    required("api", Text, "The NAME of `[batches.NAME]`."),
    Column("org_id", Id, doc="The org whose key submits it; null for the operator's."),
    required("path", Text, "As in `batch_items`."),
    required("model", Text, "As in `batch_items`."),
    required("betas", Text, "As in `batch_items`."),
    required("state", Text, "`new`, `uploaded`, `creating`, `sent`, `read`, `done` or `failed`."),
    required("requests", Integer, "The number of its requests."),
    required("apart", Boolean, "Whether all of its requests are of one org, after a batch was refused."),
    Column("file_id", Text, doc="Of OpenAI: the input file."),
    Column("provider_id", Text, doc="The provider's id of it."),
    Column("results", Text, doc="Of OpenAI: the files with its results, separated by commas."),
    required("created_at", Instant),
    Column("creating_at", Instant, doc="When it was last submitted."),
    count("tries", "How often it was submitted."),
    Column("sent_at", Instant, doc="When the provider had it."),
    Column("ended_at", Instant, doc="When its results were there."),
    required("next_at", Instant, "When it is looked at next."),
    Column("error", Text, doc="What went wrong last."),
    count("late", "Its results that were of no use any more: paid twice, or for a run that had ended."),
    required("fencing_token", BigInteger, "The lease under which it was last changed."),
    Index("ix_batches_open", "pool", "next_at", **partial(OPEN_BATCH)),
    Index("ix_batches_provider_id", "provider_id"),
    Index("ix_batches_ended_at", "ended_at"),
    Index("ix_batches_org_id", "org_id"),
    CheckConstraint(one_of("state", BATCH_STATES), name="state"),
    postgresql_with=UPDATED,
    readers="operators",
)

batch_leases = table(
    "batch_leases",
    "Which worker sends the batches of a pool.",
    Column("pool", Text, primary_key=True, doc="The pool."),
    required("worker_id", Id, "The worker."),
    required("fencing_token", BigInteger, "Grows with each new holder."),
    required("until", Instant, "When the lease expires."),
    postgresql_with=UPDATED,
    readers="operators",
)
