"""The image of config/Containerfile without a container engine: its steps, on overlays of this machine.

This machine's Python replaces that of the base image, and locked packages are copied from this
environment instead of downloaded. A container has its own mount and pid namespaces, a read-only tree and
one volume; its command is process 1 under the image's user.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMESPACES = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# pip cannot download here: copying the packages of the lock file replaces this command.
_LOCKED = re.compile(r"(\S+)/bin/pip install --no-cache-dir --require-hashes -r (\S+)")

# Enters a container: mounts the tree and what engines mount on it, and drops to the image's user.
_ENTER = """
set -e
root=$1 layers=$2 checkout=$3 volume=$4 at=$5 etc=$6 user=$7 workdir=$8
shift 8
mount -t overlay overlay -o "lowerdir=$layers" "$root"
mount -t tmpfs -o size=64k tmpfs "$root/dev"
for device in null zero random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -o remount,ro "$root/dev"
mount -t tmpfs -o ro tmpfs "$root$checkout"
mount --bind "$volume" "$root$at"
mount --bind "$etc" "$root/etc/orgworker"
mount -o remount,ro,bind "$root/etc/orgworker"
mount -t proc proc "$root/proc"
exec chroot "$root" setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs \\
    --bounding-set=-all --inh-caps=-all env --ignore-environment --chdir "$workdir" "$@"
"""

# Runs a command as root with the stage's files as the root, and keeps what it writes in the layer.
_BUILD = """
set -e
root=$1 layer=$2 work=$3 workdir=$4
shift 4
mount -t overlay overlay -o "lowerdir=/,upperdir=$layer,workdir=$work" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" env --ignore-environment --chdir "$workdir" "$@"
"""


@dataclass
class Image:
    """A stage of the Containerfile, as far as it is built."""

    folder: Path
    user: str = "0:0"
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    volume: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    @property
    def layer(self) -> Path:
        """The folder with the files of the image that are not this machine's."""
        return self.folder / "layer"

    def run(self, volume: Path, etc: Path, *command: str, **environment: str) -> list[str]:
        """The command line that runs a command in a new container.

        `volume` is a folder that the image's user owns, `etc` is mounted at /etc/orgworker.
        """
        root = self.folder / "root"
        arguments = (root, f"{self.layer}:/", ROOT, volume, self.volume, etc, self.user, self.workdir)
        return _in_namespaces(_ENTER, arguments, self.environment | environment, command)

    def build(self, script: str) -> None:
        """Run a shell script as root with the stage's files as the root, and keep what it writes."""
        arguments = (self.folder / "root", self.layer, self.folder / "work", self.workdir)
        command = _in_namespaces(_BUILD, arguments, self.environment, ("sh", "-euc", script))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"RUN {script} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def _in_namespaces(
    script: str, arguments: Sequence[object], environment: Mapping[str, str], command: Sequence[str]
) -> list[str]:
    given = [f"{name}={value}" for name, value in environment.items()]
    return [*NAMESPACES, "sh", "-c", script, "sh", *map(str, arguments), *given, *command]


def why_not() -> str | None:
    """Why this machine cannot run a container, or None."""
    if os.getuid() != 0:
        return "only root may mount an image's files"
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def build(folder: Path) -> None:
    """Build the image of config/Containerfile in memory at a new folder."""
    folder.mkdir()
    # In a file system of its own, because an overlay's layers must not contain each other.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        image = _build(folder, (ROOT / "config" / "Containerfile").read_text())
        (folder / "image").write_bytes(pickle.dumps(image))
    except BaseException:
        remove(folder)  # pytest could not remove it later
        raise


def built_at(folder: Path) -> Image:
    image: Image = pickle.loads((folder / "image").read_bytes())
    return image


def remove(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)
    folder.rmdir()


def _build(folder: Path, containerfile: str) -> Image:
    stages: dict[str, Image] = {}
    lines = "\n".join(line for line in containerfile.splitlines() if line and not line.startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            name = rest.partition(" AS ")[2] or "last"
            image = stages[name] = _base(folder / name)
            continue
        match word:
            case "RUN":
                for environment, lock in _LOCKED.findall(rest):
                    rest = rest.replace(f"{environment}/bin/pip install", "true", 1)
                    _copy_locked(ROOT / lock, image.layer / environment[1:])
                image.build(rest)
            case "COPY" if rest == ". .":
                _copy_context(image.layer / image.workdir[1:])
            case "COPY":
                option, source, target = rest.split()
                stage = stages[option.removeprefix("--from=")]
                shutil.copytree(stage.layer / source[1:], image.layer / target[1:], symlinks=True)
            case "WORKDIR":
                image.workdir = rest
                (image.layer / rest[1:]).mkdir(parents=True, exist_ok=True)
            case "ENV":
                for name, value in (pair.split("=", 1) for pair in shlex.split(rest)):
                    image.environment[name] = value.replace("$PATH", image.environment["PATH"])
            case "USER":
                image.user = rest
            case "VOLUME":
                image.volume = rest
            case "ENTRYPOINT":
                image.entrypoint = tuple(json.loads(rest))
            case "CMD":
                image.command = tuple(json.loads(rest))
            case "STOPSIGNAL" | "EXPOSE" | "ARG":
                # An argument without a value, as where none is given to the build.
                pass
            case _:
                raise AssertionError(f"this module does not support the step {word} of the Containerfile")
    return image


def _base(folder: Path) -> Image:
    """Like python:3.13-slim: a Python named `python` that every user may run."""
    for name in ("layer", "work", "root"):
        (folder / name).mkdir(parents=True)
    image = Image(folder)
    python = Path(sys.executable).resolve()
    # It may be in a home folder, which is closed to other users.
    opened = " ".join(str(parent) for parent in python.parents if parent != Path("/"))
    # Not a link: a Python looks for its library beside the name that it was called by.
    name = "/usr/local/bin/python"
    image.build(
        f"""rm -f {name}; printf '#!/bin/sh\nexec {python} "$@"\n' >{name}; chmod 755 {name}
        chmod o+x {opened}; mkdir -p /etc/orgworker"""
    )
    return image


def _copy_context(target: Path) -> None:
    """Copy the checkout without what .containerignore names."""
    ignored = [line.removeprefix("**/") for line in (ROOT / ".containerignore").read_text().split()]
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*ignored), dirs_exist_ok=True)


def _copy_locked(lock: Path, environment: Path) -> None:
    """Copy the packages of run.lock into a virtual environment, in the locked versions.

    Packages that only build the wheel stay outside the image: a .pth file adds them.
    """
    here = Path(sysconfig.get_path("purelib"))
    site = environment / here.relative_to(sys.prefix)
    site.mkdir(parents=True)
    if lock.name != "run.lock":
        (site / "build.pth").write_text(str(here))
    for name, version, marker in re.findall(r"(?m)^([\w.-]+)==([\w.+!-]+)( ;)?", lock.read_text()):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # One for another machine or version of Python.
            assert marker, f"{lock.name} has {name}, which is not installed"
            continue
        assert found.version == version, f"{lock.name} has {name} {version}, here is {found.version}"
        for file in (found.files or ()) if lock.name == "run.lock" else ():
            if ".." not in file.parts and (here / file).exists():
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(here / file, site / file)
