"""The units of config/ under systemd itself: credentials, hardening, readiness, watchdog, drain."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes import curl
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.history import files_before
from tests.fakes.image import ROOT, Image
from tests.fakes.pages import blocks
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.sealed import ASKS
from tests.fakes.site import Site, application, definition, opened, wait_until
from tests.fakes.traffic import traffic
from tests.fakes.wheelhouse import download, wheel_of
from tests.integration.test_build import BUILD, built_checkout
from worker.demo.provider import Provider
from worker.engine.runners.child import landlock, linux

SYSTEMD = Path("/lib/systemd/systemd")
STATE = "/var/lib/orgworker"
NAMESPACES = ["--mount", "--pid", "--ipc", "--uts", "--cgroup"]
UNITS = ("orgworker.service", "orgworker-upgrade.service")
UPGRADE = ROOT / "docs" / "operating" / "upgrade.md"

pytestmark = [
    pytest.mark.feature("checkout"),
    pytest.mark.skipif(
        not SYSTEMD.exists(),
        reason="systemd is not installed: tests/unit/test_deployment_files.py alone looks at the units",
    ),
    pytest.mark.timeout(600),
]

# The unit's own port is this machine's too; tests run beside each other.
HEALTH = "WORKER_WEB__HEALTH_LISTEN"


# Unlike a container's, this root is writable, in memory: each manager has its own.
_BOOT = """
set -e
root=$1 layers=$2 upper=$3 work=$4 state=$5
mount -t overlay overlay -o "lowerdir=$layers,upperdir=$upper,workdir=$work" "$root"
mount --bind "$state" "$root/var/lib/orgworker"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/outside"
cd "$root"
pivot_root . outside
umount --lazy /outside
# As container managers do: another process than systemd mounts the credentials.
mount --make-rshared /
exec env --ignore-environment container=test "$6" --system --unit=basic.target --log-target=console
"""


class ServiceManager:
    """Boots in `folder`; `state` is mounted at /var/lib/orgworker.

    With `installed` the units and the command are where the documentation puts them.
    """

    def __init__(self, image: Image, folder: Path, state: Path, *, installed: bool) -> None:
        self._log = folder / "systemd.log"
        self._layers = image.layer.parent / folder.name
        # In the image's tmpfs, where layers may be siblings.
        self._root, self._files, work = (self._layers / name for name in ("root", "files", "work"))
        for path in (self._root, self._files, work):
            path.mkdir(parents=True)
        if installed:
            self._install()
        self._group = _own_cgroup()
        arguments = (self._root, f"{image.layer}:/", self._files, work, state, SYSTEMD)
        with self._log.open("wb") as log:
            self._outer = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", "sh", "-c", _BOOT, "sh", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: _enter(self._group),
            )

    def _install(self) -> None:
        units = self._files / "etc" / "systemd" / "system"
        bins = self._files / "usr" / "local" / "bin"
        for path in (units, bins):
            path.mkdir(parents=True)
        (self._files / "etc" / "credstore").mkdir(mode=0o700)
        for name in UNITS:
            shutil.copy(ROOT / "config" / name, units)
        shutil.copy(ROOT / "config" / "orgworker", bins)

    def wait_until_booted(self) -> None:
        def booted() -> bool:
            if self._outer.poll() is not None:
                raise AssertionError(f"systemd did not start:\n{self._log.read_text()}")
            found = psutil.Process(self._outer.pid).children()
            # Degraded: a unit of the machine's own has failed, such as the one that loads kernel modules.
            state = bool(found) and self.call("systemctl", "is-system-running").stdout.strip()
            return state in ("running", "degraded")

        wait_until(booted, f"systemd to boot; its log is {self._log}")

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command as root under this systemd."""
        [process] = psutil.Process(self._outer.pid).children()
        entered = ["--mount", "--pid", "--ipc", "--uts", "--cgroup", "--root", "--wdns=/"]
        return ["nsenter", "--target", str(process.pid), *entered, *command]

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.inside(*command), capture_output=True, text=True, timeout=300)

    def must(self, *command: str) -> str:
        """The output of the command; a failure fails the test and shows the journal."""
        done = self.call(*command)
        journal = self.call("journalctl", "--no-pager", "--unit=orgworker*").stdout if done.returncode else ""
        assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}\n{journal}"
        return done.stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.must("systemctl", "show", f"--property={name}", "--value", unit).strip()

    def drop_in(self, unit: str, text: str) -> None:
        """Add to a unit's section [Service], as `systemctl edit` does."""
        self.write(f"/etc/systemd/system/{unit}.d/test.conf", f"[Service]\n{text}\n")
        self.must("systemctl", "daemon-reload")

    def write(self, path: str, text: str) -> None:
        """Write a file on that machine; its layers must not be written to from outside while mounted."""
        command = self.inside("install", "-D", "--mode=0644", "/dev/stdin", path)
        subprocess.run(command, input=text, text=True, check=True, timeout=60)

    def close(self) -> None:
        self._outer.kill()
        self._outer.wait()
        wait_until(lambda: _removed(self._group), f"the end of all in {self._group}")
        shutil.rmtree(self._layers)


@contextlib.contextmanager
def booted(image: Image, folder: Path, state: Path, *, installed: bool = True) -> Iterator[ServiceManager]:
    manager = ServiceManager(image, folder, state, installed=installed)
    try:
        manager.wait_until_booted()
        yield manager
    finally:
        manager.close()


def _own_cgroup() -> Path:
    """A new cgroup, which becomes the root of systemd's tree."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    unified = next((Path(at) for _, at, kind, *_ in mounts if kind == "cgroup2"), None)
    assert unified is not None, "systemd cannot be tested here: cgroup2 is not mounted"
    group = unified / f"orgworker-test-{os.getpid()}"
    group.mkdir()
    return group


def _enter(group: Path) -> None:
    linux.die_with_parent()
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _removed(group: Path) -> bool:
    try:
        for folder, _, _ in os.walk(group, topdown=False):
            os.rmdir(folder)
    except OSError:  # one of its processes is still ending
        return False
    return True


class Machine(Site):
    """An installation on a machine with systemd, as docs/operating/systemd.md makes it."""

    def __init__(self, image: Image, folder: Path, provider: Provider) -> None:
        self.state = folder / "state"
        self.state.mkdir()
        super().__init__(self.state, f"sqlite:///{self.state}/worker.db", provider)
        install_handlers(self.plugins)
        self._user = [int(number) for number in image.user.split(":")]
        self.hand_over()

    def hand_over(self) -> None:
        """Give the state and what is in it to the image's user."""
        for path in (self.state, *self.state.rglob("*")):
            os.chown(path, *self._user)

    def use(self, manager: ServiceManager) -> None:
        self.manager = manager
        self.configure(execution='drain = "2s"')
        settings = self.settings.read_text().replace('secrets_dir = ""\n', "")
        manager.write("/etc/orgworker/worker.toml", self.inside(settings))
        manager.drop_in("orgworker.service", f"Environment=PYTHONPATH={STATE}/plugins")

    def inside(self, text: str) -> str:
        return text.replace(str(self.state), STATE)

    cli = Site.process

    def command(self, *arguments: str) -> list[str]:
        return self.manager.inside("/usr/local/bin/orgworker", *map(self.inside, arguments))

    def restarts(self) -> int:
        return int(self.manager.show("orgworker", "NRestarts"))


@pytest.fixture
def machine(image: Image, tmp_path: Path, provider: Provider) -> Iterator[Machine]:
    with (
        opened(Machine(image, tmp_path, provider)) as made,
        booted(image, tmp_path, made.state) as manager,
    ):
        made.use(manager)
        yield made


def test_the_service_carries_a_run_survives_a_stall_and_drains(machine: Machine):
    manager, journal = machine.manager, machine.out / "journal"
    manager.must("systemctl", "start", "orgworker-upgrade")
    machine.add_orgs(application("org_a"))
    # A Tab of bash, as root: systemd passes the words on, and the wrapper starts nothing without a verb.
    asked = ["_ORGWORKER_COMPLETE=complete_bash", "COMP_WORDS=orgworker\norgs\nshow\norg_", "COMP_CWORD=3"]
    assert manager.must("env", *asked, "/usr/local/bin/orgworker").split() == ["org_a"]
    assert "no command is named" in manager.call("/usr/local/bin/orgworker").stderr
    params = {"journal": machine.inside(str(journal)), "steps": 300, "pause": 0.2}
    with machine.in_process():
        machine.apply(
            definition("org_a", "note", "acme.note", "every 5s", params=params)
            + definition("org_a", "steps", "acme.steps", params=params),
            "--allow-unknown-handlers",
        )
    machine.hand_over()
    # Shorter than the unit's 30 s, so that nobody has to wait.
    manager.drop_in("orgworker.service", f"Environment=PYTHONPATH={STATE}/plugins {HEALTH}=\nWatchdogSec=3s")

    # It comes back once READY=1 has come, and that only once runs are admitted.
    manager.must("systemctl", "start", "orgworker")
    assert manager.show("orgworker", "StatusText").startswith("runs: 0 of 50 child")
    machine.wait_for_handlers("acme.steps", timeout=60)
    assert machine.wait_for_end(definition="note", timeout=60)["state"] == "succeeded"
    # The unit's filter of system calls lets the worker confine its runs as far as the kernel can.
    said = manager.must("journalctl", "--no-pager", "--unit=orgworker")
    assert "worker.started" in said
    assert ("sandbox.incomplete" in said) == (landlock.abi() < landlock.SCOPES), said

    with machine.in_process():
        machine.cli("definitions", "run", "org_a", "steps")
    wait_until(lambda: len(read_journal(journal, "step")) > 1, "the first steps")
    manager.must("systemctl", "kill", "--kill-whom=main", "--signal=STOP", "orgworker")
    wait_until(lambda: machine.restarts() == 1, "the watchdog to bite", timeout=60)
    wait_until(lambda: len(read_journal(journal, "start")) == 2, "the second attempt", timeout=60)
    assert read_journal(journal, "start")[-1]["first"] > 0

    manager.must("systemctl", "stop", "orgworker")
    ended = manager.show("orgworker", "Result"), manager.show("orgworker", "ExecMainStatus")
    assert ended == ("success", "0")
    [run] = machine.runs(definition="steps")
    assert (run["state"], run["reason"]) == ("waiting", "handed_back")


@pytest.mark.feature("egress")
def test_the_unit_lets_runs_be_sealed_and_the_broker_send(machine: Machine) -> None:
    """Under its filter of system calls, its address families and its namespaces; names are resolved, too."""
    manager = machine.manager
    make_plugin(machine.plugins, **ASKS)
    machine.hand_over()
    manager.must("systemctl", "start", "orgworker-upgrade")
    machine.add_orgs(application("org_a"))
    with traffic() as api:
        url, other = (api.url.replace("127.0.0.1", name) for name in ("localhost", "api.acme.test"))
        machine.environment["WORKER_EXECUTION__INSECURE_ORIGINS"] = other
        settings = f"WORKER_EXECUTION__NETWORK=require WORKER_EXECUTION__INSECURE_ORIGINS={other}"
        manager.drop_in("orgworker.service", f"Environment=PYTHONPATH={STATE}/plugins {HEALTH}= {settings}")
        with machine.in_process():
            text = definition(
                "org_a", "asks", "acme.asks", params={"url": url, "seconds": 0}, api_origins=[url]
            )
            machine.apply(text, "--allow-unknown-handlers")
        machine.hand_over()
        manager.must("systemctl", "start", "orgworker")
        machine.wait_for_handlers("acme.asks", timeout=60)
        with machine.in_process():
            machine.cli("definitions", "run", "org_a", "asks")

        ended = machine.wait_for_end(definition="asks", timeout=60)

        with machine.in_process():
            params = {"url": url, "seconds": 5}
            text = definition("org_a", "spans", "acme.asks", params=params, api_origins=[url])
            machine.apply(text, "--allow-unknown-handlers")
            machine.cli("definitions", "run", "org_a", "spans")
        wait_until(lambda: len(api.seen) == 3, "its first request")

        # As network managers do: a file of the resolver is replaced, and no process may read the new one.
        def broker() -> str:
            return manager.call("pgrep", "--full", "features.egress.broker").stdout

        before = broker()
        hosts = "printf '127.0.0.1 localhost api.acme.test\\n' >/etc/hosts.new; mv /etc/hosts.new /etc/hosts"
        manager.must("sh", "-ec", hosts)
        wait_until(lambda: broker() not in ("", before), "another broker")
        with machine.in_process():
            params = {"url": other, "seconds": 0}
            text = definition("org_a", "again", "acme.asks", params=params, api_origins=[other])
            machine.apply(text, "--allow-unknown-handlers")
            machine.cli("definitions", "run", "org_a", "again")
        again = machine.wait_for_end(definition="again", timeout=60)
        spans = machine.wait_for_end(definition="spans", timeout=60)
        with machine.in_process():
            shown = machine.cli("runs", "show", str(spans["id"]), "-o", "json").json()

    # What both brokers have sent.
    assert [(row["origin"], row["requests"]) for row in shown["egress"]] == [(url, 2)]
    assert (
        ended["result"]
        == again["result"]
        == spans["result"]
        == {"statuses": [200, 200], "socket": "PermissionError"}
    )
    assert api.seen[0].headers["authorization"].count(".") == 2
    names = manager.must("ps", "-e", "-o", "comm=").split()
    assert names.count(linux.ProcessName.BROKER) == 1
    # It ends with the worker, and was not told to before: a drain still sends.
    manager.must("systemctl", "stop", "orgworker")
    assert manager.show("orgworker", "Result") == "success"
    said = manager.must("journalctl", "--no-pager", "--unit=orgworker")
    assert "broker.died" not in said
    assert linux.ProcessName.BROKER not in manager.must("ps", "-e", "-o", "comm=").split()


# Of the page's commands the one that needs an index; this environment has the packages that it would bring.
FETCHED = (
    "python3 -m pip download --dest dist/wheels --only-binary :all: --require-hashes "
    "--requirement config/requirements/run.lock\n"
)
PATH_OF_ROOT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def commands(page: str, *titles: str) -> list[str]:
    """The lines of the sections' console blocks, for root."""
    sections = [part for part in re.split(r"(?m)^## ", page) if part.partition("\n")[0] in titles]
    assert len(sections) == len(titles)
    texts = [block.text for part in sections for block in blocks(part) if block.language == "console"]
    return [line[2:].removeprefix("sudo ") for text in texts for line in text.splitlines()]


def build(page: str, built: Path, folder: Path) -> Path:
    """The archive that the commands of the section "Build" make in a checkout."""
    checkout = folder / "checkout"
    shutil.copytree(built, checkout, symlinks=True)
    script = "\n".join([*commands(page, "Build"), ""])
    before, packed = script.split(FETCHED)
    assert before.splitlines() == BUILD[:1], "another command than that of test_build"
    download(checkout / "config" / "requirements" / "run.lock", checkout / "dist" / "wheels")
    # The archive does not travel: it need not be small.
    environment = os.environ | {"GZIP": "-1"}
    subprocess.run(
        ["sh", "-euc", packed], cwd=checkout, env=environment, check=True, capture_output=True, timeout=120
    )
    return checkout / "orgworker.tar.gz"


def test_the_page_does_what_it_says(
    image: Image, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, postgres_url: str
):
    """All its commands in order, and those of an upgrade, on a machine that has only a Python."""
    port, health_port = str(free_port()), str(free_port())
    text = (ROOT / "docs" / "operating" / "systemd.md").read_text().replace("8471", health_port)
    upgrade = commands(UPGRADE.read_text(), "systemd")
    state = tmp_path / "state"
    folder = state / "page"
    (folder / "secrets").mkdir(parents=True)
    shutil.copy(build(text, built_checkout(tmp_path_factory), tmp_path), folder)
    install_handlers(tmp_path / "plugins")
    [plugin] = importlib.metadata.distributions(path=[str(tmp_path / "plugins")])
    wheel_of(plugin, folder)
    for name in ("database__url", "database__owner_url"):
        (folder / "secrets" / name).write_text(postgres_url)
    page = blocks(text)
    for block in page:
        if block.file is not None:
            (folder / block.file).write_text(block.text)
    org = {"code": "org_a", "issuer": "main", "client_id": "a", "client_secret": "secret-of-a"}
    (folder / "orgs.jsonl").write_text(json.dumps(org))
    (folder / "definitions.toml").write_text(
        definition("org_a", "ask", "http.request", params={"url": "https://api.acme.com/x"})
    )
    steps = commands(text, "Install", "Secrets", "Start", "The command line")

    with booted(image, tmp_path, state, installed=False) as manager:
        # The image has the user and the environment that the page makes.
        manager.must("userdel", "orgworker")
        manager.must("rm", "-r", "/opt/orgworker")
        python = Path(sys.executable).resolve()
        manager.write("/usr/local/bin/python3", f'#!/bin/sh\nexec {python} "$@"\n')
        manager.must("chmod", "0755", "/usr/local/bin/python3")
        if shutil.which("curl") is None:
            manager.write("/usr/local/bin/curl", curl.script())
            manager.must("chmod", "0755", "/usr/local/bin/curl")
        addresses = f"WORKER_WEB__LISTEN=127.0.0.1:{port} {HEALTH}=127.0.0.1:{health_port}"
        manager.drop_in("orgworker.service", f"Environment={addresses}")

        def run(lines: list[str]) -> str:
            at = f"export PATH={PATH_OF_ROOT} PIP_CONFIG_FILE=/dev/null; cd {STATE}/page"
            return manager.must("sh", "-euxc", "\n".join([at, *lines]))

        shown = run(steps)

        assert "http.request" in shown
        assert "acme.note" in shown
        assert re.search(r"database +postgresql\S*://", shown)
        status = next(block.text for block in page if block.language == "text").partition(";")[0]
        assert status in manager.must("systemctl", "status", "--no-pager", "orgworker")
        given = manager.must("ls", "/run/credentials/orgworker.service").split()
        assert given == ["database__url", "keyring"]
        assert not (state / "keyring").exists()
        environment = manager.must("sh", "-c", "cat /proc/$(systemctl show -P MainPID orgworker)/environ")
        assert postgres_url not in environment
        first = manager.show("orgworker", "MainPID")
        run(upgrade)
        assert manager.show("orgworker", "MainPID") != first
        result = manager.show("orgworker", "Result"), manager.show("orgworker", "NRestarts")
        assert result == ("success", "0")
        assert run(["orgworker db check"])
        manager.must("systemctl", "stop", "orgworker")


def test_the_note_on_new_names_renames_a_worker_that_runs(machine: Machine):
    """On a machine of the previous release. The controls are in tests/integration/test_new_names.py."""
    manager = machine.manager
    manager.must("sh", "-c", "cd /etc/systemd/system; rm -r orgworker*")
    previous = [f"config/worker{part}.service" for part in ("", "-upgrade")]
    for name, text in files_before(previous[0], *previous).items():
        manager.write(f"/etc/systemd/system/{Path(name).name}", text)
    manager.drop_in("worker.service", f"Environment=PYTHONPATH={STATE}/plugins {HEALTH}=\nMemoryMax=8G")
    for unit in UNITS:
        manager.write(f"/root/config/{unit}", (ROOT / "config" / unit).read_text())
    manager.write("/usr/local/bin/sudo", '#!/bin/sh\nexec "$@"\n')
    manager.must("chmod", "0755", "/usr/local/bin/sudo")
    manager.must("systemctl", "start", "worker-upgrade")
    machine.add_orgs(application("org_a"))
    manager.must("systemctl", "enable", "--now", "worker")
    [note, _] = [
        each.text for each in blocks(UPGRADE.read_text()) if each.marks.get("by") == "test_new_names"
    ]

    manager.must("sh", "-euxc", "\n".join(["cd /root", *(line[2:] for line in note.splitlines())]))

    assert manager.call("systemctl", "is-active", "worker", "orgworker").stdout.split() == [
        "inactive",
        "active",
    ]
    assert manager.must("systemctl", "is-enabled", "orgworker").strip() == "enabled"
    assert manager.show("worker", "LoadState") == "not-found"
    assert manager.show("orgworker", "DropInPaths").split() == [
        "/etc/systemd/system/orgworker.service.d/test.conf"
    ]
    assert manager.show("orgworker", "MemoryMax") == str(8 * 2**30)
    # The same database, and the drop-in's plug-ins.
    assert "org_a" in manager.must("/usr/local/bin/orgworker", "orgs", "list")
    machine.wait_for_handlers("acme.note", timeout=60)
    assert manager.must("sh", "-c", "cat /proc/$(systemctl show -P MainPID orgworker)/comm") == "orgworker\n"
    manager.must("systemctl", "stop", "orgworker")


def test_a_database_without_its_schema_is_told_and_no_restart_is_tried(machine: Machine):
    manager = machine.manager

    assert manager.call("systemctl", "start", "orgworker").returncode != 0

    assert (manager.show("orgworker", "ExecMainStatus"), machine.restarts()) == ("78", 0)
    told = manager.must("journalctl", "--no-pager", "--unit=orgworker")
    assert "db upgrade" in told
