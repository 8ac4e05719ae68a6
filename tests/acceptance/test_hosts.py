"""Hosts and workers under TLS.

What a host runs is tested in test_where_runs_execute.py, its drain in test_temporal.py, and faults in
test_host_faults.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.fakes.certificates import make_certificate
from tests.fakes.hosts import opened_hosts
from tests.fakes.ports import free_port
from tests.fakes.site import Site, application, definition, wait_until

EXECUTION = 'lease = "4s"\nrenew = "500ms"\npoll = "200ms"\nmax_children = 0\nmax_inline = 0'


def test_hosts_and_workers_speak_tls(site: Site, tmp_path: Path) -> None:
    """A host does not send its token to a worker with another certificate."""
    port = free_port()
    ours, other = (make_certificate(tmp_path / name) for name in ("ours.pem", "other.pem"))
    attempts = f'[attempts]\nlisten = "127.0.0.1:{port}"\ncertificate = "{ours}"\nkey = "{ours}"'
    site.configure(execution=EXECUTION, extra=attempts)
    site.add_orgs(application("org_acme"))
    site.apply(definition("org_acme", "note", "acme.note", params={"journal": str(site.out / "journal")}))
    site.start_worker()
    with (
        opened_hosts(site, port, ca_file=ours) as hosts,
        opened_hosts(site, port, ca_file=other) as strangers,
    ):
        strangers.start("h2")
        wait_until(lambda: strangers.events("control.lost", "h2"), "that the certificate is refused")
        hosts.start("h1")
        site.cli("definitions", "run", "org_acme", "note")

        assert site.wait_for_end("org_acme", "note", timeout=60)["state"] == "succeeded"
        listed = {
            row["name"]: row["state"] for row in json.loads(site.cli("hosts", "list", "-o", "json").out)
        }
        assert listed == {"h1": "ready", "h2": "absent"}
        [lost, *_] = strangers.events("control.lost", "h2")
        assert lost["error"] == "ConnectError"
