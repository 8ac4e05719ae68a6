"""`provision` beside a worker: an org that the provider tells of runs its templates at once."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from tests.fakes import forked
from tests.fakes.handlers import install_handlers
from tests.fakes.kinde import webhooks
from tests.fakes.kinde.server import MANAGER, Kinde, serve_kinde
from tests.fakes.ports import free_port
from tests.fakes.site import AUDIENCE, Site, opened, wait_until

pytestmark = pytest.mark.feature("provisioning")

TEMPLATE = """
[[template]]
name = "note"
orgs = "all"
handler = "acme.note"
schedule = "every 2s"
spread = "off"
params = {{ journal = "{journal}" }}
scopes = ["read:kb"]
"""


@pytest.fixture
def kinde() -> Iterator[Kinde]:
    with serve_kinde() as served:
        served.api.add_api("Acme's API", AUDIENCE, ("read:kb", "write:kb"))
        served.add_orgs(2)
        yield served
        assert served.undocumented() == []


@pytest.fixture
def site(tmp_path: Path, migrated_url: str, kinde: Kinde) -> Iterator[Site]:
    with opened(Site(tmp_path, migrated_url, kinde.provider)) as made:
        made.configure(issuer=f'[issuers.main.management]\nclient_id = "{MANAGER}"')
        install_handlers(made.plugins)
        made.migrate()
        made.apply(TEMPLATE.format(journal=made.out / "journal"), "--allow-unknown-handlers")
        yield made


def test_a_webhook_leads_to_the_first_run_within_ten_seconds(site: Site, kinde: Kinde):
    port = free_port()
    is_exposed = site.database_url.startswith("sqlite")
    secrets = site.folder / "only-provisioning"
    secrets.mkdir()
    (secrets / "management__main").write_text(kinde.secret)
    keyring = site.secrets / "keyring"
    if keyring.exists():
        (secrets / "keyring").write_bytes(keyring.read_bytes())
        (secrets / "keyring").chmod(0o600)
    if is_exposed:
        # The control: a worker that has the same folder.
        site.environment["WORKER_SECRETS_DIR"] = str(secrets)
    site.start_worker()
    environment = site.process_environment() | {
        "WORKER_SECRETS_DIR": str(secrets),
        "WORKER_PROVISIONING__LISTEN": f"127.0.0.1:{port}",
    }
    log = site.folder / "provision.log"
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(site.folder / "notify"))
    environment["NOTIFY_SOCKET"] = str(site.folder / "notify")
    with log.open("ab") as output:
        provision = forked.start(site.command("provision"), cwd=site.folder, env=environment, output=output)
    try:
        site.wait_for_handlers("acme.note")
        assert site.wait_for_end("org_2")["state"] == "succeeded"
        ready = httpx.get(f"http://127.0.0.1:{port}/readyz")
        assert (ready.status_code, ready.json()["issuers"]) == (200, {"main": "idle"})

        kinde.api.add_org("org_new", "New")
        sent_at = time.monotonic()
        content = webhooks.payload("organization.created", "org_new", at=datetime.now(UTC))
        url = f"http://127.0.0.1:{port}/hooks/main"
        answer = asyncio.run(webhooks.send(url, webhooks.signed(kinde.provider.keys, content)))
        assert answer.status_code == 204
        run = site.wait_for_end("org_new", timeout=10)
        assert run["state"] == "succeeded"
        assert time.monotonic() - sent_at < 10
        assert len(kinde.applications_of("org_new")) == 1

        provision.send_signal(signal.SIGTERM)
        assert provision.wait(timeout=5) == 0
        notified = "".join(manager.recv(4096).decode() + "\n" for _ in range(3))
        assert "READY=1" in notified and "WATCHDOG=1" in notified
    finally:
        provision.kill()
        manager.close()
    bundle = site.folder / "bundle.json"
    site.cli("doctor", "--bundle", str(bundle), check=False)
    shown = [site.cli(noun, "list", "-o", "json").out for noun in ("audit", "credentials", "orgs")]
    text = log.read_text() + bundle.read_text() + site.log_text() + "".join(shown)
    assert "provisioning.stopped" in text
    assert kinde.secret not in text
    assert not any(app.client_secret in text for app in kinde.provider.applications.values())
    assert ("management.exposed" in site.log_text()) == is_exposed
    assert (
        wait_until(lambda: site.query("SELECT actor FROM audit WHERE action = 'org.add'"), "audit")
        == [{"actor": "provision"}] * 3
    )
