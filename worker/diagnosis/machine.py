"""Doctor's checks of a machine by its settings: what confines runs here, and who can read or change what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from worker.clock import SystemClock
from worker.errors import ConfigurationError, Diagnostic
from worker.kit.broker import broker_fault
from worker.model.definitions.units import format_duration
from worker.model.egress import OPEN
from worker.process.confinement import OFF, confinement_of, in_words, readable_management_secrets
from worker.process.guarded_files import changeable, guarded
from worker.settings import Settings
from worker.store import health
from worker.wiring.start import BROKER_FIX


def said(check: str) -> tuple[Callable[..., Diagnostic], Callable[..., Diagnostic]]:
    """Functions of detail and fix that make the diagnostic of a check: an ok one, and one that is not."""
    return partial(Diagnostic, check, True), partial(Diagnostic, check, False)


def and_more(found: Sequence[object], most: int = health.NEWEST) -> str:
    if len(found) < 2:
        return ""
    return f"; and {'at least ' if len(found) == most else ''}{len(found) - 1} more"


def insecure_origins(settings: Settings) -> Diagnostic:
    """Anyone on the way to such an origin can read each org's token and use it."""
    ok = said("insecure_origins")[0]
    listed = ", ".join(settings.execution.insecure_origins)
    if not listed:
        return ok("tokens are always sent encrypted")
    return ok(
        f"tokens can be sent unencrypted to {listed}",
        "serve it over https and remove it from [execution] insecure_origins",
    )


def sandbox(settings: Settings) -> Diagnostic:
    """How a worker that starts here and now would confine handlers."""
    ok, bad = said("sandbox")
    try:
        confinement = confinement_of(_with(settings, network="auto"))
    except ConfigurationError as error:
        return bad(error.message, error.fix)
    if confinement.narrowed:
        detail = f"{confinement.level}; {in_words(confinement.narrowed[0])}"
        return bad(detail, "move it elsewhere, or allow handlers a smaller folder")
    if confinement.level == OFF:
        return ok(OFF, "handlers can read all that the worker's user can; set it to auto")
    if confinement.rules is None:
        return bad(confinement.level, "use Linux 6.12 or newer with Landlock turned on")
    return ok(confinement.level)


def network(settings: Settings) -> Diagnostic:
    """Whether a worker that starts here and now could seal runs, so that they reach only what is listed."""
    ok, bad = said("network")
    policy = settings.execution.network
    if policy == "open":
        return ok(
            '[execution] network = "open": no run is sealed, whatever handlers and definitions list',
            "set it to auto",
        )
    try:
        confinement = confinement_of(_with(settings, sandbox=_unless_required(settings)))
    except ConfigurationError as error:
        return bad(error.message, error.fix)
    if confinement.unsealed is not None:
        return ok(
            f"no run can be sealed here, so that what it lists does not bind it: {confinement.unsealed}",
            "use Linux 6.12 or newer with Landlock and seccomp turned on and sandbox not off",
        )
    execution, most = settings.execution, ", ".join(settings.execution.egress)
    detail = "runs can be sealed" + (f", with at most {most}" if most else "")
    capped = bool(most) and OPEN not in execution.egress
    if execution.inline and (capped or policy == "require"):
        unless = "" if capped else ' unless their @job has egress=["open"]'
        return ok(
            f"{detail}; inline runs of {', '.join(execution.inline)} cannot, and fail{unless}",
            'give their definitions isolation = "child"',
        )
    return ok(detail)


def broker(settings: Settings) -> Diagnostic:
    """Whether the broker of a worker that starts here and now comes up: without it no request is sent."""
    ok, bad = said("broker")
    try:
        confinement = confinement_of(_with(settings, network="auto", sandbox=_unless_required(settings)))
    except ConfigurationError as error:
        return bad(error.message, error.fix)
    fault = broker_fault(settings, SystemClock(), confinement)
    if fault is None:
        return ok("the process that sends the requests of runs starts")
    return bad(f"the process that sends the requests of runs does not start here: {fault}", BROKER_FIX)


def _unless_required(settings: Settings) -> str:
    """The sandbox, without what the check `sandbox` reports."""
    return "off" if settings.execution.sandbox == "off" else "auto"


def _with(settings: Settings, **execution: str) -> Settings:
    return settings.model_copy(update={"execution": settings.execution.model_copy(update=execution)})


def changeable_files(settings: Settings) -> Diagnostic:
    """Files with secrets that handlers could open to other accounts, if workers run as this user."""
    ok, bad = said("changeable_files")
    found = changeable(guarded(settings))
    if not found:
        return ok("handlers cannot change the modes of key ring and settings")
    detail = f"handlers could open {found[0]} to other accounts (chmod){and_more(found)}"
    if settings.execution.sandbox != "require":
        return ok(f"{detail}; a worker restores modes, and require forbids it")
    return bad(
        f"{detail}; from the next release on, a worker or host exits with 78",
        "let another account own it (chown root:GROUP, chmod 0640), or mount it read-only",
    )


def trusted_code(settings: Settings) -> Diagnostic:
    """Plug-in code outside every sandbox: inline handlers, and what the zygote imports."""
    ok = said("trusted_code")[0]
    execution = settings.execution
    trusted = {"preload": execution.preload, "inline": execution.inline}
    named = [f"{setting}: {', '.join(names)}" for setting, names in trusted.items() if names]
    return ok("; ".join(named) or "none: each handler has its own process")


def management_secrets(settings: Settings) -> Diagnostic:
    """The secret of a management API opens those of all orgs, so workers must not be able to read it."""
    ok = said("management_secrets")[0]
    readable = readable_management_secrets(settings)
    if not readable:
        return ok("this user cannot read the secret of a management API")
    return ok(
        f"this user may read {', '.join(readable)}",
        "if workers run as this user, move it to a secrets_dir that only provisioning uses",
    )


def database_password(settings: Settings) -> Diagnostic:
    """Handlers can use the network, so the database must ask for a password."""
    ok, bad = said("database_password")
    database = settings.database
    if database.sqlite_file is not None:
        return ok("SQLite is a file, not a server")
    urls = [url for url in (database.url, database.owner_url) if url]
    open_to = [user for url in urls for user in health.users_without_password(url)]
    if not open_to:
        return ok("the database asks for a password")
    return bad(
        f"the database accepts logins without a password: {', '.join(dict.fromkeys(open_to))}",
        "in pg_hba.conf use scram-sha-256 for this user, not trust, peer or ident",
    )


def request_keys(settings: Settings) -> Diagnostic:
    """A key of the API ends with its run: then a relay that sends a start again makes another run."""
    ok = said("request_keys")[0]
    retention, relayed = settings.retention, settings.relay.key_holds
    by_state = {name: getattr(retention, name) for name in ("succeeded", "failed", "skipped")}
    name = min(by_state, key=by_state.__getitem__)
    shortest, longest = format_duration(by_state[name]), format_duration(relayed)
    if by_state[name] > relayed:
        return ok(f"a key of the API holds for {shortest} or more; relays send starts again for {longest}")
    return ok(
        f"a key of the API may end after {shortest} ([retention] {name}), and relays send a start without an "
        f"answer again for {longest}: it may run twice",
        "retain runs longer, or give relays a shorter key_holds, in [relay] here, too",
    )


# Of a worker, and of a host.
OF_HOST = (sandbox, network, broker, changeable_files, trusted_code)
OF_SETTINGS = (insecure_origins, *OF_HOST, management_secrets, database_password, request_keys)
