"""Brokers under simulation: the product's own, but for sockets, processes and the network.

The worker's side is `BrokerHandle`, the broker is `BrokerProcess`, a run sends by `ctx.http`. In place of
sockets there are pipes: what is sent over them arrives late, and in order.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import httpcore

from tests.simulation.database import EPOCH
from tests.simulation.loop import SeededLoop, SimulatedProcess, process_now
from tests.simulation.network import Net
from tests.simulation.pipes import Pipe
from tests.simulation.service import Sender, Service
from worker.features.egress import attempts, broker, handle, streams
from worker.features.egress.attempts import ServedAttempt as Attempt
from worker.features.egress.broker import BrokerProcess
from worker.features.egress.pacing import Slot
from worker.guard.urls import Origin
from worker.handlers.brokered import BrokeredTransport, _Exchanges
from worker.handlers.frames import Frame, Frames
from worker.model.limits import Ask, Share

# Seconds after which what is sent to another process of the machine has arrived.
LOCAL = 0.05


class Door:
    """A run's descriptor to its broker, from all three sides: streams wait in it until one is there."""

    def __init__(self, loop: SeededLoop, run: SimulatedProcess) -> None:
        self._loop = loop
        self._run = run
        self._waiting: deque[Stream] = deque()
        self._streams: list[Stream] = []
        self._readers: dict[SimulatedProcess | None, Callable[[], object]] = {}

    def connect(self) -> Stream:
        """In the run."""
        stream = Stream(self._loop, self._run)
        self._streams.append(stream)
        self._waiting.append(stream)
        for process in self._readers:
            self._wake(process)
        return stream

    def hang_up(self) -> None:
        """The run's processes are gone."""
        for stream in self._streams:
            stream.close()

    # As a socket

    def fileno(self) -> Door:
        return self

    def setblocking(self, flag: bool) -> None:
        """Nothing here blocks."""

    def setsockopt(self, *option: int) -> None:
        """Nothing here is full."""

    def close(self) -> None:
        """Others have it open."""

    def read_by(self, reader: Callable[[], object] | None) -> None:
        """Call this in the running process when a stream is there."""
        process = process_now()
        if reader is None:
            self._readers.pop(process, None)
            return
        self._readers[process] = reader
        if self._waiting:
            self._wake(process)

    def recv(self, size: int, flags: int) -> bytes:
        """What the worker peeks at: whether a stream waits."""
        return b"s" if self._waiting else b""

    def take(self) -> Iterator[Stream]:
        while self._waiting:
            yield self._waiting.popleft()

    def _wake(self, process: SimulatedProcess | None) -> None:
        assert process is not None
        self._loop.call_later(
            min(self._loop.delay(), LOCAL), self._readable, process, context=process.context
        )

    def _readable(self, process: SimulatedProcess) -> None:
        if (reader := self._readers.get(process)) is not None:
            reader()


class Stream:
    """A stream between a run and a broker. Here is the run's end, `BrokerEnd` is the other one."""

    def __init__(self, loop: SeededLoop, run: SimulatedProcess) -> None:
        self._loop = loop
        self.down = Pipe(loop, run, LOCAL)
        self._up: Pipe | None = None
        self._protocol: asyncio.Protocol | None = None
        self._early: list[bytes] = []
        self._frames = Frames()
        self._ready: deque[Frame] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._closed = self._ended = False

    def accept(self, broker: SimulatedProcess, protocol: asyncio.Protocol) -> None:
        """In the broker."""
        self._up, self._protocol = Pipe(self._loop, broker, LOCAL), protocol
        for data in self._early:
            self._up.send(protocol.data_received, data)
        if self._closed:
            self._up.send(protocol.connection_lost, None)

    # In the run

    async def send(self, data: bytes) -> None:
        if self._ended or self._closed:
            raise BrokenPipeError
        if self._up is None or self._protocol is None:
            self._early.append(data)
        else:
            self._up.send(self._protocol.data_received, data)

    async def frame(self) -> Frame:
        while not self._ready:
            if self._ended:
                raise EOFError
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._ready.popleft()

    async def wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._up is not None and self._protocol is not None:
                self._up.send(self._protocol.connection_lost, None)

    def receive(self, data: bytes) -> None:
        self._ready.extend(self._frames.feed(data))
        self._wake()

    def end(self) -> None:
        """The broker has closed its end, or is dead."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class BrokerEnd(asyncio.Transport):
    """The transport of a stream in the broker."""

    def __init__(self, stream: Stream, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._stream = stream
        self._protocol = protocol
        self._closed = False

    def write(self, data: Any) -> None:
        if not self._closed:
            self._stream.down.send(self._stream.receive, data)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stream.down.send(self._stream.end)
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """A stream takes all that is sent."""

    def pause_reading(self) -> None:
        """The same."""

    resume_reading = pause_reading


class StreamTransport(BrokeredTransport):
    """The network of `ctx.http` in a run's process."""

    def __init__(self, door: Door) -> None:
        self._exchanges = _Exchanges(door.connect, public=False)  # type: ignore[arg-type]


class SimulatedBroker(BrokerProcess):
    """The broker, in the process that runs when it is made. It does nothing of its own but sockets."""

    def __init__(
        self,
        process: SimulatedProcess,
        worker: SimulatedProcess,
        tell: Callable[[bytes], object],
        service: Service,
        asks: Callable[[str], object],
    ) -> None:
        control: Any = SimpleNamespace(send=tell)
        context: Any = None
        super().__init__(control, context)
        self.process = process
        self.worker = worker
        pools: Any = SimulatedPools(self)
        self.pools = pools
        self._ends: list[Stream] = []
        self.service = service
        self._asks = asks
        # By task of a request its attempt, and when the request was queued.
        self.queued: dict[asyncio.Task[Any] | None, tuple[Attempt, float]] = {}

    async def admit(self, attempt: Attempt, origin: Origin) -> Slot:
        self.queued.setdefault(asyncio.current_task(), (attempt, self._loop.time()))
        return await super().admit(attempt, origin)

    def begin(self) -> None:
        self._tell({"op": "ready"})

    def died(self) -> None:
        """The kernel closes what it had open."""
        for stream in self._ends:
            stream.down.send(stream.end)

    def waiting(self) -> int:
        """The requests that wait for a limit or a pause."""
        return sum(each.waiting for each in self._pacer.counts())

    def _obey(self, message: dict[str, Any], descriptors: list[Any]) -> None:
        if message["op"] == "door":
            self._open(message["number"], descriptors[0])
        else:
            super()._obey(message, descriptors)

    def _pass(self, number: int, door: Any) -> None:
        for stream in door.take():
            self._accept(number, stream)

    def _accept(self, number: int, descriptor: Any) -> None:
        attempt = self.attempts.get(number)
        if attempt is None:
            descriptor.down.send(descriptor.end)
            return
        protocol = streams.RunStream(self, attempt)
        self._ends.append(descriptor)
        protocol.connection_made(BrokerEnd(descriptor, protocol))
        descriptor.accept(self.process, protocol)

    async def _ask_share(self, ask: Ask) -> Share:
        self._asks("AskShare")
        share = await super()._ask_share(ask)
        self.service.leased(self.process, ask.key, share)
        return share


class SimulatedPools:
    """In place of `network.Pools`: each request has a connection of its own to the service."""

    def __init__(self, broker: SimulatedBroker) -> None:
        self._broker = broker

    def of(self, org: str, *, checked: bool) -> SimulatedPools:
        return self

    async def take(self, url: httpcore.URL) -> SimulatedPools:
        return self

    async def keep(self, url: httpcore.URL, connection: object) -> None:
        """It is not used again."""

    async def tidy(self) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is kept."""

    async def aclose(self) -> None:
        """Its request has ended."""

    async def open(self, request: httpcore.Request) -> SimulatedPools:
        """As a connection that was not used before."""
        loop = self._broker._loop
        assert isinstance(loop, SeededLoop)
        self._broker.service.begin(request)
        await asyncio.sleep(loop.delay())
        return self

    def is_usable(self) -> bool:
        return True

    async def handle_async_request(self, request: httpcore.Request) -> httpcore.Response:
        """Send the request as a whole, and read."""
        broker = self._broker
        if (trace := request.extensions.get("trace")) is not None:
            await trace("http11.send_request_headers.started", {})
        if not broker.may_send():
            raise httpcore.WriteError("nothing may be sent now")
        attempt, queued_at = broker.queued.pop(asyncio.current_task())
        sender = Sender(broker.process, broker.worker, queued_at, attempt.stopped)
        status, headers, content = await broker.service.answer(sender, request)
        return httpcore.Response(status, headers=headers, content=content)


class SimulatedHelper:
    """In place of `HelperProcess`, as `BrokerHandle` uses it."""

    def __init__(
        self, brokers: Brokers, module: str, arguments: Sequence[str], variables: Iterable[str]
    ) -> None:
        worker = process_now()
        assert worker is not None
        self._brokers = brokers
        loop = self._loop = brokers.loop
        self.process = SimulatedProcess(loop, f"{worker.name}/broker", worker)
        self.pid = brokers.number()
        # What it says before its worker listens waits in the socket.
        self._unread: list[Any] = []
        self._receive: Callable[[Any], None] = self._unread.append
        self._on_death: Callable[[], None] = lambda: None
        self._down, self._up = Pipe(loop, self.process, LOCAL), Pipe(loop, worker, LOCAL)
        self._worker = worker
        tell = partial(self._up.send, self._told)
        asks = partial(brokers.net.reached, worker)
        self.broker: SimulatedBroker = self.process.context.copy().run(
            SimulatedBroker, self.process, worker, tell, brokers.service, asks
        )
        self._down.send(self.broker.begin)
        brokers.running[worker] = self

    def attach(self, on_message: Callable[[Any], None], on_death: Callable[[], None]) -> None:
        self._receive, self._on_death = on_message, on_death
        for message in self._unread:
            on_message(message)
        self._unread.clear()

    def send(self, message: Any, descriptors: Sequence[Any] = ()) -> None:
        if message["op"] == "lease":
            self._brokers.service.renewed(self._worker, message["freeze_at"])
        self._down.send(self._obey, json.dumps(message), list(descriptors))

    def close(self) -> None:
        self.process.end()
        self.broker.died()
        self._brokers.running.pop(self._worker, None)

    async def gone(self, patience: float) -> None:
        """It ends at once."""

    @property
    def end(self) -> str:
        return "signal SIGKILL"

    def kill(self) -> None:
        """SIGKILL; the worker notices."""
        self.process.kill()
        self.broker.died()
        self._loop.call_later(self._loop.delay(), self._on_death, context=self._worker.context)

    def _obey(self, data: str, descriptors: list[Any]) -> None:
        self.broker._obey(json.loads(data), descriptors)

    def _told(self, data: bytes) -> None:
        self._receive(json.loads(data))


class Brokers:
    """The brokers of a world, by the process of their worker or host."""

    def __init__(self, loop: SeededLoop, service: Service, net: Net) -> None:
        self.loop = loop
        self.service = service
        self.net = net
        self.running: dict[SimulatedProcess, SimulatedHelper] = {}
        self._count = 0

    def number(self) -> int:
        self._count += 1
        return self._count

    def clock(self) -> LoopClock:
        return LoopClock(self.loop)

    def of(self, clock: Any) -> handle.BrokerHandle:
        """The broker of the running process."""
        made = handle.BrokerHandle(clock, {})
        made.start()
        return made

    def waiting(self) -> list[str]:
        """Brokers that live and in which requests wait."""
        return [
            process.name for process, helper in self.running.items()
            if process.alive and helper.process.alive and helper.broker.waiting()
        ]  # fmt: skip

    @contextmanager
    def simulated(self) -> Iterator[None]:
        """Replace what is real in the modules of the feature."""
        loop, epoch = self.loop, EPOCH.timestamp()

        def nanoseconds() -> int:
            return int((epoch + loop.time()) * 1e9)

        time: Any = SimpleNamespace(monotonic=loop.time, time_ns=nanoseconds)
        machine: Any = SimpleNamespace(dup=lambda descriptor: descriptor, getpid=os.getpid)
        with ExitStack() as stack:
            for module in (attempts, broker, streams):
                stack.enter_context(patch.object(module, "time", time))
            stack.enter_context(patch.object(broker, "SystemClock", partial(LoopClock, loop)))
            stack.enter_context(patch.object(handle, "os", machine))
            stack.enter_context(patch.object(handle, "HelperProcess", partial(SimulatedHelper, self)))
            yield


class LoopClock:
    """CLOCK_MONOTONIC of every machine."""

    def __init__(self, loop: SeededLoop) -> None:
        self._loop = loop

    def now(self) -> Any:
        return EPOCH + timedelta(seconds=self._loop.time())

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
