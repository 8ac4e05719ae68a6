"""The features, by the processes that use them. Nothing here is imported before it is used."""

from __future__ import annotations

from worker.kit.feature import Feature

CONSOLE = Feature(
    "console",
    verbs={"serve": "verbs:serve", "login": "verbs:login", "operators": "verbs:app"},
    gives={"console.pages": "wiring:ConsolePages"},
    tables=("operators", "sessions", "login_transactions", "plans"),
)
PROVISIONING = Feature(
    "provisioning",
    verbs={
        "provision": "verbs:provision",
        "orgs sync": "verbs:sync",
        "orgs properties": "verbs:properties",
    },
    gives={"provisioning.fleet": "verbs:rotate_fleet"},
    settings=("provisioning", "issuers.NAME.management"),
    tables=("applications",),
)
HOSTS = Feature(
    "hosts",
    verbs={"host": "verbs:host", "hosts": "verbs:app"},
    gives={"hosts.worker": "worker_wiring:HostsOfWorker", "hosts.checks": "access:check_access"},
    settings=("attempts", "host", "temporal"),
    tables=("hosts", "host_handlers", "placements"),
)
CALENDARS = Feature(
    "calendars",
    verbs={"calendars": "verbs:app"},
    gives={"calendars.named": "operations"},
    tables=("calendars",),
)
IMPORTING = Feature("importing", verbs={"import": "verbs:app"})
ORG_SECRETS = Feature("org_secrets", verbs={"secrets": "verbs:app"}, tables=("org_secrets",))
EGRESS = Feature(
    "egress",
    verbs={"limits": "verbs:app"},
    gives={
        "egress.broker": "wiring:make_broker",
        "egress.limits": "limits",
        "egress.shares": "limit_source:shared_limits",
    },
    tables=("limits", "limit_shares", "origin_pauses"),
)
BATCHES = Feature(
    "batches",
    verbs={"batches": "verbs:app"},
    gives={"batches.worker": "wiring:make_batches", "batches.trial": "wiring:make_trial"},
    settings=("batches",),
    tables=("batches", "batch_items", "batch_leases"),
)
ROLLOUTS = Feature(
    "rollouts",
    verbs={"rollouts": "verbs:app"},
    gives={
        "rollouts.applied": "applying",
        "rollouts.moves": "operations",
        "rollouts.worker": "wiring:RolloutsOfWorker",
    },
    tables=("rollout_orgs", "rollout_days"),
)
OUTBOX = Feature("outbox", verbs={"relay": "verbs:relay", "outbox": "verbs:app"}, settings=("relay",))

FEATURES = (
    *(CONSOLE, PROVISIONING, HOSTS, CALENDARS, EGRESS, IMPORTING, ORG_SECRETS, OUTBOX, BATCHES, ROLLOUTS),
)
