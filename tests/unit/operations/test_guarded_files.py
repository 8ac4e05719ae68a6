"""Files with secrets: which ones handlers could open to others, and that a worker closes them again."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.clock import ManualClock
from worker.diagnosis.machine import changeable_files
from worker.features.hosts.access import token_of
from worker.process import guarded_files
from worker.process.guarded_files import ACCESS_LIST, FileWatch, changeable, guarded
from worker.settings import Settings, load
from worker.settings.sections import HostSettings
from worker.telemetry.events import Emitted
from worker.tokens.sealing import KeyRing


@pytest.fixture
def installed(tmp_path: Path) -> Settings:
    """An installation with a SQLite file, its key ring, settings and a folder of secrets."""
    state, secrets = tmp_path / "state", tmp_path / "secrets"
    for folder in (state, secrets):
        folder.mkdir(0o700)
    KeyRing.generate(state / "keyring")
    for file in (state / "worker.db", state / "worker.db-wal", secrets / "alerts__webhook_secret"):
        file.touch(0o600)
    settings = tmp_path / "worker.toml"
    settings.touch(0o600)
    settings.write_text(f'secrets_dir = "{secrets}"\n[database]\nurl = "sqlite:///{state}/worker.db"\n')
    (secrets / "alerts__webhook_secret").write_text("a secret of sixteen")
    return load(str(settings), environ={})


def names(paths: list[str]) -> list[str]:
    return [os.path.basename(path) for path in paths]


def of_another_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process be of an account that owns no file here, and is not root."""
    monkeypatch.setattr(guarded_files, "_capabilities", lambda: 0)
    monkeypatch.setattr(os, "getresuid", lambda: (os.getuid() + 1,) * 3)


# Which files


def test_key_ring_settings_and_secrets_are_guarded(installed: Settings):
    assert names(guarded(installed)) == ["worker.toml", "keyring", "alerts__webhook_secret"]


def test_the_keys_of_tls_and_the_token_of_a_host_are_guarded(tmp_path: Path):
    for name in ("host.token", "client.key"):
        (tmp_path / name).touch(0o600)
    (tmp_path / "host.toml").write_text(
        f'[host]\ncontrol = ["https://worker"]\ntoken_file = "{tmp_path}/host.token"\n'
        f'[temporal]\ntls = true\ncertificate = "{tmp_path}/client.pem"\nkey = "{tmp_path}/client.key"\n'
    )

    settings = load(str(tmp_path / "host.toml"), environ={}, of_host=True)

    assert names(guarded(settings)) == ["host.toml", "host.token", "client.key"]


def test_what_a_cluster_mounts_is_links_beside_folders(tmp_path: Path):
    """A Secret: each key is a link into a folder whose name has its version."""
    (tmp_path / "..2030").mkdir()
    (tmp_path / "..2030" / "keyring").touch(0o440)
    (tmp_path / "..data").symlink_to("..2030")
    (tmp_path / "keyring").symlink_to("..data/keyring")

    found = guarded(Settings(secrets_dir=str(tmp_path)))

    assert found == [str(tmp_path / "keyring")]


# What handlers could change


def test_a_file_of_the_account_can_be_opened(installed: Settings):
    assert names(changeable(guarded(installed))) == ["worker.toml", "keyring", "alerts__webhook_secret"]


def test_a_file_of_another_account_cannot(installed: Settings, monkeypatch: pytest.MonkeyPatch):
    of_another_account(monkeypatch)

    assert changeable(guarded(installed)) == []


def test_root_can_change_the_mode_of_every_file(installed: Settings, monkeypatch: pytest.MonkeyPatch):
    of_another_account(monkeypatch)
    monkeypatch.setattr(guarded_files, "_capabilities", lambda: 1 << 3)

    assert len(changeable(guarded(installed))) == 3


def test_a_public_file_behind_a_closed_folder_is_as_open_as_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "closed").mkdir(0o700)
    (tmp_path / "closed" / "worker.toml").touch()
    (tmp_path / "closed" / "worker.toml").chmod(0o644)
    monkeypatch.setattr(guarded_files, "_may_change", os.path.isdir)
    file = str(tmp_path / "closed" / "worker.toml")

    assert changeable([file]) == [str(tmp_path / "closed")]


IN_NAMESPACE = """\
mount --bind "$1" "$1"
if [ "$2" = ro ]; then mount -o remount,bind,ro "$1"; fi
shift 2
exec "$@"
"""


@pytest.mark.parametrize(("mount", "found"), [("rw", ["keyring"]), ("ro", [])])
def test_nobody_changes_modes_on_a_read_only_mount(tmp_path: Path, mount: str, found: list[str]):
    """Not even root; the control is the same mount, writable."""
    (tmp_path / "keyring").touch(0o600)
    code = "import sys; from worker.process.guarded_files import changeable; print(*changeable(sys.argv[1:]))"
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    command = [*namespace, "sh", "-euc", IN_NAMESPACE, "sh", str(tmp_path), mount]

    done = subprocess.run(
        [*command, sys.executable, "-c", code, str(tmp_path / "keyring")],
        capture_output=True,
        text=True,
        check=True,
    )

    assert names(done.stdout.split()) == found


def test_an_account_that_may_only_read_by_its_group_can_use_key_ring_and_token(installed: Settings):
    """As `chown root:orgworker` and `chmod 0640` leave them."""
    ring = installed.keyring_file
    ring.chmod(0o640)
    token = ring.with_name("token")
    token.write_text("orgworker_host_x")
    token.chmod(0o640)

    assert KeyRing.load(ring).path == ring
    assert token_of(HostSettings(token_file=str(token))) == "orgworker_host_x"


# doctor


def required(settings: Settings, mode: str) -> Settings:
    execution = settings.execution.model_copy(update={"sandbox": mode})
    changed = settings.model_copy(update={"execution": execution})
    vars(changed)["config_file"] = settings.config_file
    return changed


@pytest.mark.parametrize(("mode", "ok"), [("require", False), ("auto", True), ("off", True)])
def test_doctor_fails_only_where_the_sandbox_is_required(installed: Settings, mode: str, ok: bool):
    found = changeable_files(required(installed, mode))

    assert found.ok is ok
    assert f"could open {installed.config_file} to other accounts (chmod); and 2 more" in found.detail
    assert bool(found.fix) is not ok
    if not ok:
        assert "from the next release on, a worker or host exits with 78" in found.detail


def test_doctor_is_content_with_files_of_another_account(
    installed: Settings, monkeypatch: pytest.MonkeyPatch
):
    of_another_account(monkeypatch)

    assert changeable_files(required(installed, "require")).ok


# A worker's look


def mode(path: str | Path) -> str:
    return f"{os.stat(path).st_mode & 0o7777:04o}"


def opened(emitted: list[Emitted]) -> list[tuple[str, str, bool]]:
    return [
        (os.path.basename(event.fields["path"]), event.fields["mode"], event.fields["restored"])
        for event in emitted
        if event.event.name == "files.opened"
    ]


@pytest.mark.parametrize(
    "file",
    [
        "state/keyring",
        "state/worker.db",
        "state/worker.db-wal",
        "worker.toml",
        "state",
        "secrets/alerts__webhook_secret",
    ],
)
def test_a_mode_that_was_opened_is_restored_and_reported(
    installed: Settings, tmp_path: Path, clock: ManualClock, emitted: list[Emitted], file: str
):
    watch, path = FileWatch(installed, clock), tmp_path / file
    before = mode(path)
    path.chmod(0o755 if path.is_dir() else 0o644)

    watch.look()
    watch.look()

    assert mode(path) == before
    assert opened(emitted) == [(path.name, "0755" if path.is_dir() else "0644", True)]


def access_list(*, account: int) -> bytes:
    """Reading for one account more, and the mode 0640 as before: version, then tag, rights and id of each."""
    entries = ((0x01, 6, -1), (0x02, 4, account), (0x04, 4, -1), (0x10, 4, -1), (0x20, 0, -1))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)


def test_an_access_list_that_adds_an_account_is_removed(
    installed: Settings, clock: ManualClock, emitted: list[Emitted]
):
    """The mode shows nothing of it."""
    ring = installed.keyring_file
    ring.chmod(0o640)
    watch = FileWatch(installed, clock)
    os.setxattr(ring, ACCESS_LIST, access_list(account=65534))
    assert mode(ring) == "0640"

    watch.look()

    assert ACCESS_LIST not in os.listxattr(ring)
    assert mode(ring) == "0640"
    assert opened(emitted) == [("keyring", "0640", True)]


def test_an_access_list_that_was_there_at_first_is_kept(
    installed: Settings, clock: ManualClock, emitted: list[Emitted]
):
    ring = installed.keyring_file
    given = access_list(account=65534)
    os.setxattr(ring, ACCESS_LIST, given)
    watch = FileWatch(installed, clock)
    watch.look()
    assert opened(emitted) == []
    os.setxattr(ring, ACCESS_LIST, access_list(account=65533))
    watch.look()

    assert os.getxattr(ring, ACCESS_LIST) == given
    assert len(opened(emitted)) == 1


def test_of_a_folder_only_the_right_to_search_it_counts(
    installed: Settings, tmp_path: Path, clock: ManualClock, emitted: list[Emitted]
):
    watch = FileWatch(installed, clock)
    (tmp_path / "state").chmod(0o766)

    watch.look()

    assert mode(tmp_path / "state") == "0766"
    assert opened(emitted) == []


@pytest.mark.parametrize("given", [0o600, 0o400, 0o700])
def test_what_opens_nothing_is_left_alone(
    installed: Settings, clock: ManualClock, emitted: list[Emitted], given: int
):
    watch = FileWatch(installed, clock)
    installed.keyring_file.chmod(given)

    watch.look()

    assert mode(installed.keyring_file) == f"{given:04o}"
    assert opened(emitted) == []


def test_rights_that_group_and_others_had_at_first_are_no_attack(
    installed: Settings, clock: ManualClock, emitted: list[Emitted]
):
    installed.keyring_file.chmod(0o640)
    watch = FileWatch(installed, clock)
    for given in (0o600, 0o640):
        installed.keyring_file.chmod(given)
        watch.look()
        assert mode(installed.keyring_file) == f"{given:04o}"
    installed.keyring_file.chmod(0o644)
    watch.look()

    assert mode(installed.keyring_file) == "0640"
    assert opened(emitted) == [("keyring", "0644", True)]


def test_a_file_that_was_replaced_keeps_its_mode(
    installed: Settings, tmp_path: Path, clock: ManualClock, emitted: list[Emitted]
):
    watch = FileWatch(installed, clock)
    new = tmp_path / "new"
    new.write_bytes(Path(installed.config_file).read_bytes())
    new.chmod(0o644)
    new.rename(installed.config_file)

    watch.look()

    assert mode(installed.config_file) == "0644"
    assert opened(emitted) == []


def test_a_new_journal_has_the_mode_that_the_database_had_at_first(
    installed: Settings, tmp_path: Path, clock: ManualClock, emitted: list[Emitted]
):
    """SQLite gives a new one the mode of the database, which a handler has just opened."""
    watch = FileWatch(installed, clock)
    (tmp_path / "state" / "worker.db").chmod(0o644)
    journal = tmp_path / "state" / "worker.db-shm"
    journal.touch()
    journal.chmod(0o644)

    watch.look()

    assert mode(journal) == mode(tmp_path / "state" / "worker.db") == "0600"
    assert {name for name, _, _ in opened(emitted)} == {"worker.db", "worker.db-shm"}


def test_what_the_worker_cannot_undo_is_reported_once(
    installed: Settings, clock: ManualClock, emitted: list[Emitted], monkeypatch: pytest.MonkeyPatch
):
    """Another account owns the file, so no handler did this."""
    watch = FileWatch(installed, clock)
    installed.keyring_file.chmod(0o644)

    def denied(path: str, mode: int) -> None:
        raise PermissionError(path)

    monkeypatch.setattr("worker.process.guarded_files.os.chmod", denied)
    for _ in range(3):
        watch.look()

    assert opened(emitted) == [("keyring", "0644", False)]


@pytest.mark.parametrize(("mode", "times"), [("require", 2), ("auto", 0), ("off", 0)])
def test_what_handlers_could_open_is_reported_at_first_and_each_day(
    installed: Settings, clock: ManualClock, emitted: list[Emitted], mode: str, times: int
):
    watch = FileWatch(required(installed, mode), clock)
    for _ in range(2 * 60):
        watch.look()
        clock.advance(15 * 60)

    reported = [event for event in emitted if event.event.name == "files.changeable"]
    assert [event.fields for event in reported] == [{"path": installed.config_file, "files": 3}] * times
