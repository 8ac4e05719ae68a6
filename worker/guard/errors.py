"""The errors of tokens and of a guard's configuration, and the base of all errors.

The class says what happened and whether a retry may help. No message contains a token or a full claim set.
"""

from __future__ import annotations


class WorkerError(Exception):
    """Base of all errors.

    `code` is stable, for JSON and logs. `exit_code` is that of the process. `fix` says what to do, by
    default `usual_fix`. `transient` means that a retry may help, after `retry_after` seconds if known.
    `detail` is the reason code of another system or a verifier, or empty.
    """

    code = "error"
    usual_fix = ""
    exit_code = 1
    transient = False
    detail = ""

    def __init__(
        self, message: str, *, fix: str = "", detail: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix or self.usual_fix
        self.detail = detail or self.detail
        self.retry_after = retry_after


class ConfigurationError(WorkerError):
    """`worker.toml`, the environment, the key ring or the schema version is not usable."""

    code = "configuration"
    exit_code = 78


class TokenError(WorkerError):
    """An org has no usable token; `detail` is the reason code of the issuer or the verifier."""

    code = "token"


class TokenRefused(TokenError):
    """A token failed verification or enforcement: the run is refused.

    `reason` is a reason of a run (org_mismatch, client_mismatch, scope_missing, property_missing,
    pool_mismatch, token_invalid), `detail` the code of the verifier or the name of the scope or property.
    """

    code = "token_refused"

    def __init__(self, reason: str, detail: str, message: str = "") -> None:
        super().__init__(message or f"token refused: {reason} ({detail})", detail=detail)
        self.reason = reason


class Unavailable(WorkerError):
    """An external service did not respond; a retry may help."""

    code = "unavailable"
    exit_code = 69
    transient = True


class IssuerUnavailable(Unavailable):
    """The issuer did not respond, or with a 5xx or a malformed response."""

    code = "issuer_unavailable"
    usual_fix = (
        "try again; if it persists, check that the issuer's url in worker.toml is correct and reachable"
    )


class KeyNotPublished(IssuerUnavailable):
    """No key set has this key id yet, so there is no verdict."""

    code = "key_not_published"
