"""Every exception of the project, and the result of a check.

The class says what happened and whether a retry may help. The message names the org, the run and the fix.
No message contains a secret, a token or a full claim set.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# Under this name for the rest of the project; the guard's own package imports nothing from here.
from worker.guard.errors import ConfigurationError as ConfigurationError
from worker.guard.errors import IssuerUnavailable as IssuerUnavailable
from worker.guard.errors import KeyNotPublished as KeyNotPublished
from worker.guard.errors import TokenError as TokenError
from worker.guard.errors import TokenRefused as TokenRefused
from worker.guard.errors import Unavailable as Unavailable
from worker.guard.errors import WorkerError as WorkerError

# A kind, a name, and the org of a definition.
Sought = tuple[Literal["org", "definition", "template", "calendar", "handler"], str, str | None]


class UsageError(WorkerError):
    """The command line or the request is invalid."""

    code = "usage"
    exit_code = 2


class AmbiguousRun(UsageError):
    """Several runs fit what was given of an id.

    `candidates` are some of them, newest first, with `id`, `org`, `definition` and `scheduled_for`.
    """

    code = "ambiguous"
    usual_fix = "give more of its beginning or its end, or the whole id"

    def __init__(self, message: str, *, candidates: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(message)
        self.candidates = candidates


class NotFound(WorkerError):
    """The named object does not exist or belongs to another org.

    `sought` is what was named: its kind and name, and the org of a definition. The command line, whose
    user may see all names, suggests similar ones.
    """

    code = "not_found"
    exit_code = 3

    def __init__(self, message: str, *, fix: str = "", sought: Sought | None = None) -> None:
        super().__init__(message, fix=fix)
        self.sought = sought


class Conflict(WorkerError):
    """The state of the object does not allow the change."""

    code = "conflict"
    exit_code = 5


class PreconditionFailed(Conflict):
    """The object is no longer at the revision that the change was made for."""


class CanaryFailed(WorkerError):
    """Not all of the first few succeeded; the others were not changed."""

    code = "canary_failed"


class NothingImported(WorkerError):
    """No entry of a crontab or a source could become a definition."""

    code = "nothing_imported"


class RolesMissing(ConfigurationError):
    """The database login cannot take the roles that the web side needs."""

    code = "roles_missing"
    usual_fix = (
        "GRANT orgworker_web, orgworker_operator TO this process's login; "
        "`python -m worker db check` names it (the documentation's page Many workers on one PostgreSQL)"
    )


class InstallationMismatch(ConfigurationError):
    """The database may be a copy of another installation's, so nothing is changed at a provider."""

    code = "installation_mismatch"


class DefinitionError(WorkerError):
    """A definition is invalid; `entry` and `field` name the place, `others` are later errors of its file."""

    code = "definition"
    exit_code = 78
    usual_fix = (
        "correct it and try again, nothing was changed; the documentation's page Files lists every key"
    )

    def __init__(self, message: str, *, entry: str = "", field: str = "", fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.entry = entry
        self.field = field
        self.others: tuple[DefinitionError, ...] = ()


class InvalidTrigger(DefinitionError):
    """A schedule or time zone is invalid, or can never fire."""

    code = "invalid_trigger"


class UnknownHandler(DefinitionError):
    """No installed distribution offers the handler, or it cannot be loaded."""

    code = "unknown_handler"


class CredentialsRejected(TokenError):
    """The issuer answered `invalid_client` or similar; a retry does not help (RFC 6749, 5.2)."""

    code = "credentials_rejected"


class RequestRejected(TokenError):
    """The issuer rejected the request itself, such as `invalid_scope` (RFC 6749, 5.2)."""

    code = "request_rejected"


class AnswerTooLarge(IssuerUnavailable):
    """The issuer's answer for one org is larger than a token may be; a retry does not help.

    It is about that org's token, so it says nothing about the issuer.
    """

    code = "answer_too_large"
    exit_code = 1
    transient = False
    detail = "answer_too_large"


class Throttled(TokenError):
    """The issuer asked for fewer requests."""

    code = "throttled"
    usual_fix = "wait; if it happens often, lower max_requests_per_second of the issuer"
    transient = True


class ProviderThrottled(Throttled):
    """The provider's management API asks for a pause of more than five minutes."""

    code = "provider_throttled"
    exit_code = 75


class AccessDenied(WorkerError):
    """The caller may not see or do this."""

    code = "denied"
    exit_code = 4


class TooManyRequests(WorkerError):
    """A caller or an address sends too many requests."""

    code = "too_many_requests"
    usual_fix = (
        "wait as long as Retry-After says; web.logins_per_minute and web.calls_per_second set the limits"
    )
    exit_code = 75
    transient = True


class LeaseLost(WorkerError):
    """This process no longer owns the run: a newer fencing token exists, or the run has ended."""

    code = "lease_lost"


class ProviderUnavailable(Unavailable):
    """The provider's management API did not respond, or with a 5xx or a malformed response."""

    code = "provider_unavailable"
    usual_fix = (
        "try again; if it persists, check that url in [issuers.NAME.management] is correct and reachable"
    )


class Unclear(ProviderUnavailable):
    """A change was sent to the provider, and no response says whether it was carried out.

    Look up what happened before sending it again.
    """

    code = "unclear"
    usual_fix = "run the command again: it looks up what happened, and goes on from there"


class ProviderRefused(WorkerError):
    """The provider refuses the request; `detail` is its error code, or empty."""

    code = "provider_refused"
    usual_fix = "look at the org and its applications at the provider, and at what your plan there allows"


class ForeignApplication(WorkerError):
    """The provider's response names an application that is not the one asked for; nothing was changed."""

    code = "foreign_application"
    usual_fix = (
        "compare the application's name at the provider with the org; if it was renamed, name it as before"
    )


class WebhookRefused(AccessDenied):
    """A webhook is not genuine, too old or malformed; `detail` is the code of the check that failed."""

    code = "webhook_refused"
    usual_fix = "let only the provider send webhooks here; check this machine's clock and the issuer's url"

    def __init__(self, detail: str, message: str) -> None:
        super().__init__(f"the webhook was refused: {message}", detail=detail)


class StoreUnavailable(Unavailable):
    """The database did not respond."""

    code = "database_unavailable"
    usual_fix = "check that the database is up and reachable; `config show` says which one it is"


class Busy(Unavailable):
    """Another process holds what this one needs; try again later."""

    code = "busy"
    exit_code = 75


# Names that share only a prefix such as org_ are not close.
_CLOSE = 0.7
# Names that are suggested.
_MAX_CLOSE = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean org_acme?` for a wrong name, with the closest known ones; empty if none is close.

    A name that contains the wrong one as a word is close, too, as org_acme is to acme.
    """
    # Not on the way of any process that has no such error.
    from difflib import get_close_matches

    names = sorted(set(known))
    words = [one for one in names if name.lower() in re.split(r"[_.\-\s]+", one.lower())]
    # A word of many, such as org, says nothing.
    words = words if len(words) <= _MAX_CLOSE else []
    similar = get_close_matches(name, names, n=_MAX_CLOSE, cutoff=_CLOSE)
    close = [*dict.fromkeys([*words, *similar])][:_MAX_CLOSE]
    if not close:
        return ""
    return f"did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?"


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """The result of one check; `fix` says what to do, or what could be better if it is `ok`."""

    check: str
    ok: bool
    detail: str
    fix: str = ""
