"""`ctx.state` with a real worker: committed with a success, lost with a kill, changed between runs."""

from __future__ import annotations

import os
import signal

from tests.fakes.handlers import read_journal
from tests.fakes.plugins import make_plugin
from tests.fakes.site import Site, application, definition, wait_until

COUNTS = ("org_acme", "counts")
# In a plug-in of its own: workers of older releases load the others.
SOURCE = """
import asyncio, json, os
from worker import Context, job

@job("acme.remembers", state=True)
async def remembers(ctx: Context) -> int:
    line = {"who": "remembers", "pid": os.getpid(), "state": dict(ctx.state)}
    ctx.state["runs"] = ctx.state.get("runs", 0) + 1
    hangs = ctx.state["runs"] == 2 and ctx.run.attempt == 1
    with open(ctx.params["journal"], "a") as file:
        file.write(json.dumps(line | {"hangs": hangs}) + "\\n")
    if hangs:
        await asyncio.sleep(3600)
    return ctx.state["runs"]
"""


def run(site: Site, count: int) -> None:
    """Make a run, and wait until so many have succeeded."""
    site.cli("definitions", "run", *COUNTS)
    wait_until(
        lambda: [row["state"] for row in site.runs("org_acme")] == ["succeeded"] * count,
        f"{count} runs that succeeded",
        timeout=30,
    )


def test_a_definition_remembers_what_its_successes_left(short_site, journal):
    site = short_site
    entry_points = {"acme.remembers": "acme_state:remembers"}
    make_plugin(site.plugins, dist="acme-state", modules={"acme_state": SOURCE}, entry_points=entry_points)
    site.add_orgs(application("org_acme"))
    keys = {"params": {"journal": str(journal)}, "retry_backoff": "0s"}
    site.start_worker()
    site.apply(definition("org_acme", "counts", "acme.remembers", **keys))
    run(site, 1)

    site.cli("definitions", "run", *COUNTS)
    [hanging] = wait_until(
        lambda: [line for line in read_journal(journal) if line["hangs"]],
        "the attempt that hangs",
        timeout=30,
    )
    refused = site.cli("definitions", "state", "set", *COUNTS, "--data", "{}", check=False)
    assert (refused.code, "is running" in refused.err) == (5, True)
    os.kill(hanging["pid"], signal.SIGKILL)
    site.wait_for_state("counts", "succeeded", attempt=2, timeout=30)

    site.cli("definitions", "state", "set", *COUNTS, "--data", '{"runs": 40, "by": "hand"}')
    run(site, 3)

    loaded = [line["state"] for line in read_journal(journal, "remembers")]
    assert loaded == [{}, {"runs": 1}, {"runs": 1}, {"runs": 40, "by": "hand"}]
    state = site.cli("definitions", "state", "show", *COUNTS, "-o", "json").json()
    assert state == {"runs": 41, "by": "hand"}
