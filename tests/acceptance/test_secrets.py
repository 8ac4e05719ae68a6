"""Secrets of orgs with a real worker: who gets them, and that no value is written anywhere."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.test_canary import written
from tests.fakes.handlers import read_journal
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

pytestmark = pytest.mark.feature("org_secrets")

KEY = "sk/canary+of=acme-0123456789"
MAIL = "canary-mail-of-acme"
CONTROL = "control-canary-0123456789"
# In a plug-in of its own: workers of older releases load the others.
SOURCE = """
import hashlib, json, os
from worker import BlockingContext, Context, job

def write(ctx, **fields):
    with open(ctx.params["journal"], "a") as file:
        file.write(json.dumps({"attempt": ctx.run.attempt, **fields}) + "\\n")

def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()

@job("acme.blocks", secrets={"openai"})
def blocks(ctx: BlockingContext):
    write(ctx, who="blocks", key=digest(ctx.secret("openai")))
    ctx.secret("mail")

@job("acme.leaks", secrets={"openai"}, timeout="30s", max_attempts=1)
async def leaks(ctx: Context):
    for text in (ctx.secret("openai"), ctx.params["control"]):
        print(f"printed {text}")
        ctx.log.warning("logged %s", text)
        os.write(2, f"written {text}\\n".encode())
        ctx.progress(1, 2, f"at {text}")
        await ctx.save({"saved": text})
        await ctx.step(f"call-{len(text)}", lambda text=text: {"answered": text})
    if ctx.params["fails"]:
        raise RuntimeError(f"raised {ctx.secret('openai')} {ctx.params['control']} {ctx!r} {ctx._given!r}")
    return {"returned": [ctx.secret("openai"), ctx.params["control"]]}
"""
HANDLERS = ("blocks", "leaks")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prepared(site: Site, **secrets: str) -> None:
    """The handlers, and an org with these secrets."""
    points = {f"acme.{name}": f"acme_secrets:{name}" for name in HANDLERS}
    make_plugin(site.plugins, dist="acme-secrets", modules={"acme_secrets": SOURCE}, entry_points=points)
    site.add_orgs(application("org_acme"))
    for name, value in secrets.items():
        site.cli("secrets", "add", "org_acme", name, stdin=f"{value}\n")


def run(site: Site, name: str) -> dict[str, Any]:
    """The run that this definition makes now, at its end."""
    run_id = site.cli("definitions", "run", "org_acme", name, "-o", "id").out.strip()

    def ended() -> dict[str, Any] | None:
        [found] = site.query("SELECT * FROM run_view WHERE id = ?", run_id)
        return found if found["finished_at"] else None

    return wait_until(ended, f"the end of a run of {name}")


def test_an_org_that_lacks_a_secret_is_refused_and_everything_says_so(site: Site, journal: Path) -> None:
    prepared(site, mail=MAIL)
    params = {"journal": str(journal)}
    site.apply(definition("org_acme", "blocks", "acme.blocks", params=params, max_attempts=1))
    site.start_worker()
    site.wait_for_handlers("acme.blocks")

    refused = run(site, "blocks")

    assert (refused["state"], refused["reason"], refused["detail"]) == ("refused", "secret_missing", "openai")
    assert read_journal(journal) == []
    why = site.cli("runs", "why", str(refused["id"])).out
    assert "its org has no secret openai, which its handler needs" in why
    assert "Next: `secrets add org_acme openai`" in why
    fix = "secrets add org_acme openai"
    for command in (("check",), ("orgs", "check", "org_acme")):
        checked = site.cli(*command, check=False)
        assert (checked.code, fix in checked.err) == (1, True), checked
    shown = site.cli("handlers", "show", "acme.blocks", "-o", "json").json()
    assert shown["secrets"] == ["openai"]

    site.cli("secrets", "add", "org_acme", "openai", "--file", "-", stdin=KEY)

    for command in (("check",), ("orgs", "check", "org_acme")):
        assert fix not in site.cli(*command, check=False).err
    # A handler gets only what it declares.
    failed = run(site, "blocks")
    assert [line["key"] for line in read_journal(journal, "blocks")] == [digest(KEY)]
    assert failed["error"]["message"] == "ctx.secret('mail') needs @job(..., secrets={'mail'})"


def all_of(site: Site) -> dict[str, bytes]:
    commands = [
        ("secrets", "list", "org_acme", "-o", "json"),
        ("secrets", "list"),
        ("audit", "list", "-o", "json"),
        ("doctor",),
        *(("runs", verb, str(row["id"]), "-o", "json") for row in site.runs() for verb in ("logs", "why")),
    ]
    return written(site, *commands)


def served(site: Site, address: str) -> dict[str, bytes]:
    """What the worker answers to an operator: the API, pages of the console, metrics."""
    token = site.cli("operators", "add", "ops", "--role", "admin", "-o", "json").json()["token"]
    runs = [str(row["id"]) for row in site.runs()]
    paths = ["/metrics", "/api/v1/runs", "/api/v1/audit", "/api/v1/handlers", "/", "/audit", "/failures"]
    paths += [f"{place}/{run_id}" for place in ("/api/v1/runs", "/runs") for run_id in runs]
    paths += [path for run_id in runs for path in (f"/api/v1/runs/{run_id}/logs", f"/runs/{run_id}/log")]
    found = {}
    with httpx.Client(base_url=address) as client:
        form = re.search(r'name="csrf" value="([^"]+)"', client.get("/").text)
        assert form is not None
        login = {"token": token, "csrf": form[1]}
        assert client.post("/login", data=login, headers={"Origin": address}).status_code == 303
        for path in paths:
            bearer = {"Authorization": f"Bearer {token}"} if path.startswith("/api/") else {}
            answer = client.get(path, headers=bearer)
            assert answer.status_code == 200, (path, answer.text)
            found[path] = answer.content
    return found


@pytest.mark.feature("console")
def test_no_value_is_written_anywhere(site: Site, journal: Path) -> None:
    """The same text that is no secret comes everywhere, so the test would see one."""
    prepared(site)
    site.cli("secrets", "add", "org_acme", "openai", stdin="canary-first-0123456789\n")
    site.cli("secrets", "rotate", "org_acme", "openai", stdin=f"{KEY}\n")
    params = {"journal": str(journal), "control": CONTROL}
    site.apply(
        definition("org_acme", "fails", "acme.leaks", params=params | {"fails": True})
        + definition("org_acme", "returns", "acme.leaks", params=params | {"fails": False})
    )
    listen = f"127.0.0.1:{free_port()}"
    site.configure(web=f'listen = "{listen}"', extra='[log]\nlevel = "debug"\n')
    worker = site.start_worker()
    site.wait_for_handlers("acme.leaks")
    failed, returned = run(site, "fails"), run(site, "returns")
    assert returned["state"] == "succeeded", returned["error"]
    assert failed["error"]["message"].startswith(f"raised [masked] {CONTROL}")
    while_running = all_of(site) | served(site, f"http://{listen}")
    assert site.stop_worker(worker) == 0
    sinks = while_running | {f"{name} at the end": data for name, data in all_of(site).items()}

    forms = [KEY.encode(), json.dumps(KEY)[1:-1].encode(), b"sk/canary", b"sk%2Fcanary", b"canary-first"]
    found = {name for name, data in sinks.items() if any(form in data for form in forms)}
    assert found == set()
    seen = {name for name, data in sinks.items() if CONTROL.encode() in data}
    run_id = str(returned["id"])
    assert {f"runs show {run_id} -o json", f"runs logs {run_id} -o json", "worker.db"} <= seen
    assert {f"/runs/{run_id}", f"/api/v1/runs/{run_id}", f"/api/v1/runs/{run_id}/logs"} <= seen
    logs = sinks[f"runs logs {run_id} -o json"].decode()
    for how in ("printed", "logged", "written"):
        assert f"{how} [masked]" in logs
        assert f"{how} {CONTROL}" in logs
    shown = json.loads(sinks[f"runs show {run_id} -o json"])
    assert shown["result"] == {"returned": ["[masked]", CONTROL]}
