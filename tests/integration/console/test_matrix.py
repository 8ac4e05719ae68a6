"""Who may do what: every caller at every route of the router, for things of its org and of another.

Each route has a rule in RULES; a new route without one fails here. The same matrix runs on SQLite,
and on PostgreSQL with the login of `serve`. An answer is wrong if its status is not the rule's, if
it names another org's things to a caller that is not an operator, or if the database has changed
other than it says.
"""

from __future__ import annotations

import itertools
import re
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import httpx
import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Connection, Engine, event, insert, select, update

import worker.operations.runs
from tests.fakes import postgres
from tests.fakes.clock import ManualClock
from tests.fakes.issuer import App, FakeIssuer, kinde_issuer
from tests.fakes.limits import no_limits
from tests.fakes.rows import attempt_row, checkpoint_row, within
from tests.integration.console.conftest import BASE, OPERATORS, TOKENS, csrf_of, log_in
from tests.integration.console.test_callers import PERSON, with_scopes
from worker.features.console.access import Access
from worker.features.console.callers import RANK, Caller, Role
from worker.features.console.pages.docs import ELSEWHERE, PAGES, PLACES
from worker.features.console.server import build
from worker.features.console.sessions import DOCS, SESSION_COOKIE, Sessions
from worker.features.hosts.operations import add_host
from worker.guard import Guard
from worker.handlers.catalogue import HandlerEntry
from worker.handlers.ceiling import Ceiling, digest
from worker.ids import ALL_ORGS, RunId, WorkerId, new_id
from worker.kit.web.health import Health
from worker.kit.web.listener import build_health
from worker.model.definitions.file import parse_file
from worker.operations.apply import apply
from worker.operations.credentials import add_credential
from worker.operations.definitions import pause_definition
from worker.operations.orgs import set_org_state
from worker.operations.runs import cancel, run_now
from worker.operations.templates import materialise
from worker.store import catalogue, edit_runs, host_handlers, hosts, orgs, roles, rollouts, sign_in, tables
from worker.store.database import Database
from worker.store.lists import morning
from worker.store.orgs import OrgCaller
from worker.telemetry.metrics import Metrics

ORGS = ("org_a", "org_b", "org_z")
FILE = "".join(
    f"""
[[org]]
code = "{org}"
name = "canary-{org} Inc"
issuer = "main"
tags = ["{org}"]

[[definition]]
org = "{org}"
name = "digest"
handler = "acme.canary-{org}"
schedule = "0 3 * * *"
overlap = "allow"

[[template]]
name = "canary-{org}-template"
orgs = {{ tags = ["{org}"] }}
handler = "acme.canary-{org}"
schedule = "@hourly"

[[budget]]
org = "{org}"
meter = "canary-{org}-tokens"
limit = 1000
per = "day"
"""
    for org in ORGS
)
# The org of the people who run the installation; it is not one of those served.
VENDOR = "org_v"
LOGIN_RULES = "the hash of the rules of [web.login]"
# What managers may do here.
PORTAL = ("run", "retry", "answer")
NUMBERS = itertools.count(1)
# Those that ask for each GET by HEAD as well, which the router answers alike: refused, an org, an operator.
ASK_HEAD = ("nobody", "of org_a as viewer", "an operator as viewer")
# Refused before any query, so on SQLite only.
NEED_NO_DATABASE = ("with a forged token", "with no bearer token", "a person of org_a", "another scope")
# What a request may change.
CHANGED = (
    "runs",
    "live_runs",
    "checkpoints",
    "steps",
    "waits",
    "audit",
    "definitions",
    "schedule",
    "rollup_days",
    "run_logs",
    "credentials",
    "budget_raises",
    "pool_approvals",
    "rollouts",
)
# How each of these is read, and the place of its org: what is of no org is kept by its first column.
READ = {
    name: (
        f"SELECT {', '.join(table.c.keys())} FROM {name} ORDER BY {', '.join(table.primary_key.c.keys())}",
        table.c.keys().index("org_id") if "org_id" in table.c else 0,
    )
    for name, table in ((name, tables.metadata.tables[name]) for name in CHANGED)
}
State = dict[str, list[tuple[Any, ...]]]


@dataclass(frozen=True)
class Who:
    """A caller: an org by a token, an operator, or nobody; `refused` is the status of one not let in."""

    name: str
    role: Role = "viewer"
    org: str | None = None
    token: str | None = None
    org_role: Role = "viewer"
    refused: int | None = None
    # The `sub` of a person, who has a session and no token.
    person: str = ""

    @property
    def actor(self) -> str:
        if self.person:
            return f"person:{self.person}@{self.org or VENDOR}"
        if self.org is not None:
            return f"org:{self.org}"
        return f"{'starter' if self.role == 'starter' else 'operator'}:{self.role}"

    @property
    def is_operator(self) -> bool:
        return self.org is None and self.refused is None


Kind = Literal[
    "open",
    "metrics",
    "list",
    "own_run",
    "own_org",
    "front",
    "write",
    "run_now",
    "api_bulk",
    "document",
    "login",
    "logout",
    "page",
    "staff",
    "zone",
    "bulk",
    "approve",
    "plan",
    "plan_form",
    "rollout",
]


@dataclass(frozen=True)
class Rule:
    """What a route answers; `role` is what operators need for it, `status` that of success."""

    kind: Kind
    role: Role = "viewer"
    status: int = 200


API = "/api/v1"
BY_STAFF = Rule("by_staff", role="operator", status=303)
# Changes of what belongs to no org.
OF_NO_ORG = ("approve", "rollout")
# A search that finds no run.
NOTHING = "definition:nothing"
RULES: Mapping[tuple[str, str], Rule] = {
    ("GET", "/livez"): Rule("open"),
    ("GET", "/readyz"): Rule("open", status=503),
    ("GET", "/metrics"): Rule("metrics"),
    **{
        ("GET", f"{API}/{noun}"): Rule("list")
        for noun in ("orgs", "definitions", "templates", "runs", "skips", "handlers")
    },
    ("GET", f"{API}/credentials"): Rule("list", role="admin"),
    ("GET", f"{API}/audit"): Rule("list", role="admin"),
    ("GET", f"{API}/runs/{{run}}"): Rule("own_run"),
    ("GET", f"{API}/runs/{{run}}/why"): Rule("own_run"),
    ("GET", f"{API}/runs/{{run}}/attempts"): Rule("own_run"),
    ("GET", f"{API}/runs/{{run}}/logs"): Rule("own_run"),
    ("POST", f"{API}/runs/{{run}}/cancel"): Rule("write", role="operator"),
    ("POST", f"{API}/runs/{{run}}/retry"): Rule("write", role="operator", status=201),
    ("POST", f"{API}/runs/{{run}}/answers/{{name}}"): Rule("write", role="operator"),
    ("GET", f"{API}/runs/{{run}}/events"): Rule("own_run"),
    ("POST", f"{API}/runs:retry"): Rule("api_bulk", role="operator"),
    ("POST", f"{API}/runs:cancel"): Rule("api_bulk", role="operator"),
    ("GET", f"{API}/orgs/{{org}}"): Rule("own_org"),
    # Each pause is undone by the next rule.
    ("POST", f"{API}/orgs/{{org}}/pause"): replace(BY_STAFF, status=200),
    ("POST", f"{API}/orgs/{{org}}/resume"): replace(BY_STAFF, status=200),
    ("GET", f"{API}/status"): Rule("staff"),
    ("GET", f"{API}/usage"): Rule("list"),
    ("GET", f"{API}/costs"): Rule("staff"),
    ("GET", f"{API}/budgets/{{org}}"): Rule("by_staff"),
    ("POST", f"{API}/budgets/{{org}}/raise"): replace(BY_STAFF, status=200),
    ("POST", f"{API}/credentials/{{org}}"): replace(BY_STAFF, role="admin", status=201),
    ("POST", f"{API}/credentials/{{org}}/{{generation}}/retire"): replace(BY_STAFF, role="admin", status=200),
    ("GET", f"{API}/definitions/{{org}}/{{name}}"): Rule("own_org"),
    ("PATCH", f"{API}/definitions/{{org}}/{{name}}"): replace(BY_STAFF, status=200),
    ("POST", f"{API}/definitions/{{org}}/{{name}}/run"): Rule("run_now", role="operator", status=201),
    ("POST", f"{API}/definitions/{{org}}/{{name}}/pause"): Rule("run_now", role="operator"),
    ("POST", f"{API}/definitions/{{org}}/{{name}}/resume"): Rule("run_now", role="operator"),
    ("POST", f"{API}/definitions/{{org}}/{{name}}/backfill"): replace(BY_STAFF, status=200),
    ("GET", f"{API}/definitions/{{org}}/{{name}}/next"): Rule("own_org"),
    ("GET", f"{API}/definitions/{{org}}/{{name}}/state"): Rule("own_org"),
    ("PUT", f"{API}/definitions/{{org}}/{{name}}/state"): replace(BY_STAFF, status=200),
    ("DELETE", f"{API}/definitions/{{org}}/{{name}}/state"): replace(BY_STAFF, status=200),
    **{("GET", f"{API}/rollouts{rest}"): Rule("staff") for rest in ("", "/{rollout}", "/{rollout}/plan")},
    **{
        ("POST", f"{API}/rollouts/{{rollout}}/{verb}"): Rule("rollout", role="operator")
        for verb in ("advance", "halt", "resume", "finish", "undo")
    },
    ("GET", f"{API}/openapi.json"): Rule("document"),
    ("GET", "/static/console.css"): Rule("open"),
    ("GET", "/static/console.js"): Rule("open"),
    ("GET", "/static/htmx.min.js"): Rule("open"),
    **{("GET", f"{DOCS}{place.page}"): Rule("open") for place in (*PLACES.values(), ELSEWHERE)},
    ("GET", "/"): Rule("front"),
    **{
        ("GET", f"/{page}"): Rule("page")
        for page in ("orgs", "search", "definitions", "templates", "handlers", "usage")
    },
    **{("GET", f"/{page}"): Rule("page", role="admin") for page in ("credentials", "audit")},
    **{("GET", f"/{page}"): Rule("staff") for page in ("workers", "failures")},
    **{("GET", f"/rollouts{rest}"): Rule("staff") for rest in ("", "/{rollout}")},
    # That of a verb which there is not is tested in tests/integration/console/test_rollouts.py.
    ("POST", "/rollouts/{rollout}/{verb}"): Rule("rollout", role="operator", status=303),
    ("GET", "/orgs/{org}"): Rule("own_org"),
    ("POST", "/orgs/{org}/pause"): BY_STAFF,
    ("POST", "/orgs/{org}/resume"): BY_STAFF,
    ("POST", "/usage/{org}/raise"): BY_STAFF,
    ("POST", "/pools/approve"): Rule("approve", role="admin", status=303),
    ("GET", "/runs/{run}"): Rule("own_run"),
    ("GET", "/runs/{run}/log"): Rule("own_run"),
    ("GET", "/runs/{run}/log.txt"): Rule("own_run"),
    ("GET", "/runs/{run}/live"): Rule("own_run"),
    **{("GET", f"/live/{page}"): Rule("staff") for page in ("overview", "workers")},
    ("GET", "/live/runs"): Rule("page"),
    ("GET", "/live/orgs/{org}"): Rule("own_org"),
    ("GET", "/live/orgs/{org}/definitions/{name}"): Rule("own_org"),
    ("POST", "/runs/{run}/cancel"): Rule("write", role="operator", status=303),
    ("POST", "/runs/{run}/retry"): Rule("write", role="operator", status=303),
    ("POST", "/runs/{run}/answer"): Rule("write", role="operator", status=303),
    # There is no plan here; tests/integration/console/test_mcp_plans.py has some.
    ("GET", "/plans/{plan}"): Rule("plan", status=404),
    ("POST", "/plans/{plan}"): Rule("plan_form", status=404),
    ("GET", "/orgs/{org}/definitions/{name}"): Rule("own_org"),
    **{
        ("POST", f"/orgs/{{org}}/definitions/{{name}}/{verb}"): Rule("run_now", role="operator", status=303)
        for verb in ("run", "pause", "resume")
    },
    **{
        (method, f"/orgs/{{org}}/definitions/{{name}}/{verb}"): rule
        for verb in ("edit", "backfill")
        for method, rule in (("GET", replace(BY_STAFF, status=200)), ("POST", BY_STAFF))
    },
    ("GET", "/login"): Rule("open"),
    ("POST", "/login"): Rule("login", status=303),
    # There is no provider here; tests/integration/console/test_login.py has one.
    ("GET", "/login/start"): Rule("open", status=404),
    ("GET", "/login/callback"): Rule("open", status=404),
    ("GET", "/login/once/{code}"): Rule("open"),
    ("POST", "/login/once/{code}"): Rule("open", status=403),
    ("POST", "/logout"): Rule("logout", status=303),
    ("POST", "/zone"): Rule("zone", status=303),
    # Of a search that finds nothing; test_console.py has those that change runs.
    **{
        (method, f"/{verb}"): rule
        for verb in ("retry", "cancel")
        for method, rule in (("GET", Rule("bulk")), ("POST", Rule("bulk", role="operator", status=303)))
    },
}


# All that a starter may call; tests/integration/console/test_starters.py has runs of its own.
BY_STARTERS = (
    f"{API}/runs/{{run}}",
    f"{API}/runs/{{run}}/events",
    f"{API}/definitions/{{org}}/{{name}}/run",
)


def expected(rule: Rule, who: Who, target: str, *, session: bool, page: bool, path: str = "") -> int:
    """The status that this caller has to get for a thing of the org `target`."""
    if rule.kind == "open":
        return rule.status
    if who.role == "starter" and path in BY_STARTERS:
        # None of the runs here is of its own.
        return 404 if rule.kind == "own_run" else rule.status
    if who.refused is not None:
        return who.refused
    if who.person and not session:
        return 401
    if rule.kind == "metrics":
        # They name orgs here.
        return 200 if who.org is None else 403
    if rule.kind == "login":
        return rule.status
    is_form = rule.kind in ("write", "run_now", "logout", "zone", "plan_form", *OF_NO_ORG) or rule == BY_STAFF
    if page and not session and is_form:
        # A form is taken from a page of ours only.
        return 401
    if rule.kind in ("logout", "zone", "document", "plan", "plan_form"):
        return rule.status
    if rule.kind in OF_NO_ORG:
        return rule.status if who.org is None and RANK[who.role] >= RANK[rule.role] else 403
    if rule.kind == "bulk":
        if rule.status == 303 and not session:
            return 401
        may = path[1:] in PORTAL if who.role == "manager" else RANK[who.role] >= RANK[rule.role]
        return rule.status if may or rule.status == 200 else 403
    if rule.kind == "staff" and who.org is not None:
        return 403
    if rule.kind in ("page", "staff"):
        is_lower = who.org is None and RANK[who.role] < RANK[rule.role]
        return 403 if is_lower else rule.status
    own = who.org in (None, target)
    if rule.kind == "front":
        return 200 if who.org is None else 303
    if rule.kind == "api_bulk":
        may = "retry" in PORTAL and path.endswith("retry") if who.role == "manager" else RANK[who.role] > 0
        return rule.status if may else 403
    if rule.kind in ("run_now", "by_staff") and not own:
        return 404
    if rule.kind == "by_staff" and who.org is not None:
        return 403
    if who.role == "manager" and ("answer" if "/answers/" in path else path.rpartition("/")[2]) in PORTAL:
        return rule.status if own else 404
    if RANK[who.role] < RANK[rule.role] and (who.org is None or rule.kind in ("write", "run_now")):
        return 403
    return rule.status if own else 404


@dataclass
class Installation:
    """Two orgs that are active and one that is suspended, each with one of everything."""

    admin: Database
    served: Database
    served_url: str
    clock: ManualClock
    issuer: FakeIssuer
    guard: Guard
    # The incarnation of a host of pool eu, and the digest of what it declares last.
    host: WorkerId = field(default_factory=lambda: WorkerId(""))
    digest: str = ""
    known_rollout: str = ""
    ids: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    names: dict[str, set[str]] = field(default_factory=dict)
    # By table, what it held when it was last read, and what `marks_of` said of it then.
    read: dict[str, tuple[object, list[tuple[Any, ...]]]] = field(default_factory=dict)

    def token(self, org: str, **claims: Any) -> str:
        return self.issuer.token(App(org, f"m2m-{org}", "s3cret"), **claims)

    def app(self, org_role: Role) -> Any:
        unknown = self.served.acting(roles.NOBODY)

        async def find_caller(code: str, client_id: str) -> OrgCaller | None:
            return await unknown.call_autocommit(orgs.find_caller, code, client_id)

        access = Access(
            OPERATORS,
            {"main": self.guard},
            find_caller,
            org_role=org_role,
            org_scope="jobs:read",
            limits=no_limits(self.clock),
            login_basis=LOGIN_RULES,
            portal=PORTAL,
        )
        return build(Health(Metrics(version="1.0", top_orgs=5)), self.served, access, self.clock)

    def waiting(self, org: str) -> str:
        """A new run that waits."""
        return str(run_now(self.admin, org, "digest", actor="tester")["id"])

    def cancelled(self, org: str) -> str:
        """A new run that has ended, and was not retried yet."""
        return str(cancel(self.admin, self.waiting(org), actor="tester")["id"])

    def new_credential(self, org: str) -> int:
        """The generation of another credential."""
        row = add_credential(self.admin, None, org, client_id="m2m-more", actor="tester", reference="absent")
        return row["generation"]

    def unapproved(self, org: str) -> str:
        """The digest of what a host declares, which is not approved yet."""
        entry = HandlerEntry("gpu.render", "gpu", "1.0", "gpu:render", max_attempts=10 + next(NUMBERS))
        within(self.admin, host_handlers.report, self.host, [entry])
        self.digest = digest("eu", entry.name, Ceiling.of(entry))
        return self.digest

    def rollout(self, state: str) -> str:
        """The name of a new rollout in this state."""
        name, at = f"rollout-{next(NUMBERS)}", self.clock.now()
        values = {
            "definitions": "digest", "from_handler": "acme.canary-org_a",
            "to_handler": "acme.canary-org_b", "orgs": "all",
            "flag": None, "steps": ["50%", "100%"], "auto": False, "watch": {"failed": "+2 points"},
        }  # fmt: skip
        within(self.admin, rollouts.put, name, values, None, at=at, actor="tester")
        if state != "planned":
            began = {"state": state, "step": 1, "step_began_at": at, "began_at": at}
            change = update(tables.rollouts).where(tables.rollouts.c.name == name).values(**began)
            within(self.admin, lambda connection: connection.execute(change))
        return name

    def planned(self, _: str) -> str:
        return self.rollout("planned")

    def running(self, _: str) -> str:
        return self.rollout("running")

    def halted(self, _: str) -> str:
        return self.rollout("halted")

    def callers(self) -> list[Who]:
        org = {role: f"of org_a as {role}" for role in ("viewer", "operator")}
        return [
            Who("nobody", refused=401),
            Who("with a forged token", token=f"{self.token('org_a')[:-8]}AAAAAAAA", refused=401),
            Who("with no bearer token", token="", refused=401),
            Who("a person of org_a", token=self.token("org_a", **PERSON), refused=401),
            Who("another scope", token=self.token("org_a", **with_scopes("jobs")), refused=401),
            Who("another org's client", token=self.token("org_a", azp="m2m-org_b"), refused=401),
            Who("of a suspended org", token=self.token("org_z"), refused=403),
            Who("of no org known", token=self.token("org_q"), refused=403),
            Who(org["viewer"], "viewer", "org_a", self.token("org_a")),
            Who(org["operator"], "operator", "org_a", self.token("org_a"), org_role="operator"),
            Who("by scope", "viewer", "org_a", self.token("org_a", **with_scopes("jobs:read"))),
            Who("of org_b as operator", "operator", "org_b", self.token("org_b"), org_role="operator"),
            *(
                Who(f"an operator as {role}", role, token=token, refused=403 if role == "starter" else None)
                for role, token in TOKENS.items()
            ),
            Who("a member of org_a", "member", "org_a", person="kp_ann"),
            Who("a manager of org_a", "manager", "org_a", person="kp_max"),
            Who("a person of the vendor", "operator", person="kp_sue"),
        ]

    def paused(self, org: str) -> None:
        """Its definition, which a request may resume."""
        pause_definition(self.admin, org, "digest", actor="tester")

    def state(self) -> State:
        """All that a request may change, as the driver has it: it is read more than a thousand times."""
        with self.admin.autocommit() as connection:
            marks = marks_of(connection)
            for name, mark in marks.items():
                if self.read.get(name, (None,))[0] != mark:
                    result = connection.exec_driver_sql(READ[name][0])
                    self.read[name] = (mark, list(result.cursor.fetchall()))
        return {name: rows for name, (_, rows) in self.read.items()}

    def changes(self, before: State, after: State) -> dict[str, dict[str, list[tuple[Any, ...]]]]:
        """The rows that are only in one of the two, by org and table."""
        found: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
        code = {id_: org for org, id_ in self.ids.items()}
        for name, (_, place) in READ.items():
            if before[name] != after[name]:
                pairs = zip(before[name], after[name], strict=False)
                same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                rows = [{str(row): row for row in state[name][same:]} for state in (before, after)]
                for text in rows[0].keys() ^ rows[1].keys():
                    row = rows[0].get(text) or rows[1][text]
                    found.setdefault(code.get(str(row[place]), ""), {}).setdefault(name, []).append(row)
        return found


def marks_of(connection: Connection) -> dict[str, object]:
    """What is another for each table that has changed: on SQLite, where any has."""
    if connection.dialect.name == "sqlite":
        driver: Any = connection.connection.dbapi_connection
        version = connection.exec_driver_sql("PRAGMA data_version").scalar_one()
        return dict.fromkeys(READ, (id(driver), version, driver.total_changes))
    # A changed row has the id of a later transaction.
    each = (f"SELECT '{name}', count(*), sum(xmin::text::bigint) FROM {name}" for name in READ)
    return {name: tuple(mark) for name, *mark in connection.exec_driver_sql(" UNION ALL ".join(each))}


def fill(made: Installation) -> None:
    """An ended run with an attempt, a log and a checkpoint for each org, and the markers of each."""
    with made.admin.transaction() as connection:
        now = made.admin.now(connection)
        for code in ORGS:
            org_id = made.ids[code] = orgs.require(connection, code)["id"]
            definition = connection.execute(
                select(tables.definitions.c.id).where(
                    tables.definitions.c.org_id == org_id, tables.definitions.c.name == "digest"
                )
            ).scalar_one()
            run, mark, worker_id = new_id(), f"canary-{code}", new_id()
            common = {"org_id": org_id, "definition_id": definition, "revision": 1, "origin": "manual"}
            ends = {
                "state": "failed",
                "reason": "error",
                "finished_at": now,
                "error": {"type": "KeyError", "message": mark},
            }
            connection.execute(
                insert(tables.runs).values(
                    id=run, handler=mark, scheduled_for=now, created_at=now, idempotency_key=run, attempt=1,
                    result={"said": mark}, result_fencing_token=1, worker_id=worker_id, **common, **ends,
                )
            )  # fmt: skip
            values = {"worker_id": worker_id, "handler": mark, "claims": {"org_code": code}}
            connection.execute(attempt_row(run, org_id, now, **values))
            connection.execute(
                insert(tables.run_logs).values(
                    run_id=run, attempt=1, seq=1, org_id=org_id, at=now, level="info", source="log", text=mark
                )
            )
            connection.execute(checkpoint_row(run, org_id, now, {"at": mark}))
            connection.execute(
                insert(tables.skips).values(
                    id=new_id(), org_id=org_id, definition_id=definition, revision=1, skipped_from=now,
                    skipped_until=now, count=1, reason="missed",
                )
            )  # fmt: skip
            connection.execute(
                insert(tables.meter_days).values(
                    day=now.date(), org_id=org_id, meter=f"{mark}-tokens", definition_id=definition, used=5
                )
            )
            made.ended[code] = run
            made.names[code] = {code, mark, run, org_id, definition}


def begin_host(database: Database) -> WorkerId:
    """A live host of pool eu."""
    token, worker = add_host(database, "gpu1", "eu", actor="tester")["token"], WorkerId(new_id())
    with database.transaction() as connection:
        found = hosts.find(connection, sign_in.sha256(token), None)
        assert found is not None
        slots = {"children": 1, "inline": 1}
        what = {"capacity": slots, "host": "gpu1.local", "pid": 7, "version": "1"}
        hosts.begin(connection, found, worker, lease=timedelta(hours=9), **what)
    return worker


@contextmanager
def login_of_serve(server: postgres.Server, url: str) -> Iterator[str]:
    """The URL of a login as docs/operating/postgresql.md makes it for `serve`."""
    login = f"serve_{new_id()[-12:]}"
    server.execute(f"CREATE ROLE {login} LOGIN NOINHERIT")
    server.execute(f"GRANT {roles.WEB}, {roles.OPERATOR} TO {login}")
    try:
        yield url.replace("postgres@", f"{login}@")
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(login)))
        server.execute(f"DROP ROLE {login}")


# PostgreSQL by the login of `serve`, which has fewer rights than a worker's.
@pytest.fixture(params=["sqlite", "serve"])
async def made(
    request: pytest.FixtureRequest, clock: ManualClock, tmp_path: Path
) -> AsyncIterator[Installation]:
    async with AsyncExitStack() as stack:
        kind = "sqlite" if request.param == "sqlite" else "postgres"
        url = served_url = request.getfixturevalue(f"migrated_{kind}_url")
        if request.param == "serve":
            server = request.getfixturevalue("postgres_server")
            served_url = stack.enter_context(login_of_serve(server, url))
        admin = Database.open(url, clock=clock)
        stack.callback(admin.close)
        served = Database.open(served_url, clock=clock, role="web")
        stack.callback(served.close)
        with admin.transaction() as connection:
            entries = [HandlerEntry(f"acme.canary-{org}", "acme", "1.0", "acme:x") for org in ORGS]
            catalogue.put(connection, entries, at=admin.now(connection))
        apply(admin, parse_file(FILE), actor="tester")
        materialise(admin)
        for org in ORGS:
            add_credential(admin, None, org, client_id=f"m2m-{org}", actor="tester", reference="absent")
        issuer = FakeIssuer(clock)
        guard = Guard(kinde_issuer(), client=issuer.client(), clock=clock)
        stack.push_async_callback(guard.close)
        installation = Installation(admin, served, served_url, clock, issuer, guard)
        fill(installation)
        installation.host = begin_host(admin)
        installation.known_rollout = installation.rollout("running")
        set_org_state(admin, "org_z", "suspended", actor="tester")
        yield installation


class Client:
    """One caller at one application: by its bearer token, and by a session that the token opened."""

    def __init__(self, app: Any, who: Who, made: Installation) -> None:
        self.made, self.served, self.clock = made, made.served, made.clock
        headers = {} if who.token is None else {"authorization": f"Bearer {who.token}"}
        self.bearer = self._client(app, headers)
        self.session = self._client(app, {"origin": BASE})
        self.who = who
        self.csrf = ""

    @staticmethod
    def _client(app: Any, headers: Mapping[str, str]) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 40000), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=BASE, headers=headers)

    async def open(self, run: str) -> int:
        """Log in; the status of that."""
        self.session.cookies.clear()
        if self.who.person:
            who, home = self.who, self.who.org or VENDOR
            person = Caller(
                "Pat", who.role, who.org, kind="person", subject=who.person, home=home, issuer="main",
                basis=LOGIN_RULES,
            )  # fmt: skip
            opened = await Sessions(self.served, self.clock).begin(person)
            self.session.cookies.set(SESSION_COOKIE, opened.key)
            self.csrf = csrf_of(await self.session.get(f"/runs/{run}"))
            return 303
        answer = await log_in(self.session, self.who.token or "")
        if answer.status_code == 303:
            self.csrf = csrf_of(await self.session.get(f"/runs/{run}"))
        return answer.status_code

    async def ask(self, method: str, path: str, *, session: bool) -> httpx.Response:
        client = self.session if session else self.bearer
        if path.startswith("/live/"):
            # The streams of lists have no end.
            return await client.head(f"{path}?after=1")
        fields, request = self.fields(path), {}
        if method == "PATCH":
            request = {"json": {"priority": next(NUMBERS)}}
        elif method == "PUT":
            request = {"json": {"data": {"cursor": next(NUMBERS)}}}
        elif path.startswith(API):
            request = {"json": fields} if fields else {}
        elif session and method == "POST":
            request = {"data": {"csrf": self.csrf, "zone": "UTC", "q": NOTHING, "reason": "why"} | fields}
        return await client.request(method, path, **request)

    def fields(self, path: str) -> dict[str, Any]:
        """The fields that a form of this path has, each time others, so that they change something."""
        if ":" in path:
            # Of whatever the caller reaches, which tests/integration/console/test_bulk.py judges.
            return {"q": "state:succeeded" if path.endswith("retry") else "state:running"}
        if path.startswith(f"{API}/credentials/") and not path.endswith("/retire"):
            return {"client_id": f"m2m-{next(NUMBERS)}", "reference": "absent"}
        if path.endswith("/raise"):
            org = path.split("/")[-2]
            by: Any = next(NUMBERS) if path.startswith(API) else str(next(NUMBERS))
            return {"meter": f"canary-{org}-tokens", "per": "day", "by": by}
        if path.endswith("/approve"):
            return {"pool": "eu", "handler": "gpu.render", "digest": self.made.digest}
        if path.endswith("/answer"):
            return {"name": "approval", "choice": "true"}
        if "/answers/" in path:
            return {"data": "yes"}
        if path.endswith("/backfill"):
            start = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(days=next(NUMBERS))
            return {"from": start.isoformat(), "until": (start + timedelta(days=1)).isoformat()}
        if path.startswith(f"{API}/rollouts/"):
            return {"reason": "why"}
        return {"confirmed": "1", "key.priority": str(next(NUMBERS))} if path.endswith("/edit") else {}


async def routes_of(app: Any) -> set[tuple[str, str]]:
    """Every method and path of the router, which puts itself into the scope of a request."""
    scope = {"type": "http", "method": "GET", "path": "/livez", "headers": [], "query_string": b""}

    async def nothing(*_: Any) -> Any:
        return {"type": "http.request"}

    await app(scope, nothing, nothing)
    router: Any = scope["router"]
    return {(method, route.path) for route in router.routes for method in route.methods}


def is_page(path: str) -> bool:
    return not path.startswith(("/api/", "/livez", "/readyz", "/metrics"))


def used_by(path: str) -> str | None:
    """The method of `Installation` that makes what a request of this path uses up, if it is not refused."""
    # An answer may come before the run waits for it.
    if path.endswith(("{run}/cancel", "{run}/answer")) or "/answers/" in path:
        return "waiting"
    ends = {
        "{run}/retry": "cancelled",
        "/{name}/resume": "paused",
        "/retire": "new_credential",
        "/approve": "unapproved",
        "{rollout}/{verb}": "planned",
        "{rollout}/advance": "planned",
        "{rollout}/undo": "planned",
        "{rollout}/halt": "running",
        "{rollout}/finish": "running",
        "{rollout}/resume": "halted",
    }
    return next((thing for end, thing in ends.items() if path.endswith(end)), None)


class Matrix:
    """Asks, judges, and keeps what was wrong."""

    def __init__(self, made: Installation) -> None:
        self.made = made
        self.apps = {role: made.app(role) for role in ("viewer", "operator")}
        self.asked = 0
        # What requests of that kind may still use up, by method of the installation and org.
        self.unused: dict[tuple[str | None, str], Any] = {}
        # What the last change left, which no reading may change.
        self.known: State = {}
        self.wrong: list[str] = []

    async def run(self, rules: Mapping[tuple[str, str], Rule] = RULES) -> None:
        on_sqlite = self.made.admin.dialect == "sqlite"
        for who in self.made.callers():
            if who.name in NEED_NO_DATABASE and not on_sqlite:
                continue
            client = Client(self.apps[who.org_role], who, self.made)
            own = self.made.ended[who.org or "org_a"]
            status = await client.open(own)
            self.judge(who, "POST /login", status, who.refused or 303)
            # Whoever is not let in has no session: what it is answered without a token shows one of them.
            sessions = (False, True)
            if who.refused is not None and who.token:
                assert not client.session.cookies.get(SESSION_COOKIE)
                sessions = (False,)
            for (method, path), rule in rules.items():
                # The answer of the others does not depend on an org.
                is_of_org = rule.kind in ("list", "own_run", "own_org", "write", "run_now")
                for target in ("org_a", "org_b") if is_of_org else ("org_a",):
                    for session in sessions:
                        # A cookie is refused by the API before any query too.
                        if rule.kind != "login" and (on_sqlite or is_page(path) or not session):
                            await self.cell(client, method, path, rule, target, session=session)

    async def cell(
        self, client: Client, method: str, path: str, rule: Rule, target: str, *, session: bool
    ) -> None:
        who, page = client.who, is_page(path)
        writes = rule.kind in ("write", "run_now", "by_staff", *OF_NO_ORG) and method != "GET"
        thing = used_by(path)
        if thing is not None and (thing, target) not in self.unused:
            self.unused[thing, target] = getattr(self.made, thing)(target)
            self.known = {}
        made = self.unused.get((thing, target))
        run = made if thing in ("waiting", "cancelled") else self.made.ended[target]
        generation = made if thing == "new_credential" else 0
        named = {
            "run": run,
            "org": target,
            "name": "digest",
            "code": "x",
            "plan": "x",
            "generation": generation,
        }
        if "{rollout}" in path:
            named["rollout"] = made or self.made.known_rollout
        url = path.format(**named, verb="advance")
        if rule.kind == "bulk":
            url += f"?q={NOTHING}" if method == "GET" else ""
        if rule.kind == "list":
            url += f"?org={target}"
        wanted = expected(rule, who, target, session=session, page=page, path=path)
        if session and who.refused is not None and rule.kind != "open":
            wanted = 401
        if session and not page and rule.kind != "open":
            # A cookie opens pages, never the API.
            wanted = 401
        before = (self.known or self.made.state()) if writes else None
        answer = await client.ask(method, url, session=session)
        called = f"{method} {path} of {target}{' in a session' if session else ''}"
        self.judge(who, called, answer.status_code, wanted)
        self.judge_text(who, called, answer, url)
        if before is not None:
            # An approval is of a pool, and of no org.
            changed = "" if rule.kind in OF_NO_ORG else target
            self.judge_effect(who, called, changed, before, done=wanted == rule.status)
        if wanted == rule.status:
            self.unused.pop((thing, target), None)
        # The router answers HEAD as GET, whichever org it is about.
        if method == "GET" and not session and target == "org_a" and who.name in ASK_HEAD:
            head = await client.ask("HEAD", url, session=session)
            self.judge(who, f"HEAD for {called}", head.status_code, wanted)
        if rule.kind == "logout" and session:
            await client.open(self.made.ended[who.org or "org_a"])

    def judge(self, who: Who, called: str, status: int, wanted: int) -> None:
        self.asked += 1
        if status != wanted:
            self.wrong.append(f"{who.name}: {called}: {status}, not {wanted}")

    def judge_text(self, who: Who, called: str, answer: httpx.Response, url: str) -> None:
        """Nothing of another org is in it, but what the caller itself has asked for."""
        if url.startswith(DOCS):
            # The orgs in it are those of its examples: everybody gets the same.
            if answer.content != PAGES[url.removeprefix(DOCS)] and answer.status_code == 200:
                self.wrong.append(f"{who.name}: {called}: not as it is shipped")
            return
        if who.is_operator or (who.role == "starter" and answer.status_code == 201):
            return
        hidden = set().union(*(names for org, names in self.made.names.items() if org != who.org))
        hidden = {name for name in hidden if name not in url and name not in (who.token or "")}
        said = f"{answer.text} {answer.headers.get('location', '')}"
        if who.refused is not None:
            # A refusal may name the org of the token that it refuses.
            hidden -= {"org_a", "org_z"}
        if leaked := sorted(name for name in hidden if name in said):
            self.wrong.append(f"{who.name}: {called}: names {', '.join(leaked)}")

    def judge_effect(self, who: Who, called: str, target: str, before: State, *, done: bool) -> None:
        self.known = self.made.state()
        changes = self.made.changes(before, self.known)
        if changes.keys() != ({target} if done else set()):
            self.wrong.append(f"{who.name}: {called}: changed {sorted(changes) or 'nothing'}")
        elif done:
            rows = changes[target].get("audit", [])
            if len(rows) != 1 or who.actor not in rows[0]:
                self.wrong.append(f"{who.name}: {called}: audit rows {rows}")


async def test_every_route_of_the_router_has_a_rule(clock: ManualClock):
    access = Access((), {}, lambda code, client_id: None, org_role="viewer", limits=no_limits())  # type: ignore[arg-type,return-value]
    database = Database.open("sqlite:///unused.db", clock=clock)
    app = build(Health(Metrics(version="1.0")), database, access, clock)
    database.close()

    routes = await routes_of(app)
    assert {(method, path) for method, path in routes if method != "HEAD"} == set(RULES)
    own = await routes_of(build_health(Health(Metrics(version="1.0"))))
    assert {(method, path) for method, path in own if method != "HEAD"} <= set(RULES)
    heads = {path for method, path in routes if method == "HEAD"}
    assert heads == {path for method, path in RULES if method == "GET"}


@pytest.mark.timeout(300)
async def test_no_answer_is_wrong(made: Installation):
    matrix = Matrix(made)

    await matrix.run()

    assert matrix.wrong == []
    assert matrix.asked > 1500


# Of the whole file: whether any run is held at all; and, by their ids, those of the org's own definition.
UNSCOPED = ("SELECT 1 FROM live_runs WHERE state = 'held' LIMIT 1",)


@pytest.mark.parametrize("made", ["sqlite"], indirect=True)
async def test_every_statement_of_an_orgs_request_on_sqlite_names_its_org(
    made: Installation, monkeypatch: pytest.MonkeyPatch
):
    """SQLite has no row-level security: there each statement on rows of orgs has to say whose it means."""
    refuse_what_is_for_all_orgs(monkeypatch)
    (who,) = (who for who in made.callers() if who.org == "org_a" and who.role == "operator")
    runs = {org: [made.waiting(org) for _ in range(4)] for org in ("org_a", "org_b")}
    with traced() as statements:
        made.served = Database.open(made.served_url, clock=made.clock, role="web")
        client = Client(made.app(who.org_role), who, made)
        assert await client.open(made.ended["org_a"]) == 303
        done = 0
        for method, path in RULES:
            for target in ("org_a", "org_b"):
                for session in (False, True):
                    run = runs[target].pop() if path.endswith("}/cancel") else made.ended[target]
                    if not path.startswith(("/login", "/logout")):
                        answer = await client.ask(
                            method,
                            path.format(
                                run=run,
                                org=target,
                                name="digest",
                                code="x",
                                plan="x",
                                generation=1,
                                rollout=made.known_rollout,
                                verb="advance",
                            ),
                            session=session,
                        )
                        done += answer.status_code in (200, 201, 303)
        made.served.close()

    named = re.compile(rf"\b(?:FROM|JOIN|INTO|UPDATE)\s+(?:{'|'.join(roles.ORG_DATA)}|run_view|run_ends)\b")
    on_orgs = [statement for statement in statements if named.search(statement)]
    unscoped = {
        statement
        for statement in on_orgs
        if "org_a" not in statement and made.ids["org_a"] not in statement and statement not in UNSCOPED
    }
    assert unscoped == set()
    assert (len(on_orgs) > 100, done > 30) == (True, True)


def refuse_what_is_for_all_orgs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every call of the store fail that is given all orgs for its scope."""

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert ALL_ORGS not in (*args, *kwargs.values()), "an org's request has reached all orgs"
            return function(*args, **kwargs)

        return call

    refused: dict[Callable[..., Any], Callable[..., Any]] = {}
    for module in [module for name, module in sys.modules.items() if name.startswith("worker.")]:
        for name, function in list(vars(module).items()):
            # By its type: some objects that other tests import do not like to be asked for their class.
            if type(function) is not FunctionType or not function.__module__.startswith("worker.store"):
                continue
            if any(
                "Scope" in str(each) or "AllOrgs" in str(each) for each in function.__annotations__.values()
            ):
                new = refused.get(function) or refused.setdefault(function, refusing(function))
                monkeypatch.setattr(module, name, new)
    assert len(refused) > 60


def test_a_call_for_all_orgs_fails_once_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    """The control of the test above: what an operator's request may read fails there."""
    refuse_what_is_for_all_orgs(monkeypatch)
    for call in (edit_runs.find, morning.running, orgs.scope_of):
        with pytest.raises(AssertionError, match="all orgs"):
            call(None, ALL_ORGS)  # type: ignore[arg-type,call-arg]


@contextmanager
def traced() -> Iterator[list[str]]:
    """Every statement, with its values, of the SQLite connections that are opened meanwhile."""
    statements: list[str] = []

    def trace(connection: sqlite3.Connection, record: Any) -> None:
        connection.set_trace_callback(statements.append)

    event.listen(Engine, "connect", trace)
    try:
        yield statements
    finally:
        event.remove(Engine, "connect", trace)


async def test_a_write_that_forgets_its_org_is_seen_here_and_kept_in_by_row_level_security(
    made: Installation, monkeypatch: pytest.MonkeyPatch
):
    """The control: with an operation that looks a run up in all orgs, SQLite's matrix is wrong."""

    def forgetful(connection: Connection, run_id: str, org: str | None) -> Any:
        row = edit_runs.find(connection, ALL_ORGS, RunId(run_id))
        return row or require_run(connection, run_id, org)

    require_run = worker.operations.runs.require_run
    monkeypatch.setattr(worker.operations.runs, "require_run", forgetful)
    matrix = Matrix(made)

    await matrix.run({key: rule for key, rule in RULES.items() if key[1].endswith("/cancel")})

    if made.admin.dialect == "sqlite":
        assert any("org_a as operator" in wrong and "changed ['org_b']" in wrong for wrong in matrix.wrong)
    else:
        assert matrix.wrong == []


@pytest.mark.parametrize("made", ["serve"], indirect=True)
async def test_without_its_roles_the_web_side_serves_nobody_and_tells_operators_the_grant(
    made: Installation, postgres_server: postgres.Server
):
    """It never falls back to the rights of its login."""
    login = made.served_url.split("//")[1].split("@")[0]
    postgres_server.execute(f"REVOKE {roles.WEB}, {roles.OPERATOR} FROM {login}")
    app = made.app("operator")
    for who in made.callers():
        client = Client(app, who, made)
        if (who.is_operator or who.org is not None) and not who.person:
            for method, path in ((m, p) for (m, p), rule in RULES.items() if rule.kind != "document"):
                if not path.startswith(API):
                    continue
                names = {"org": "org_a", "name": "digest", "code": "x", "generation": 1, "rollout": "r"}
                url = path.format(run=made.ended["org_a"], **names)
                answer = await client.ask(method, url, session=False)
                if RANK[who.role] < RANK[RULES[method, path].role]:
                    assert answer.status_code in (403, 503), (who.name, path)
                    continue
                assert answer.status_code == 503, (who.name, path, answer.text)
                error = answer.json()["error"]
                assert error["code"] == "roles_missing"
                assert (f"GRANT {roles.WEB}, {roles.OPERATOR}" in error["fix"]) == who.is_operator, who.name
                assert login not in answer.text
        assert (await client.ask("GET", "/livez", session=False)).status_code == 200
