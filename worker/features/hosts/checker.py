"""Checker: lets another process, `body_check.py`, check the large bodies of hosts' calls."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from worker.errors import Busy
from worker.features.hosts import body_check
from worker.features.hosts.body_check import CALL, ENDING, FRAME, REFUSED, REQUEST, ROW, ROWS, TEXT
from worker.features.hosts.wire import Malformed
from worker.handlers.installed import environment
from worker.handlers.json_text import CheckedObject, CheckedText
from worker.telemetry.events import emit

COMMAND = (sys.executable, "-P", "-m", body_check.__name__)
# Seconds that one body may take: 16 MiB of results take about one.
DEADLINE = 20.0
# Bytes that are passed on at a time.
PIECE = 256 * 1024
# Rows of a part of a call, and bytes of them without their long texts.
PART_ROWS = 100
PART_BYTES = 32 * 1024

Message = dict[str, Any]


class Checker:
    """Checks one body after another; starts the process for the first one, and again when it has ended."""

    def __init__(self, command: Sequence[str] = COMMAND, *, deadline: float = DEADLINE) -> None:
        self._command = command
        self._deadline = deadline
        self._process: asyncio.subprocess.Process | None = None
        self._closed = False
        self._turn = asyncio.Lock()

    async def check(self, name: str, body: bytes | bytearray) -> list[Message]:
        """The call with this body, in parts that can each be called on its own, in this order.

        Raises:
            Malformed: it is not valid, or ended the process.
            Busy: it took too long, or no process can be started, or this was closed.
        """
        async with self._turn:
            if self._closed:
                raise Busy("the worker is stopping", fix="ask another worker")
            try:
                async with asyncio.timeout(self._deadline):
                    return await self._ask(name, body)
            except TimeoutError:
                await self._kill()
                raise Busy(f"the body of {name} was not checked in time", fix="try again") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                code = await self._kill()
                if self._closed:
                    raise Busy("the worker is stopping", fix="ask another worker") from None
                emit("checker.died", call=name, bytes=len(body), exit_code=code)
                raise Malformed(f"the body of {name} cannot be checked") from None
            except asyncio.CancelledError:
                # Its answer would be taken for that of the next body.
                await self._kill()
                raise

    async def close(self) -> None:
        """End the process for good; a body that is being checked is to be sent to another worker."""
        self._closed = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        # A check under way reads to the end of the process, or is starting another one.
        async with self._turn:
            await self._kill()

    async def _ask(self, name: str, body: bytes | bytearray) -> list[Message]:
        process = await self._started()
        to, of = process.stdin, process.stdout
        if to is None or of is None:
            raise ConnectionError
        to.write(REQUEST.pack(len(name.encode()), len(body)) + name.encode())
        for start in range(0, len(body), PIECE):
            to.write(body[start : start + PIECE])
            await to.drain()
        parts, ends = _Parts(name), False
        while True:
            kind, size = FRAME.unpack(await of.readexactly(FRAME.size))
            content = await of.readexactly(size)
            if kind == TEXT:
                parts.text(content)
            elif kind in (CALL, ROW):
                parts.add(kind, content)
            elif kind == ENDING:
                ends = True
            else:
                break
            # Each piece is small, but there may be thousands.
            await asyncio.sleep(0)
        if ends:
            await self._kill()
        if kind == REFUSED:
            raise Malformed(content.decode("utf-8", "replace"))
        return parts.whole()

    async def _started(self) -> asyncio.subprocess.Process:
        process = self._process
        if process is None or process.returncode is not None:
            try:
                process = self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    env=environment(()),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                    # In the session by which the worker finds its children.
                    process_group=0,
                )
            except OSError as error:
                raise Busy(f"no process can be started to check a large body: {error.strerror}") from None
        return process

    async def _kill(self) -> int | None:
        process, self._process = self._process, None
        if process is None:
            return None
        with suppress(ProcessLookupError):
            process.kill()
        if process.stdout is not None:
            # Asyncio stops reading from a process that has written much, and then never sees its end.
            await process.stdout.read()
        return await process.wait()


class _Parts:
    """The parts of a call, as they arrive."""

    def __init__(self, name: str) -> None:
        self._rows = ROWS[name][0] if name in ROWS else None
        self._call: Message = {}
        self._done: list[list[Message]] = [[]]
        self._size = 0
        self._places: list[tuple[Sequence[str], bool, bool]] = []
        self._message: Message = {}

    def add(self, kind: int, content: bytes) -> None:
        self._message, self._places = json.loads(content)
        if kind == CALL:
            self._call = self._message
            return
        last = self._done[-1]
        # Handlers are taken all or none; there may be few.
        is_batch = self._rows != "entries"
        if last and is_batch and (len(last) >= PART_ROWS or self._size + len(content) > PART_BYTES):
            self._done.append(last := [])
            self._size = 0
        last.append(self._message)
        self._size += len(content)

    def text(self, content: bytes) -> None:
        path, is_json, is_schema = self._places.pop(0)
        into = self._message
        for name in path[:-1]:
            into = into[name]
        text = content.decode()
        if is_schema:
            into[path[-1]] = CheckedObject(json.loads(text))
        else:
            into[path[-1]] = CheckedText(text) if is_json else text

    def whole(self) -> list[Message]:
        rows = self._rows
        if rows is None:
            return [self._call]
        # What is beside the rows goes with the last of them.
        return [*({rows: part} for part in self._done[:-1]), {rows: self._done[-1], **self._call}]


def joined(answers: Sequence[Mapping[str, Any]]) -> Message:
    """The answer to a call from those to its parts: their lists one after another."""
    if len(answers) == 1:
        return dict(answers[0])
    whole: Message = {}
    for answer in answers:
        for name, values in answer.items():
            whole[name] = [*whole.get(name, ()), *values]
    return whole
