"""Plug-ins are read by children: whatever an import does, everything else is in the catalogue."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from tests.fakes.plugins import make_plugin
from tests.fakes.running import child_pool, until
from worker.clock import SystemClock
from worker.engine.runners.child import linux, zygote
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.pool import ChildPool
from worker.handlers.catalogue import MAX_AT_ONCE, HandlerEntry, read_catalogue
from worker.handlers.installed import distributions
from worker.handlers.job import MAX_DESCRIPTION

GOOD = '''
import os, sys
from pydantic import BaseModel, Field
from worker import job, Context

print("a plug-in that prints while it is imported")
os.write(1, b"{}\\n")

class Params(BaseModel):
    collection: str

class Settings(BaseModel):
    max_tokens: int = Field(1000, ge=1)

@job("acme.digest", params=Params, settings=Settings, scopes={"write:kb", "read:kb"}, timeout="2h",
     max_attempts=4, memory="512MiB", max_concurrent=3)
async def digest(ctx):
    """Digest a collection. It takes a while."""

@job("acme.inline", isolation="inline")
async def inline(ctx): return None

@job("acme.environment", timeout=" ".join(sorted(os.environ)))
def environment(ctx): return None

@job("acme.other_name")
def misnamed(ctx): return None

not_a_job = 1
'''

BAD = {
    "raises": ("raise ValueError('broken on purpose')", "ValueError: broken on purpose"),
    "exits": ("import sys; sys.exit(2)", "SystemExit: its import calls sys.exit(2)"),
    "os_exits": ("import os; os._exit(3)", "its import ended the process: exit code 3"),
    "crashes": (
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "its import ended the process: signal SIGSEGV",
    ),
    "hangs": ("import time; time.sleep(60)", "its import took longer than 3 s"),
    # As a pattern that backtracks for ever does, without the CPU time.
    "holds_gil": ("import ctypes; ctypes.PyDLL(None).sleep(60)", "its import took longer than 3 s"),
    "absent": (
        "import not_installed_anywhere",
        "ModuleNotFoundError: No module named 'not_installed_anywhere'",
    ),
    "syntax": ("def", "SyntaxError: invalid syntax"),
    "sync_inline": (
        "from worker import job\n@job('z.sync_inline', isolation='inline')\ndef f(ctx): ...",
        "TypeError: z.sync_inline is inline and must be an async def",
    ),
    "bad_timeout": (
        "from worker import job\n@job('z.bad_timeout', timeout='soon')\ndef f(ctx): ...",
        "ValueError: 'soon' is not a duration",
    ),
}

SUFFIX = "which is a public suffix or above one; write the origins, or a longer name"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WORKER_DATABASE__URL", "postgresql://secret")
    return tmp_path


async def read(*names: str, timeout: float = 3, new: bool = False) -> dict[str, HandlerEntry]:
    """The handlers of these distributions, read by a fork of a zygote, or by a `new` interpreter."""
    children = ChildPool(SystemClock(), describes=not new)
    if not new:
        children.start()
        children.attach()
    try:
        reading = read_catalogue(names, timeout=timeout, forked=children.take_describing())
        return {entry.name: entry async for found in reading for entry in found}
    finally:
        await children.close()


@pytest.mark.parametrize("new", [False, True])
async def test_a_plug_in_is_described_without_being_imported_here(folder: Path, new: bool) -> None:
    make_plugin(
        folder,
        dist="acme-jobs",
        version="1.2",
        modules={"acme_good": GOOD},
        entry_points={
            "acme.digest": "acme_good:digest",
            "acme.inline": "acme_good:inline",
            "acme.environment": "acme_good:environment",
            "acme.misnamed": "acme_good:misnamed",
            "acme.not_a_job": "acme_good:not_a_job",
            "acme.missing": "acme_good:missing",
        },
    )

    found = await read("Acme_Jobs", new=new)

    digest = found["acme.digest"]
    assert (digest.distribution, digest.version) == ("acme-jobs", "1.2")
    assert digest.entry_point == "acme_good:digest"
    assert digest.scopes == ("read:kb", "write:kb")
    assert (digest.timeout, digest.max_attempts) == ("2h", 4)
    assert (digest.memory, digest.max_concurrent) == ("512MiB", 3)
    assert digest.params_schema is not None
    assert digest.params_schema["required"] == ["collection"]
    assert digest.params_schema["additionalProperties"] is False
    assert digest.settings_schema is not None
    assert digest.settings_schema["properties"]["max_tokens"]["default"] == 1000
    assert digest.description == "Digest a collection."
    assert digest.error is None
    assert found["acme.inline"].isolation == "inline"
    assert found["acme.inline"].params_schema is None
    assert "acme.misnamed" in str(found["acme.misnamed"].error)
    assert found["acme.not_a_job"].error == "acme_good:not_a_job is not a function declared with @job"
    assert "AttributeError" in str(found["acme.missing"].error)
    assert "acme_good" not in sys.modules
    # It shows its environment as a timeout, which is refused by name.
    assert "PATH" in str(found["acme.environment"].error)
    assert "WORKER" not in str(found["acme.environment"].error)


@pytest.mark.parametrize(("new", "bad"), [(False, BAD.keys()), (True, ("raises", "os_exits"))])
async def test_a_broken_plug_in_is_listed_with_its_error_and_the_rest_is_read(
    folder: Path, new: bool, bad: Collection[str]
) -> None:
    modules = {f"acme_{name}": BAD[name][0] for name in bad}
    points = {f"z.{name}": f"acme_{name}:f" for name in bad}
    ok = "from worker import job\n@job('{}')\ndef f(ctx): ..."
    modules |= {"acme_first": ok.format("a.first"), "acme_last": ok.format("zz.last")}
    points |= {"a.first": "acme_first:f", "zz.last": "acme_last:f"}
    make_plugin(folder, dist="acme-broken", version="0.9", modules=modules, entry_points=points)

    found = await read("acme-broken", new=new)

    assert found.keys() == points.keys()
    for name in bad:
        entry = found[f"z.{name}"]
        assert str(entry.error).startswith(BAD[name][1]), entry
        assert (entry.distribution, entry.version) == ("acme-broken", "0.9")
    assert found["a.first"].error is None
    assert found["zz.last"].error is None


# Prints as the child would, past it: `describe` writes to a copy of its standard output.
FORGED = """
import json, os
from worker import job
offer = {{"isolation": "child", "scopes": [], "params_schema": None, "settings_schema": None, "timeout": None,
         "max_attempts": None, "memory": None, "max_concurrent": None,
         "state": False, "pool": None, "secrets": [], "description": None,
         "egress": None, "audiences": [], "children": []}}
def nested(levels): return {{"not": nested(levels - 1)}} if levels else {{}}
line = {line}
for descriptor in map(int, os.listdir("/proc/self/fd")):
    try:
        if descriptor > 2 and os.readlink(f"/proc/self/fd/{{descriptor}}").startswith("pipe:"):
            os.write(descriptor, line.encode() + b"\\n")
    except OSError:
        pass
os._exit(0)
"""

FORGERIES = {
    "scopes": ("json.dumps(offer | {'scopes': 5})", "scopes is a int"),
    "more": ("json.dumps(offer | {'trusted': True})", "its import wrote into the catalogue's pipe"),
    "less": ("json.dumps({'isolation': 'child'})", "its import wrote into the catalogue's pipe"),
    "count": ("json.dumps(offer | {'max_attempts': True})", "max_attempts is a bool"),
    "state": ("json.dumps(offer | {'state': 1})", "state is a int"),
    "pool": ("json.dumps(offer | {'pool': 'Not A Pool'})", "is not the name of a pool"),
    "secrets": ("json.dumps(offer | {'secrets': 'all'})", "secrets is a str"),
    "secret": ("json.dumps(offer | {'secrets': ['a b']})", "is not the name of a secret"),
    "many_secrets": ("json.dumps(offer | {'secrets': ['a'] * 21})", "secrets are more than 20"),
    "description": ("json.dumps(offer | {'description': ['x']})", "description is a list"),
    "egress": ("json.dumps(offer | {'egress': 'open'})", "egress is a str"),
    "item": ("json.dumps(offer | {'egress': [['open']]})", "an item is not a text"),
    "wildcard": (
        "json.dumps(offer | {'egress': ['https://*.github.io']})",
        SUFFIX,
    ),
    "audiences": ("json.dumps(offer | {'audiences': ['a'] * 21})", "it has more than 20 items"),
    "isolation": ("json.dumps(offer | {'isolation': 'worker'})", "its isolation or scopes are invalid"),
    "no_schema": ("json.dumps(offer | {'params_schema': [1]})", "params_schema is a list"),
    "deep_schema": (
        "json.dumps(offer | {'params_schema': nested(64)})",
        "the params_schema nests more than 64",
    ),
    "large_schema": (
        "json.dumps(offer | {'settings_schema': {'title': 'x' * 300_000}})",
        "the settings_schema is larger",
    ),
    "nul": ("json.dumps(offer | {'params_schema': {'title': chr(0)}})", "the params_schema contains a NUL"),
    "deep": ("'[' * 500_000", "its import wrote into the catalogue's pipe"),
}


async def test_an_import_that_writes_its_own_offer_is_held_to_what_an_offer_is(folder: Path) -> None:
    for name, (line, _) in FORGERIES.items():
        module = f"acme_{name}"
        make_plugin(
            folder,
            dist=module,
            modules={module: FORGED.format(line=line)},
            entry_points={f"z.{name}": f"{module}:f"},
        )

    found = await read(*(f"acme-{name.replace('_', '-')}" for name in FORGERIES), timeout=30)

    for name, (_, error) in FORGERIES.items():
        assert error in str(found[f"z.{name}"].error)


async def test_an_import_that_writes_its_own_description_gets_a_printable_line(folder: Path) -> None:
    line = "json.dumps(offer | {'description': 'a' + chr(0) + chr(27) + 'b' * 1000})"
    make_plugin(
        folder,
        dist="acme-said",
        modules={"acme_said": FORGED.format(line=line)},
        entry_points={"z.said": "acme_said:f"},
    )

    [entry] = (await read("acme-said", timeout=30)).values()

    assert (entry.error, entry.description) == (None, f"a {'b' * (MAX_DESCRIPTION - 3)}…")


async def test_what_a_handler_reaches_is_in_the_catalogue(folder: Path) -> None:
    source = (
        "from worker import job\n"
        "@job('acme.lists', egress=['api', 'https://*.example.com'], audiences=['mcp'])\ndef f(ctx): ...\n"
        "@job('acme.none')\ndef g(ctx): ...\n"
        "@job('acme.suffix', egress=['https://*.co.uk'])\ndef h(ctx): ...\n"
    )
    points = {"acme.lists": "acme_reach:f", "acme.none": "acme_reach:g", "acme.suffix": "acme_reach:h"}
    make_plugin(folder, dist="acme-reach", modules={"acme_reach": source}, entry_points=points)

    found = await read("acme-reach")

    lists, none, suffix = (found[name] for name in points)
    assert (lists.egress, lists.audiences) == (("api", "https://*.example.com"), ("mcp",))
    assert (none.egress, none.audiences, none.error) == (None, (), None)
    assert suffix.error == (f"'https://*.co.uk': anyone can have a name below co.uk, {SUFFIX}")


async def test_a_model_with_too_large_a_schema_is_named(folder: Path) -> None:
    source = (
        "from typing import Literal\nfrom pydantic import BaseModel\nfrom worker import job\n"
        "class Params(BaseModel):\n    which: Literal[tuple(str(n) * 10 for n in range(10_000))]\n"
        "@job('acme.large', params=Params)\ndef f(ctx): ...\n"
    )
    make_plugin(
        folder, dist="acme-large", modules={"acme_large": source}, entry_points={"acme.large": "acme_large:f"}
    )

    [entry] = (await read("acme-large")).values()

    assert entry.error == "the params_schema is larger than 256 KiB: shorten its enums and texts"


async def test_one_that_hangs_keeps_no_other_distribution_waiting(folder: Path) -> None:
    hang = "import time; time.sleep(60)"
    ok = "from worker import job\n@job('b.ok')\ndef f(ctx): ..."
    make_plugin(folder, dist="a-hangs", modules={"a_hangs": hang}, entry_points={"a.hangs": "a_hangs:f"})
    make_plugin(folder, dist="b-works", modules={"b_works": ok}, entry_points={"b.ok": "b_works:f"})

    reading = read_catalogue(["a-hangs", "b-works"], timeout=2)
    order = [entry.name async for found in reading for entry in found]

    assert order == ["b.ok", "a.hangs"]


async def test_two_distributions_that_offer_one_name_offer_neither(folder: Path) -> None:
    ok = "from worker import job\n@job('same')\ndef f(ctx): ..."
    make_plugin(folder, dist="one", modules={"one_same": ok}, entry_points={"same": "one_same:f"})
    make_plugin(folder, dist="two", modules={"two_same": ok}, entry_points={"same": "two_same:f"})

    found = [entry async for read in read_catalogue(["one", "two"], timeout=3) for entry in read]

    assert [entry.error for entry in found] == [
        "another installed distribution has a handler of the same name"
    ] * 2


async def test_what_is_installed_is_known_by_metadata(folder: Path) -> None:
    make_plugin(folder, dist="acme-jobs", version="7", entry_points={"x": "nowhere:f"})

    assert [(found.name, found.version) for found in distributions(["acme-jobs"])] == [("acme-jobs", "7")]


async def test_processes_that_an_import_starts_end_with_it(folder: Path) -> None:
    source = (
        "import subprocess\n"
        f"subprocess.Popen(['sh', '-c', 'sleep 60 & echo $! > {folder}/pid; wait'])\n"
        f"import os, time\nwhile not os.path.exists('{folder}/pid'): time.sleep(0.01)\n"
        f"while not os.path.getsize('{folder}/pid'): time.sleep(0.01)\n"
    )
    make_plugin(
        folder, dist="acme-starts", modules={"acme_starts": source}, entry_points={"s": "acme_starts:f"}
    )

    await read("acme-starts")

    def ended() -> bool:
        process = linux.process_of(int((folder / "pid").read_text()))
        return process is None or process.state == "Z"

    await until(ended)


async def test_handlers_are_read_again_if_the_zygote_dies(folder: Path) -> None:
    """All that it has forked dies with it, which says nothing of a plug-in."""
    source = (
        "import os, time\nfrom worker import job\n"
        f"if not os.path.exists('{folder}/begun'):\n    open('{folder}/begun', 'w')\n    time.sleep(60)\n"
        "@job('a.slow')\ndef f(ctx): ..."
    )
    make_plugin(folder, dist="a-slow", modules={"a_slow": source}, entry_points={"a.slow": "a_slow:f"})
    async with child_pool(attached=True, describes=True) as children:
        reading = read_catalogue(["a-slow"], timeout=30, forked=children.take_describing())
        first = asyncio.ensure_future(anext(reading))
        await until((folder / "begun").exists)
        os.kill(children.zygote_pid or 0, signal.SIGKILL)

        [entry] = await first
        assert entry.error is None
        await reading.aclose()


async def test_the_process_that_has_described_handlers_is_gone(folder: Path) -> None:
    make_plugin(folder, dist="b-works", modules={"b": "x = 1"}, entry_points={"b.x": "b:x"})
    async with child_pool(attached=True, describes=True) as children:
        forked = children.take_describing()
        [[entry]] = [found async for found in read_catalogue(["b-works"], forked=forked)]
        assert entry.name == "b.x"
        assert children.take_describing() is None
        await until(
            lambda: [process.pid for process in linux.adopted(linux.processes())] == [children.zygote_pid]
        )


async def test_handlers_that_are_known_at_the_same_time_come_together(folder: Path) -> None:
    names = [f"many.{number}" for number in range(2 * MAX_AT_ONCE)]
    source = "from worker import job\n" + "".join(
        f"@job('{name}')\ndef f{number}(ctx): ...\n" for number, name in enumerate(names)
    )
    points = {name: f"many:f{number}" for number, name in enumerate(names)}
    make_plugin(folder, dist="many", modules={"many": source}, entry_points=points)

    batches = []
    async for found in read_catalogue(["many"]):
        await asyncio.sleep(0.1)  # as storing them takes
        batches.append(len(found))

    assert sum(batches) == len(names)
    assert max(batches) <= MAX_AT_ONCE
    assert len(batches) < len(names) / 2


@pytest.mark.parametrize("new", [False, True])
async def test_an_import_reaches_no_descriptor_but_its_own(folder: Path, new: bool) -> None:
    """Neither the socket of the zygote nor the lock of an SQLite file."""
    source = (
        "import os, stat\n"
        "found = [fd for fd in range(3, 1000) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "raise ValueError(sorted(stat.S_ISFIFO(os.fstat(fd).st_mode) for fd in found))"
    )
    make_plugin(folder, dist="a-looks", modules={"a_looks": source}, entry_points={"a.looks": "a_looks:f"})

    found = await read("a-looks", new=new)

    assert found["a.looks"].error == "ValueError: [True]"


def test_without_the_process_that_describes_the_zygote_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may refuse a fork; the worker starts such a process itself."""

    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    ours, theirs = socket.socketpair()
    open_before = len(os.listdir("/proc/self/fd"))

    assert zygote.fork_describing(theirs.detach(), Setup(folder="")) is None

    assert len(os.listdir("/proc/self/fd")) == open_before - 1
    assert ours.recv(1) == b""
    ours.close()
