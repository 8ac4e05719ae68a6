"""Token requests with httpx and with httpx2: processor time of the client, over loopback and without TLS.

    .venv/bin/python -m bench.http_clients [--requests N] [--rounds N]

`client` is the library itself, as handlers use it; `guard` and `worker` are `exchange` with the connections
of `worker.guard` and of a worker. httpx2 runs the same code: `httpx2.alias_httpx()` replaces the module. Each
measurement is a process of its own; both libraries take turns, and the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable

WAYS = ("client", "guard", "worker")
CONCURRENCY = (1, 8, 32)
FORM = b"grant_type=client_credentials&client_id=m2m-acme&client_secret=secret&scope=read%3Akb"
BODY = b'{"access_token":"' + 800 * b"x" + b'","expires_in":3600,"token_type":"Bearer"}'
RESPONSE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(BODY) + BODY
)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            [length] = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            await reader.readexactly(int(length.partition(b":")[2]))
            writer.write(RESPONSE)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def measured(way: str, url: str, concurrency: int, requests: int) -> float:
    """Milliseconds of this process's time for a request."""
    # Here, after the alias.
    import httpx

    from worker import outbound
    from worker.clock import SystemClock
    from worker.guard import http

    clock = SystemClock()
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    client = {
        "client": lambda: httpx.AsyncClient(limits=limits),
        "guard": http.open_client,
        "worker": outbound.open_client,
    }[way]()

    async def plain() -> None:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        (await client.post(url, content=FORM, headers=headers)).json()

    async def exchanged() -> None:
        reply = await http.exchange(client, "POST", url, clock=clock, limit=http.TOKEN_LIMIT, form=FORM)
        if isinstance(reply, str):
            raise RuntimeError(reply)
        reply.json_object()

    async def several(send: Callable[[], Awaitable[None]], times: int) -> None:
        for _ in range(times):
            await send()

    send = plain if way == "client" else exchanged
    async with client:
        await asyncio.gather(*(several(send, 2) for _ in range(concurrency)))
        before = time.process_time()
        await asyncio.gather(*(several(send, requests // concurrency) for _ in range(concurrency)))
        return (time.process_time() - before) / (requests // concurrency * concurrency) * 1000


def in_a_process(library: str, *arguments: str) -> float:
    command = [sys.executable, "-m", "bench.http_clients", "--measure", library, *arguments]
    return float(subprocess.check_output(command, text=True))


def serve() -> int:
    """Serve on loopback until the process ends; returns the port."""
    ports: list[int] = []
    ready = threading.Event()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    ready.wait()
    return ports[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        library, way, url, concurrency, requests = given.measure
        if library == "httpx2":
            import httpx2

            httpx2.alias_httpx()
        print(asyncio.run(measured(way, url, int(concurrency), int(requests))))
        return
    url = f"http://127.0.0.1:{serve()}/token"
    print("milliseconds of processor time for a request")
    print(f"{'':8}{'at once':>8}{'httpx':>8}{'httpx2':>8}")
    for way in WAYS:
        for concurrency in CONCURRENCY:
            took: dict[str, list[float]] = {"httpx": [], "httpx2": []}
            for _ in range(given.rounds):
                for library, times in took.items():
                    times.append(in_a_process(library, way, url, str(concurrency), str(given.requests)))
            shown = "".join(f"{statistics.median(times):8.2f}" for times in took.values())
            print(f"{way:8}{concurrency:8}{shown}", flush=True)


if __name__ == "__main__":
    main()
