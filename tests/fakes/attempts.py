"""A worker's attempt API that a test drives: what a host is given, and all that it sends."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.unit.execution.runs import admitted
from worker.demo.serving import ServerThread, bind_loopback
from worker.execution.hosts import wire
from worker.execution.hosts.sent import END, LINE, PROGRESS, End, LineRow, calls_of
from worker.execution.hosts.wire import Registered, Taken
from worker.execution.runners.contract import Work
from worker.guard.claims import Claims
from worker.handlers.catalogue import HandlerEntry
from worker.ids import RunId
from worker.runs.run import Isolation, OwnedRun
from worker.secret import AccessToken

TOKEN = "host-token-canary-7f3a9c2e51d8"


class Attempts:
    """The API on a loopback port. `lease` and `renew` are in seconds."""

    def __init__(self, *, pool: str = "eu", lease: float = 4.0, renew: float = 0.2) -> None:
        self.pool, self.lease, self.renew_every = pool, lease, renew
        self.incarnations: list[str] = []
        self.registered = True
        self.entries: dict[str, HandlerEntry] = {}
        self.complete = self.unregistered = False
        self.waiting: deque[Taken] = deque()
        self.owned: dict[RunId, OwnedRun] = {}
        self.ends: list[End] = []
        self.lines: list[LineRow] = []
        self.saved: list[str] = []
        self.calls: list[str] = []
        self.hangs = False
        # Answers a call in place of what is below, if it returns something.
        self.instead: Callable[[str], Response | None] = lambda name: None
        self._stopping = False
        self._lock = threading.Lock()
        listener = bind_loopback()
        app = Starlette(
            routes=[
                Route("/attempts", self._versions),
                Route(f"{wire.PREFIX}/{{name}}", self._call, methods=["POST"]),
            ]
        )
        self.thread = ServerThread(app, listener)
        self.url = self.thread.url

    def stop(self) -> None:
        self._stopping = True
        self.thread.stop()

    def give(self, name: str, *, isolation: Isolation = "child", **changes: Any) -> Taken:
        """Let a run of the handler `name` wait for a host."""
        now = datetime.now(UTC)
        timeout = changes.pop("timeout", timedelta(minutes=1))
        run = replace(admitted(f"run-{len(self.calls)}-{name}"), isolation=isolation, started_at=now)
        work = Work(
            run_id=run.id,
            attempt=run.attempt,
            fencing_token=run.fencing_token,
            idempotency_key=run.idempotency_key,
            scheduled_for=now,
            org_code="org_acme",
            org_name="Acme",
            handler=name,
            entry_point="the host knows",
            claims=Claims("org_acme", "client", frozenset(), {}, {}, now, now + timedelta(hours=1)),
            token=AccessToken("org-token-canary-5b1d", now + timedelta(hours=1)),
            api_origins=(),
            timeout_at=now + timeout,
            **{"params": {}, **changes},
        )
        taken = Taken(run, "org_acme", "tick", timedelta(seconds=2), timeout, work, sealed="c2VhbGVk")
        with self._lock:
            self.waiting.append(taken)
        return taken

    def cancel(self, run_id: RunId) -> None:
        with self._lock:
            self.owned[run_id] = replace(self.owned[run_id], cancel_reason="requested")

    async def _versions(self, request: Request) -> Response:
        return JSONResponse({"versions": list(wire.VERSIONS)})

    async def _call(self, request: Request) -> Response:
        name, message = request.path_params["name"], await request.json()
        self.calls.append(name)
        if self.hangs:
            await asyncio.sleep(3600)
        if (instead := self.instead(name)) is not None:
            return instead
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return problem(401, "token", "the token is not that of a host")
        if name != "register" and request.headers.get(wire.INCARNATION) not in self.incarnations:
            return problem(403, "denied", "the incarnation is that of another host")
        if name == "take":
            return JSONResponse(await self._take(message, request))
        return JSONResponse(getattr(self, f"_{name}")(message))

    async def _take(self, message: dict[str, Any], request: Request) -> dict[str, Any]:
        free = wire.slots_of(message["free"])
        for _ in range(int(message["wait"] / 0.02)):
            with self._lock:
                given = [taken for taken in self.waiting if free[taken.run.isolation] > 0]
                if given:
                    self.waiting = deque(taken for taken in self.waiting if taken not in given)
                    for taken in given:
                        run = taken.run
                        self.owned[run.id] = OwnedRun(run.id, run.fencing_token, None)
                    return {"attempts": [wire.taken_message(taken) for taken in given]}
            if self._stopping or await request.is_disconnected():
                break
            await asyncio.sleep(0.02)
        return {"attempts": []}

    def _register(self, message: dict[str, Any]) -> dict[str, Any]:
        self.registration = wire.registration_of(message)
        self.incarnations.append(f"incarnation-{len(self.incarnations)}")
        self.registered, self.complete = True, False
        return wire.registered_message(
            Registered(self.incarnations[-1], self.pool, self.lease, self.renew_every, 0.2)
        )

    def _handlers(self, message: dict[str, Any]) -> dict[str, Any]:
        for entry in wire.entries_of(message):
            self.entries[entry.name] = entry
        self.complete = self.complete or message.get("complete") is True
        return {}

    def _renew(self, message: dict[str, Any]) -> dict[str, Any]:
        return wire.renewed_message(self.registered, list(self.owned.values()))

    def _unregister(self, message: dict[str, Any]) -> dict[str, Any]:
        self.unregistered = True
        return {}

    def _finish(self, message: dict[str, Any]) -> dict[str, Any]:
        accepted = []
        for end in wire.rows_of(message, "ends", END):
            owned = self.owned.get(end.run)
            if owned is not None and owned.fencing_token == end.fencing_token:
                del self.owned[end.run]
                self.ends.append(end)
                accepted.append(end.run)
        return {"accepted": accepted}

    def _save(self, message: dict[str, Any]) -> dict[str, Any]:
        self.saved.append(calls_of("save", message)[0].call.data)
        return {}

    def _logs(self, message: dict[str, Any]) -> dict[str, Any]:
        self.lines += wire.rows_of(message, "lines", LINE)
        return {}

    def _progress(self, message: dict[str, Any]) -> dict[str, Any]:
        wire.rows_of(message, "rows", PROGRESS)
        return {}

    def _hand_back(self, message: dict[str, Any]) -> dict[str, Any]:
        runs = [fence.run for fence in wire.rows_of(message, "runs", wire.FENCE)]
        for run_id in runs:
            self.owned.pop(run_id, None)
        return {"runs": runs}


def problem(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message, "fix": "see there"}}, status)
