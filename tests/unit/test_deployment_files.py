"""What is deployed fits the code and the files it names."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest

from worker.definitions.units import parse_duration
from worker.errors import ConfigurationError
from worker.execution.pulse import PATIENCE
from worker.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def service() -> configparser.SectionProxy:
    unit = configparser.RawConfigParser(strict=False, comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "config" / "worker.service")
    return unit["Service"]


def test_the_service_waits_for_readiness_and_signals_the_worker_alone(service):
    assert (service["Type"], service["NotifyAccess"], service["KillMode"]) == ("notify", "main", "mixed")
    assert service["ExecStart"].endswith("-m worker --config /etc/orgworker/worker.toml run")


def test_the_service_lets_a_drain_end(service):
    assert parse_duration(service["TimeoutStopSec"]) > Settings().execution.drain


def test_the_watchdog_bites_only_after_a_loop_has_stalled(service):
    assert parse_duration(service["WatchdogSec"]).total_seconds() > PATIENCE


def test_the_service_does_not_restart_what_a_restart_cannot_mend(service):
    assert service["Restart"] == "always"
    assert service["RestartPreventExitStatus"] == str(ConfigurationError.exit_code)


def test_the_image_is_made_from_files_that_exist_and_does_not_run_as_root():
    text = (ROOT / "config" / "Containerfile").read_text()

    for lock in re.findall(r"-r (\S+)", text):
        assert (ROOT / lock).is_file()
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert text.count("--require-hashes") == 2


@pytest.mark.parametrize("name", ["run.lock", "dev.lock"])
def test_every_locked_package_has_a_hash_and_no_host_or_path_is_named(name):
    text = (ROOT / "requirements" / name).read_text()
    packages = re.split(r"\n(?=[a-z0-9])", text.partition("\n#\n")[2])

    assert packages
    assert all("--hash=sha256:" in package for package in packages if "==" in package)
    assert not re.search(r"https?:|file:|--index|--find-links|\s/", text)
