"""The development provider as a process of its own, turned from outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

APPLICATION = {"org_code": "org_a", "client_id": "a", "client_secret": "s", "audiences": ["https://a"]}
FORM = {"grant_type": "client_credentials", "client_id": "a", "client_secret": "s", "audience": "https://a"}


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    orgs = tmp_path / "orgs.json"
    orgs.write_text(json.dumps([APPLICATION]))
    command = [sys.executable, "-m", "worker.demo.provider", "--port", "0", "--orgs", str(orgs)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_it_prints_its_url_serves_its_orgs_and_is_turned_from_outside(process):
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]

    first = httpx.post(f"{url}/oauth2/token", data=FORM)
    httpx.put(f"{url}/control/faults/*", json={"status": 503}).raise_for_status()
    second = httpx.post(f"{url}/oauth2/token", data=FORM)

    assert (first.status_code, second.status_code) == (200, 503)
    assert httpx.get(f"{url}/control/").json()["token_requests"] == {"a": 2}
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0


def test_a_malformed_orgs_file_is_named(tmp_path):
    orgs = tmp_path / "orgs.json"
    orgs.write_text('[{"org": "x"}]')

    done = subprocess.run(
        [sys.executable, "-m", "worker.demo.provider", "--orgs", str(orgs)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.returncode == 2
    assert "orgs.json" in done.stderr
    assert "unknown keys: org" in done.stderr
