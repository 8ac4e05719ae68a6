"""Ways out: no byte of a token or a bound secret leaves a sealed run, and each way works for an open one."""

from __future__ import annotations

import asyncio
import base64
import os
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.fakes.answering import AnsweringWorker
from tests.fakes.certificates import make_certificate
from tests.fakes.plugins import make_plugin
from tests.fakes.running import claims, token, until, work
from tests.integration.egress import ways
from tests.integration.egress.conftest import CONFINED
from tests.integration.egress.sinks import Sinks
from worker.clock import SystemClock
from worker.engine.runners.child.pool import ChildPool
from worker.engine.runners.child.sandbox import Planner
from worker.engine.runners.contract import StopSignal, Work
from worker.features.egress.handle import BrokerHandle
from worker.model.egress import BoundSecret, Egress, placeholder_of
from worker.model.runs.outcome import Failed, Outcome, Succeeded

pytestmark = pytest.mark.anyio
MODULE = "egress_ways"
# The part of each that is random is looked for in parts, so that one that was cut is found.
RANDOM = {name: secrets.token_hex(12) for name in ("token", "newer", "secret", "variable")}
TOKEN, NEWER = f"token-canary-{RANDOM['token']}", f"token-canary-{RANDOM['newer']}"
SECRET = f"secret-canary-{RANDOM['secret']}/a+b&c="
VARIABLE = f"secret-canary-{RANDOM['variable']}"
MARKER = f"marker-{secrets.token_hex(12)}"
OTHER_RUN = "01234567-89ab-7def-8123-456789abcd00"

# Each way, and the sink that its control reaches.
OWN = ("result", "error", "log", "checkpoint", "progress", "step")
WAYS = {
    **dict.fromkeys(("tcp", "tcp_of_a_thread", "tcp_fast_open", "mptcp", "io_uring", "child_process"), "tcp"),
    **dict.fromkeys(("orphan", "inherited", "descriptor_of_another", "descriptors_to_the_broker"), "tcp"),
    **dict.fromkeys(("udp", "udp_of_a_mapped_address"), "udp"),
    **{
        name: name
        for name in ("quic", "dns", "icmp", "raw", "packet", "netlink", "vsock", "path", "abstract")
    },
    **dict.fromkeys(("path_of_datagrams", "pair_of_datagrams", "pair_of_streams"), "datagrams"),
    **{"message_queue": "queue", "shared_memory": "segment", "file": "file"},
    **dict.fromkeys(("environment", "own_memory", "memory_of_others", "core_dump"), "result"),
    **{name: name for name in OWN},
    **{name: "result" for name in ways.WAYS if name.startswith("echo_")},
    "echo_followed": "evil",
    **dict.fromkeys(("path_of_a_url", "query", "body", "header_to_another", "basic_to_another"), "stranger"),
    **dict.fromkeys(("cookie_to_another", "look_alike", "placeholder_of_another"), "stranger"),
    **dict.fromkeys(("userinfo", "userinfo_of_the_owner", "unlisted", "number_for_an_address"), "evil"),
    **dict.fromkeys(("subdomain", "websocket", "proxy", "smuggled"), "evil"),
    **{"other_servers_name": "sni", "authority": "tcp"},
}
# The sandbox of files denies these to open runs too: their control has none, and no broker.
UNCONFINED = ("abstract", "message_queue", "shared_memory", "file", "environment", "memory_of_others")
# What a control may lack, and why. It is then expected to fail, with this reason in the report.
MAY_LACK = {
    "vsock": "no vsock on loopback: the module vsock_loopback is not there",
    "icmp": "no right to raw sockets",
    "raw": "no right to raw sockets",
    "packet": "no right to packet sockets",
    "mptcp": "no MPTCP in this kernel",
    "io_uring": "no io_uring, or not for this account",
    "memory_of_others": "no right to the memory of other processes",
    "core_dump": "no process may write a core here, or another program gets it",
}


@pytest.fixture(scope="module", autouse=True)
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    files = Path(ways.__file__).parent.glob("*.py")
    modules = {f"{MODULE}.{file.stem}": file.read_text() for file in files}
    folder = make_plugin(
        tmp_path_factory.mktemp("ways"), "acme-ways", modules=modules, entry_points={"ways": f"{MODULE}:ways"}
    )
    sys.path.append(str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
async def sinks(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> AsyncIterator[Sinks]:
    async with Sinks(tmp_path_factory.mktemp("sinks")).open(certificate) as sinks:
        yield sinks


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls") / "tls.pem")


@pytest.fixture(scope="module")
async def children(plugin: None, certificate: Path) -> AsyncIterator[ChildPool]:
    """A pool as a worker has it, whose broker knows the TLS sink's certificate."""
    os.environ["SSL_CERT_FILE"] = str(certificate)
    broker = BrokerHandle(SystemClock(), CONFINED)
    pool = ChildPool(SystemClock(), sandbox=Planner([]).rules([], []), spares=1, broker=broker)
    pool.start()
    del os.environ["SSL_CERT_FILE"]
    pool.attach()
    yield pool
    await pool.close()


@pytest.fixture(scope="module")
async def unconfined(plugin: None) -> AsyncIterator[ChildPool]:
    """A pool without sandbox and broker, whose runs get a variable of the environment."""
    os.environ["WAYS_KEY"] = VARIABLE
    pool = ChildPool(SystemClock(), pass_environment=["WAYS_KEY"])
    pool.start()
    del os.environ["WAYS_KEY"]
    pool.attach()
    yield pool
    await pool.close()


def work_of(way: str, sinks: Sinks, *, sealed: bool) -> Work:
    url = {name: f"http://127.0.0.1:{sinks.places[name]}" for name in ("owner", "stranger", "evil")}
    listed = (
        url["stranger"],
        f"http://localhost:{sinks.places['stranger']}",
        f"https://127.0.0.1:{sinks.places['tls']}",
    )
    common: dict[str, Any] = {
        "entry_point": f"{MODULE}:ways",
        "token": token(TOKEN),
        "api_origins": (url["owner"],),
        "private_origins": listed,
        "params": {
            "way": way,
            "places": sinks.places,
            "marker": MARKER,
            "sealed": sealed,
            "other": placeholder_of(OTHER_RUN, "KEY"),
        },
        "egress": Egress((("api", *listed),)) if sealed else Egress(),
        "bound": (BoundSecret("KEY", SECRET, url["owner"]),) if sealed else (),
    }
    made = work("ways", **common)
    made.secrets = {"KEY": placeholder_of(made.run_id, "KEY") if sealed else SECRET}
    return made


async def tried(pool: ChildPool, sinks: Sinks, way: str, *, sealed: bool) -> Outcome:
    """Try a way; all that arrived is in the sinks then."""
    sinks.clear()
    worker = AnsweringWorker(renewed=(token(NEWER), claims()))
    outcome = await pool.run(work_of(way, sinks, sealed=sealed), worker, StopSignal())
    await asyncio.sleep(0.02)
    sinks.collect()
    kept = {
        "result": outcome.result if isinstance(outcome, Succeeded) else None,
        "error": [outcome.error, outcome.reason] if isinstance(outcome, Failed) else None,
        "log": worker.text(),
        "checkpoint": worker.saved,
        "progress": worker.progressed,
        "step": worker.steps,
        "record": [worker.sent, worker.denials],
    }
    for name, what in kept.items():
        sinks.got[name] += (what if isinstance(what, str) else repr(what)).encode()
    return outcome


def found_in(data: bytes, *, names: tuple[str, ...] = tuple(RANDOM)) -> list[str]:
    """Which values are in data, as they are or encoded, whole or in parts of eight characters."""
    return [
        name
        for name in names
        if any(part in data for form in _encoded(RANDOM[name].encode()) for part in _parts(form))
    ]


def _encoded(value: bytes) -> Iterator[bytes]:
    yield value
    yield value.hex().encode()
    yield quote(value, safe="").encode()
    yield b"".join(b"%%%02x" % byte for byte in value)
    yield value.decode().encode("utf-16-le")
    for offset in range(3):
        yield base64.b64encode(bytes(offset) + value)[4:-4]


def _parts(form: bytes, size: int = 8) -> Iterator[bytes]:
    size *= len(form) // len(RANDOM["token"]) or 1
    for at in range(len(form) - size + 1):
        yield form[at : at + size]


def _core(folder: Path) -> bytes:
    """The core of a process that has the token."""
    code = "import os,resource,sys; resource.setrlimit(resource.RLIMIT_CORE, (2**30, 2**30)); os.abort()"
    subprocess.run([sys.executable, "-c", code, TOKEN], cwd=folder, check=False)
    return b"".join(path.read_bytes() for path in folder.iterdir())


def test_the_search_finds_values_that_are_cut_or_encoded() -> None:
    value = RANDOM["token"].encode()
    for text in (
        value,
        value[3:11],
        base64.b64encode(b"ab" + value),
        quote(value).encode(),
        value.hex().encode(),
    ):
        assert found_in(b"x" + text + b"y") == ["token"]
    assert found_in(placeholder_of(OTHER_RUN, "KEY").encode() + MARKER.encode()) == []


def test_each_way_of_the_table_is_tried_and_there_are_forty() -> None:
    assert WAYS.keys() == ways.WAYS.keys()
    assert len(WAYS) >= 40
    assert MAY_LACK.keys() <= WAYS.keys() and set(UNCONFINED) <= WAYS.keys()


@pytest.mark.parametrize("way", WAYS)
async def test_no_byte_of_a_token_or_secret_leaves_a_sealed_run(
    children: ChildPool, sinks: Sinks, way: str
) -> None:
    await tried(children, sinks, way, sealed=True)

    # The owner is the one origin that they belong to.
    arrived = {name: found_in(bytes(data)) for name, data in sinks.got.items() if name != "owner"}
    assert not any(arrived.values()), {name: sinks.got[name][:2000] for name in arrived if arrived[name]}
    # Nothing else leaves either, but for what the list allows and the worker keeps.
    marked = {name for name, data in sinks.got.items() if MARKER.encode() in data}
    assert marked <= {*OWN, "record"}
    assert not sinks.got["evil"] and not sinks.got["tcp"]
    if way.startswith("echo_") and way != "echo_by_trace":  # the owner had something to give back
        assert "token" in found_in(bytes(sinks.got["owner"]))


@pytest.mark.parametrize("way", WAYS)
async def test_the_control_the_way_works_for_an_open_run(
    children: ChildPool, unconfined: ChildPool, sinks: Sinks, way: str, tmp_path: Path
) -> None:
    pool = unconfined if way in UNCONFINED else children

    outcome = await tried(pool, sinks, way, sealed=False)
    if way == "core_dump":  # no run may raise the limit again: a process of the test has none
        sinks.got["result"] += _core(tmp_path)

    sink = WAYS[way]
    with suppress(TimeoutError):
        await until(lambda: (sinks.collect(), found_in(bytes(sinks.got[sink])))[1], within=1)
    if not found_in(bytes(sinks.got[sink])) and way in MAY_LACK:
        pytest.xfail(
            f"{way} does not work on this machine: {MAY_LACK[way]}; {sinks.lacking.get(sink, outcome)}"
        )
    assert found_in(bytes(sinks.got[sink])), (outcome, bytes(sinks.got[sink])[:2000])
