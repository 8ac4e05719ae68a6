"""A hostile handler in a worker of an unprivileged user: what it can reach with the sandbox and without.

Every attack of `hostile_jobs.py` must fail in the sandbox, and work without it, as proof that
it is real. DEFENDED lists those that fail in both cases, with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fakes.kernel import require_landlock
from tests.fakes.plugins import make_plugin
from tests.fakes.ports import free_port
from tests.fakes.postgres import Server, unprivileged_user
from tests.fakes.site import Site, application, definition, opened, wait_until
from worker.demo.provider import Provider

pytestmark = pytest.mark.feature("console")

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("hostile_jobs.py")
# Makes the needed paths below closed folders reachable: in a mount namespace, each closed folder is an empty
# one that is open to all, and contains only the needed paths.
_REACH = """\
hold=$1 closed=$2 needed=$3
shift 3
mount -t tmpfs -o mode=755 tmpfs "$hold"
for path in $needed; do mkdir -p "$hold$path"; mount --rbind "$path" "$hold$path"; done
for path in $closed; do mount -t tmpfs -o mode=755 tmpfs "$path"; done
for path in $needed; do mkdir -p "$path"; mount --rbind "$hold$path" "$path"; done
exec "$@"
"""
# The worker imports a plug-in to see what it offers: in a child of its own.
AT_IMPORT = """\
from pathlib import Path
for folder in ("state", "secrets"):
    if (secret := Path(__file__).parents[1] / folder / "keyring").exists():
        raise RuntimeError(f"its import has read {len(secret.read_bytes())} bytes of the key ring")
"""
NOT_DUMPABLE = "the process hides its memory (PR_SET_DUMPABLE)"
DEFENDED = {
    f"{what} of {who}": NOT_DUMPABLE
    for what in (
        *("read the environment", "read the memory"),
        *("list the descriptors", "reach the working folder"),
    )
    for who in ("the worker", "the zygote", "serve", "another run")
} | {"release the lock of the SQLite file": "a run holds a lock of its own, not the worker's descriptor"}

YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
if YAMA.exists() and YAMA.read_text().strip() != "0":
    DEFENDED["read the memory of another run's process"] = "Yama lets only a parent trace a process"


def as_unprivileged(hold: Path) -> list[str]:
    """The words to put before a command. `hold` is an empty folder."""
    user = unprivileged_user()
    if user is None:
        return []
    drop = ["setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", "--clear-groups"]
    closed = {}
    for path in {ROOT, Path(sys.prefix), Path(sys.base_prefix)}:
        shut = [parent for parent in (path, *path.parents) if not parent.stat().st_mode & 0o001]
        if shut:
            closed[path] = shut[-1]
    if not closed:
        return drop
    script = ["sh", "-euc", _REACH, "sh", str(hold)]
    lists = [" ".join(sorted(map(str, set(paths)))) for paths in (closed.values(), closed)]
    return ["unshare", "--mount", "--propagation", "private", *script, *lists, *drop]


def hand_over(folder: Path) -> None:
    """Give the folder and its contents to the unprivileged user."""
    user = unprivileged_user()
    if user is not None:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, *user)


class Installation(Site):
    """A site of the unprivileged user, as is every command on it, with all that a handler must not reach."""

    def __init__(self, folder: Path, database_url: str, provider: Provider, login_url: str = "") -> None:
        super().__init__(folder, database_url, provider)
        self.hold = folder / "hold"
        self.state = folder / "state"
        for made in (self.hold, self.state):
            made.mkdir()
        self.decoy = self.state / "decoy"
        self.decoy.write_text("state")
        self.configure()
        if login_url:
            # As an operator keeps it: with its password in a file of secrets_dir.
            text = self.settings.read_text().replace(f'url = "{database_url}"\n', "", 1)
            self.settings.write_text(text)
            (self.secrets / "database__url").write_text(login_url)
        make_plugin(
            self.plugins,
            dist="hostile-jobs",
            modules={"hostile_jobs": SOURCE.read_text(), "hostile_import": AT_IMPORT},
            entry_points={
                "hostile.victim": "hostile_jobs:victim",
                "hostile.attacks": "hostile_jobs:attacks",
                "hostile.import": "hostile_import:nothing",
            },
        )

    def prepare(self) -> None:
        """Migrate, and add two orgs with a definition each, in this process; then hand all over."""
        params = {"out": str(self.out)}
        with self.in_process():
            self.migrate()
            self.add_orgs(application("org_hostile"), application("org_victim"))
            self.apply(
                definition("org_hostile", "hostile-attacks", "hostile.attacks", params=params)
                + definition("org_victim", "hostile-victim", "hostile.victim", params=params),
                "--allow-unknown-handlers",
            )
        hand_over(self.folder)

    @property
    def keyring(self) -> Path:
        on_file = self.database_url.startswith("sqlite")
        return (self.state if on_file else self.secrets) / "keyring"

    cli = Site.process

    def command(self, *arguments: str) -> list[str]:
        python, *given = super().command(*arguments)
        # As the units and the image start it: what lies in the working folder is not imported.
        return [*as_unprivileged(self.hold), python, "-P", *given]

    def run_by_hand(self, org: str, handler: str) -> None:
        self.cli("definitions", "run", org, handler.replace(".", "-"))


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def installation(request: pytest.FixtureRequest, provider: Provider) -> Iterator[Installation]:
    """One for each database, with two orgs; both tests start a worker of their own in it."""
    require_landlock()
    # Not in tmp_path, which is closed to others where the tests run as root.
    folder = Path(tempfile.mkdtemp(prefix="orgworker-hostile-"))
    folder.chmod(0o755)
    try:
        with contextlib.ExitStack() as stack:
            url, login = f"sqlite:///{folder}/state/worker.db", ""
            if request.param == "postgresql":
                server: Server = request.getfixturevalue("postgres_server")
                url = stack.enter_context(server.new_database())
                login = server.url_with_password(url)
            site = stack.enter_context(opened(Installation(folder, url, provider, login)))
            site.prepare()
            yield site
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def attempted(site: Installation, sandbox: str) -> dict[str, str]:
    """What became of each attempt in a worker of this mode, and of the plug-in's import."""
    for name in ("victim.json", "targets.json"):
        (site.out / name).unlink(missing_ok=True)
    site.environment["WORKER_EXECUTION__SANDBOX"] = sandbox
    abstract = f"orgworker-hostile-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener, served(site) as serve:
        listener.bind(f"\0{abstract}")
        listener.listen()
        worker = site.start_worker()
        site.wait_for_handlers("hostile.victim", "hostile.attacks")
        site.run_by_hand("org_victim", "hostile.victim")
        wait_until((site.out / "victim.json").exists, "the victim's run")
        victim = json.loads((site.out / "victim.json").read_text())
        targets: dict[str, Any] = {
            "keyring": str(site.keyring),
            "secrets": str(site.secrets),
            "configuration": str(site.settings),
            "decoy": str(site.decoy),
            "here": str(site.folder),
            "plugins": str(site.plugins),
            "victim": victim["folder"],
            "abstract": abstract,
            "processes": {
                "the worker": worker.pid,
                "the zygote": site.zygote(worker).pid,
                "serve": serve.pid,
                "another run": victim["pid"],
                "another run's process": victim["process"],
            },
        }
        if site.database_url.startswith("sqlite"):
            targets["database"] = site.database_url.removeprefix("sqlite:///")
        (site.out / "targets.json").write_text(json.dumps(targets))
        site.run_by_hand("org_hostile", "hostile.attacks")
        run = newest_ended(site, "hostile-attacks")
        assert run["state"] == "succeeded", run
        imported = wait_until(
            lambda: site.query("SELECT error AS why FROM catalogue WHERE name = 'hostile.import'"),
            "the catalogue",
        )[0]["why"]
        assert site.stop_worker(worker) == 0
    what_was_read = "its import has read" in imported
    return run["result"] | {"read the key ring at import": "worked" if what_was_read else imported}


@contextlib.contextmanager
def served(site: Installation) -> Iterator[subprocess.Popen[bytes]]:
    port = free_port()
    command = site.command("--set", f"web.listen=127.0.0.1:{port}", "serve")
    with (site.folder / "serve.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=site.folder, env=site.process_environment(), stdout=log, stderr=log
        )
    try:
        wait_until(lambda: ready(port, process), "serve to be ready")
        yield process
    finally:
        process.kill()
        process.wait()


def ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "serve has ended; see serve.log"
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    return False


def newest_ended(site: Installation, name: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        run = site.runs(definition=name)[-1]
        return run if run["finished_at"] is not None else None

    run = wait_until(found, "the attacks to end", timeout=60)
    assert run is not None
    return run


def test_in_the_sandbox_every_attempt_fails(installation: Installation):
    result = attempted(installation, "require")

    assert {name: said for name, said in result.items() if said == "worked"} == {}
    # And each by a refusal, not by a mistake of the test.
    odd = {name: said for name, said in result.items() if not refused(said)}
    assert odd == {}
    assert installation.decoy.read_text() == "state"


def refused(said: str) -> bool:
    kinds = ("PermissionError: ", "CalledProcessError: ", "OperationalError: unable to open database file")
    # Links that would give a handler more rights than it has are refused by EXDEV.
    return said.startswith((*kinds, "OSError: [Errno 18]"))


def test_without_the_sandbox_they_work(installation: Installation):
    """The control: but for what another defence refuses, and then that is why."""
    installation.decoy.write_text("state")
    result = attempted(installation, "off")

    failed = {name for name, said in result.items() if said != "worked"}
    expected = set(DEFENDED) & set(result)
    assert failed == expected, {name: result[name] for name in failed ^ expected}
