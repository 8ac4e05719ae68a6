"""The commands of docs/operating/upgrade.md that rename what the previous release installed.

`systemctl`, `sudo` and `kubectl` are stand-ins: the first makes and removes the links of units, as
`systemctl --root` does, and the last keeps objects in a file. tests/acceptance/test_systemd.py follows the
same commands under systemd itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.history import files_before
from tests.fakes.pages import ROOT, blocks

pytestmark = pytest.mark.feature("checkout")

PAGE = ROOT / "docs" / "operating" / "upgrade.md"
BEFORE = "config/worker.service"
UNITS = Path("etc/systemd/system")
DROP_INS = {
    UNITS / "worker.service.d" / "override.conf": "[Service]\nTimeoutStopSec=610s\n",
    Path("etc/systemd/system.control/worker.service.d/50-MemoryMax.conf"): "[Service]\nMemoryMax=8G\n",
}
FOREIGN = "[Unit]\nDescription=The worker of another product\n[Install]\nWantedBy=multi-user.target\n"

SYSTEMCTL = """#!{python}
import pathlib, sys
units = pathlib.Path("{root}/etc/systemd/system")
verb, *words = sys.argv[1:]
with open("{root}/calls", "a") as calls:
    print(verb, *words, file=calls)
for name in (word for word in words if word[0] != "-"):
    unit = units / (name + ".service")
    if not unit.is_file():
        sys.exit(f"Failed to {{verb}}: {{unit.name}} not found.")
    link = units / "multi-user.target.wants" / unit.name
    if verb in ("enable", "disable"):
        link.unlink(missing_ok=True)
    if verb == "enable" and "WantedBy=multi-user.target" in unit.read_text():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(unit)
"""

KUBECTL = """#!{python}
import json, pathlib, sys, yaml
state = pathlib.Path("{root}/objects.json")
objects = json.loads(state.read_text())
verb, *words = sys.argv[1:]
with open("{root}/calls", "a") as calls:
    print(verb, *words, file=calls)
if verb == "apply":
    folder = pathlib.Path(words[1])
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        for made in yaml.safe_load_all((folder / name).read_text()):
            objects[made["kind"].lower() + "/" + made["metadata"]["name"]] = made
else:
    words = [word for word in words if word != "status"]
    key = words[0] if "/" in words[0] else "/".join(words[:2])
    if key not in objects:
        sys.exit(f'Error from server (NotFound): "{{key}}" not found')
    if verb == "get":
        assert words[2:] == ["-o", "jsonpath={{.spec.replicas}}"], words
        print(objects[key]["spec"]["replicas"], end="")
    elif verb == "scale":
        objects[key]["spec"]["replicas"] = int(words[1].removeprefix("--replicas="))
    elif verb == "delete":
        del objects[key]
state.write_text(json.dumps(objects))
"""


class Machine:
    """A folder in place of `/`, where the note's commands run in a copy of the release."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.bin = folder / "bin"
        (self.root / UNITS).mkdir(parents=True)
        self.bin.mkdir()
        for name, text in {
            "sudo": '#!/bin/sh\nexec "$@"\n',
            "systemctl": SYSTEMCTL,
            "kubectl": KUBECTL,
        }.items():
            self.write(self.bin / name, text.format(python=sys.executable, root=self.root))
            (self.bin / name).chmod(0o755)

    def write(self, path: Path, text: str) -> None:
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, *lines: str) -> subprocess.CompletedProcess[str]:
        script = "\n".join(lines).replace("/etc/systemd", f"{self.root}/etc/systemd")
        environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}"}
        return subprocess.run(
            ["sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
        )

    @property
    def files(self) -> dict[str, str | None]:
        """The files of systemd's folders with their texts; None is a link to one of them."""
        folder = self.root / "etc" / "systemd"
        found = (path for path in folder.rglob("*") if not path.is_dir())
        return {
            str(path.relative_to(folder)): None if path.is_symlink() and path.exists() else path.read_text()
            for path in found
        }

    @property
    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()


def note() -> tuple[list[str], list[str]]:
    """The lines of the note's two blocks: for units, and for Deployments."""
    units, deployments = (
        [line[2:] for line in block.text.splitlines()]
        for block in blocks(PAGE.read_text())
        if block.marks.get("by") == "test_new_names"
    )
    return units, deployments


def directives(text: str, *names: str) -> list[str]:
    return [line for line in text.splitlines() if line.partition("=")[0] in names]


@pytest.fixture(scope="module")
def previous() -> dict[str, str]:
    """The units and manifests of the release that called them `worker`."""
    units = [f"config/worker{part}.service" for part in ("", "-upgrade", "-provision", "-host")]
    found = files_before(BEFORE, *units, "config/kubernetes")
    assert set(units) < set(found)
    return found


@pytest.fixture
def machine(tmp_path: Path, previous: dict[str, str]) -> Machine:
    """A machine with a worker and a provisioner of the previous release, and drop-ins."""
    made = Machine(tmp_path)
    for name in ("worker", "worker-upgrade", "worker-provision"):
        made.write(UNITS / f"{name}.service", previous[f"config/{name}.service"])
    for path, text in DROP_INS.items():
        made.write(path, text)
    assert made.run("systemctl enable worker", "systemctl enable worker-provision").returncode == 0
    (made.root / "calls").unlink()
    return made


def test_the_note_renames_the_units_with_their_drop_ins(machine: Machine, previous: dict[str, str]):
    units, _ = note()

    done = machine.run("set -eu", *units)

    assert (done.returncode, done.stderr) == (0, "")
    new = {
        f"system/org{name}.service": (ROOT / "config" / f"org{name}.service").read_text()
        for name in ("worker", "worker-upgrade", "worker-provision")
    }
    kept = {
        f"system/{name}.service.before": previous[f"config/{name}.service"]
        for name in ("worker", "worker-upgrade", "worker-provision")
    }
    moved = {
        str(path.relative_to("etc/systemd")).replace("worker.service.d", "orgworker.service.d"): text
        for path, text in DROP_INS.items()
    }
    enabled = "system/multi-user.target.wants/orgworker.service"
    assert machine.files == {**new, **kept, **moved, enabled: None}
    assert machine.calls[-3:] == ["daemon-reload", "start orgworker-upgrade", "enable --now orgworker"]
    # A stop while the old unit and its drop-ins are there: their TimeoutStopSec= holds for this drain.
    assert machine.calls[:3] == [
        f"disable --now {name}" for name in ("worker", "worker-upgrade", "worker-provision")
    ]

    again = machine.run("set -eu", *units)

    assert (again.returncode, again.stderr) == (0, "")
    assert machine.files == {**new, **kept, **moved, enabled: None}


def test_without_the_moves_a_drop_in_has_no_effect(machine: Machine):
    """The control."""
    units, _ = note()

    done = machine.run("set -eu", *(line.replace("sudo mv -T", ":") for line in units))

    assert done.returncode == 0
    assert "system/orgworker.service" in machine.files
    assert not [name for name in machine.files if "orgworker.service.d" in name]


def test_drop_ins_that_cannot_move_leave_the_old_unit_for_a_second_try(machine: Machine):
    """With `mv` alone they would land in a folder of the new one's, where systemd does not look."""
    machine.write(UNITS / "orgworker.service.d" / "own.conf", "[Service]\nMemoryMax=4G\n")
    units, _ = note()

    done = machine.run(*units)

    assert done.returncode != 0
    assert "not empty" in done.stderr
    assert {"system/worker.service", "system/worker.service.d/override.conf"} < set(machine.files)
    assert "system/orgworker.service" not in machine.files
    machine.run(*(line.replace("mv -T", "mv") for line in units))
    assert "system/orgworker.service.d/worker.service.d/override.conf" in machine.files


@pytest.mark.parametrize("line", ["grep", None], ids=["the control", "as it is"])
def test_a_unit_of_another_product_stays(tmp_path: Path, previous: dict[str, str], line: str | None):
    machine = Machine(tmp_path)
    machine.write(UNITS / "worker.service", FOREIGN)
    machine.write(UNITS / "worker-host.service", previous["config/worker-host.service"])
    units, _ = note()
    guarded = [
        each.replace("grep -qs '^Description=orgworker'", "test -e") if line else each for each in units[:-2]
    ]

    assert machine.run("set -eu", *guarded).returncode == 0

    assert "system/orgworker-host.service" in machine.files
    assert (machine.files.get("system/worker.service") == FOREIGN) == (line is None)


def test_the_new_units_use_the_same_user_data_and_secrets(previous: dict[str, str]):
    names = ("User", "Group", "StateDirectory", "StateDirectoryMode", "WorkingDirectory", "LoadCredential")

    for part in ("", "-upgrade", "-provision", "-host"):
        text = (ROOT / "config" / f"orgworker{part}.service").read_text()
        old = directives(previous[f"config/worker{part}.service"], *names)
        assert set(old) <= set(directives(text, *names))
        assert {"User", "StateDirectory"} < {line.partition("=")[0] for line in old}


def manifests(texts: list[str]) -> dict[str, Any]:
    made = (each for text in texts for each in yaml.safe_load_all(text))
    return {f"{one['kind'].lower()}/{one['metadata'].get('name')}": one for one in made if "metadata" in one}


def test_the_note_replaces_the_deployment_once_the_new_one_is_ready(tmp_path: Path, previous: dict[str, str]):
    machine = Machine(tmp_path)
    resources = yaml.safe_load(previous["config/kubernetes/kustomization.yaml"])["resources"]
    before = manifests([previous[f"config/kubernetes/{name}"] for name in resources])
    before["deployment/worker"]["spec"]["replicas"] = 6
    machine.write(Path("objects.json"), json.dumps(before))
    _, deployments = note()

    done = machine.run("set -eu", *deployments)

    assert (done.returncode, done.stderr) == (0, "")
    after = json.loads((machine.root / "objects.json").read_text())
    old, new = before.pop("deployment/worker"), after.pop("deployment/orgworker")
    # All others have their names, so none of them selects the same pods twice.
    assert set(after) == set(before)
    assert new["spec"]["replicas"] == 6
    assert new["spec"]["selector"] == old["spec"]["selector"]
    ready, deleted = "rollout status deployment/orgworker", "delete deployment worker"
    assert machine.calls.index(ready) < machine.calls.index(deleted)


def test_labels_and_other_objects_of_the_cluster_keep_their_names(previous: dict[str, str]):
    """A second PodDisruptionBudget for the same pods blocks their eviction; an ingress names the Service."""
    folder = ROOT / "config" / "kubernetes"
    now = manifests([path.read_text() for path in folder.glob("*.yaml")])
    before = manifests([text for name, text in previous.items() if name.endswith(".yaml")])
    renamed = {"worker": "orgworker", "host": "orgworker-host", "provision": "orgworker-provision"}

    for key, old in before.items():
        kind, name = key.split("/")
        new = now[f"{kind}/{renamed[name]}" if kind == "deployment" else key]
        assert new["metadata"].get("labels") == old["metadata"].get("labels")
        for where in ("selector", "podSelector"):
            assert new["spec"].get(where) == old["spec"].get(where)
    assert {key for key in before if key.startswith("deployment/")} == {
        f"deployment/{name}" for name in renamed
    }
