"""systemd as process 1 of its own namespaces, on the files of the image, with the units of config/."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.fakes.image import ROOT, Image
from tests.fakes.site import wait_until
from worker.execution.runners.child import linux

SYSTEMD = Path("/lib/systemd/systemd")
STATE = "/var/lib/orgworker"
NAMESPACES = ["--mount", "--pid", "--ipc", "--uts", "--cgroup"]
UNITS = ("worker.service", "worker-upgrade.service")

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
            return bool(found) and self.call("systemctl", "is-system-running").stdout.strip() == "running"

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
        journal = self.call("journalctl", "--no-pager", "--unit=worker*").stdout if done.returncode else ""
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
