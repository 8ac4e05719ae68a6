"""The broker: a process that sends what runs ask for, and so holds tokens while it reads hostile bytes.

So it confines itself before it hears of an org: it reads no files but those of the resolver, starts no
process, and no core shows its memory. Over its control socket it gets attempts, doors, leases and answers,
and sends questions and records, each a JSON datagram. When the worker is gone, it ends.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import json
import os
import signal
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from worker.engine.runners.child import linux
from worker.features.egress.attempts import MAX_ORIGINS, Held, ServedAttempt, TokenMissing
from worker.features.egress.confinement import FileId, confine, resolver_files
from worker.features.egress.injection import Headers
from worker.features.egress.network import Pools, read_less, tls_context
from worker.features.egress.pacing import OriginCounts, Pacer, Slot, Stopped
from worker.features.egress.requests import NO_LEASE, UNKNOWN_CALL, RequestRefused, RunRequest, shown
from worker.features.egress.streams import RunStream
from worker.guard.clock import SystemClock
from worker.guard.urls import Origin
from worker.handlers.door import GIVE, PASS
from worker.handlers.results import RateLimited
from worker.model.limits import Ask, BucketKey, Limit, Share
from worker.model.throttling import asked_pause

DATAGRAM = 256 * 1024
# Seconds between two looks at idle connections.
TIDY = 1.0
# Messages that are read before anything else is done.
AT_ONCE = 64
# Seconds that a broker whose files were replaced waits for a pause in its requests, and for the last of them.
PAUSE = 10.0
LAST = 60.0
# Seconds for which the limits of an origin are known, and its pauses, which other workers learn of in
# `shares.POLL` seconds: within one in all.
KNOWN = 0.4
# Seconds for which they are remembered besides, in case the database is away.
REMEMBERED = 60.0
# Modules that are imported at a first use, when their files cannot be read any more.
LATE = ("anyio._backends._asyncio", "encodings.idna", "concurrent.futures.thread")
Message = Mapping[str, Any]


class StreamSocket(socket.socket):
    """A socket of a run, which has it too and could make it block: O_NONBLOCK belongs to all who share it."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(size, flags | socket.MSG_DONTWAIT)

    def send(self, data: Any, flags: int = 0) -> int:
        return super().send(data, flags | socket.MSG_DONTWAIT)

    def sendmsg(self, buffers: Any, ancillary: Any = (), flags: int = 0, *address: Any) -> int:
        return super().sendmsg(buffers, ancillary, flags | socket.MSG_DONTWAIT, *address)


class HeaderFields:
    """The headers of an answer by name."""

    def __init__(self, headers: Headers) -> None:
        self._fields = {name.lower(): value.decode("latin-1") for name, value in headers}

    def get(self, key: str, default: str = "", /) -> str:
        return self._fields.get(key.lower().encode(), default)


@dataclass(frozen=True, slots=True)
class KnownPlace:
    """What is known of an org at an origin, until a time of the monotonic clock."""

    limits: tuple[Limit, ...]
    until: float


class BrokerProcess:
    """Serves the doors of attempts; `control` leads to the worker."""

    def __init__(
        self,
        control: socket.socket,
        context: ssl.SSLContext,
        *,
        files: Sequence[FileId] | None = None,
        **network: Any,
    ) -> None:
        """`files` are those of `FILES` that it may read; None if it may read all."""
        self._control = control
        self._files = files
        self._retiring = False
        self._loop = asyncio.get_running_loop()
        self.pools = Pools(context, self.may_send, **network)
        self.attempts: dict[int, ServedAttempt] = {}
        self._doors: dict[int, socket.socket] = {}
        self._freeze_at = float("inf")
        self._freezing: asyncio.TimerHandle | None = None
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Message]] = {}
        # What the worker said of limits, and the questions under way.
        self._places: dict[tuple[str, str], KnownPlace] = {}
        self._looking: dict[tuple[str, str], asyncio.Task[KnownPlace]] = {}
        self._clock = SystemClock()
        self._pacer = Pacer(self._clock, self._ask_share)
        self._reported: list[OriginCounts] = []
        self._unsent: deque[bytes] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.ended = asyncio.Event()

    async def serve(self) -> None:
        """Serve until the worker is gone, or files of the resolver are replaced: it may not read them."""
        self._loop.add_reader(self._control, self._receive)
        self._tell({"op": "ready"})
        while not self.ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(TIDY):
                    await self.ended.wait()
            await self.pools.tidy()
            self._forget_places()
            self._report()
            linux.release_memory()
            if self._files is not None and resolver_files() != self._files:
                await self._retire()
                return

    # What streams need

    def may_send(self) -> bool:
        return time.monotonic() < self._freeze_at

    async def admit(self, attempt: ServedAttempt, origin: Origin) -> Slot:
        name = shown(origin)
        known = await self._place(attempt, name)
        try:
            slot = await self._pacer.acquire(
                attempt.org, name, known.limits, float("inf"), group=str(attempt.number)
            )
        except RateLimited as limited:
            raise RequestRefused("limited", name, retry_after=limited.retry_after) from None
        except Stopped:
            raise RequestRefused("ConnectError", NO_LEASE) from None
        if slot.waited > KNOWN:
            # A pause that another broker has learned of meanwhile ends the leave to send.
            try:
                await self._place(attempt, name)
            except BaseException:
                slot.release()
                raise
        return slot

    def answered(self, attempt: ServedAttempt, request: RunRequest, status: int, headers: Headers) -> None:
        if (seconds := asked_pause(status, HeaderFields(headers), self._clock.now().timestamp())) is not None:
            name = shown(request.origin)
            self._pacer.pause(attempt.org, name, seconds)
            self._begin(self._pause(attempt.number, name, seconds))

    def denied(self, attempt: ServedAttempt, origin: str, reason: str) -> None:
        if origin not in attempt.reported and len(attempt.reported) < MAX_ORIGINS:
            attempt.reported.add(origin)
            self._tell({"op": "denied", "number": attempt.number, "origin": origin, "reason": reason})

    def sent(
        self, attempt: ServedAttempt, request: RunRequest, began: int, status: int | None, error: str
    ) -> None:
        where = {"method": request.method, "host": request.origin.host, "port": request.origin.port}
        when = {"began": began, "ended": time.time_ns()}
        self._tell(
            {"op": "sent", "number": attempt.number, "status": status, "error": error, **where, **when}
        )

    async def ask(self, of: int, call: str, fields: Message) -> Message:
        """The worker's answer to a call in the name of an attempt; or its `error`."""
        number = next(self._numbers)
        answer: asyncio.Future[Message] = self._loop.create_future()
        self._asked[number] = answer
        self._tell({"op": "ask", "number": of, "call": call, "fields": fields, "n": number})
        try:
            return await answer
        finally:
            self._asked.pop(number, None)

    # Limits

    async def _place(self, attempt: ServedAttempt, origin: str) -> KnownPlace:
        """The limits of an origin, as they were at most `KNOWN` seconds ago; none if nothing is known."""
        key = (attempt.org, origin)
        known = self._places.get(key)
        if known is not None and time.monotonic() < known.until:
            return known
        looking = self._looking.get(key)
        if looking is None:
            looking = self._looking[key] = self._loop.create_task(self._look(*key))
            looking.add_done_callback(lambda _: self._looking.pop(key, None))
        return await asyncio.shield(looking)

    async def _look(self, org: str, origin: str) -> KnownPlace:
        """Ask in the name of any attempt of the org: the one that began may end before the answer."""
        key, limits = (org, origin), None
        while limits is None:
            now = time.monotonic()
            number = next((each.number for each in self.attempts.values() if each.org == org), None)
            if number is None:  # nor is there a request that waits
                return KnownPlace((), now)
            answer = await self.ask(number, "limits", {"origin": origin})
            error = answer.get("error")
            if error is None:
                limits = tuple(map(Limit.from_json, answer["limits"]))
                if answer["paused"] > 0:
                    self._pacer.pause(org, origin, answer["paused"])
            elif error["code"] == UNKNOWN_CALL:
                limits = ()  # a worker of an older release, behind a host
            elif key in self._places:
                limits = self._places[key].limits  # the database is away
            else:
                await asyncio.sleep(KNOWN)
        known = self._places[key] = KnownPlace(limits, now + KNOWN)
        return known

    def _forget_places(self) -> None:
        """Forget origins that were not asked for lately: a run may reach any number of them."""
        oldest = time.monotonic() - REMEMBERED
        for key in [key for key, known in self._places.items() if known.until < oldest]:
            del self._places[key]

    def _report(self) -> None:
        """Tell the worker what the pacer counts, if that has changed."""
        if (counts := self._pacer.counts()) != self._reported:
            self._reported = counts
            self._tell({"op": "paced", "counts": [each._asdict() for each in counts]})

    async def _ask_share(self, ask: Ask) -> Share:
        began = time.monotonic()
        number = self._number_of(ask.key)
        fields = {"limit": ask.key.limit_id, **ask._asdict()}
        del fields["key"]
        answer = await self.ask(number, "share", fields)
        if "error" in answer:
            raise ConnectionError(answer["error"]["message"])
        share = Share(*answer["share"])
        return share._replace(until=began + share.until, slots_until=began + share.slots_until)

    def _number_of(self, key: BucketKey) -> int:
        """An attempt in whose name a share of a limit can be asked for: of the org, if it is by org."""
        for attempt in self.attempts.values():
            if key.org_id in (None, attempt.org):
                return attempt.number
        raise ConnectionError("no attempt is left that uses the limit")

    async def _pause(self, number: int, origin: str, seconds: float) -> None:
        await self.ask(number, "pause", {"origin": origin, "seconds": seconds})

    # Messages of the worker

    def _receive(self) -> None:
        for _ in range(AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(self._control, DATAGRAM, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:
                self._loop.remove_reader(self._control)
                self.ended.set()
                return
            self._obey(json.loads(data), descriptors)

    def _obey(self, message: dict[str, Any], descriptors: list[int]) -> None:
        number = message.get("number")
        match message["op"]:
            case "attempt":
                self.attempts[message["number"]] = ServedAttempt(message, self._token)
            case "secret" if number in self.attempts:
                self.attempts[message["number"]].bind(message)
            case "door":
                self._open(message["number"], socket.socket(fileno=descriptors[0]))
            case "stream":
                self._accept(message["number"], descriptors[0])
            case "lease":
                self._renew(message["freeze_at"])
            case "stop" if number in self.attempts:
                self.attempts[message["number"]].stop()
            case "end":
                self._end(message["number"])
            case "answer":
                answer = self._asked.get(message["n"])
                if answer is not None and not answer.done():
                    answer.set_result(message)

    def _open(self, number: int, door: socket.socket) -> None:
        """Accept the streams that a run passes over its door."""
        door.setblocking(False)
        # The least that the kernel allows, some five messages: a run may leave unread what it has asked for.
        door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self._doors[number] = door
        if not self._retiring:
            self._loop.add_reader(door, self._pass, number, door)

    def _pass(self, number: int, door: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                data, descriptors, _, _ = socket.recv_fds(door, 16, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            for descriptor in descriptors:
                self._accept(number, descriptor)
            if data == GIVE:
                self._give(number, door)
            if not data:  # no process holds the other end
                self._loop.remove_reader(door)
                return

    def _give(self, number: int, door: socket.socket) -> None:
        """Pass a stream to a run that may pass none: this process may have more descriptors in flight."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                socket.send_fds(door, [PASS], [theirs.fileno()])
            except OSError:  # the run reads none of them, or has ended
                ours.close()
                return
        self._accept(number, ours.detach())

    def _accept(self, number: int, descriptor: int) -> None:
        attempt = self.attempts.get(number)
        # A run can pass any descriptor.
        try:
            stream = StreamSocket(fileno=descriptor)
        except OSError:  # not a socket
            os.close(descriptor)
            return
        if attempt is None or (stream.family, stream.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            stream.close()
            return
        stream.setblocking(False)
        self._begin(self._loop.create_connection(lambda: RunStream(self, attempt), sock=stream))

    def _end(self, number: int) -> None:
        """Drop all of an attempt, and tell the worker what it has sent."""
        if (door := self._doors.pop(number, None)) is not None:
            self._loop.remove_reader(door)
            door.close()
        attempt = self.attempts.pop(number, None)
        self._tell({"op": "ended", "number": number, "rows": attempt.end() if attempt else []})

    # Files that are replaced

    async def _retire(self) -> None:
        """End at the next pause in the requests, or after the last of them: another broker goes on."""
        began = time.monotonic()
        while not self.ended.is_set() and self._busy() and time.monotonic() < began + LAST:
            if time.monotonic() > began + PAUSE:
                self._take_no_more()
            await asyncio.sleep(0.02)
        for attempt in self.attempts.values():
            self._tell({"op": "counted", "number": attempt.number, "rows": attempt.rows()})
        self._tell({"op": "retired"})

    def _busy(self) -> bool:
        return any(stream.busy for attempt in self.attempts.values() for stream in attempt.streams)

    def _take_no_more(self) -> None:
        """Leave what the runs pass from now on to the next broker."""
        self._retiring = True
        for door in self._doors.values():
            self._loop.remove_reader(door)
        for attempt in self.attempts.values():
            for stream in [each for each in attempt.streams if not each.busy]:
                stream.close()

    # Leases

    def _renew(self, freeze_at: float) -> None:
        if not self.may_send():
            # It was late, and reads the renewal before its timer is due.
            self._end_waits()
        self._freeze_at = freeze_at
        if self.may_send():
            self._pacer.resume()
        if self._freezing is not None:
            self._freezing.cancel()
        # A stopped process learns here that it is late: `may_send` has said so already.
        self._freezing = self._loop.call_later(max(freeze_at - time.monotonic(), 0), self._freeze)

    def _freeze(self) -> None:
        if self.may_send():
            self._renew(self._freeze_at)
            return
        self._end_waits()

    def _end_waits(self) -> None:
        """Send nothing of what is queued, and close all connections."""
        self._pacer.stop()
        for attempt in self.attempts.values():
            attempt.close_streams()
        self._begin(self.pools.close())

    # Questions

    async def _token(self, number: int, fresh: bool, audience: str, resource: str) -> Held:
        of = {"audience": audience, "resource": resource} if audience or resource else {}
        answer = await self.ask(number, "token_for" if of else "token", {"fresh": fresh, **of})
        if "error" in answer:
            error = answer["error"]
            raise TokenMissing(error["code"], error["message"], error["retry_after"])
        return Held(answer["text"].encode(), time.monotonic() + answer["seconds"])

    def _begin(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, message: Message) -> None:
        self._unsent.append(json.dumps(message).encode())
        self._flush()

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._control.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            self._loop.add_writer(self._control, self._flush)
            return
        except OSError as error:
            if error.errno == errno.EMSGSIZE:  # this one only: others are of other orgs
                self._unsent.popleft()
                return self._flush()
            self._unsent.clear()  # the worker is gone, which the next read reports
        self._loop.remove_writer(self._control)


async def _serve(control: socket.socket, prepare: Callable[[], Sequence[FileId] | None]) -> None:
    try:
        context = tls_context()
        # Before there is a second thread: only threads that start later are confined too.
        files = prepare()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        control.send(json.dumps({"op": "failed", "reason": reason}).encode())
        raise
    gc.freeze()
    await BrokerProcess(control, context, files=files).serve()


def main() -> None:
    """`python -m worker.features.egress.broker DESCRIPTOR PARENT SETUP`, for worker and host only."""
    control, parent, setup = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the worker ends it
    linux.name_process(linux.ProcessName.BROKER)
    linux.die_with_parent()
    if os.getppid() != parent:
        sys.exit(os.EX_UNAVAILABLE)
    linux.allow_many_descriptors()
    control.setblocking(False)
    for name in LATE:
        import_module(name)
    read_less()
    asyncio.run(_serve(control, lambda: confine(**setup)))


if __name__ == "__main__":
    main()
