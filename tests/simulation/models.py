"""The APIs of models under simulation: the fakes of both providers, over a network that loses and delays.

A worker sends batches there, and a run what is sent on its own. What arrives once was sent by a worker that
may be dead, or does not wait for the answer any more.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch
from uuid import UUID

import httpcore
import httpx

from tests.simulation.database import EPOCH
from tests.simulation.loop import SeededLoop, outside, process_now
from tests.simulation.network import Net
from worker.demo.model_apis import Batch, Json, ModelApis
from worker.features.batches import wiring
from worker.features.batches.advance import Patience
from worker.features.batches.loop import BatchSender
from worker.model.batches import BASE_URLS, Provider
from worker.outbound import open_client
from worker.store import batch_requests

PROVIDERS: tuple[Provider, ...] = ("openai", "anthropic")
ORIGINS = frozenset(BASE_URLS.values())
MODEL = "simulated-model"
# Nano-units of a token that goes in or comes out, by tariff.
PRICES = {"standard": (2000, 8000), "batch": (1000, 4000)}
# Tokens that an answer has at most.
OUTPUT = 12
# Seconds of a batch, from its submission until its results are there.
TAKES = (3.0, 28.0)
# Shares of the requests that fail, and that their batch does not get to.
FAILS, EXPIRES = 0.06, 0.06
# Seconds that requests wait for others, between two looks at a batch, and between two looks of the loop.
POOLED, POLLED, LOOKED = 4, 3, 2.0
# Seconds for which a lost submission is looked for, in place of the product's minutes.
PATIENCE = replace(Patience(), grace=timedelta(seconds=24))
_ID = re.compile(r"/(batch|file|msgbatch)[-_]\d+")


def units_of(said: str) -> tuple[int, int]:
    """The tokens of a request and its answer, by what it says: others have others, so a mix-up shows."""
    number = zlib.crc32(said.encode())
    return 20 + number % 41, 1 + number % OUTPUT


def said_in(body: Json) -> str:
    """What a request says."""
    return str(body["input"] if "input" in body else body["messages"][0]["content"])


@dataclass(frozen=True)
class Charge:
    """A request that was answered and is paid for; `id` and `batch` are empty for one on its own."""

    provider: str
    said: str
    units: tuple[int, int]
    id: str = ""
    batch: str = ""


class Models(ModelApis):
    """Both APIs; keeps what they charge."""

    def __init__(self, loop: SeededLoop, seed: int) -> None:
        chance = Random(f"models {seed}")
        super().__init__(
            now=lambda: EPOCH.timestamp() + loop.time(),
            takes=lambda: chance.uniform(*TAKES),
            reply=lambda body: 500 if chance.random() < FAILS else f"to {said_in(body)}",
            expire=EXPIRES,
            random=chance,
        )
        self._loop = loop
        self.charged: list[Charge] = []
        # Seconds for which the next request that breaks off is still under way.
        self.late: list[float] = []

    @property
    def paid_in_batches(self) -> dict[str, list[Charge]]:
        """What was paid in batches, by `custom_id`."""
        found: dict[str, list[Charge]] = defaultdict(list)
        for charge in self.charged:
            if charge.batch:
                found[charge.id].append(charge)
        return found

    def answer_alone(self, request: httpcore.Request, body: bytes) -> tuple[int, bytes]:
        """The answer to a request that a run sends on its own."""
        read, provider = json.loads(body), _provider_of(request)
        said = said_in(read)
        self.charged.append(Charge(provider, said, units_of(said)))
        answer = self._response(read, f"alone to {said}", openai=provider == "openai")
        return 200, json.dumps(answer).encode()

    def _done(self, id_: str, body: Json, reply: Any, batch: Batch) -> str:
        said, provider = said_in(body), "openai" if batch.file_id else "anthropic"
        self.charged.append(Charge(provider, said, units_of(said), id_, batch.id))
        return super()._done(id_, body, reply, batch)

    def _response(self, body: Json, reply: Any, *, openai: bool) -> Json:
        self.tokens = units_of(said_in(body))
        return super()._response(body, reply, openai=openai)


def _provider_of(request: httpcore.Request) -> str:
    return "openai" if b"openai" in request.url.host else "anthropic"


class ToModels(httpx.AsyncBaseTransport):
    """How a worker reaches the APIs. What it has sent arrives, whatever becomes of the worker."""

    def __init__(self, loop: SeededLoop, net: Net, models: Models) -> None:
        self._loop = loop
        self._net = net
        self._models = models

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        process, loop = process_now(), self._loop
        assert process is not None
        content = await request.aread()
        place = f"{request.method} {_ID.sub('/ID', request.url.path)}"
        answered: asyncio.Future[tuple[int, bytes]] = loop.create_future()

        def arrive() -> None:
            if (away := self._net.away(process, "models")) > 0:
                loop.call_later(away + loop.delay(), arrive, context=outside())
                return
            headers = {name.lower(): value for name, value in request.headers.items()}
            found = self._models.answer(request.method, str(request.url), headers, content)
            loop.note(None, f"{place} of {process.name} is answered {found[0]}")
            loop.call_later(loop.delay(), answer, found, context=outside())

        def answer(found: tuple[int, bytes]) -> None:
            if not answered.done():
                answered.set_result(found)

        breaks = self._net.reached(process, f"models.sent {place}")
        # Not before it has thawed, if it was frozen just now.
        await asyncio.sleep(0)
        if breaks:
            loop.call_later(self._models.late.pop(0), arrive, context=outside())
            raise httpx.ReadError("the connection was reset")
        loop.call_later(loop.delay(), arrive, context=outside())
        status, body = await answered
        if self._net.reached(process, f"models.done {place}"):
            raise httpx.ReadError("the connection was reset")
        return httpx.Response(status, content=body)


@contextmanager
def simulated(loop: SeededLoop, net: Net, models: Models, seed: int) -> Iterator[None]:
    """Replace the network of the loop that sends batches, its minutes by seconds, and its random ids."""
    ids = Random(f"rows {seed}")

    def client() -> httpx.AsyncClient:
        return open_client(ToModels(loop, net, models))

    def id_of_row() -> UUID:
        return UUID(bytes=ids.randbytes(16), version=4)

    sender = partial(BatchSender, every=LOOKED, patience=PATIENCE)
    variables = {"OPENAI_API_KEY": "sk-run", "ANTHROPIC_API_KEY": "sk-run"}
    with ExitStack() as stack:
        stack.enter_context(patch.object(wiring, "open_client", client))
        stack.enter_context(patch.object(wiring, "BatchSender", sender))
        stack.enter_context(patch.object(batch_requests, "uuid4", id_of_row))
        stack.enter_context(patch.dict(os.environ, variables))
        yield


def settings_in(folder: Path) -> Mapping[str, Any]:
    """The settings of a worker that sends batches; the operator's keys are files in `secrets_dir`."""
    for name in PROVIDERS:
        (folder / f"model_key__{name}").write_text("sk-operator")
    of_api = {"every": f"{POOLED}s", "poll": f"{POLLED}s", "max_requests": 5}
    own = [
        {"model": MODEL, "tariff": tariff, "input": str(input_ / 1000), "output": str(output / 1000)}
        for tariff, (input_, output) in PRICES.items()
    ]
    return {"batches": {name: {"provider": name, **of_api} for name in PROVIDERS}, "prices": {"own": own}}
