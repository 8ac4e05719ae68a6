"""worker.toml, WORKER_* variables and files of `secrets_dir` -> one frozen Settings, checked once."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from worker.definitions.origins import unencrypted
from worker.errors import ConfigurationError
from worker.settings.sections import (
    AlertSettings,
    DatabaseSettings,
    ExecutionSettings,
    IssuerName,
    IssuerSettings,
    LogSettings,
    OperatorSettings,
    RetentionSettings,
    Section,
    TracingSettings,
    WebSettings,
)
from worker.telemetry.masking import masker, secrets_of_url

PREFIX = "WORKER_"
# Where worker.toml is looked for, the administrator's place first: in a worker's working directory
# a handler may have left one.
CONFIG_PLACES = ("/etc/orgworker/worker.toml", "worker.toml")
MOUNTED_SECRETS = "/run/secrets"

# URLs whose path may be all that keeps others out.
_SECRET_PATHS = ("webhook_url", "deadman_url", "endpoint")

Keys = tuple[str, ...]
# For each setting that is not at its default: its value and where it was said.
Said = dict[Keys, tuple[Any, str]]


class Settings(Section):
    """All settings; those of a section that is not written keep their defaults."""

    secrets_dir: str = ""
    database: DatabaseSettings = DatabaseSettings()
    issuers: dict[IssuerName, IssuerSettings] = Field(default_factory=dict)
    execution: ExecutionSettings = ExecutionSettings()
    web: WebSettings = WebSettings()
    alerts: AlertSettings = AlertSettings()
    tracing: TracingSettings = TracingSettings()
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()

    @cached_property
    def config_file(self) -> str:
        """The file that `load` has read, as it was named; "" where none was. It is no setting."""
        return ""

    @property
    def keyring_file(self) -> Path:
        """Where the key ring is, or would be made: in `secrets_dir`, on SQLite else beside the database.

        Raises:
            ConfigurationError: neither exists.
        """
        mounted = Path(self.secrets_dir, "keyring") if self.secrets_dir else None
        file = self.database.sqlite_file
        if mounted is not None and (file is None or mounted.exists()):
            return mounted
        if file is None:
            raise ConfigurationError(
                "no place for the key ring: secrets_dir is not set",
                fix="set secrets_dir in worker.toml, then run `python -m worker keys generate`",
            )
        return file.with_name("keyring")


def load(
    config_path: str | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings in force.

    `overrides` are dotted names with values as text, from the command line.

    Raises:
        ConfigurationError: a file that cannot be read, an unknown setting or a bad value, named.
    """
    settings = check(gather(config_path, overrides, environ))
    file = _config_of(config_path, os.environ if environ is None else environ)
    vars(settings)["config_file"] = file or ""
    return settings


def gather(
    config_path: str | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Said:
    """What flags, variables, secret files and worker.toml say, the first of these first; unchecked.

    Raises:
        ConfigurationError: as in `load`, for files.
    """
    environ = os.environ if environ is None else environ
    said = _from_file(_config_of(config_path, environ))
    variables = _from_variables(environ)
    flags = {tuple(name.split(".")): (value, f"--set {name}") for name, value in (overrides or {}).items()}
    named = [source[keys] for source in (flags, variables, said) if (keys := ("secrets_dir",)) in source]
    chosen = next((entry for entry in named if entry[0]), None) or _mounted_secrets(environ)
    if chosen is not None:
        flags[("secrets_dir",)] = chosen
    return said | _from_secrets(str(chosen[0]) if chosen else "") | variables | flags


def check(said: Said) -> Settings:
    """Settings from what was said.

    Raises:
        ConfigurationError: an unknown setting or a bad value, named with where it was said.
    """
    _register_secrets(said)
    tree: dict[str, Any] = {}
    for keys, (value, where) in said.items():
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise ConfigurationError(
                    f"{where}: {key} is a section, not a value",
                    fix="config/worker.toml explains every setting",
                )
        if value != {} or keys[-1] not in branch:
            branch[keys[-1]] = value
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(said, fault) for fault in error.errors(include_url=False, include_input=False)]
        raise ConfigurationError(
            "; ".join(faults), fix="config/worker.toml explains every setting with its unit and default"
        ) from None
    _refuse_unencrypted(settings, said)
    return settings


def _refuse_unencrypted(settings: Settings, said: Said) -> None:
    for name, issuer in settings.issuers.items():
        for origin in unencrypted(issuer.api_origins, settings.execution.insecure_origins):
            setting = ("issuers", name, "api_origins")
            where = f"{said[setting][1]}: " if setting in said else ""
            raise ConfigurationError(
                f"{where}{'.'.join(setting)}: {origin} would carry each org's token unencrypted",
                fix=f'write https://; to accept it, add "{origin}" to [execution] insecure_origins',
            )


def _register_secrets(said: Said) -> None:
    """Let the masker know what is secret in settings, before anything can go wrong with them.

    What the settings themselves show leaves secrets out already; this is for the words of libraries.
    """
    for keys, (value, _) in said.items():
        if not isinstance(value, str):
            continue
        if keys[-1].endswith("_secret"):
            masker.register(value)
        elif keys[-1] == "headers":
            for part in value.split(","):
                masker.register(part.partition("=")[2])
        elif keys[-1].endswith(("url", "endpoint")):
            for piece in secrets_of_url(value, path=keys[-1] in _SECRET_PATHS):
                masker.register(piece)


def _from_file(path: str | None) -> Said:
    if path is None:
        return {}
    try:
        with Path(path).open("rb") as file:
            return _flat(tomllib.load(file), path)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}", fix="name another with --config or WORKER_CONFIG"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no TOML: {error}", fix="correct it there") from None


def _config_of(named: str | None, environ: Mapping[str, str]) -> str | None:
    return named or environ.get(f"{PREFIX}CONFIG") or _found_config(CONFIG_PLACES)


def _found_config(places: Sequence[str]) -> str | None:
    there = [place for place in places if _is_there(place)]
    for ignored in there[1:]:
        if ignored not in _told and not Path(ignored).samefile(there[0]):
            _told.add(ignored)
            print(
                f"{Path(ignored).absolute()} is ignored, since {there[0]} exists; --config chooses another",
                file=sys.stderr,
            )
    return there[0] if there else None


# Files that were reported as ignored: once per process.
_told: set[str] = set()


def _is_there(place: str) -> bool:
    try:
        return Path(place).is_file()
    except PermissionError:
        # One that this user may not look at is not passed over for another: reading it fails, and says so.
        return True


def _flat(table: Mapping[str, Any], where: str, above: Keys = ()) -> Said:
    said: Said = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            said |= _flat(value, where, (*above, key))
        else:
            said[(*above, key)] = (value, where)
    return said


def _from_variables(environ: Mapping[str, str]) -> Said:
    # Only names with a section count: a container engine sets WORKER_PORT and the like by itself.
    return {
        tuple(name.removeprefix(PREFIX).lower().split("__")): (value, name)
        for name, value in environ.items()
        if name.startswith(PREFIX) and ("__" in name or name == f"{PREFIX}SECRETS_DIR")
    }


def _mounted_secrets(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """systemd's `LoadCredential` and container engines say by themselves where secrets are."""
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        return directory, "CREDENTIALS_DIRECTORY"
    return (MOUNTED_SECRETS, "its default") if Path(MOUNTED_SECRETS).is_dir() else None


def _from_secrets(directory: str) -> Said:
    """Files named `section__key`; the others there are not settings."""
    said: Said = {}
    try:
        files = sorted(Path(directory).iterdir()) if directory and Path(directory).is_dir() else []
        for file in files:
            keys = tuple(file.name.split("__"))
            if len(keys) > 1 and keys[0] in Settings.model_fields and file.is_file():
                said[keys] = (file.read_text(encoding="utf-8").rstrip("\r\n"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"a file of secrets_dir {directory} cannot be read: {error}",
            fix="let the worker's user read it, or take it out of there",
        ) from None
    return said


def _fault(said: Said, fault: Any) -> str:
    keys: Keys = tuple(key for key in fault["loc"] if isinstance(key, str) and key != "[key]")
    # What is missing was said nowhere: name the place that says the rest of its section.
    depth = len(keys) - (fault["type"] == "missing")
    said_here = (place for named, (_, place) in said.items() if named[:depth] == keys[: len(named)][:depth])
    where = next(said_here, "")
    name = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(keys[-1], _names_beside(keys), 1)
        text = f"unknown setting {name}" + (f"; did you mean {close[0]}?" if close else "")
    else:
        text = f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{where}: {text}" if where else text


def _names_beside(keys: Keys) -> list[str]:
    if len(keys) == 1:
        return list(Settings.model_fields)
    if keys[:2] == ("web", "operators"):
        return list(OperatorSettings.model_fields)
    section = IssuerSettings if keys[0] == "issuers" else Settings.model_fields[keys[0]].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
