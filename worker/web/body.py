"""The body of a request, of a bounded size: JSON or the fields of a form."""

from __future__ import annotations

from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from worker.errors import UsageError

# Params of a run at most; tokens and forms are far smaller.
MOST_BYTES = 256 * 1024


async def read_body(request: Request) -> bytes:
    """All of it.

    Raises:
        HTTPException: 413, it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"the body is larger than {MOST_BYTES} bytes")
    return bytes(body)


async def read_form(request: Request) -> dict[str, str]:
    """The fields of a form that a browser sends; of one given twice the last.

    Raises:
        UsageError: it is no such form.
    """
    try:
        return dict(parse_qsl((await read_body(request)).decode("ascii"), max_num_fields=50))
    except ValueError:
        raise UsageError("the body is no form") from None
