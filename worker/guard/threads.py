"""Keys of an issuer for callers on any thread and any event loop, also after a fork.

Callers verify signatures on their own thread. Only fetches happen elsewhere: on one event loop for all
guards of a process, in a thread of its own. A process that was forked starts another one, because it has
none of its parent's threads, and keeps the keys that its parent knew.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar

from .errors import IssuerUnavailable
from .jwks import KeySet
from .verify import Key

WAIT = 25.0  # seconds: the discovery document and the key set take ten each at most

# httpx, httpcore and asyncio load these with the first request. A fork during an import leaves the child
# with an import that never ends.
_LAZY = ("httpcore", "anyio", "anyio._backends._asyncio", "sniffio", "encodings.idna", "stringprep")


T = TypeVar("T")


class _Process:
    """The loop of this process."""

    def __init__(self) -> None:
        # Held by the loop's thread whenever it is not waiting, and by a thread that forks.
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.pid = 0
        # Collecting what belongs to a loop of the parent would close its sockets, or warn.
        self.of_parent: list[object] = []

    def running_loop(self) -> asyncio.AbstractEventLoop:
        """The loop, started by the first call."""
        if self.loop is not None and self.pid == os.getpid():
            return self.loop
        with self.lock:
            if self.loop is None or self.pid != os.getpid():
                for name in _LAZY:
                    with suppress(ImportError):
                        import_module(name)
                with suppress(ImportError):
                    # httpx asks it for its file where neither SSL_CERT_FILE nor SSL_CERT_DIR is set.
                    import_module("certifi").where()
                self.of_parent.append(self.loop)
                loop = asyncio.SelectorEventLoop(_Selector(self.lock))
                thread = threading.Thread(target=_run, args=(loop, self.lock), name="guard-keys", daemon=True)
                thread.start()
                self.loop, self.pid = loop, os.getpid()
            return self.loop

    def after_fork(self) -> None:
        """In the child, whose lock is held by a thread that it does not have."""
        self.lock = threading.Lock()
        self.of_parent.append(self.loop)
        self.loop = None


class _Selector(selectors.DefaultSelector):
    """Releases a lock while it waits.

    So the process is forked only then. OpenSSL has locks of its own: a fork while the loop's thread makes
    an SSL context or shakes hands would leave them held in the child.
    """

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__()
        self._lock = lock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._lock.release()
        try:
            return super().select(timeout)
        finally:
            self._lock.acquire()


def _run(loop: asyncio.AbstractEventLoop, lock: threading.Lock) -> None:
    with lock:
        loop.run_forever()


_process = _Process()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _process.lock.acquire(),
        after_in_parent=lambda: _process.lock.release(),
        after_in_child=_process.after_fork,
    )


class ThreadKeys:
    """The keys of the issuer `name`; its methods may be called on any thread.

    `open_keys` is called on the loop, once in each process.
    """

    def __init__(self, name: str, open_keys: Callable[[], KeySet]) -> None:
        self._name = name
        self._open = open_keys
        # Set on the loop only, so no lock is needed, and a fork leaves none held.
        self._keys: KeySet | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def find(self, kid: str) -> Key:
        """As `KeySet.find`; waits if keys must be fetched, for 25 s at most."""
        if (key := self._known(kid)) is not None:
            return key
        future = self._submit(self._find(kid))
        try:
            return future.result(WAIT)
        except TimeoutError:
            future.cancel()
            raise IssuerUnavailable(f"the keys of issuer {self._name} cannot be read in time") from None

    async def find_async(self, kid: str) -> Key:
        """As `find`, without blocking the caller's event loop."""
        if (key := self._known(kid)) is not None:
            return key
        return await asyncio.wrap_future(self._submit(self._find(kid)))

    async def close(self) -> None:
        """Cancel fetches of this process."""
        if self._loop is not None and self._loop is _process.loop:
            await asyncio.wrap_future(self._submit(self._close()))

    def _known(self, kid: str) -> Key | None:
        keys = self._keys
        if keys is None:
            return None
        key = keys.known(kid)
        if key is not None and keys.document.is_due:
            self._submit(self._refresh())
        return key

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, _process.running_loop())

    async def _find(self, kid: str) -> Key:
        return await self._here().find(kid)

    async def _refresh(self) -> None:
        self._here().document.refresh_if_old()

    async def _close(self) -> None:
        if self._keys is not None:
            await self._keys.close()

    def _here(self) -> KeySet:
        """The key set of the running loop, with the keys that the parent process knew."""
        loop = asyncio.get_running_loop()
        if self._keys is not None and self._loop is loop:
            return self._keys
        keys = self._open()
        if self._keys is not None:
            keys.adopt(self._keys)
            _process.of_parent.append(self._keys)
        self._keys, self._loop = keys, loop
        return keys
