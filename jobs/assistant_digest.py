"""`assistant.digest`: a support assistant for each org that summarises what is new in its knowledge base.

Both the knowledge base and the model are asked over clients of `ctx`. The knowledge base gets the org's
token; the model gets a key of its own, never that token, even if its origin is one of `api_origins`.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from worker import Context, PermanentError, Retry, WaitTimeout, job

# A placeholder in `[execution.bind_environment]` of worker.toml, or the key itself in `pass_environment`.
API_KEY_VARIABLE = "ASSISTANT_API_KEY"
# Seconds that the model may take to answer.
PATIENCE = 60.0
# What the tokens of the model count for.
METER = "llm_tokens"
REVIEW_FLAG = "review-before-publish"


class Params(BaseModel):
    """Where the knowledge base and the chat endpoint are."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    knowledge_base: str
    """The base URL of the knowledge base, read with the org's token."""
    chat: str
    """The base URL of an OpenAI-compatible chat endpoint, which never gets that token."""
    collection: str = Field("faq", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")
    """The org's collection to read: letters, digits, `.`, `_` and `-`."""
    page_size: int = Field(3, ge=1, le=100)
    """Articles per page; each page is a step, with one request to the model."""
    publish: str | None = Field(None, pattern=r"^https?://")
    """The URL that the digest is posted to with the org's token; without it, it is only the run's result."""


class Settings(BaseModel):
    """The org's own configuration, from the properties in its token."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    model_version: str = "gpt-4"
    """The model to request from the chat endpoint."""
    max_tokens: int = Field(1000, ge=1)
    """Maximum tokens per response."""
    daily_tokens: int | None = Field(None, ge=1)
    """Maximum tokens per day, for a budget with `limit_from = "property:daily_tokens"`."""
    language: str = "en"
    """The language of the digest."""


class Page(BaseModel):
    """One page of the knowledge base; `next` is None on the last."""

    articles: list[dict[str, str]]
    next: int | None = None

    def as_text(self) -> str:
        return "\n\n".join(f"[{item['id']}] {item['title']}\n{item['text']}" for item in self.articles)


class ChatBusy(Exception):
    """The chat endpoint requested a pause of `after`."""

    def __init__(self, after: timedelta) -> None:
        super().__init__(f"the chat endpoint requests a pause of {after}")
        self.after = after


class Chat:
    """An OpenAI-compatible chat endpoint, used with the org's model and limit.

    The key is sent as the request's own header: `ctx.http_client()`, made for libraries, would send the org's
    token in place of a key to `api_origins`.
    """

    def __init__(self, ctx: Context[Params, Settings], key: str) -> None:
        self._ctx = ctx
        self._headers = {"Authorization": f"Bearer {key}"}

    async def ask(self, task: str, text: str) -> str:
        """The assistant's response to one text; what it used is spent.

        Raises:
            PermanentError: the endpoint refuses the credential or the request.
            ChatBusy: it responded with 429.
        """
        settings = self._ctx.settings
        response = await self._ctx.http.post(
            f"{self._ctx.params.chat}/v1/chat/completions",
            headers=self._headers,
            timeout=PATIENCE,
            json={
                "model": settings.model_version,
                "max_tokens": settings.max_tokens,
                "messages": [
                    {"role": "system", "content": f"{task} Answer in {settings.language}."},
                    {"role": "user", "content": text},
                ],
            },
        )
        if response.status_code == 429:
            seconds = response.headers.get("retry-after", "")
            raise ChatBusy(timedelta(seconds=min(int(seconds), 3600) if seconds.isdigit() else 30))
        if response.is_client_error:
            raise PermanentError(f"the chat endpoint responded with {response.status_code}")
        response.raise_for_status()
        answer = response.json()
        await self._ctx.spend(METER, answer.get("usage", {}).get("total_tokens", 0))
        return str(answer["choices"][0]["message"]["content"])


@dataclass(frozen=True)
class Agent:
    """How a digest is written: `write` gets the chat, the digest so far and the next page."""

    name: str
    write: Callable[[Chat, str, Page], Awaitable[str]]
    join: Callable[[str, str], str]
    """The digest from the one so far and what was written."""


async def sum_up(chat: Chat, digest: str, page: Page) -> str:
    return await chat.ask("Sum up these help articles.", page.as_text())


async def fold_in(chat: Chat, digest: str, page: Page) -> str:
    text = f"{digest}\n\n{page.as_text()}".strip()
    return await chat.ask("Fold the articles into the digest and cite each by its [id].", text)


# Params say where the knowledge base, the model and the digest's reader are.
EGRESS = ("api", "public")
# The first agent writes a paragraph for each page; the second rewrites the digest, and cites articles.
V1 = Agent("v1", sum_up, lambda digest, written: f"{digest}\n\n{written}".strip())
V2 = Agent("v2", fold_in, lambda digest, written: written)


@job(
    "assistant.digest",
    params=Params,
    settings=Settings,
    scopes={"read:kb"},
    timeout="2h",
    max_attempts=4,
    state=True,
    egress=EGRESS,
)
async def digest(ctx: Context[Params, Settings]) -> dict[str, Any] | Retry:
    """Summarise the new articles of the org's knowledge base page by page, with the first agent."""
    return await digest_news(ctx, V1)


@job(
    "assistant.digest_v2",
    params=Params,
    settings=Settings,
    scopes={"read:kb"},
    timeout="2h",
    max_attempts=4,
    state=True,
    egress=EGRESS,
)
async def digest_v2(ctx: Context[Params, Settings]) -> dict[str, Any] | Retry:
    """The same with agent v2, for orgs with the flag `agent-v2`."""
    return await digest_news(ctx, V2)


async def digest_news(ctx: Context[Params, Settings], agent: Agent) -> dict[str, Any] | Retry:
    """Digest the articles since the last run that succeeded.

    Each page is a step: another attempt does not pay for it again. The state has how many articles were
    read; it is committed with the run's success.
    """
    digest, articles = "", 0
    at: int | None = ctx.state.get(ctx.params.collection, 0)
    chat = Chat(ctx, model_key())
    try:
        while at is not None:
            page = await ctx.step("page", read_page, ctx, chat, agent, digest, at)
            articles += page["articles"]
            if page["articles"]:
                digest = agent.join(digest, page["written"])
            ctx.progress(articles)
            ctx.state[ctx.params.collection] = at + page["articles"]
            at = page["next"]
    except ChatBusy as busy:
        return Retry(after=busy.after)
    return {
        "agent": agent.name,
        "model": ctx.settings.model_version,
        "articles": articles,
        "digest": digest,
        "published": bool(digest) and await publish(ctx, digest),
    }


async def read_page(
    ctx: Context[Params, Settings], chat: Chat, agent: Agent, digest: str, at: int
) -> dict[str, Any]:
    """Fetch a page and write about it; an empty one costs nothing."""
    page = await fetch_page(ctx, at)
    written = await agent.write(chat, digest, page) if page.articles else ""
    return {"written": written, "articles": len(page.articles), "next": page.next}


async def publish(ctx: Context[Params, Settings], digest: str) -> bool:
    """Publish a digest, where the org's flag asks for it once a person approves; whether it was published."""
    if ctx.flag(REVIEW_FLAG):
        try:
            approved = await ctx.wait_for("publish", timeout="7d", ask={"digest": digest})
        except WaitTimeout:
            approved = False
        if approved is not True:
            return False
    if ctx.params.publish is not None:
        await ctx.step("publish", post, ctx, ctx.params.publish, digest)
    return True


async def post(ctx: Context[Params, Settings], url: str, digest: str) -> None:
    response = await ctx.public_http.post(url, json={"digest": digest})
    if response.is_client_error:
        raise PermanentError(f"{url} responded with {response.status_code}")
    response.raise_for_status()


async def fetch_page(ctx: Context[Params, Settings], after: int) -> Page:
    """Fetch one page of the org's knowledge base with the org's token."""
    response = await ctx.public_http.get(
        f"{ctx.params.knowledge_base}/v1/collections/{ctx.params.collection}/articles",
        params={"after": after, "limit": ctx.params.page_size},
    )
    if response.status_code in (401, 403, 404):
        raise PermanentError(f"the knowledge base responded with {response.status_code} to {ctx.org.code}")
    response.raise_for_status()
    return Page.model_validate(response.json())


def model_key() -> str:
    """The model's own credential: a placeholder if it is bound to the origin of the chat endpoint."""
    key = os.environ.get(API_KEY_VARIABLE)
    if not key:
        raise PermanentError(
            f"{API_KEY_VARIABLE} is not set: export it and bind it to the origin of the chat endpoint in "
            "[execution.bind_environment]"
        )
    return key
