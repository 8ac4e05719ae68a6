"""The rules of the sandbox: no path that handlers may use leads to a secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from worker.engine.runners.child import landlock, sandbox
from worker.engine.runners.child.messages import Setup
from worker.engine.runners.child.sandbox import MAX_PARTS, Planner, SandboxRules, SecretPath
from worker.errors import ConfigurationError
from worker.process.confinement import confinement_of
from worker.settings import Settings
from worker.settings.sections import DatabaseSettings, ExecutionSettings


def planned(
    secrets: list[SecretPath], *, read: tuple[str, ...] = (), write: tuple[str, ...] = ()
) -> SandboxRules:
    return Planner(secrets).rules(read, write)


def allowed(rules: SandboxRules, path: Path) -> bool:
    """Whether the rules reach the path, as the kernel would see it."""
    roots = (*rules.execute, *rules.read, *rules.write)
    return any(str(path) == root or str(path).startswith(f"{root}/") for root in roots)


def test_the_interpreter_and_all_it_imports_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plugin, editable = tmp_path / "plugin", tmp_path / "editable"
    record = plugin / "acme-1.0.dist-info" / "direct_url.json"
    record.parent.mkdir(parents=True)
    editable.mkdir()
    record.write_text(f'{{"dir_info": {{"editable": true}}, "url": "file://{editable}"}}')
    monkeypatch.syspath_prepend(str(plugin))

    rules = planned([])

    for path in (sys.prefix, sys.base_prefix, os.__file__, pytest.__file__, "/usr/bin/env", plugin, editable):
        assert allowed(rules, Path(path).resolve()), path
    assert rules.write == ()


def test_nothing_else_may_be_read(tmp_path: Path):
    rules = planned([])

    for path in ("/proc/1/environ", "/proc/1/status", "/etc/shadow", "/etc/orgworker/worker.toml", "/root/x"):
        assert not allowed(rules, Path(path)), path
    assert not allowed(rules, tmp_path)


def test_a_root_with_a_secret_is_allowed_in_its_other_parts(tmp_path: Path):
    for name in ("data/a", "data/state/keyring", "data/state/backup", "data/state/notes"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "data" / "state" / "keyring")
    keyring = SecretPath(str(tmp_path / "data/state/keyring"), "the key ring")
    planner = Planner([keyring])

    rules = planner.rules([str(tmp_path / "data")], [])

    assert allowed(rules, tmp_path / "data/a")
    assert allowed(rules, tmp_path / "data/state/notes")
    assert not allowed(rules, tmp_path / "data/state/keyring")
    assert not allowed(rules, tmp_path / "data/link")
    assert [(found.root, found.secret, found.left_out) for found in planner.narrowed] == [
        (str(tmp_path / "data"), keyring, False)
    ]


@pytest.mark.parametrize("root", ["secrets", "secrets/deeper"])
def test_a_root_that_is_a_secret_or_lies_in_one_is_left_out(tmp_path: Path, root: str):
    (tmp_path / "secrets" / "deeper").mkdir(parents=True)
    planner = Planner([SecretPath(str(tmp_path / "secrets"), "secrets_dir")])

    rules = planner.rules([str(tmp_path / root)], [])

    assert not allowed(rules, tmp_path / root)
    assert [found.left_out for found in planner.narrowed] == [True]


def test_a_link_does_not_hide_that_a_root_leads_to_a_secret(tmp_path: Path):
    (tmp_path / "secrets").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "secrets")
    planner = Planner([SecretPath(str(tmp_path / "secrets"), "secrets_dir")])

    rules = planner.rules([str(tmp_path / "link")], [])

    assert not allowed(rules, tmp_path / "secrets")
    assert planner.narrowed


def test_a_root_of_too_many_parts_is_left_out(tmp_path: Path):
    for number in range(MAX_PARTS + 1):
        (tmp_path / f"part{number}").touch()
    planner = Planner([SecretPath(str(tmp_path / "keyring"), "the key ring")])

    rules = planner.rules([str(tmp_path)], [])

    assert not allowed(rules, tmp_path / "part0")
    assert planner.narrowed[0].left_out


def test_what_is_called_like_the_database_is_kept_with_it(tmp_path: Path):
    for name in ("worker.db", "worker.db-wal", "worker.db.lock", "other"):
        (tmp_path / name).touch()

    rules = planned(
        [SecretPath(str(tmp_path / "worker.db"), "the database", stem=True)], read=(str(tmp_path),)
    )

    assert [name for name in sorted(os.listdir(tmp_path)) if allowed(rules, tmp_path / name)] == ["other"]


def test_no_handler_may_write_where_the_worker_imports_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "code" / "data").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "code"))

    rules = planned([], write=(str(tmp_path), str(tmp_path / "code"), str(tmp_path / "code" / "data")))

    # A folder in it is the operator's own choice; by itself nothing there is imported.
    assert rules.write == (str(tmp_path / "beside"), str(tmp_path / "code" / "data"))


def test_a_path_that_a_handler_could_replace_is_not_opened_again(tmp_path: Path):
    (tmp_path / "file").touch()

    rules = planned([], read=(str(tmp_path / "file"),), write=(str(tmp_path),))

    assert str(tmp_path / "file") not in rules.execute


def settings(tmp_path: Path, **execution: object) -> Settings:
    return Settings(
        database=DatabaseSettings(url=f"sqlite:///{tmp_path}/state/worker.db"),
        execution=ExecutionSettings.model_validate(execution),
    )


@pytest.mark.parametrize("version", range(landlock.SCOPES))
def test_a_kernel_without_all_of_it_is_refused_where_it_is_required(tmp_path: Path, version: int):
    with pytest.raises(ConfigurationError, match="Landlock") as refused:
        confinement_of(settings(tmp_path, sandbox="require"), version=version)

    assert refused.value.exit_code == 78
    assert confinement_of(settings(tmp_path, sandbox="require"), version=landlock.SCOPES).rules is not None


def test_auto_takes_what_there_is_and_says_what_is_missing(tmp_path: Path, emitted: list):
    none, files = (confinement_of(settings(tmp_path), version=version) for version in (0, 4))
    full = confinement_of(settings(tmp_path), version=7)

    assert none.rules is None
    assert files.rules == full.rules is not None
    assert none.level == "none: the kernel has no Landlock, or it is turned off or filtered"
    assert files.level == (
        "partial: Landlock 4 and seccomp, which does not confine ioctl on devices, "
        "signals and abstract sockets"
    )
    assert full.level == "full: Landlock 7 and seccomp"
    for confinement in (none, files, full):
        confinement.warn()
    assert [event.fields["sandbox"] for event in emitted] == [none.level, files.level]


def test_a_run_can_be_sealed_with_all_of_the_sandbox_only(tmp_path: Path):
    none, files = (
        confinement_of(settings(tmp_path), version=version) for version in (0, landlock.SCOPES - 1)
    )
    full, off = (
        confinement_of(settings(tmp_path, sandbox=sandbox), version=landlock.SCOPES)
        for sandbox in ("auto", "off")
    )

    assert (full.seals, full.unsealed) == (True, None)
    for confinement in (none, files, off):
        assert (confinement.seals, confinement.unsealed) == (False, confinement.level)


@pytest.mark.parametrize(("version", "sandbox"), [(0, "auto"), (landlock.SCOPES - 1, "auto"), (7, "off")])
def test_sealed_runs_that_are_required_must_be_possible(tmp_path: Path, version: int, sandbox: str):
    with pytest.raises(ConfigurationError, match=r'network = "require": no run can be sealed: ') as refused:
        confinement_of(settings(tmp_path, network="require", sandbox=sandbox), version=version)

    assert refused.value.exit_code == 78
    assert "set network to auto" in refused.value.fix
    # The controls: a kernel that can, and a network that may be open.
    assert confinement_of(settings(tmp_path, network="require"), version=landlock.SCOPES).seals
    assert not confinement_of(settings(tmp_path, sandbox=sandbox), version=version).seals


def test_off_confines_nothing(tmp_path: Path):
    confinement = confinement_of(settings(tmp_path, sandbox="off"), version=7)

    assert confinement.rules is None
    assert confinement.level == 'off: [execution] sandbox = "off"'


@pytest.mark.parametrize("secret", ["state/worker.db", "state/keyring", "etc/worker.toml", "secrets/x"])
@pytest.mark.parametrize("setting", ["read_paths", "write_paths"])
def test_a_path_with_a_secret_is_refused_where_the_sandbox_is_required(
    tmp_path: Path, secret: str, setting: str, monkeypatch: pytest.MonkeyPatch, emitted: list
):
    for name in ("state/worker.db", "state/keyring", "etc/worker.toml", "secrets/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("WORKER_CONFIG", str(tmp_path / "etc/worker.toml"))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "secrets"))
    root = str((tmp_path / secret).parent)

    with pytest.raises(ConfigurationError, match=root):
        confinement_of(settings(tmp_path, sandbox="require", **{setting: [root]}), version=7)
    confinement = confinement_of(settings(tmp_path, **{setting: [root]}), version=7)

    assert confinement.rules is not None
    assert not allowed(confinement.rules, tmp_path / secret)
    confinement.warn()
    assert [(event.event.name, event.fields["path"]) for event in emitted] == [("sandbox.narrowed", root)]


@pytest.mark.parametrize("root", ["/", "/proc", "/proc/self"])
def test_never_all_of_proc(tmp_path: Path, root: str):
    confinement = confinement_of(settings(tmp_path, read_paths=[root]), version=7)

    assert confinement.rules is not None
    assert not allowed(confinement.rules, Path("/proc/1"))
    assert not allowed(confinement.rules, Path(f"/proc/{os.getpid()}"))
    assert [found.secret.name for found in confinement.narrowed] == ["all of /proc"]


def test_rules_reach_the_zygote_as_they_are():
    rules = SandboxRules(execute=("/usr",), read=("/etc/hosts",), write=("/srv/out",))

    assert Setup.from_json(Setup(folder="x", sandbox=rules).as_json()).sandbox == rules
    assert Setup.from_json(Setup(folder="x").as_json()).sandbox is None


def test_older_interfaces_are_asked_for_what_they_know():
    assert landlock.handled(1) < landlock.handled(2) < landlock.handled(3) < landlock.handled(5)
    assert landlock.handled(3) == landlock.handled(4)
    assert landlock.handled(5) == landlock.handled(7)
    assert sandbox.level(1).startswith(
        "partial: Landlock 1 and seccomp, which does not confine truncating files"
    )
