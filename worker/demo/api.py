"""The customer API of the demo: a knowledge base for each org, and a chat endpoint in OpenAI's form."""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route

from worker.guard import Guard, RequireToken
from worker.guard.claims import Claims

TOPICS = (
    ("Resetting a password", "Open Settings, then Security, and choose Reset. A link arrives by mail."),
    ("Inviting a colleague", "An admin invites people under Members. An invitation is good for a week."),
    ("Exporting data", "Exports are made at night. The file can be fetched for seven days."),
    ("Changing the plan", "Plans change at once and are billed by the day. Nothing is lost on the way."),
    ("Connecting a calendar", "Calendars connect under Integrations. Only free and busy times are read."),
    ("Reporting a fault", "Write to support with the page's address. Most faults are fixed within a day."),
    ("Deleting an account", "Deletion takes effect after thirty days. Until then it can be taken back."),
)


# The collections of each org, and how the ids of their articles begin.
COLLECTIONS = {"faq": "kb", "handbook": "hb"}


def articles_of(org_name: str, prefix: str, count: int) -> list[dict[str, str]]:
    """The first articles of a collection; the topics come again and again."""
    topics = enumerate(itertools.islice(itertools.cycle(TOPICS), count), start=1)
    return [
        {"id": f"{prefix}-{number}", "title": f"{title} at {org_name}", "text": text}
        for number, (title, text) in topics
    ]


ARTICLE = re.compile(r"\[(?P<id>[\w-]+)\]\s*(?P<title>.*?)\n(?P<text>.*)")


class ApiRefusal(Exception):
    """An error response in OpenAI's form."""

    def __init__(self, message: str, *, code: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status

    def as_response(self) -> JSONResponse:
        error = {"message": self.message, "type": "invalid_request_error", "code": self.code}
        return JSONResponse({"error": error}, status_code=self.status)


class ChatEndpoint:
    """`POST /v1/chat/completions` with an API key; `models` counts the requests for each model.

    It takes `delay` seconds to answer.
    """

    def __init__(self, api_key: str, *, delay: float = 0.0) -> None:
        self._api_key = api_key
        self._delay = delay
        self.models: Counter[str] = Counter()
        self._articles: Counter[str] = Counter()
        self.refused = 0

    def routes(self) -> list[Route]:
        return [Route("/v1/chat/completions", self._complete, methods=["POST"])]

    def asked_about_handbooks(self) -> int:
        """How many requests were about articles of handbooks."""
        counts = dict(self._articles)
        return sum(count for article, count in counts.items() if article.startswith(COLLECTIONS["handbook"]))

    async def _complete(self, request: Request) -> Response:
        try:
            expected, given = f"Bearer {self._api_key}", request.headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), expected.encode()):
                raise ApiRefusal("Incorrect API key provided", code="invalid_api_key", status=401)
            body = await request.json()
            # A caller that is gone by then still pays, as it does elsewhere.
            await asyncio.sleep(self._delay)
            return JSONResponse(self._answer(body))
        except ApiRefusal as refusal:
            self.refused += 1
            return refusal.as_response()
        except ValueError:
            return ApiRefusal("the body is not JSON", code="invalid_json").as_response()

    def _answer(self, body: Any) -> dict[str, Any]:
        model, limit, messages = check_request(body)
        self.models[model] += 1
        self._articles.update(article["id"] for article in ARTICLE.finditer(messages[-1]["content"]))
        words = summarise(messages).split(" ")
        prompt = sum(len(message["content"].split()) for message in messages)
        used = min(len(words), limit)
        reply = {"role": "assistant", "content": " ".join(words[:limit])}
        reason = "stop" if len(words) <= limit else "length"
        return {
            "id": f"chatcmpl-{secrets.token_hex(8)}",
            "object": "chat.completion",
            "model": model,
            "choices": [{"index": 0, "message": reply, "finish_reason": reason}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used},
        }


def check_request(body: Any) -> tuple[str, int, list[dict[str, str]]]:
    """The model, word limit and messages of a request; raises ApiRefusal."""
    if not isinstance(body, dict):
        raise ApiRefusal("the body must be an object", code="invalid_type")
    model, messages, limit = body.get("model"), body.get("messages"), body.get("max_tokens", 1000)
    if not isinstance(model, str) or not model:
        raise ApiRefusal("model must be text", code="invalid_model")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ApiRefusal("max_tokens must be a whole number above 0", code="invalid_max_tokens")
    if not isinstance(messages, list) or not messages:
        raise ApiRefusal("messages must be a list that is not empty", code="invalid_messages")
    if not all(isinstance(each, dict) and isinstance(each.get("content"), str) for each in messages):
        raise ApiRefusal("each message needs role and content", code="invalid_messages")
    return model, limit, messages


def summarise(messages: list[dict[str, str]]) -> str:
    """The completion: the text before the articles, then each article's title and first sentence.

    Articles are cited by their id if the system message asks for it.
    """
    system = " ".join(item["content"] for item in messages if item.get("role") == "system")
    text = messages[-1]["content"]
    first = ARTICLE.search(text)
    kept = [text[: first.start()].strip()] if first else [text.strip()]
    for article in ARTICLE.finditer(text):
        sentence = article["text"].split(". ")[0].rstrip(".")
        source = f" [{article['id']}]" if "cite" in system else ""
        kept.append(f"{article['title']}: {sentence}.{source}")
    return "\n".join(line for line in kept if line)


MAX_PAGE = 100


class CustomerApi:
    """The API of a fictional customer. `orgs` maps codes to names; `reads` counts pages by org.

    With `news_every`, the FAQ of each org gets a new article every `news_every` seconds.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        orgs: Mapping[str, str],
        chat_key: str,
        delay: float = 0.0,
        news_every: float | None = None,
    ) -> None:
        self._guard = guard
        self._orgs = orgs
        self._news_every = news_every
        self._began = time.monotonic()
        self.chat = ChatEndpoint(chat_key, delay=delay)
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
        name, collection = self._orgs.get(claims.org_code), request.path_params["collection"]
        if name is None or collection not in COLLECTIONS:
            return JSONResponse({"error": "not_found"}, status_code=404)
        try:
            after = max(0, int(request.query_params.get("after", "0")))
            limit = min(MAX_PAGE, max(1, int(request.query_params.get("limit", "10"))))
        except ValueError:
            return JSONResponse({"error": "after and limit are whole numbers"}, status_code=400)
        self.reads[claims.org_code] += 1
        news = 0
        if collection == "faq" and self._news_every is not None:
            news = int((time.monotonic() - self._began) / self._news_every)
        articles = articles_of(name, COLLECTIONS[collection], len(TOPICS) + news)
        end = after + limit
        page = {"articles": articles[after:end], "next": end if end < len(articles) else None}
        return JSONResponse(page | {"org": claims.org_code})
