"""The Python of the pages, executed: what a block leaves to its reader comes from the test.

Here are blocks of agents.md, budgets.md, handlers.md, long-runs.md, monitoring.md, prices.md, secrets.md and
service-limits.md.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from pydantic import BaseModel

from tests.fakes.pages import ROOT, blocks
from worker import Context, RateLimited, job
from worker.testing import Orgworker

REFERENCE = ROOT / "docs" / "reference"


def python_of(page: Path) -> list[str]:
    """The page's blocks that this module executes."""
    found = blocks(page.read_text(encoding="utf-8"))
    return [block.text for block in found if block.marks.get("by") == "test_page_code"]


def executed(text: str, **given: Any) -> dict[str, Any]:
    names: dict[str, Any] = dict(given)
    exec(compile(text, "page.md", "exec"), names)
    return names


async def double(article: dict[str, int]) -> int:
    return 2 * article["id"]


def test_steps_and_a_map(orgworker: Orgworker):
    async def articles(http: httpx.AsyncClient) -> list[dict[str, int]]:
        return [{"id": 1}, {"id": 2}]

    async def overview(texts: list[int]) -> dict[str, int]:
        return {"sum": sum(texts)}

    text, _ = python_of(REFERENCE / "handlers.md")
    handler = executed(
        text, job=job, Context=Context, fetch_articles=articles, summarize=double, overview=overview
    )

    assert orgworker.run(handler["summaries"]).result == {"sum": 6}


def test_a_run_gathers_what_its_children_return(orgworker: Orgworker):
    async def fetch(number: int) -> int:
        return 10 + number

    (text,) = python_of(REFERENCE / "children.md")
    handlers = executed(text, fetch=fetch)

    finished = orgworker.run(handlers["sync"], params={"pages": 3}, children=[handlers["page"]])

    assert finished.result == 10 + 11 + 12


def test_a_state_remembers_the_cursor(orgworker: Orgworker):
    async def new_articles(http: httpx.AsyncClient, since: int | None) -> list[dict[str, int]]:
        return [{"id": number} for number in range(1, 6) if number > (since or 0)]

    _, text = python_of(REFERENCE / "handlers.md")
    handler = executed(text, job=job, Context=Context, new_articles=new_articles)["digest"]

    first = orgworker.run(handler)
    again = orgworker.run(handler, state={"cursor": 3})

    assert (first.result, first.definition_state) == (5, {"cursor": 5})
    assert (again.result, again.definition_state) == (2, {"cursor": 5})


@pytest.mark.parametrize(
    ("answers", "result"),
    [({"approval": "yes"}, "sent a draft"), ({"approval": "no"}, "rejected"), ({}, "no answer came")],
)
def test_a_wait_for_an_approval(orgworker: Orgworker, answers: dict[str, str], result: str):
    async def write_draft(params: Any) -> str:
        return "a draft"

    async def send(draft: str) -> str:
        return f"sent {draft}"

    [text] = python_of(REFERENCE / "long-runs.md")
    handler = executed(text, write_draft=write_draft, send=send)["publish"]

    assert orgworker.run(handler, answers=answers).result == result


class Settings(BaseModel):
    model: str = "gpt-4"


class Client:
    """Answers as OpenAI's client does."""

    def __init__(self) -> None:
        self.chat = self.completions = self

    async def create(self, model: str, messages: list[Any]) -> Any:
        message = type("Message", (), {"content": f"{model} says so"})
        choice, usage = type("Choice", (), {"message": message}), type("Usage", (), {"total_tokens": 12})
        return type("Completion", (), {"choices": [choice], "usage": usage})


def test_a_step_spends_what_it_used(orgworker: Orgworker):
    [text] = python_of(REFERENCE / "budgets.md")
    code = compile(text, "budgets.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    @job("acme.ask", settings=Settings)
    async def handler(ctx: Context[dict, Settings]) -> str:
        names = {"Context": Context, "Settings": Settings, "client": Client(), "ctx": ctx, "prompt": "Why?"}
        await eval(code, names)
        return names["answer"]

    finished = orgworker.run(handler)

    assert finished.result == "gpt-4 says so"
    assert finished.spends == {"llm_tokens": 12}


def test_spends_name_their_model(orgworker: Orgworker):
    [text] = python_of(REFERENCE / "prices.md")
    code = compile(text, "prices.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    @job("acme.ask")
    async def handler(ctx: Context) -> None:
        await eval(code, {"ctx": ctx})

    spent = orgworker.run(handler).spends
    assert spent == {"llm_tokens": 1200 + 80 + 1200, "money": spent["money"]}
    assert spent["money"] > 0


@pytest.mark.parametrize("is_caught", [True, False])
def test_a_limit_of_a_service_lets_the_run_wait(orgworker: Orgworker, is_caught: bool):
    pages: list[int] = []

    async def summarise(http: httpx.AsyncClient, page: int) -> None:
        pages.append(page)
        if len(pages) == 5:
            raise RateLimited(12.5, "https://api.example.com")

    [text] = python_of(REFERENCE / "service-limits.md")
    if not is_caught:
        text = text.replace("except RateLimited", "except ZeroDivisionError")
    finished = orgworker.run(executed(text, summarise=summarise)["summaries"])

    assert [attempt.outcome for attempt in finished.attempts] == ["snoozed", "succeeded"]
    assert pages == [*range(5), *range(4 if is_caught else 0, 10)]


def test_an_agent_is_durable(orgworker: Orgworker):
    [text] = python_of(REFERENCE / "agents.md")
    handler = executed(text.replace("openai:gpt-5", "test"))["answer"]

    finished = orgworker.run(handler, params={"question": "Why?"})

    assert finished.result == "success (no tool calls)"


def test_a_handler_gets_its_orgs_secret(orgworker: Orgworker):
    given = []
    [text] = python_of(ROOT / "docs" / "secrets.md")
    handler = executed(text, job=job, Context=Context, AsyncOpenAI=lambda api_key: given.append(api_key))

    finished = orgworker.run(handler["ask"], secrets={"openai": "sk-of-the-org"})

    assert (finished.state, given) == ("succeeded", ["sk-of-the-org"])


def test_a_handler_joins_the_trace_of_its_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRACEPARENT", f"00-{7:032x}-{5:016x}-01")
    [text] = python_of(ROOT / "docs" / "operating" / "monitoring.md")

    place = executed(text)["place"]

    assert trace.get_current_span(place).get_span_context().trace_id == 7
