"""The image of config/Containerfile without a container engine: its own steps, on overlays of this machine.

This machine's Python stands in for the base image's, and packages that a lock file names
are copied from this environment in place of their download; all else is what the
Containerfile says. A container is a mount and a pid namespace in which the tree is
mounted read-only, with the one volume; the command is process 1 under the image's user.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMESPACES = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What `pip install … -r LOCK` becomes: pip of that environment cannot download here.
_LOCKED = re.compile(r"(\S+)/bin/pip install --no-cache-dir --require-hashes -r (\S+)")

# Enters a container: the tree, what engines mount on it, and the image's user without any right.
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


@dataclass(frozen=True)
class Image:
    """A stage of the Containerfile as far as it has come: its files in `layer`, the rest as written there."""

    layer: Path
    user: str = "0:0"
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    volume: str = ""
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()

    def run(self, volume: Path, etc: Path, *command: str, **environment: str) -> list[str]:
        """The command line that runs it in a new container.

        `volume` is a folder that the image's user owns, `etc` what /etc/orgworker is to be.
        """
        root = self.layer.with_name(f"{self.layer.name}.root")
        given = [f"{name}={value}" for name, value in (self.environment | environment).items()]
        arguments = (root, f"{self.layer}:/", ROOT, volume, self.volume, etc, self.user, self.workdir)
        enter = ["sh", "-c", _ENTER, "sh", *map(str, arguments)]
        return [*NAMESPACES, *enter, *given, *command]


def why_not() -> str | None:
    """Why this machine lets nobody make the namespaces of a container, or None."""
    if os.getuid() != 0:
        return "only root may mount an image's files"
    try:
        subprocess.run([*NAMESPACES, "true"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no unshare (package util-linux)"
    except subprocess.CalledProcessError as error:
        return f"namespaces are refused: {error.stderr.strip()}"
    return None


@contextlib.contextmanager
def built(folder: Path) -> Iterator[Image]:
    """The image of config/Containerfile, as long as the block lasts; in memory, at the folder."""
    # A file system of its own, too, since an overlay's layers must not lie in each other.
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
    try:
        yield _build(folder, (ROOT / "config" / "Containerfile").read_text())
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _build(folder: Path, containerfile: str) -> Image:
    stages: dict[str, Image] = {}
    image = None
    for word, rest in _steps(containerfile):
        if word == "FROM":
            name = rest.partition(" AS ")[2] or "last"
            image = stages[name] = _base(folder / name)
            continue
        assert image is not None, "a Containerfile begins with FROM"
        stages[name] = image = _step(image, word, rest, stages)
    assert image is not None
    return image


def _steps(text: str) -> list[tuple[str, str]]:
    lines = "\n".join(line for line in text.splitlines() if line and not line.startswith("#"))
    steps = [line.partition(" ") for line in lines.replace("\\\n", " ").splitlines()]
    return [(word, rest.strip()) for word, _, rest in steps]


def _base(layer: Path) -> Image:
    """As python:3.13-slim: a Python named `python`, that everybody may run."""
    for path in (layer, layer.with_name(f"{layer.name}.work"), layer.with_name(f"{layer.name}.root")):
        path.mkdir()
    image = Image(layer)
    python = Path(sys.executable).resolve()
    # It may lie in somebody's home folder, which is closed to all others.
    opened = " ".join(str(folder) for folder in python.parents if folder != Path("/"))
    # No link: a Python looks for its library beside the name that it was called by.
    name = "/usr/local/bin/python"
    _shell(image, f"""rm -f {name}; printf '#!/bin/sh\\nexec {python} "$@"\\n' >{name}; chmod 755 {name}""")
    _shell(image, f"chmod o+x {opened}; mkdir -p /etc/orgworker")
    return image


def _step(image: Image, word: str, rest: str, stages: dict[str, Image]) -> Image:
    match word:
        case "RUN":
            for environment, lock in _LOCKED.findall(rest):
                rest = rest.replace(f"{environment}/bin/pip install", "true", 1)
                site = image.layer / environment[1:] / "lib" / _python() / "site-packages"
                _copy_locked(ROOT / lock, site)
            _shell(image, rest)
        case "COPY" if rest == ". .":
            _copy_context(image.layer / image.workdir[1:])
        case "COPY":
            option, source, target = rest.split()
            stage = stages[option.removeprefix("--from=")]
            shutil.copytree(stage.layer / source[1:], image.layer / target[1:], symlinks=True)
        case "WORKDIR":
            (image.layer / rest[1:]).mkdir(parents=True, exist_ok=True)
            return replace(image, workdir=rest)
        case "ENV":
            pairs = dict(pair.split("=", 1) for pair in shlex.split(rest))
            known = image.environment
            return replace(
                image, environment=known | {k: v.replace("$PATH", known["PATH"]) for k, v in pairs.items()}
            )
        case "USER":
            return replace(image, user=rest)
        case "VOLUME":
            return replace(image, volume=rest)
        case "ENTRYPOINT":
            return replace(image, entrypoint=tuple(json.loads(rest)))
        case "CMD":
            return replace(image, command=tuple(json.loads(rest)))
        case "STOPSIGNAL" | "EXPOSE":
            pass
        case _:
            raise AssertionError(f"the Containerfile has a step that this does not know: {word}")
    return image


def _python() -> str:
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _shell(image: Image, script: str) -> None:
    """Run it as root with the stage's files as the root, and keep what it writes."""
    root, work = (image.layer.with_name(f"{image.layer.name}.{suffix}") for suffix in ("root", "work"))
    enter = (
        f"mount -t overlay overlay -o lowerdir=/,upperdir={image.layer},workdir={work} {root}"
        f" && mount -t proc proc {root}/proc && mount --rbind /dev {root}/dev"
        f' && exec chroot {root} env --ignore-environment --chdir {image.workdir} "$@"'
    )
    given = [f"{name}={value}" for name, value in image.environment.items()]
    command = [*NAMESPACES, "sh", "-c", enter, "sh", *given, "sh", "-euc", script]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"RUN {script} ended with {done.returncode}:\n{done.stdout}{done.stderr}"


def _copy_context(target: Path) -> None:
    """The checkout but for what .containerignore names."""
    ignored = [line.removeprefix("**/") for line in (ROOT / ".containerignore").read_text().split()]

    def unwanted(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]

    shutil.copytree(ROOT, target, ignore=unwanted, dirs_exist_ok=True)


def _copy_locked(lock: Path, site: Path) -> None:
    """Every package of the run-time lock file, in just that version, from this environment into another.

    What only builds is lent, not copied: it is large, and stays out of the image.
    """
    here = Path(sysconfig.get_path("purelib"))
    site.mkdir(parents=True)
    if lock.name != "run.lock":
        (site / "lent.pth").write_text(str(here))
    for name, version in re.findall(r"(?m)^([\w.-]+)==([\w.+!-]+)", lock.read_text()):
        found = importlib.metadata.distribution(name)
        assert found.version == version, f"{lock.name} has {name} {version}, here is {found.version}"
        if lock.name != "run.lock":
            continue
        for file in found.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(here / file, site / file)
