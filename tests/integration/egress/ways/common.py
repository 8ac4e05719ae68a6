"""What all ways use. `places` has the ports and paths of `sinks.Sinks`; `has` is what the run has."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

from worker import Context

LOCAL = "127.0.0.1"
Places = dict[str, Any]
Way = Callable[[Context[Any, Any], Places, bytes], Coroutine[Any, Any, Any]]
WAYS: dict[str, Way] = {}
libc = ctypes.CDLL(None, use_errno=True)


def way(function: Way) -> Way:
    WAYS[function.__name__] = function
    return function


def checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def tried(act: Callable[[], Any], otherwise: Any = None) -> Any:
    """What it gives, or the error."""
    try:
        return act()
    except (OSError, TypeError) as error:  # an address of another family
        return error if otherwise is None else otherwise


def connected(places: Places, name: str = "tcp") -> socket.socket:
    return socket.create_connection((LOCAL, places[name]))


def raw_request(
    port: int, path: str, has: bytes, *, method: str = "GET", host: str = "x", more: str = ""
) -> str:
    with socket.create_connection((LOCAL, port)) as out:
        token = has.split()[1].decode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: {token}\r\n{more}\r\n"
        out.sendall(head.encode())
        time.sleep(0.05)
        return out.recv(65_536).decode("latin-1")
