"""A worker as a container runs it: as process 1 of its own table, on a root that cannot be written."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess

import psutil
import pytest

from tests.fakes.handlers import read_journal
from tests.fakes.site import application, definition, wait_until

# The folder of the database stays writable, and /var/tmp, as a container's volume and its tmpfs would.
ENTRY = """
mount --bind "$1" "$1" && mount -t tmpfs tmpfs /var/tmp && mount -o remount,ro,bind / || exit 99
cd "$1" && shift && exec "$@"
"""
UNSHARE = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can_unshare() -> bool:
    if os.getuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not can_unshare(), reason="needs root and namespaces")


def test_a_worker_runs_as_process_1_on_a_read_only_root(site, journal):
    site.configure(execution='drain = "2s"')
    site.add_orgs(application("org_a"))
    params = {"journal": str(journal), "steps": 300, "pause": 0.2}
    site.apply(
        definition("org_a", "steps", "acme.steps", params=params)
        + definition("org_a", "crash", "acme.segfault", max_attempts=1)
    )
    outer = site.start_worker(before=[*UNSHARE, "sh", "-c", ENTRY, "sh", str(site.folder)])
    site.wait_for_handlers("acme.steps")
    [worker] = psutil.Process(outer.pid).children()
    site.cli("definitions", "run", "org_a", "crash")
    assert site.wait_for_end(definition="crash")["detail"] == "signal SIGSEGV"

    # The zygote's death leaves the run, its grandchild and their zombies to process 1.
    site.cli("definitions", "run", "org_a", "steps")
    wait_until(lambda: read_journal(journal, "grandchild"), "the grandchild")
    [zygote] = [child for child in worker.children() if "worker.execution.zygote" in child.cmdline()]
    zygote.kill()
    wait_until(lambda: len(read_journal(journal, "start")) == 2, "the second attempt")
    zombies = [child.pid for child in worker.children(recursive=True) if child.status() == "zombie"]
    assert zombies == []
    assert read_journal(journal, "start")[-1]["first"] > 0

    worker.send_signal(signal.SIGTERM)
    assert outer.wait(20) == 0
    [run] = site.runs(definition="steps")
    assert (run["state"], run["reason"]) == ("waiting", "handed_back")
