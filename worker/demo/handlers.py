"""Handlers of the demo that stop: for an approval, for a budget, and for a batch of model requests.

The demo installs them in a folder of its own, so they are in no other installation.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from worker.handlers.context import Context
from worker.handlers.job import job

# What the letters count for.
METER = "letters"
# The name of what a refund waits for.
APPROVAL = "approval"
OPTIONS = ["yes", "no"]
# Seconds that a letter takes.
PACE = 0.05
DISTRIBUTION = "orgworker-demo"
VERSION = "1.0"
HANDLERS = {"demo.refund": "refund", "demo.letters": "letters", "demo.reviews": "reviews"}
# The model of the summaries.
MODEL = "gpt-5-mini"


class Refund(BaseModel):
    """A payment to give back."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    customer: str
    """Who gets it."""
    euros: int = Field(ge=1)
    """How much."""


class Letters(BaseModel):
    """A letter to each customer."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    customers: int = Field(ge=1, le=1000)
    """How many letters to send."""


@job("demo.refund", params=Refund, timeout="10m")
async def refund(ctx: Context[Refund, Any]) -> dict[str, Any]:
    """Refund a payment once a person has approved it."""
    ask = {"text": f"Refund {ctx.params.euros} EUR to {ctx.params.customer}?", "options": OPTIONS}
    decision = await ctx.wait_for(APPROVAL, ask=ask, options=OPTIONS)
    paid = await ctx.step("pay", pay, ctx) if decision == "yes" else 0
    return {"decision": decision, "refunded": paid}


async def pay(ctx: Context[Refund, Any]) -> int:
    """Nothing is paid here: this is where a payment provider would be called."""
    return ctx.params.euros


@job("demo.letters", params=Letters, timeout="10m")
async def letters(ctx: Context[Letters, Any]) -> dict[str, int]:
    """Send a letter to each customer. Each is a step and counts for a budget, so none is sent twice."""
    for number in range(1, ctx.params.customers + 1):
        await ctx.step("letter", send, ctx)
        ctx.progress(number, ctx.params.customers)
    return {"letters": ctx.params.customers}


async def send(ctx: Context[Letters, Any]) -> None:
    """Nothing is sent here; it takes a moment."""
    await asyncio.sleep(PACE)
    await ctx.spend(METER, 1)


@job("demo.reviews", timeout="10m")
async def reviews(ctx: Context[Any, Any]) -> dict[str, str]:
    """Summarise what customers wrote. In a batch it costs the half, and no process waits for it."""
    said = f"Summarise what customers of {ctx.org.name} wrote."
    response = await ctx.complete({"model": MODEL, "input": said, "max_output_tokens": 500})
    return {"summary": response["output"][0]["content"][0]["text"]}


def install(folder: Path) -> None:
    """Make the handlers those of a distribution in this folder, which belongs into PYTHONPATH."""
    info = folder / f"{DISTRIBUTION.replace('-', '_')}-{VERSION}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {VERSION}\n")
    points = "".join(f"{name} = {__name__}:{attribute}\n" for name, attribute in HANDLERS.items())
    (info / "entry_points.txt").write_text(f"[worker.jobs]\n{points}")
    (info / "RECORD").write_text("")
