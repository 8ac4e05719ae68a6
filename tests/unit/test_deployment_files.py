"""What is deployed fits the code, the settings' defaults and the files it names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.pages import unknown_words
from worker import settings as places
from worker.client.client import EXCHANGE
from worker.client.relay import ROUND
from worker.engine.incarnation import LAST_FLUSH
from worker.engine.loops.supervisor import PATIENCE
from worker.errors import ConfigurationError
from worker.features.provisioning.provision_loop import LAST_TURN
from worker.kit.web.database_health import CHECK_EVERY
from worker.kit.web.health import PATHS
from worker.model.definitions.units import parse_duration
from worker.settings import Settings

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
KUBERNETES = CONFIG / "kubernetes"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
DEFAULTS = Settings()
PORT = int(DEFAULTS.web.listen.rpartition(":")[2])
HEALTH_PORT = PORT + 1
# What a stop takes at most: the drain, and what has ended in it written down.
DRAINED = DEFAULTS.execution.drain.total_seconds() + LAST_FLUSH

# ---- systemd

# Of these systemd-analyze makes up the exposure of a unit. What is not here and why, the unit itself says.
HARDENING = {
    "User": "orgworker",
    "UMask": "0077",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "PrivateUsers": "yes",
    "ProtectClock": "yes",
    "ProtectControlGroups": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "MemoryDenyWriteExecute": "yes",
    "SystemCallArchitectures": "native",
}
UNITS = (
    "orgworker.service",
    "orgworker-upgrade.service",
    "orgworker-provision.service",
    "orgworker-host.service",
    "orgworker-relay.service",
)
# Of units with a user of their own.
USERS = {f"orgworker-{name}.service": f"orgworker-{name}" for name in ("provision", "host", "relay")}
RUN_HANDLERS = ("orgworker.service", "orgworker-host.service")
ANALYZE = shutil.which("systemd-analyze")


def unit(name: str) -> dict[str, str]:
    """The directives of a unit; one that is given again stands on a line of its own."""
    found: dict[str, str] = {}
    for line in (CONFIG / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found[key] = f"{found[key]}\n{value}" if key in found else value
    return found


@pytest.fixture
def service() -> dict[str, str]:
    return unit("orgworker.service")


def test_the_service_waits_for_readiness_and_signals_the_worker_alone(service):
    assert (service["Type"], service["NotifyAccess"], service["KillMode"]) == ("notify", "main", "mixed")
    assert service["ExecStart"].endswith("python -P -m worker --config /etc/orgworker/worker.toml run")


def test_the_service_answers_health_on_a_listener_of_its_own_for_this_machine(service):
    assert service["Environment"] == f"WORKER_WEB__HEALTH_LISTEN=127.0.0.1:{HEALTH_PORT}"
    # The manual asks there.
    assert f"http://127.0.0.1:{HEALTH_PORT}/readyz" in (ROOT / "docs/operating/systemd.md").read_text()


def test_the_service_lets_a_drain_end(service):
    assert parse_duration(service["TimeoutStopSec"]).total_seconds() > DRAINED


def test_the_watchdog_bites_only_after_a_loop_has_stalled(service):
    assert parse_duration(service["WatchdogSec"]).total_seconds() > PATIENCE


def test_the_service_does_not_restart_what_a_restart_cannot_mend(service):
    assert service["Restart"] == "always"
    assert service["RestartPreventExitStatus"] == str(ConfigurationError.exit_code)


def test_the_schema_is_upgraded_once_and_by_the_owner_alone(service):
    upgrade = unit("orgworker-upgrade.service")

    assert (upgrade["Type"], upgrade["ExecStart"]) == ("oneshot", service["ExecStart"][:-3] + "db upgrade")
    assert "database__owner_url" in upgrade["LoadCredential"]
    assert "database__owner_url" not in service["LoadCredential"]


def test_only_the_provisioner_gets_the_management_secret(service):
    provision = unit("orgworker-provision.service")
    holders = {
        name: unit(name)["LoadCredential"] for name in UNITS if "management" in unit(name)["LoadCredential"]
    }
    command = service["ExecStart"]

    assert set(holders) == {"orgworker-provision.service"}
    assert provision["ExecStart"] == command.removesuffix("run") + "provision"
    assert provision["User"] != service["User"]
    assert (provision["Type"], provision["NotifyAccess"]) == ("notify", "main")
    # A watchdog bites later than the pause between two signs of life.
    assert parse_duration(provision["WatchdogSec"]).total_seconds() > 2 * CHECK_EVERY
    assert parse_duration(provision["TimeoutStopSec"]).total_seconds() > LAST_TURN + CHECK_EVERY
    assert provision["RestartPreventExitStatus"] == str(ConfigurationError.exit_code)
    assert provision["Environment"] != service["Environment"]
    [compose_holder] = [
        n for n, each in compose()["services"].items() if "management__main" in each["secrets"]
    ]
    assert compose_holder == "provision"
    assert compose()["services"]["provision"]["command"] == ["provision"]


def test_a_host_has_no_secret_but_its_token(service):
    host = unit("orgworker-host.service")

    assert host["LoadCredential"] == "host_token:orgworker.host_token"
    assert "WORKER_HOST__TOKEN_FILE=%d/host_token" in host["Environment"].split("\n")
    assert is_setting("host__token_file")
    assert host["ExecStart"] == service["ExecStart"].replace("worker.toml run", "host.toml host")
    assert host["User"] not in (service["User"], unit("orgworker-provision.service")["User"])
    for key in ("Type", "NotifyAccess", "KillMode", "WatchdogSec", "Restart", "RestartPreventExitStatus"):
        assert host[key] == service[key]
    assert parse_duration(host["TimeoutStopSec"]).total_seconds() > DRAINED
    # It is ready once a worker answers, which may take any time.
    assert host["TimeoutStartSec"] == "infinity"


def test_a_relay_has_a_token_and_the_products_database_and_no_other_secret(service):
    relay = unit("orgworker-relay.service")
    names = ("relay_token", "relay__outbox_url")

    assert relay["LoadCredential"].split("\n") == [f"{name}:orgworker.{name}" for name in names]
    assert relay["Environment"] == "WORKER_RELAY__TOKEN_FILE=%d/relay_token"
    assert is_setting("relay__token_file") and is_setting("relay__outbox_url")
    assert relay["ExecStart"] == service["ExecStart"].replace("worker.toml run", "relay.toml relay")
    assert relay["RestartPreventExitStatus"] == service["RestartPreventExitStatus"]
    assert parse_duration(relay["TimeoutStopSec"]).total_seconds() > ROUND + EXCHANGE
    assert pod("Deployment", of="relay")["terminationGracePeriodSeconds"] > ROUND + EXCHANGE
    [container] = pod("Deployment", of="relay")["containers"]
    assert {one["name"] for one in container["env"]} == {"WORKER_RELAY__TOKEN_FILE"}


@pytest.mark.parametrize(
    "name", ["orgworker.service", "orgworker-upgrade.service", "orgworker-provision.service", "orgworker"]
)
def test_a_credential_is_a_setting_or_the_key_ring_and_may_be_missing(name: str):
    text = (CONFIG / name).read_text()
    credentials = re.findall(r"LoadCredential=(\w+):(\S+)", text)

    assert ("database__url", "orgworker.database__url") in credentials
    for credential, path in credentials:
        # Without a / it is looked up in the credential stores; the start does not fail if it is in none.
        assert path == f"orgworker.{credential}"
        assert credential in ("keyring", "management__main") or is_setting(credential)
    assert "#LoadCredential" not in text


def test_the_command_runs_what_the_service_runs_with_the_same_credentials(service):
    text = (CONFIG / "orgworker").read_text()

    assert service["ExecStart"].removesuffix("run") + '"$@"' in text
    assert re.findall(r"LoadCredential=(\S+)", text) == service["LoadCredential"].splitlines()
    for key in ("User", "Group", "UMask", "StateDirectory", "StateDirectoryMode"):
        assert f"--property={key}={service[key]} " in text


@pytest.mark.parametrize("name", UNITS)
def test_the_exposure_is_at_most_1_5(name: str):
    """Measured where systemd is; elsewhere only what it was measured of is compared."""
    directives = unit(name)
    user = USERS.get(name, "orgworker")
    assert {key: directives.get(key) for key in HARDENING} == HARDENING | {"User": user}
    # Workers and hosts confine their runs by Landlock.
    landlock = ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"]
    needed = ["@system-service", *(landlock if name in RUN_HANDLERS else [])]
    assert directives["SystemCallFilter"].split("\n")[0].split() == needed
    assert "~@privileged" in directives["SystemCallFilter"]
    if ANALYZE is None:
        return

    command = [ANALYZE, "security", "--offline=true", "--no-pager", "--threshold=15", CONFIG / name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"exposure level for \S+: (0\.\d|1\.[0-5]) ", done.stdout)


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed: no unit is verified")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_no_fault_in_the_unit(name: str, tmp_path: Path):
    copy = tmp_path / name
    # It wants the program to be there.
    copy.write_text((CONFIG / name).read_text().replace("/opt/orgworker/bin/python", "/bin/true"))

    command = [str(ANALYZE), "verify", "--man=no", copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stderr) == (0, "")


# ---- container


@pytest.fixture(scope="module")
def containerfile() -> dict[str, str]:
    """The last stage's steps that stand alone."""
    last = (CONFIG / "Containerfile").read_text().rpartition("\nFROM ")[2]
    return dict(re.findall(r"(?m)^(USER|WORKDIR|VOLUME|EXPOSE|STOPSIGNAL|ENTRYPOINT) (.+)$", last))


def test_the_image_is_made_from_files_that_exist_and_does_not_run_as_root(containerfile):
    text = (CONFIG / "Containerfile").read_text()

    for lock in re.findall(r"-r (\S+)", text):
        assert (ROOT / lock).is_file()
    assert containerfile["USER"] == "10001:10001"
    assert containerfile["VOLUME"] == containerfile["WORKDIR"]
    assert containerfile["EXPOSE"] == f"{PORT} {HEALTH_PORT}"
    assert f"ENV WORKER_WEB__HEALTH_LISTEN=127.0.0.1:{HEALTH_PORT}\n" in text
    assert text.count("--require-hashes") == 2
    [stop] = re.findall(r"--stop-timeout (\d+)", text)
    assert int(stop) > DRAINED


def test_the_base_images_can_be_given_by_digest():
    stages = re.findall(r"(?m)^FROM (\S+)", (CONFIG / "Containerfile").read_text())

    assert stages == ["${PYTHON}", "${PYTHON}"]
    assert compose()["services"]["postgresql"]["image"].startswith("${POSTGRESQL_IMAGE:-")


def test_no_secret_gets_into_the_image_or_the_repository():
    folders = {Path(secret["file"]).parent for secret in compose()["secrets"].values()}

    assert folders == {Path("secrets")}
    assert "**/secrets" in (ROOT / ".containerignore").read_text().splitlines()
    assert "config/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


# ---- compose


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CONFIG / "compose.yaml").read_text())
    return loaded


def test_compose_upgrades_the_schema_before_two_workers_begin():
    services = compose()["services"]

    assert services["worker"]["deploy"]["replicas"] == 2
    assert services["worker"]["depends_on"] == {"upgrade": {"condition": "service_completed_successfully"}}
    assert services["upgrade"]["depends_on"] == {"postgresql": {"condition": "service_healthy"}}
    assert unknown_words(" ".join(services["upgrade"]["command"])) == []
    assert services["upgrade"]["command"] == ["db", "upgrade"]


@pytest.mark.parametrize("name", ["upgrade", "worker", "provision", "host"])
def test_a_container_of_compose_can_write_its_volume_only(name: str, containerfile):
    service = compose()["services"][name]
    uid, gid = containerfile["USER"].split(":")

    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == f"{containerfile['VOLUME']}:uid={uid},gid={gid},mode=0700"
    [mounted] = service["volumes"]
    source, target, mode = mounted.split(":")
    assert (CONFIG / source).is_file()
    assert (target in places.CONFIG_PLACES, mode) == (True, "ro")


def test_compose_lets_a_drain_end_and_replaces_only_what_stands_still():
    worker = compose()["services"]["worker"]

    assert parse_duration(worker["stop_grace_period"]).total_seconds() > DRAINED
    assert f"http://127.0.0.1:{HEALTH_PORT}/livez" in worker["healthcheck"]["test"][-1]
    assert worker["environment"] == {
        "WORKER_WEB__LISTEN": f"0.0.0.0:{PORT}",
        "WORKER_WEB__HEALTH_LISTEN": f"0.0.0.0:{HEALTH_PORT}",
    }
    # Health and metrics are not published beyond the containers' network.
    [published] = worker["ports"]
    assert published.startswith("127.0.0.1:")
    assert published.endswith(f":{PORT}")


def test_each_service_of_compose_is_shown_the_secrets_it_needs_and_no_other():
    loaded = compose()
    shown = {name: set(service["secrets"]) for name, service in loaded["services"].items()}

    assert shown["worker"] == {"keyring", "database__url"}
    assert shown["upgrade"] == {"database__url", "database__owner_url"}
    assert shown["provision"] == {"keyring", "database__url", "management__main"}
    assert shown["host"] == {"host_token"}
    assert set.union(*shown.values()) == set(loaded["secrets"])
    for name in loaded["secrets"]:
        assert name in ("keyring", "superuser", "management__main", "host_token") or is_setting(name)


# ---- Kubernetes


def manifests() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def manifest(kind: str, *, of: str = "worker") -> dict[str, Any]:
    """The manifest of a kind; `of` names it if it is not one of the workers'."""

    def belongs(one: dict[str, Any]) -> bool:
        name = one.get("metadata", {}).get("name", "").removeprefix("orgworker-")
        return (name if name in ("provision", "host", "relay", "attempts", "upgrade") else "worker") == of

    [found] = [one for one in manifests() if one["kind"] == kind and belongs(one)]
    return found


def pod(kind: str, *, of: str = "worker") -> dict[str, Any]:
    spec: dict[str, Any] = manifest(kind, of=of)["spec"]["template"]["spec"]
    return spec


def test_a_pod_may_drain_and_a_deploy_or_an_emptied_node_takes_one_at_a_time():
    deployment = manifest("Deployment")["spec"]

    assert pod("Deployment")["terminationGracePeriodSeconds"] > DRAINED
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert manifest("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1 < deployment["replicas"]


def test_what_kustomize_puts_together_is_there_and_of_this_release():
    kustomization = manifest("Kustomization")
    [image] = kustomization["images"]
    [generated] = kustomization["configMapGenerator"]
    [config] = [volume["configMap"] for volume in pod("Deployment")["volumes"] if "configMap" in volume]

    assert all((KUBERNETES / name).is_file() for name in (*kustomization["resources"], *generated["files"]))
    assert "networkpolicy.yaml" in kustomization["resources"]
    [endpoint] = manifest("PodMonitor")["spec"]["podMetricsEndpoints"]
    assert (endpoint["path"] in PATHS, endpoint["port"]) == (True, "health")
    assert generated["name"] == config["name"]
    assert pod("Deployment")["containers"][0]["image"] == image["name"]
    assert pod("Job")["containers"][0]["image"] == f"{image['newName']}:{image['newTag']}"
    assert image["newTag"] == VERSION
    assert {manifest(kind)["metadata"]["namespace"] for kind in ("Job", "PodMonitor")} == {
        kustomization["namespace"]
    }


def test_the_settings_of_the_cluster_are_ones():
    settings = places.load(str(KUBERNETES / "worker.toml"), environ={})

    assert settings.issuers["main"].profile == "kinde"
    # Else a worker without its secret would begin on a SQLite file.
    assert settings.database.url == "postgresql://worker@postgresql:5432/orgworker"


# ---- both


def is_setting(name: str) -> bool:
    """Whether a file or variable of this name sets something, as `database__url` does."""
    section, _, key = name.partition("__")
    return key in type(getattr(DEFAULTS, section, None)).model_fields


@pytest.mark.parametrize("name", ["run.lock", "dev.lock"])
def test_every_locked_package_has_a_hash_and_no_host_or_path_is_named(name):
    text = (CONFIG / "requirements" / name).read_text()
    packages = re.split(r"\n(?=[a-z0-9])", text.partition("\n#\n")[2])

    assert packages
    assert all("--hash=sha256:" in package for package in packages if "==" in package)
    assert not re.search(r"https?:|file:|--index|--find-links|\s/", text)


# What starts Python on a module of ours, as an argument list or in a line for a shell.
_STARTS = re.compile(r'"-m", (?:"worker|module\b)|bin/python (?:-P )?-m worker')
_SAFELY = re.compile(r'"-P", "-m", (?:"worker|module\b)|bin/python -P -m worker')


def test_nothing_that_is_shipped_imports_from_its_working_directory():
    """A handler may have left a worker/__main__.py there, which `python -m worker` would run."""
    files = [path for path in CONFIG.rglob("*") if path.is_file() and path.suffix not in (".json", ".pyc")]
    files += [*(ROOT / "worker").rglob("*.py"), ROOT / "dev"]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in files}
    starts = {name: len(_STARTS.findall(text)) for name, text in texts.items() if _STARTS.search(text)}

    assert {Path(name).name for name in starts} >= {
        *("orgworker.service", "orgworker-upgrade.service", "orgworker-provision.service", "orgworker"),
        *("orgworker-host.service", "orgworker-relay.service", "Containerfile", "dev"),
        *("installation.py", "zygote_handle.py", "catalogue.py"),
    }
    assert starts == {name: len(_SAFELY.findall(texts[name])) for name in starts}


def test_the_image_names_its_settings_and_imports_nothing_from_the_volume(containerfile):
    entrypoint = json.loads(containerfile["ENTRYPOINT"])

    assert entrypoint[1:] == ["-P", "-m", "worker", "--config", places.CONFIG_PLACES[0]]
    assert "PYTHONSAFEPATH=1" in (CONFIG / "Containerfile").read_text()


@pytest.mark.parametrize("how", [["-m"], ["-P", "-m"]], ids=["the control", "as it is started"])
def test_a_planted_module_is_run_without_P_only(tmp_path: Path, how: list[str]):
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "__init__.py").touch()
    (tmp_path / "worker" / "__main__.py").write_text("print('planted')")

    command = [sys.executable, *how, "worker", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    assert ("planted" in done.stdout) == (how == ["-m"])
