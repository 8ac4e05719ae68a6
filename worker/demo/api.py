"""The small customer API of the demo: a knowledge base for each org, and a chat endpoint.

The knowledge base is guarded by `worker.guard`: the org is the token's, never the
request's. The chat endpoint has a key of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from worker.claims.claims import Claims
from worker.demo.articles import articles_of
from worker.demo.chat import ChatEndpoint
from worker.guard import Guard, RequireToken

MAX_PAGE = 100


class CustomerApi:
    """The API of a made-up customer: `orgs` maps an org's code to its name.

    `reads` counts the pages that each org has read.
    """

    def __init__(self, guard: Guard, *, orgs: Mapping[str, str], chat_key: str) -> None:
        self._guard = guard
        self._articles = {code: articles_of(name) for code, name in orgs.items()}
        self.chat = ChatEndpoint(chat_key)
        self.reads: Counter[str] = Counter()

    def asgi(self) -> Starlette:
        pages = Starlette(routes=[Route("/{collection}/articles", self._list_articles)])
        knowledge_base = Mount("/v1/collections", app=RequireToken(pages, self._guard))
        return Starlette(routes=[*self.chat.routes(), knowledge_base], lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self._guard.close()

    async def _list_articles(self, request: Request) -> Response:
        claims: Claims = request.scope["claims"]
        articles = self._articles.get(claims.org_code)
        if articles is None or request.path_params["collection"] != "faq":
            return JSONResponse({"error": "not_found"}, status_code=404)
        try:
            after = max(0, int(request.query_params.get("after", "0")))
            limit = min(MAX_PAGE, max(1, int(request.query_params.get("limit", "10"))))
        except ValueError:
            return JSONResponse({"error": "after and limit are whole numbers"}, status_code=400)
        self.reads[claims.org_code] += 1
        return JSONResponse(page_of(articles, after, limit) | {"org": claims.org_code})


def page_of(articles: Sequence[Mapping[str, str]], after: int, limit: int) -> dict[str, Any]:
    """Up to `limit` articles behind the first `after`; `next` is where the following page begins."""
    end = after + limit
    return {"articles": articles[after:end], "next": end if end < len(articles) else None}
