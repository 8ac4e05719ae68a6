"""kill -9 of worker or zygote: nothing of the run stays alive, and it goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

from tests.fakes.handlers import read_journal
from tests.fakes.site import Site, application, definition, wait_until

STEPS = 20


def begin(site: Site, journal: Path) -> dict[str, object]:
    """Start a run of many steps, and return it once it is in the middle of them."""
    site.add_orgs(application("org_acme"))
    params = {"journal": str(journal), "steps": STEPS}
    site.apply(definition("org_acme", "steps", "acme.steps", params=params))
    site.cli("definitions", "run", "org_acme", "steps")
    wait_until(lambda: len(read_journal(journal, "step")) >= 4, "the fourth step", timeout=30)
    wait_until(lambda: read_journal(journal, "grandchild"), "a process of the run's own")
    return site.runs(definition="steps")[0]


def assert_all_dead(journal: Path) -> None:
    """One second after the kill no process that wrote to the journal is alive, and none writes."""
    time.sleep(1.0)
    entries = read_journal(journal)
    assert not [pid for pid in {entry["pid"] for entry in entries} if alive(pid)]
    time.sleep(0.3)
    assert len(read_journal(journal)) == len(entries)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_gone_on(site: Site, journal: Path, run_id: object) -> None:
    """The run has succeeded as attempt 2, from a step that attempt 1 saved, under a newer fencing token."""
    run = site.wait_for_state("steps", "succeeded", attempt=2, timeout=30)
    assert run["id"] == run_id
    assert (run["fencing_token"], run["result_fencing_token"]) == (2, 2)
    assert run["result"]["attempt"] == 2
    done = [entry["step"] for entry in read_journal(journal, "step") if entry["attempt"] == 1]
    # A step is saved before it is written down.
    assert run["result"]["first"] in (done[-1], done[-1] + 1)
    attempts = [(row["attempt"], row["outcome"], row["fencing_token"]) for row in site.attempts(run_id)]
    assert attempts == [(1, "lost", 1), (2, "succeeded", 2)]
    assert len(site.runs(definition="steps")) == 1


def test_a_killed_workers_run_goes_on_after_the_restart(site_on_either, journal):
    site = site_on_either
    worker = site.start_worker()
    run = begin(site, journal)

    worker.kill()
    worker.wait()

    assert_all_dead(journal)
    site.start_worker()
    assert_gone_on(site, journal, run["id"])
    log = json.loads(site.cli("runs", "logs", str(run["id"]), "-o", "json").out)
    [lost] = [line for line in log if line["source"] == "worker"]
    [[dead, by]] = [re.findall(r"worker (\S+)", lost["text"])]
    assert lost["attempt"] == 1
    assert lost["text"].startswith(f"attempt 1 was lost: worker {dead} crashed, last seen ")
    assert (
        f"crashed {lost['text'].split()[-6][:5]} UTC, 1 run recovered by {by}"
        in site.cli("doctor", "-o", "json", check=False).out
    )


def test_a_killed_zygote_is_replaced_and_its_run_goes_on(short_site, journal):
    site = short_site
    worker = site.start_worker()
    run = begin(site, journal)
    zygote = site.zygote(worker)
    dead = {entry["pid"] for entry in read_journal(journal)}

    os.kill(zygote.pid, signal.SIGKILL)

    time.sleep(1.0)
    assert not [pid for pid in dead if alive(pid)]
    assert_gone_on(site, journal, run["id"])
    assert worker.poll() is None
    assert site.zygote(worker).pid != zygote.pid
