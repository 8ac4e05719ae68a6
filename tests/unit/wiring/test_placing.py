"""The client of Temporal is loaded, and asked for, only where a pool uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.errors import ConfigurationError
from worker.features.hosts.temporal import connection as temporal
from worker.features.hosts.temporal.connection import place_of, tls_of
from worker.features.hosts.temporal.wiring import check_placers
from worker.features.hosts.wire import TemporalPlace
from worker.settings import Settings
from worker.settings.sections import PoolSettings, TemporalSettings

PLACED = Settings(
    pools={"gpu": PoolSettings(placer="temporal")}, temporal=TemporalSettings(address="h:7233", tls=True)
)


def test_neither_a_worker_nor_a_host_loads_the_client_at_its_start():
    code = "import sys, worker.app.process, worker.features.hosts.wiring; print('temporalio' in sys.modules)"

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "False"


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch):
    check_placers(PLACED)
    monkeypatch.setattr(temporal, "find_spec", lambda name: None)

    check_placers(Settings())
    with pytest.raises(ConfigurationError, match="pools.gpu.placer is temporal") as raised:
        check_placers(PLACED)

    assert raised.value.fix == "install orgworker with its extra temporal (the documentation's page Install)"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    file = tmp_path / "ca.pem"
    settings = TemporalSettings(address="h:7233", tls=True, ca_file=str(file))

    with pytest.raises(ConfigurationError, match=r"temporal.ca_file: .*ca.pem cannot be read"):
        tls_of(settings, tls=True)
    file.write_bytes(b"certificates")

    found = tls_of(settings, tls=True)
    assert found is not None
    assert (found.ca_file, found.certificate, found.key) == (b"certificates", None, None)
    assert tls_of(settings, tls=False) is None


def test_a_host_goes_where_its_workers_say_unless_it_has_an_address():
    told = TemporalPlace("temporal:7233", "jobs", tls=True)

    assert place_of(told, TemporalSettings()) == told
    own = place_of(told, TemporalSettings(address="127.0.0.1:7233"))
    assert (own.address, own.namespace, own.tls) == ("127.0.0.1:7233", "jobs", False)
