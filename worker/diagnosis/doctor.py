"""Doctor: find slow or silent faults and say how to fix them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from worker.clock import to_text
from worker.diagnosis.machine import OF_SETTINGS, and_more, said
from worker.diagnosis.matters import DAY, listed, what_of
from worker.errors import ConfigurationError, Diagnostic
from worker.handlers.ceiling import may_run
from worker.ids import ALL_ORGS
from worker.model.claims import PoolRules
from worker.model.definitions.pools import DEFAULT_POOL
from worker.model.definitions.units import format_duration
from worker.model.runs import worker_ends
from worker.model.runs.next_steps import NextStep
from worker.operations import approvals
from worker.operations.handlers import Handlers
from worker.operations.installation import ADOPT, NO_WORD, difference
from worker.settings import Settings
from worker.store import calendars, catalogue, health, placements, places, pools, roles
from worker.store import installation as stored_installation
from worker.store import org_secrets as stored_secrets
from worker.store.database import Database
from worker.store.dialect import Row
from worker.store.lists.failures import mismatches
from worker.store.lists.morning import NAMED, CappedCount, Named
from worker.store.lists.morning import crashed as crashed_workers

if TYPE_CHECKING:
    from worker.tokens.sealing import KeyRing

# Seconds after which a held snapshot makes the hot tables grow; the worker's transactions last milliseconds.
SNAPSHOT_SECONDS = 60.0
# Crashed workers and hosts that are named.
MAX_CRASHES = 3
CRASHED = "the log of that machine says why"
# Seconds after which a scheduled time should have been fired.
OVERDUE_SECONDS = 60.0
# A calendar with no date after this needs new ones.
CALENDAR_AHEAD = timedelta(days=30)
# Transactions that a replica, a slot or a prepared transaction can lag behind.
SNAPSHOT_TRANSACTIONS = 100_000
# Secrets of orgs that are opened to see whether they can be.
MAX_OPENED = 1_000


NameOf = Callable[[str], str]


def run_checks(
    database: Database,
    settings: Settings,
    ring: KeyRing | None = None,
    *,
    org: NameOf = str,
) -> list[Diagnostic]:
    """Every check, in reading order. An `ok` one with a `fix` is a warning.

    `ring` opens the stored secrets; None without one. `org` is how a diagnostic names an org. They name
    no machine and quote no handler's message, so that they can be sent to others.

    Raises:
        StoreUnavailable: the database did not answer.
    """
    return [
        *(check(database) for check in (held_snapshots, live_rows, web_roles, file_modes)),
        *(check(settings) for check in OF_SETTINGS),
        installation(database, settings),
        workers(database),
        credentials(database, org),
        *tokens(database, org),
        *org_secrets(database, ring, org),
        handlers(database),
        *undeclared_egress(database, settings),
        *revealed_tokens(database, org),
        *unbatched(database, settings, org),
        *unapproved(database),
        *homeless(database, org),
        served_pools(database, org),
        pool_rules(database, settings),
        ending_calendars(database),
        *(placed_pool(database, pool) for pool in settings.placed_by_temporal),
    ]


def installation(database: Database, settings: Settings) -> Diagnostic:
    """A copy of a database has what another installation made at the provider; the word tells them apart."""
    (ok, bad), word = said("installation"), settings.installation
    with database.autocommit() as connection:
        found = stored_installation.read(connection)
    state = found.state(word)
    if state == "matches":
        return ok(f"worker.toml and the database belong to {word}")
    if state == "differs":
        return bad(difference(word, found), ADOPT)
    if not word:
        fix = f"{NO_WORD}, then run `python -m worker db upgrade`"
        if found.word is not None:
            # A copy must not take over the word of what it was copied from.
            fix = f'add installation = "{found.word}" at the top of worker.toml, or another word in a copy'
        return ok("worker.toml does not name this installation", fix)
    return ok(
        f"the database does not name its installation, worker.toml does: {word}",
        "run `python -m worker db upgrade`, or in a copy `installation adopt --new`",
    )


def workers(database: Database) -> Diagnostic:
    """A worker that died holds its runs until another one takes over; without one, nothing runs."""
    ok, bad = said("workers")
    with database.autocommit() as connection:
        now = database.now(connection)
        crashed = crashed_workers(connection, ALL_ORGS, now - DAY)
        lost = health.lost_workers(connection)
        alive = len(health.live_workers(connection))
        overdue = health.oldest_unfired(connection)
    if lost:
        first = lost[0]
        who = f"host {first['of_host']}" if first["of_host"] else "worker"
        detail = (
            f"{who} {first['id']} (process {first['pid']}) is silent since {to_text(first['renewed_at'])}"
        )
        how = f"{alive} live ones take" if alive else "start one (`systemctl start orgworker`): it takes"
        return bad(
            f"{detail}: its lease expired at {to_text(first['lease_until'])}{and_more(lost)}",
            f"{how} over its runs within the length of a lease; its log says whether it died or was cut off",
        )
    since = _crashes(crashed, now)
    if alive:
        up = "1 worker is up" if alive == 1 else f"{alive} workers are up"
        return ok(up + since, CRASHED if since else "")
    if overdue is not None and overdue[2] > OVERDUE_SECONDS:
        late = format_duration(timedelta(seconds=round(overdue[2])))
        detail = f"no worker is up, and what has been due for {late} does not run{since}"
        return bad(detail, "start one: `python -m worker run`, or `systemctl start orgworker`")
    return ok(f"no worker is up, and nothing is due{since}", CRASHED if since else "")


def _crashes(found: CappedCount, now: datetime) -> str:
    """Which workers and hosts crashed within the last day, and who recovered how many of their runs."""
    if not found.total:
        return ""
    ends = [worker_ends.named_end(row, now) for row in found.examples[:MAX_CRASHES]]
    rest = [f"{found.total - len(ends):,} more"] if found.total > len(ends) else []
    return f"; within a day: {'; '.join([*ends, *rest])}"


def credentials(database: Database, org: NameOf = str) -> Diagnostic:
    """An org whose credentials are all rejected gets no token: its runs wait."""
    ok, bad = said("credentials")
    with database.autocommit() as connection:
        dead = health.dead_credentials(connection)
    if not dead:
        return ok("no issuer has rejected all credentials of an active org")
    code = org(dead[0]["code"])
    return bad(
        f"{code} gets no token: {dead[0]['last_error']}{and_more(dead)}",
        f"`credentials rotate {code} --client-id ID --secret-file FILE` stores a new secret; "
        f"{_command('check_org', org=code)} tries it",
    )


def tokens(database: Database, org: NameOf = str) -> Iterator[Diagnostic]:
    """A provider that gave orgs the tokens of others in the last day: their runs are refused."""
    ok, bad = said("tokens")
    with database.autocommit() as connection:
        found = mismatches(connection, ALL_ORGS, database.now(connection) - DAY)
    for one in found:
        orgs = [org(code) for code in one.orgs[:NAMED]]
        yield bad(
            f"the provider returns {what_of(one)} for {listed(Named(len(one.orgs), orgs))}; runs are refused "
            f"since {to_text(one.first_at)}",
            f"{_command('check_org', org=orgs[0])} says whose token it is; correct the credentials, or the "
            "provider or proxy that mixes orgs up",
        )
    if not found:
        yield ok("in the last day no org had the token of another one")


def org_secrets(database: Database, ring: KeyRing | None, org: NameOf = str) -> Iterator[Diagnostic]:
    """A secret that the key ring does not open: runs that need it wait. Nothing if no org has secrets.

    Tries the newest ones, and warns of those that handlers get in clear.
    """
    ok, bad = said("secrets")
    with database.autocommit() as connection:
        rows = stored_secrets.newest(connection, ALL_ORGS, limit=MAX_OPENED)
        declared = Handlers(connection).declared_secrets() if rows else set()
    closed = [row for row in rows if not _opens(ring, row)]
    if closed:
        first = closed[0]
        code, secret = org(first["org"]), first["name"]
        yield bad(
            f"the key ring here does not open the secret {secret} of {code}{and_more(closed, MAX_OPENED)}",
            f"put the key {first['key_id']} back into the key ring, or `secrets remove {code} {secret}` and "
            f"`secrets add {code} {secret}`, with --for ORIGIN if it was bound",
        )
    elif rows:
        yield ok("the key ring opens the secrets of orgs")
    if clear := [row for row in rows if row["origin"] is None and row["name"] in declared]:
        names = [f"{row['name']} of {org(row['org'])}" for row in clear[:NAMED]]
        named = listed(Named(len(clear), names), at_least=len(rows) == MAX_OPENED)
        code, secret = org(clear[0]["org"]), clear[0]["name"]
        yield ok(
            f"handlers get secrets in clear, and could send them anywhere: {named}",
            f"bind each to its service: `secrets bind {code} {secret} --for ORIGIN`",
        )


def _opens(ring: KeyRing | None, row: Row) -> bool:
    if ring is None:
        return False
    try:
        ring.unseal_secret(row["sealed"], row["key_id"], **stored_secrets.place_of(row))
    except ConfigurationError:
        return False
    return True


def handlers(database: Database) -> Diagnostic:
    """A handler that does not load: the runs of its definitions wait."""
    ok, bad = said("handlers")
    with database.autocommit() as connection:
        broken = [row for row in catalogue.entries(connection) if row["error"] is not None]
        on_hosts = [] if broken else places.broken(connection)
    if not broken and not on_hosts:
        return ok("every handler loads")
    first = (broken or on_hosts)[0]
    place = f"{first['name']} of {first['distribution']} {first['version']}"
    place += "" if broken else f" on hosts of pool {first['pool']}"
    more = and_more(broken) if broken else and_more(on_hosts, places.BROKEN)
    return (bad if broken else ok)(
        f"{place} does not load: {type_of(first['error'])}{more}",
        f"install a fixed version and restart {'the workers' if broken else 'these hosts'}; "
        f"{_command('show_handler', handler=first['name'])} shows why",
    )


def unapproved(database: Database) -> Iterator[Diagnostic]:
    """What hosts declare that is not approved; a warning unless a definition's runs wait, too.

    Names keys and not their values, which hosts choose. Nothing without hosts.
    """
    ok, bad = said("approvals")
    with database.autocommit() as connection:
        rows = approvals.declared(connection)
        waiting = [row for row in rows if not row["approved"]]
        uses = places.uses(connection, ALL_ORGS, {row["handler"] for row in waiting}) if waiting else []
    if rows and not waiting:
        yield ok("all that hosts declare is approved")
    if waiting:
        blocking = [row for row in waiting if any(_waits(row, use) for use in uses)]
        first = (blocking or waiting)[0]
        more = f"; and {len(waiting) - 1} more" if len(waiting) > 1 else ""
        yield (bad if blocking else ok)(
            f"hosts of pool {first['pool']} declare {', '.join(first['pending'])} for {first['handler']} "
            f"beyond what is approved{'; its runs wait' if blocking else ''}{more}",
            f"look at it with `pools approvals`; `{approvals.command_of(first)}` approves it",
        )


def _waits(row: Row, use: Row) -> bool:
    """Whether runs of a definition wait for the approval of a row."""
    if (use["handler"], use["pool"] or DEFAULT_POOL) != (row["handler"], row["pool"]):
        return False
    return not may_run(row["pending"], use["spec"], scopes=row["scopes"])


def homeless(database: Database, org: NameOf = str) -> Iterator[Diagnostic]:
    """Definitions of handlers that only hosts offer, without a pool: their runs reach no host."""
    bad = said("hosts_only")[1]
    with database.autocommit() as connection:
        used = places.uses(connection, ALL_ORGS, places.only_of_hosts(connection))
        found = [row for row in used if row["pool"] is None]
        pools_of = places.pools_with(connection, found[0]["handler"]) if found else []
    if found:
        first = found[0]
        written = "its template" if first["template_id"] is not None else "it"
        yield bad(
            f"only hosts offer {first['handler']}, and a definition of {org(first['org'])} names no pool"
            f"{and_more(found)}",
            f'give {written} pool = "{pools_of[0] if pools_of else "POOL"}", or its org a pool; '
            f"{_command('show_handler', handler=first['handler'])} shows who offers it",
        )


def served_pools(database: Database, org: NameOf = str) -> Diagnostic:
    """A definition whose pool no worker or host serves: its runs wait. Looks at the newest definitions."""
    ok, bad = said("pools")
    with database.autocommit() as connection:
        served = pools.slots_of(health.live_workers(connection))
        wanted = pools.of_definitions(connection)
    if not served:
        return ok("no worker is up to serve a pool")
    lacking = sorted(wanted.keys() - served.keys())
    if not lacking:
        return ok(f"workers and hosts serve {', '.join(sorted(served))}")
    pool = lacking[0]
    return bad(
        f"no worker or host serves pool {pool}, where a definition of {org(wanted[pool])} runs"
        f"{and_more(lacking)}",
        f"start a host of it, add it to [execution] pools of a worker, or correct the name; "
        f"`pools list` shows what waits for {pool}",
    )


def placed_pool(database: Database, pool: str) -> Diagnostic:
    """A handler that only some hosts of a pool offer which Temporal places: its runs wait."""
    ok, bad = said("placed_pool")
    with database.autocommit() as connection:
        lacking = placements.unplaced_handlers(connection, pool)
    if not lacking:
        return ok(f"the hosts of pool {pool} offer the same handlers")
    return bad(
        f"not all hosts of pool {pool} offer {lacking[0]}, so its runs are not placed{and_more(lacking)}",
        f"install the same plug-ins on all hosts of {pool}; `hosts list` shows them",
    )


def pool_rules(database: Database, settings: Settings) -> Diagnostic:
    """What pools require: the same in every configuration, and only of pools that are served."""
    ok, bad = said("pool_rules")
    with database.autocommit() as connection:
        rules = PoolRules(settings.pool_rules, pools.rules(connection))
        alive = health.live_workers(connection)
    if rules.differing:
        pool = min(rules.differing)
        return bad(
            f"[pools.{pool}] requires {_rule(rules.own[pool])} here, and {_rule(rules.stored.get(pool, {}))} "
            f"is stored{and_more(sorted(rules.differing))}",
            "give every worker the same [pools], and restart those with older rules: they take no run of it",
        )
    served = pools.slots_of(alive)
    unserved = sorted(pool for pool in rules.stored if pool not in served)
    if alive and unserved:
        return ok(
            f"pool {unserved[0]} has rules, and no worker or host serves it{and_more(unserved)}",
            f"start one, correct the name in worker.toml, or `pools forget {unserved[0]}`",
        )
    stored = ", ".join(f"{pool} requires {_rule(rule)}" for pool, rule in sorted(rules.stored.items()))
    return ok(stored or "no pool has rules")


def ending_calendars(database: Database) -> Diagnostic:
    """Calendars in use that have no later dates: definitions run on the holidays after the last one."""
    ok = said("calendars")[0]
    with database.autocommit() as connection:
        until = (database.now(connection) + CALENDAR_AHEAD).date()
        ending = calendars.ending(connection, until)
    if not ending:
        return ok("every calendar in use has dates for the next 30 days or more")
    first = ending[0]
    last = "no dates" if first["last_date"] is None else f"no date after {first['last_date']}"
    return ok(
        f"calendar {first['name']} has {last}{and_more(ending)}",
        f"apply a file that has its next dates, too; `calendars show {first['name']}` says what uses it",
    )


def _rule(required: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in sorted(required.items())) or "nothing"


def type_of(error: str) -> str:
    """The type of an error only: its message comes from the plug-in's import."""
    return error.partition(":")[0][:80]


def _command(verb: str, **subject: str) -> str:
    return f"`{NextStep(verb, subject).command}`"


def held_snapshots(database: Database) -> Diagnostic:
    """A held snapshot keeps every row that has ended since, and slows admission down."""
    ok, bad = said("held_snapshots")
    if database.dialect == "sqlite":
        return ok("SQLite holds no snapshots")
    with database.autocommit() as connection:
        holders = health.snapshot_holders(connection)
    old = [holder for holder in holders if too_old(holder)]
    if not old:
        oldest = max((holder.seconds or 0.0 for holder in holders), default=0.0)
        return ok(f"the oldest is {oldest:.0f} s old")
    first = old[0]
    lasting = "" if first.seconds is None else f", for {first.seconds:.0f} s"
    fixes = {
        "session": "end it: SELECT pg_terminate_backend(PID); run dumps and reports on a replica",
        "prepared": "ROLLBACK PREPARED it, or finish it, in the program that prepared it",
        "slot": "drop the replication slot if it is not used any more",
    }
    return bad(
        f"{len(old)} held; the oldest by {first.kind} {first.name} "
        f"({first.application or 'unnamed'}, {first.state}){lasting}, {first.transactions} transactions back",
        fixes[first.kind],
    )


def too_old(holder: health.Holder) -> bool:
    """Whether it delays vacuum too long: by time for a session's transaction, else by distance."""
    if holder.seconds is not None and holder.kind == "session":
        return holder.seconds > SNAPSHOT_SECONDS
    return holder.transactions > SNAPSHOT_TRANSACTIONS


def live_rows(database: Database) -> Diagnostic:
    """A run has a live row exactly until it ends."""
    ok, bad = said("live_rows")
    with database.autocommit() as connection:
        strayed = health.strayed(connection)
    if not strayed:
        return ok("every unfinished run has its live row, and no other run does")
    run_id, fault = strayed[0]
    return bad(
        f"{len(strayed)} or more disagree, such as run {run_id}: {fault}",
        "another program has written to runs or live_runs, or a backup was partly restored; "
        "report it with the output of `runs show`",
    )


def web_roles(database: Database) -> Diagnostic:
    """The web side uses two roles of its own; a login that cannot take them answers 503."""
    ok, bad = said("web_roles")
    if database.dialect == "sqlite":
        return ok("SQLite has no roles")
    with database.autocommit() as connection:
        missing = roles.missing(connection)
    if not missing:
        return ok(f"the login can act as {roles.WEB} and {roles.OPERATOR}")
    return bad(*missing.split(": ", 1))


def file_modes(database: Database) -> Diagnostic:
    """New files are readable by their owner only; those of an older release can be open to others."""
    ok = said("file_modes")[0]
    if database.dialect != "sqlite":
        return ok("PostgreSQL has no database file here")
    with database.autocommit() as connection:
        file = health.sqlite_file(connection)
    folder = file.parent
    searched = folder.stat().st_mode
    found = [path for path in (*sorted(folder.glob(f"{file.name}*")), folder / "keyring") if path.is_file()]
    # Others need r on the file and x on the folder.
    open_to = [path for path in found if path.stat().st_mode >> 2 & searched & _others(path)]
    if not open_to:
        return ok(f"only their owner can read the files in {folder}")
    names = " ".join(path.name for path in open_to)
    return ok(f"others can read in {folder}: {names}", f"there: chmod go= {names}")


def _others(path: Path) -> int:
    """x for group and others; not for the group, by which this account reads a file that another one owns."""
    return 0o011 if path.stat().st_uid == os.geteuid() else 0o001


def undeclared_egress(database: Database, settings: Settings) -> Iterator[Diagnostic]:
    """Handlers that declare no egress. Nothing if there is no handler, or no run is sealed anyway."""
    ok, policy = said("egress")[0], settings.execution.network
    with database.autocommit() as connection:
        total, silent = places.undeclared_egress(connection)
    if policy == "open" or not total:
        return
    if not silent:
        yield ok("every handler declares what it reaches")
        return
    named = listed(Named(len(silent), silent[:NAMED]))
    if policy == "require":
        meaning = "their runs reach only the api_origins"
    elif settings.execution.egress:
        meaning = "their runs reach all that [execution] egress lists"
    else:
        meaning = "their runs keep the network, the org's token and its unbound secrets"
    yield ok(
        f"handlers that declare no egress: {named}; {meaning}",
        'add a line to their @job: egress=["api"], with the other origins that they reach',
    )


def unbatched(database: Database, settings: Settings, org: NameOf = str) -> Iterator[Diagnostic]:
    """Definitions whose model requests go into batches, without an API or a key; nothing without any."""
    ok, bad = said("batches")
    with database.autocommit() as connection:
        rows = places.batching(connection, ALL_ORGS)
    if not rows:
        return
    keys = {name: Path(settings.secrets_dir) / f"model_key__{name}" for name in settings.batches}
    keyless = [name for name, file in keys.items() if not settings.secrets_dir or not file.exists()]
    first = f"a definition of {rows[0]['handler']} by {org(rows[0]['org'])}"
    if not keys:
        yield bad(
            f'{first} has model_requests = "batch", and worker.toml has no [batches.NAME]: its requests are '
            f"sent at once, at the full price{and_more(rows, places.REVEALING)}",
            "add [batches.NAME] with provider and secret, as the page Batches of the documentation says",
        )
    elif keyless:
        says = [f"{name} (of orgs: {settings.batches[name].secret or 'none'})" for name in keyless]
        yield ok(
            f"[batches] has no operator's key for {', '.join(says)}: requests of orgs without a key of their "
            "own are sent at once, at the full price",
            f"write the key into {keys[keyless[0]].name} in secrets_dir, or give each org that secret",
        )
    else:
        yield ok(f"the model requests of {first} go into batches{and_more(rows, places.REVEALING)}")


def revealed_tokens(database: Database, org: NameOf = str) -> Iterator[Diagnostic]:
    """Definitions whose sealed runs get the org's token itself; nothing without any."""
    ok = said("reveal_token")[0]
    with database.autocommit() as connection:
        rows = places.revealing(connection, ALL_ORGS)
    if rows:
        first = rows[0]
        yield ok(
            f"runs of a definition of {first['handler']} by {org(first['org'])} get the org's token itself, "
            f"also if they are sealed{and_more(rows, places.REVEALING)}",
            "remove reveal_token where ctx.http, which adds the token, is enough; `definitions list -o json` "
            "has a column reveal_token",
        )
