"""Serves ASGI applications on loopback, each in a thread with its own event loop."""

from __future__ import annotations

import socket
import threading

import uvicorn
from starlette.types import ASGIApp


def bind_loopback(port: int = 0) -> socket.socket:
    """A listening socket on 127.0.0.1; port 0 picks a free one.

    It listens at once: a request sent before the server runs waits.
    """
    listener = socket.create_server(("127.0.0.1", port), backlog=512)
    listener.set_inheritable(False)
    # asyncio does not set this for connections of such a socket: each response would wait 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def url_of(listener: socket.socket) -> str:
    """The base URL of a bound socket, without a trailing slash."""
    host, port = listener.getsockname()[:2]
    return f"http://{host}:{port}"


class ServerThread:
    """Serves one application from a thread until `stop()`; also a context manager."""

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self.url = url_of(listener)
        self._listener = listener
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, log_level="warning", access_log=False, timeout_graceful_shutdown=1
            )
        )
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [listener]},
            name=f"serve {self.url}",
            daemon=True,
        )

    def start(self) -> ServerThread:
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close the socket and wait for the thread. Idempotent."""
        self._server.should_exit = True
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        self._listener.close()

    def __enter__(self) -> ServerThread:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
