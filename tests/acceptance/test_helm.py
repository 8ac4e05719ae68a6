"""The pods that the Helm chart renders, as processes of this machine: the chart gives them all they need."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.fakes import forked
from tests.fakes.certificates import make_certificate
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.helm import MISSING, Rendered, render
from tests.fakes.image import ROOT
from tests.fakes.kinde.server import MANAGER, serve_kinde
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server
from tests.fakes.site import AUDIENCE, definition, wait_until

CHART = ROOT / "config" / "helm" / "orgworker"
GROUPS = "orgworker_worker, orgworker_web, orgworker_operator"

pytestmark = [pytest.mark.feature("hosts"), pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]


class Pod:
    """A pod's only container: its files, variables and command, with free ports on loopback.

    `data` has the Secrets and ConfigMaps that the chart does not make, by name.
    """

    def __init__(self, folder: Path, spec: dict[str, Any], data: dict[str, dict[str, str]]) -> None:
        [self.container] = spec["containers"]
        self._folder = folder
        self._volumes = {volume["name"]: volume for volume in spec["volumes"]}
        self._places = {
            mount["mountPath"]: folder / mount["name"] for mount in self.container["volumeMounts"]
        }
        for place in self._places.values():
            place.mkdir(parents=True)
            self._fill(place, self._volumes[place.name], data)
        ports = self.container.get("ports", [])
        self.ports = {port["containerPort"]: free_port() for port in ports}
        self.named = {port["name"]: self.ports[port["containerPort"]] for port in ports}
        self.log = folder / "log"

    def _fill(self, place: Path, volume: dict[str, Any], data: dict[str, dict[str, str]]) -> None:
        projected = volume.get("projected", {})
        parts = [source["secret"] for source in projected.get("sources", [])]
        parts += [volume[kind] for kind in ("secret", "configMap") if kind in volume]
        for part in parts:
            content = data[part.get("secretName") or part["name"]]
            # A key that is named and missing keeps a pod from starting.
            keys = {item["key"]: item["path"] for item in part.get("items", [])} or {
                key: key for key in content
            }
            for key, path in keys.items():
                (place / path).write_text(content[key])
                (place / path).chmod(0o440 if "configMap" not in volume else 0o444)

    @property
    def environment(self) -> dict[str, str]:
        given = {each["name"]: self._moved(each["value"]) for each in self.container.get("env", [])}
        work = str(self._places["/var/lib/orgworker"])
        image = {"HOME": work, "TMPDIR": work, "WORKER_SECRETS_DIR": str(self._places["/run/secrets"])}
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return kept | image | given

    def _moved(self, value: str) -> str:
        """The value with paths and ports of this machine."""
        host, _, port = value.rpartition(":")
        if host == "0.0.0.0":
            return f"127.0.0.1:{self.ports[int(port)]}"
        for path, place in self._places.items():
            if value.startswith(f"{path}/"):
                return f"{place}{value.removeprefix(path)}"
        return value

    def command(self, *arguments: str) -> list[str]:
        config = self._places.get("/etc/orgworker", self._folder) / "worker.toml"
        config.touch()
        return [sys.executable, "-P", "-m", "worker", "--config", str(config), *arguments]

    def call(self, *arguments: str, stdin: str = "") -> str:
        """What a command prints in this pod, as `kubectl exec` runs it; its failure fails the test."""
        work = self._places["/var/lib/orgworker"]
        done = forked.run(self.command(*arguments), cwd=work, env=self.environment, stdin=stdin)
        return done.checked(arguments).out

    @contextmanager
    def running(self) -> Iterator[Pod]:
        """Until its readiness probe succeeds, and to a drained end afterwards."""
        with self.log.open("wb") as log:
            process = forked.start(
                self.command(*self.container["args"]),
                cwd=self._places["/var/lib/orgworker"],
                env=self.environment,
                output=log,
            )
        try:
            wait_until(lambda: process.poll() is not None or self.is_ready(), f"readiness, see {self.log}")
            assert process.poll() is None, self.log.read_text()
            assert self.probe("livenessProbe") == 200
            yield self
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=45) == 0, self.log.read_text()
        finally:
            process.kill()
            process.wait()

    def is_ready(self) -> bool:
        return self.probe("readinessProbe") == 200

    def probe(self, name: str) -> int | None:
        get = self.container[name]["httpGet"]
        try:
            return httpx.get(f"http://127.0.0.1:{self.named[get['port']]}{get['path']}").status_code
        except httpx.TransportError:
            return None


@pytest.fixture
def urls(own_postgres: Server) -> dict[str, str]:
    """The URLs of the three logins of the documentation, on a server with nothing else."""
    for statement in (
        "CREATE ROLE owner LOGIN CREATEROLE",
        "CREATE ROLE worker LOGIN",
        "CREATE ROLE serve LOGIN NOINHERIT",
        "CREATE DATABASE orgworker OWNER owner",
    ):
        own_postgres.execute(statement)
    at = own_postgres.url("orgworker")
    return {role: at.replace("postgres@", f"{role}:password@") for role in ("owner", "worker", "serve")}


@pytest.mark.timeout(240)
@pytest.mark.feature("provisioning")
def test_a_release_comes_up_and_a_host_of_it_runs_a_job(
    tmp_path: Path, urls: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    plugins, journal, ring = tmp_path / "plugins", tmp_path / "out" / "journal", tmp_path / "ring"
    # The run writes its journal to a folder without secrets; the sandbox lets it write to no other.
    for folder in (plugins, ring, journal.parent):
        folder.mkdir()
    install_handlers(plugins)
    monkeypatch.setenv("PYTHONPATH", str(plugins))
    # As on the page: the file of the URL is there first.
    (ring / "database__url").write_text(urls["worker"])
    generate = [sys.executable, "-P", "-m", "worker", "keys", "generate"]
    forked.run(generate, cwd=ring, env=os.environ | {"WORKER_SECRETS_DIR": str(ring)}).checked(generate)
    certificate = make_certificate(tmp_path / "attempts.pem").read_text()
    data = {
        "worker-secrets": {"database__url": urls["worker"], "keyring": (ring / "keyring").read_text()},
        "owner-secrets": {"database__owner_url": urls["owner"]},
        "serve-secrets": {"database__url": urls["serve"]},
        "attempts-tls": {"tls.crt": certificate, "tls.key": certificate},
        "attempts-ca": {"ca.crt": certificate},
    }
    with ExitStack() as stack:
        kinde = stack.enter_context(serve_kinde())
        kinde.api.add_api("Acme's API", AUDIENCE, ("read:kb",))
        kinde.add_orgs(1)
        data["provision-secrets"] = {"management__main": kinde.secret}
        made = release(urls["worker"].replace(":password", ""), kinde.provider.url, journal)
        data |= {
            each["metadata"]["name"]: each["data"] for each in made.objects if each["kind"] == "ConfigMap"
        }

        def pod(kind: str, name: str) -> Pod:
            spec = made.one(kind, f"orgworker-{name}")["spec"]["template"]["spec"]
            return Pod(tmp_path / name, spec, data)

        upgrade = pod("Job", "upgrade")
        upgrade.call(*upgrade.container["args"])
        with psycopg.connect(urls["owner"], autocommit=True) as owner:
            owner.execute(f"GRANT {GROUPS} TO worker".encode())
            owner.execute(b"GRANT orgworker_web, orgworker_operator TO serve")

        worker = stack.enter_context(pod("Deployment", "worker").running())
        serve = stack.enter_context(pod("Deployment", "serve").running())
        provision = stack.enter_context(pod("Deployment", "provision").running())
        token = json.loads(worker.call("hosts", "add", "gpu-1", "--pool", "eu-gpu", "-o", "json"))["token"]
        data["host-secrets"] = {"host_token": token}
        config = data["orgworker-host-config"]
        config["host.toml"] = config["host.toml"].replace(":8480", f":{worker.named['attempts']}")
        stack.enter_context(pod("Deployment", "host").running())

        # Only `serve` has API and console; the provisioner brought the org and its credential.
        assert (set(worker.named), set(serve.named)) == ({"health", "attempts"}, {"http", "health"})
        assert httpx.get(f"http://127.0.0.1:{serve.named['http']}/api/v1/runs").status_code < 500
        assert set(provision.named) == {"hooks", "health"}
        wait_until(lambda: worker.call("credentials", "list", "-o", "id").split(), "a credential")
        [code] = [each["code"] for each in json.loads(worker.call("orgs", "list", "-o", "json"))]
        text = definition(code, "note", "acme.note", pool="eu-gpu", params={"journal": str(journal)})
        worker.call("apply", "-", stdin=text)
        worker.call("definitions", "run", code, "note")

        def ended() -> Any:
            [run] = json.loads(worker.call("runs", "list", "-o", "json"))
            return run if run["state"] not in ("waiting", "running") else None

        run = wait_until(ended, "the end of the run")
        assert (run["state"], run["attempt"]) == ("succeeded", 1), worker.call("runs", "show", run["id"])
        assert [line["org"] for line in read_journal(journal, "note")] == [code]


def release(database: str, issuer: str, journal: Path) -> Rendered:
    """A release with everything, and hosts of the pool eu-gpu."""
    values = {
        "config": f"""\
[database]
url = "{database}"
[issuers.main]
profile = "kinde"
url = "{issuer}"
audience = "{AUDIENCE}"
[issuers.main.management]
client_id = "{MANAGER}"
""",
        "worker": {"http": False, "drainSeconds": 5},
        "attempts": {"enabled": True},
        "serve": {"enabled": True},
        "provision": {"enabled": True},
        "host": {
            "enabled": True,
            "pool": "eu-gpu",
            "caConfigMap": "attempts-ca",
            "drainSeconds": 5,
            "config": f"""\
[host]
control = ["https://127.0.0.1:8480"]
[execution]
sandbox = "auto"
write_paths = ["{journal.parent}"]
""",
        },
    }
    made = render(CHART, {"release": values})["release"]
    assert made.error == ""
    return made
