"""The handlers of `shared_pages.rehearse`, which imports them again and again as runs import theirs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from worker.handlers.context import BlockingContext, Context
from worker.handlers.job import job


class Params(BaseModel):
    """As most handlers have."""

    number: int = 0


class RehearsalSettings(BaseModel):
    """As most handlers have."""

    text: str = ""


@job("rehearsal.async", params=Params, settings=RehearsalSettings)
async def asynchronous(ctx: Context[Params, RehearsalSettings]) -> dict[str, Any]:
    ctx.log.debug("rehearsal")
    return {"text": ctx.settings.text}


@job("rehearsal.blocking", params=Params, settings=RehearsalSettings)
def blocking(ctx: BlockingContext[Params, RehearsalSettings]) -> dict[str, Any]:
    ctx.log.debug("rehearsal")
    return {"number": ctx.params.number}
