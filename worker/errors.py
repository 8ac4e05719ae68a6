"""Every exception of the project, drawn as a tree.

WorkerError
├── UsageError                 the command line or a request is malformed
├── NotFound                   the thing named does not exist
├── Conflict                   the state of the thing forbids the change
├── CanaryFailed               the first few did not all succeed, so the rest was left alone
├── ConfigurationError         worker.toml, the key ring or the schema version; RolesMissing
├── DefinitionError            InvalidTrigger, UnknownHandler
├── TokenError
│   ├── CredentialsRejected    the issuer answered that it does not know this client or secret
│   ├── RequestRejected        the issuer refused the request itself: audience, scope, grant type
│   ├── Throttled              the issuer asked for fewer requests (transient)
│   └── TokenRefused           a token that fails verification or enforcement
├── AccessDenied               a caller of ours may not see or do this
├── TooManyRequests            a caller or an address asks too often (transient)
├── LeaseLost                  this process no longer owns the run
└── Unavailable                IssuerUnavailable, StoreUnavailable, Busy (transient)

The class says what happened and whether a retry may help; the message says which
org and run and what to do. No secret, no token and no full claim set stands in one.
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base of all errors of the project.

    `code` is the stable word for it in JSON and logs, `exit_code` the process exit
    code, `fix` one sentence that says what to do (`usual_fix` where none is given),
    `transient` whether another try may help without anybody's doing.
    """

    code = "error"
    usual_fix = ""
    exit_code = 1
    transient = False
    # Seconds after which another try may help, where that is known.
    retry_after: float | None = None

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix or self.usual_fix


class UsageError(WorkerError):
    """The command line or the request is malformed."""

    code = "usage"
    exit_code = 2


class NotFound(WorkerError):
    """The thing named does not exist, or is another org's."""

    code = "not_found"
    exit_code = 3


class Conflict(WorkerError):
    """The state of the thing forbids what was asked."""

    code = "conflict"
    exit_code = 5


class CanaryFailed(WorkerError):
    """Of the few that were tried first not all succeeded; the rest was left alone."""

    code = "canary_failed"


class ConfigurationError(WorkerError):
    """`worker.toml`, the environment, the key ring or the schema version is not usable."""

    code = "configuration"
    exit_code = 78


class RolesMissing(ConfigurationError):
    """The database's login may not take a role that the web side acts in."""

    code = "roles_missing"
    usual_fix = (
        "GRANT orgworker_web, orgworker_operator TO this process's login; "
        "`python -m worker db check` names it (docs/operating/postgresql.md)"
    )


class DefinitionError(WorkerError):
    """A definition cannot be accepted; `entry` and `field` name the place."""

    code = "definition"
    exit_code = 78
    usual_fix = "correct it and try again, nothing was changed; docs/reference/files.md has every key"

    def __init__(self, message: str, *, entry: str = "", field: str = "", fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.entry = entry
        self.field = field


class InvalidTrigger(DefinitionError):
    """A schedule or zone that cannot be read, or that can never fire."""

    code = "invalid_trigger"


class UnknownHandler(DefinitionError):
    """No installed distribution offers the handler, or it does not load."""

    code = "unknown_handler"


class TokenError(WorkerError):
    """No usable token for an org; `detail` is the issuer's or the verifier's own word for why."""

    code = "token"
    detail: str = ""


class CredentialsRejected(TokenError):
    """The issuer answered `invalid_client` or the like: another try does not help (RFC 6749, 5.2)."""

    code = "credentials_rejected"


class RequestRejected(TokenError):
    """The issuer refused the request itself, such as `invalid_scope` (RFC 6749, 5.2)."""

    code = "request_rejected"


class Throttled(TokenError):
    """The issuer asked for fewer requests; `retry_after` is in seconds."""

    code = "throttled"
    usual_fix = "wait; lower max_requests_per_second of the issuer where it happens often"
    transient = True

    def __init__(self, message: str, *, retry_after: float, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.retry_after = retry_after


class TokenRefused(TokenError):
    """A token that fails verification or enforcement: the run is refused.

    `reason` is a run's reason (org_mismatch, client_mismatch, scope_missing,
    property_missing, token_invalid), `detail` the verifier's own code or the name
    of the scope or property.
    """

    code = "token_refused"

    def __init__(self, reason: str, detail: str, message: str = "") -> None:
        super().__init__(message or f"token refused: {reason} ({detail})")
        self.reason = reason
        self.detail = detail


class AccessDenied(WorkerError):
    """The caller may not see or do this."""

    code = "denied"
    exit_code = 4


class TooManyRequests(WorkerError):
    """A caller or an address asks too often; `retry_after` is in seconds."""

    code = "too_many_requests"
    usual_fix = (
        "wait as long as Retry-After says; web.logins_per_minute and web.calls_per_second set the limits"
    )
    exit_code = 75
    transient = True

    def __init__(self, message: str, *, retry_after: float, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.retry_after = retry_after


class LeaseLost(WorkerError):
    """This process no longer owns the run: a newer fencing token exists, or the run ended."""

    code = "lease_lost"


class Unavailable(WorkerError):
    """Something outside did not answer; another try may help."""

    code = "unavailable"
    exit_code = 69
    transient = True


class IssuerUnavailable(Unavailable):
    """The issuer gave no answer, a 5xx, or no well-formed one."""

    code = "issuer_unavailable"
    usual_fix = "try again; if it lasts, see that the issuer's url in worker.toml is right and can be reached"


class StoreUnavailable(Unavailable):
    """The database did not answer."""

    code = "database_unavailable"
    usual_fix = "see that the database is up and can be reached; `config show` says which one it is"


class Busy(Unavailable):
    """Another process holds what this one needs; try later."""

    code = "busy"
    exit_code = 75
