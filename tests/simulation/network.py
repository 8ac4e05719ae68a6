"""The network under simulation: between hosts, workers, the issuer and the database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx

from tests.simulation.loop import SeededLoop, SimulatedProcess, Thread, process_now
from worker.features.hosts.control import Controls

if TYPE_CHECKING:
    from tests.simulation.world import Machine, World


class Net:
    """Who reaches what: partitions between processes and the database, the issuer and other processes."""

    def __init__(self, loop: SeededLoop) -> None:
        self._loop = loop
        self._until: dict[tuple[str, str], float] = {}
        # What to do at the next point of that kind, by process; each is used once.
        self.armed: list[tuple[str, str, Callable[[SimulatedProcess], bool]]] = []

    def part(self, one: str, other: str, seconds: float) -> None:
        """Nothing passes between these two for so long; packets are sent again afterwards."""
        until = self._loop.time() + seconds
        self._until[one, other] = max(until, self._until.get((one, other), 0.0))

    def away(self, process: SimulatedProcess, place: str) -> float:
        """Seconds until this process reaches that place again."""
        root = process.name.partition("/")[0]
        until = max(self._until.get((who, place), 0.0) for who in (root, "*"))
        return max(0.0, until - self._loop.time())

    def reached(self, process: SimulatedProcess, point: str) -> bool:
        """A point is reached: carry out what is armed for it; returns whether the answer is lost."""
        root, lost = process.name.partition("/")[0], False
        for entry in list(self.armed):
            who, where, strike = entry
            if who in (root, "*") and point.startswith(where):
                self.armed.remove(entry)
                lost = strike(process) or lost
        return lost


class ToWorkers(httpx.AsyncBaseTransport):
    """How a host reaches the attempt API: the real application, over a network that loses and delays."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        world, process, limits = self._world, process_now(), request.extensions["timeout"]
        assert process is not None
        worker = world.machines[request.url.host]
        world.net.reached(process, "http.sent")
        await self._pass(process, worker, limits["connect"], httpx.ConnectTimeout)
        target = worker.process
        if target is None or not target.alive or worker.attempts is None:
            raise httpx.ConnectError("connection refused")
        answered: asyncio.Future[tuple[int, Any, bytes]] = world.loop.create_future()
        left = asyncio.Event()
        caller = world.machines[process.name.partition("/")[0]]
        worker.open_calls[answered] = caller.own_calls[left] = None
        context = target.context.copy()
        call = _answer(worker.attempts.attempts.app(), request, answered, left)
        context.run(world.loop.create_task, call)
        try:
            async with asyncio.timeout(limits["read"]):
                status, headers, body = await answered
        except TimeoutError:
            raise httpx.ReadTimeout("the worker does not answer") from None
        finally:
            worker.open_calls.pop(answered, None)
            caller.own_calls.pop(left, None)
            left.set()
        if world.net.reached(process, "http.done"):
            raise httpx.ReadError("the connection was reset")
        await self._pass(process, worker, limits["read"], httpx.ReadTimeout)
        return httpx.Response(status, headers=headers, content=body)

    async def _pass(
        self, process: SimulatedProcess, worker: Machine, seconds: float, late: type[httpx.TransportError]
    ) -> None:
        loop, net = self._world.loop, self._world.net
        until = loop.time() + seconds
        await asyncio.sleep(loop.delay())
        while (away := net.away(process, worker.name)) > 0:
            if loop.time() >= until:
                raise late("cut off")
            await asyncio.sleep(min(away, until - loop.time()) + loop.delay())


async def _answer(app: Any, request: httpx.Request, answered: Any, left: asyncio.Event) -> None:
    """One call, in the worker."""
    body, sent = request.read(), False
    found: dict[str, Any] = {"body": b""}
    scope = {
        "type": "http", "method": request.method, "path": request.url.path, "root_path": "",
        "raw_path": request.url.path.encode(), "query_string": b"", "http_version": "1.1",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "client": ("127.0.0.1", 40000), "server": ("127.0.0.1", 8471), "scheme": "http",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.update(status=message["status"], headers=message["headers"])
        found["body"] += message.get("body", b"")

    await app(scope, receive, send)
    if not answered.done():
        answered.set_result((found["status"], found["headers"], found["body"]))


class BlockingToWorkers(httpx.BaseTransport):
    """The same for the heartbeat's thread."""

    def __init__(self, world: World) -> None:
        self._world = world

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        thread = Thread.current()
        assert thread is not None
        task = self._world.loop.create_task(ToWorkers(self._world).handle_async_request(request))
        task.add_done_callback(lambda done: thread.wake())
        thread.park(None)
        return task.result()


class HostControls(Controls):
    """The controls of a simulated host."""

    def __init__(self, world: World, token: str, clock: Any) -> None:
        super().__init__([f"http://{name}" for name in world.workers], token, clock)
        self._world = world

    def transport(self) -> httpx.AsyncBaseTransport:
        return ToWorkers(self._world)

    def blocking_transport(self) -> httpx.BaseTransport:
        return BlockingToWorkers(self._world)


class ToIssuer(httpx.AsyncBaseTransport):
    def __init__(self, world: World) -> None:
        self._world = world
        self._inner = httpx.MockTransport(world.issuer._handle)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        world, process = self._world, process_now()
        assert process is not None
        world.net.reached(process, "issuer.sent")
        await asyncio.sleep(world.loop.delay())
        if world.net.away(process, "issuer") > 0:
            await asyncio.sleep(1.0)
            raise httpx.ConnectTimeout("the issuer does not answer")
        response = await self._inner.handle_async_request(request)
        await asyncio.sleep(world.loop.delay())
        if world.net.reached(process, "issuer.done"):
            raise httpx.ReadError("the connection was reset")
        return response
