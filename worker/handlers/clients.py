"""Clients of a context: over the broker, if there is one, else over connections of their own."""

from __future__ import annotations

from typing import Any, Literal

import httpx

from worker.handlers.brokered import BlockingBrokeredTransport, BrokeredTransport
from worker.handlers.given import Given
from worker.handlers.http import TokenSource, blocking_org_client, org_client
from worker.handlers.model_usage import BlockingCount, Count
from worker.handlers.public_http import BlockingPublicTransport, PublicTransport

Name = Literal["http", "public_http"]


def client(
    given: Given[Any, Any],
    token: TokenSource,
    name: Name,
    replaced: httpx.AsyncBaseTransport | None,
    *,
    base_url: str = "",
    count: Count | None = None,
    of_library: bool = False,
) -> httpx.AsyncClient:
    """A client of an async handler, or `of_library`; `replaced` is the transport of a test."""
    transport, public = replaced, name == "public_http"
    if replaced is None and given.connect is not None:
        transport = BrokeredTransport(given.connect, public=public)
    elif replaced is None and public:
        transport = PublicTransport(given.trusted_origins)
    authorizes = not isinstance(transport, BrokeredTransport)
    more = {"authorizes": authorizes, "of_library": of_library}
    return org_client(given, token, transport, base_url=base_url, count=count, **more)


def blocking_client(
    given: Given[Any, Any],
    token: TokenSource,
    name: Name,
    replaced: httpx.BaseTransport | None,
    *,
    base_url: str = "",
    count: BlockingCount | None = None,
    of_library: bool = False,
) -> httpx.Client:
    """The same for a handler that blocks."""
    transport, public = replaced, name == "public_http"
    if replaced is None and given.connect is not None:
        transport = BlockingBrokeredTransport(given.connect, public=public)
    elif replaced is None and public:
        transport = BlockingPublicTransport(given.trusted_origins)
    authorizes = not isinstance(transport, BlockingBrokeredTransport)
    more = {"authorizes": authorizes, "of_library": of_library}
    return blocking_org_client(given, token, transport, base_url=base_url, count=count, **more)
