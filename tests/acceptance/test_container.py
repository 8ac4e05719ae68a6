"""The image of config/Containerfile in a container: its user, a read-only root, one volume, process 1."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import copied
from tests.fakes.handlers import install_handlers, read_journal
from tests.fakes.image import Image
from tests.fakes.plugins import make_plugin
from tests.fakes.sealed import ASKS
from tests.fakes.site import Site, application, definition, opened, wait_until
from tests.fakes.traffic import traffic
from worker.demo.provider import Provider
from worker.engine.runners.child import landlock, linux

pytestmark = pytest.mark.feature("checkout")


class Container(Site):
    """An installation whose commands are containers of their own; they share the volume."""

    def __init__(self, image: Image, folder: Path, provider: Provider) -> None:
        self.image = image
        self.volume = folder / "volume"
        self.etc = folder / "etc"
        self.volume.mkdir()
        self.etc.mkdir()
        super().__init__(self.volume, f"sqlite:///{self.volume}/worker.db", provider)
        install_handlers(self.plugins)
        # For commands of this process; a container has its own.
        self.settings = folder / "worker.toml"
        self.configure(execution='drain = "2s"')
        (self.etc / "worker.toml").write_text(self.inside(self.settings.read_text()))
        self.hand_over()

    def hand_over(self) -> None:
        """Give the volume and its contents to the image's user."""
        for path in (self.volume, *self.volume.rglob("*")):
            os.chown(path, *map(int, self.image.user.split(":")))

    def inside(self, text: str) -> str:
        """The text with paths of the volume as they are in a container."""
        return text.replace(str(self.volume), self.image.volume)

    cli = Site.process

    def command(self, *arguments: str) -> list[str]:
        given = map(self.inside, arguments or self.image.command)
        plugins = self.inside(str(self.plugins))
        # Its network is this machine's, where others may have the image's port.
        environment = {"PYTHONPATH": plugins, "WORKER_WEB__HEALTH_LISTEN": ""}
        return self.image.run(self.volume, self.etc, *self.image.entrypoint, *given, **environment)

    def close(self) -> None:
        # The change of user takes back the signal by which `unshare --kill-child` ends its child.
        for outer in self._workers:
            with suppress(psutil.NoSuchProcess):
                for worker in psutil.Process(outer.pid).children():
                    worker.kill()
        super().close()

    def shell(self, script: str) -> str:
        """What a script prints that runs in a container in place of the image's command."""
        command = self.image.run(self.volume, self.etc, "sh", "-c", script)
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout + done.stderr


@pytest.fixture
def container(image: Image, tmp_path: Path, provider: Provider) -> Iterator[Container]:
    with opened(Container(image, tmp_path, provider)) as made:
        yield made


def test_nothing_but_the_volume_can_be_written_and_the_user_has_no_rights(container: Container):
    tried = ["/", "/etc/orgworker", "/opt/orgworker", "/tmp", "/var/tmp", "/dev", "/dev/shm", "/run", "$PWD"]

    shown = container.shell(f"for at in {' '.join(tried)}; do touch $at/x 2>/dev/null && echo $at; done")
    assert shown.split() == [container.image.volume]
    shown = container.shell("id -u; id -g; id -G; echo $$; grep -E '^(Cap|NoNew)' /proc/self/status")
    uid, gid, groups, pid, *status = shown.splitlines()
    assert (uid, gid, groups, pid) == ("10001", "10001", "10001", "1")
    assert all(set(line.split()[1]) == {"0"} for line in status if line.startswith("Cap"))
    assert "NoNewPrivs:\t1" in status


@pytest.mark.timeout(180)
def test_a_worker_runs_children_as_process_1_leaves_no_zombie_and_drains(container: Container):
    journal = container.out / "journal"
    container.migrate()
    params = {"journal": container.inside(str(journal)), "steps": 300, "pause": 0.2}
    with container.in_process():
        container.add_orgs(application("org_a"))
        container.apply(
            definition("org_a", "steps", "acme.steps", params=params)
            + definition("org_a", "note", "acme.note", params=params)
            + definition("org_a", "crash", "acme.segfault", max_attempts=1)
        )
    container.hand_over()
    outer = container.start_worker()
    container.wait_for_handlers("acme.steps")
    assert ("sandbox.incomplete" in container.log_text()) == (landlock.abi() < landlock.SCOPES)
    [worker] = psutil.Process(outer.pid).children()
    assert (Path("/proc") / str(worker.pid) / "status").read_text().split("NSpid:")[1].split()[1] == "1"

    container.cli("definitions", "run", "org_a", "note")
    assert container.wait_for_end(definition="note")["state"] == "succeeded"
    with container.in_process():
        container.cli("definitions", "run", "org_a", "crash")
    assert container.wait_for_end(definition="crash")["detail"] == "signal SIGSEGV"

    # The zygote's death leaves the run, its grandchild and their zombies to process 1.
    with container.in_process():
        container.cli("definitions", "run", "org_a", "steps")
    wait_until(lambda: read_journal(journal, "grandchild"), "the grandchild")
    assert {child.uids().real for child in worker.children(recursive=True)} == {10001}
    [zygote] = [
        child for child in worker.children() if "worker.engine.runners.child.zygote" in child.cmdline()
    ]
    zygote.kill()
    wait_until(lambda: len(read_journal(journal, "start")) == 2, "the second attempt")
    zombies = [child.pid for child in worker.children(recursive=True) if child.status() == "zombie"]
    assert zombies == []
    assert read_journal(journal, "start")[-1]["first"] > 0

    worker.send_signal(signal.SIGTERM)
    assert outer.wait(20) == 0
    [run] = container.runs(definition="steps")
    assert (run["state"], run["reason"]) == ("waiting", "handed_back")
    assert [path.name for path in container.volume.glob("orgworker-*")] == []


def test_a_second_container_on_the_same_file_names_the_first_and_is_to_be_tried_later(
    container: Container, migrated_sqlite_file: Path
):
    copied(migrated_sqlite_file, container.volume)
    container.hand_over()
    container.start_worker()
    container.wait_for_handlers("acme.note")

    assert container.cli("run", check=False).code == 75


@pytest.mark.feature("egress")
@pytest.mark.timeout(180)
def test_sealed_runs_use_the_broker_which_a_drain_leaves_to_them(container: Container) -> None:
    """On a read-only root, without rights; SIGTERM to process 1 ends the broker last."""
    make_plugin(container.plugins, **ASKS)
    container.migrate()
    with traffic() as api, container.in_process():
        url = api.url.replace("127.0.0.1", "localhost")
        container.add_orgs(application("org_a"))
        params = {"url": url, "seconds": 1}
        container.apply(definition("org_a", "asks", "acme.asks", params=params, api_origins=[url]))
        container.hand_over()
        outer = container.start_worker()
        container.wait_for_handlers("acme.asks")
        container.cli("definitions", "run", "org_a", "asks")
        wait_until(lambda: api.seen, "the first request")

        [worker] = psutil.Process(outer.pid).children()
        [broker] = [child for child in worker.children() if child.name() == linux.ProcessName.BROKER]
        # As a terminal and some managers do: to all of them.
        broker.send_signal(signal.SIGTERM)
        worker.send_signal(signal.SIGTERM)
        assert outer.wait(20) == 0

    [run] = container.runs(definition="asks")
    assert run["result"] == {"statuses": [200, 200], "socket": "PermissionError"}
    assert [each.headers["authorization"].count(".") for each in api.seen] == [2, 2]
    assert "broker.died" not in container.log_text()
    assert not broker.is_running()
