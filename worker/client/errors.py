"""The errors of a client.

The class says what happened, `fix` what to do, `transient` whether a retry may help. No message contains the
token, even if a server sends it back.
"""

from __future__ import annotations


class ClientError(Exception):
    """Base of all errors.

    `code` is the API's stable code, or this class's own. `status` is the HTTP status, None without an
    answer. `transient` means that a retry may help, after `retry_after` seconds if known. `is_final` means
    that the API understood the request and will refuse it again. `field` names what is invalid.
    """

    code = "error"
    transient = False
    is_final = False

    def __init__(
        self,
        message: str,
        *,
        fix: str = "",
        code: str = "",
        status: int | None = None,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{message} ({fix})" if fix else message)
        self.message = message
        self.fix = fix
        self.code = code or self.code
        self.status = status
        self.field = field
        self.retry_after = retry_after


class ConfigurationError(ClientError):
    """The client's own address or token cannot be used."""

    code = "configuration"


class InvalidRequest(ClientError):
    """The request, or one of its params, is invalid: 400, 413, 422, or found before it was sent."""

    code = "usage"
    is_final = True


class NotFound(ClientError):
    """There is no such org, definition or run for this token."""

    code = "not_found"
    is_final = True


class Conflict(ClientError):
    """The current state does not allow it: a run is unfinished, the org not active, the definition closed."""

    code = "conflict"


class Unauthorized(ClientError):
    """The token is missing or invalid."""

    code = "token"


class Denied(ClientError):
    """The token's role does not allow it."""

    code = "denied"


class TooManyRequests(ClientError):
    """A limit of the API; it says when to try again."""

    code = "too_many_requests"
    transient = True


class Unavailable(ClientError):
    """No answer, or one that says to try again.

    `was_sent` is false if the request certainly did not reach the API.
    """

    code = "unavailable"
    transient = True
    was_sent = True


class BadAnswer(ClientError):
    """What answered is not the API: a redirect, a page of a proxy, too large, or of another shape."""

    code = "bad_answer"


class WaitTimeout(ClientError):
    """The run has not ended in time; it continues."""

    code = "timeout"
    transient = True


BY_STATUS: dict[int, type[ClientError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Denied,
    404: NotFound,
    408: Unavailable,
    409: Conflict,
    412: Conflict,
    413: InvalidRequest,
    422: InvalidRequest,
    429: TooManyRequests,
}
