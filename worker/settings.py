"""worker.toml, WORKER_* variables and files of `secrets_dir` -> one frozen Settings, checked once."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from worker.definitions.units import parse_duration
from worker.errors import ConfigurationError

PREFIX = "WORKER_"
CONFIG_PLACES = ("worker.toml", "/etc/orgworker/worker.toml")
MOUNTED_SECRETS = "/run/secrets"

Keys = tuple[str, ...]
# For each setting that is not at its default: its value and where it was said.
Said = dict[Keys, tuple[Any, str]]


def _duration(value: Any) -> Any:
    return value if isinstance(value, timedelta) else parse_duration(value)


def _listed(value: Any) -> Any:
    """A variable or secret file holds a JSON array, or texts parted by commas."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return json.loads(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def _origins(value: Any) -> Any:
    origins = _listed(value)
    for origin in origins if isinstance(origins, list) else ():
        if re.fullmatch(r"https?://[^\s/?#@]+", str(origin)) is None:
            raise ValueError(f"{origin!r} is no origin; write scheme, host and port: https://api.acme.com")
    return origins


Duration = Annotated[timedelta, BeforeValidator(_duration)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Origins = Annotated[tuple[str, ...], BeforeValidator(_origins)]
IssuerName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class DatabaseSettings(_Section):
    """`[database]`; the URLs may hold a password and so stay out of the repr."""

    url: str = Field("sqlite:///var/worker.db", repr=False)
    owner_url: str = Field("", repr=False)

    @property
    def sqlite_file(self) -> Path | None:
        """The SQLite file that `url` names, relative to the working directory; None on PostgreSQL."""
        named = re.fullmatch(r"sqlite(?:\+\w+)?:///([^?]+)(?:\?.*)?", self.url)
        return Path(named[1]) if named else None


class IssuerSettings(_Section):
    """`[issuers.NAME]`: an identity provider, as the operator configured it."""

    profile: str = "kinde"
    url: str
    audience: str = ""
    api_origins: Origins = ()
    max_requests_per_second: float = Field(10.0, gt=0, le=10_000)
    token_endpoint: str = ""
    keys_url: str = ""


class ExecutionSettings(_Section):
    """`[execution]`: how many runs at once, and how long a silent worker keeps them."""

    max_children: int = Field(50, ge=0, le=10_000)
    max_inline: int = Field(1000, ge=0, le=1_000_000)
    inline: Texts = ()
    preload: Texts = ()
    pass_environment: Texts = ()
    lease: Duration = Field(timedelta(seconds=30), ge=timedelta(seconds=1))
    renew: Duration = Field(timedelta(seconds=5), ge=timedelta(milliseconds=50))
    poll: Duration = Field(timedelta(seconds=1), ge=timedelta(milliseconds=10), le=timedelta(minutes=1))
    drain: Duration = timedelta(seconds=60)
    max_freeze: Duration = timedelta(minutes=10)

    @model_validator(mode="after")
    def _renew_often_enough(self) -> ExecutionSettings:
        if self.renew * 4 > self.lease:
            raise ValueError(
                f"renew is {self.renew.total_seconds():g}s, more than a quarter of the lease of "
                f"{self.lease.total_seconds():g}s"
            )
        return self


class WebSettings(_Section):
    """`[web]`: where health, metrics, API and dashboard are served; an empty text turns it off."""

    listen: str = "127.0.0.1:8470"


class RetentionSettings(_Section):
    """`[retention]`: how long finished runs, skips and logs are kept."""

    succeeded: Duration = timedelta(days=30)
    failed: Duration = timedelta(days=90)
    skipped: Duration = timedelta(days=7)
    logs: Duration = timedelta(days=14)


class LogSettings(_Section):
    """`[log]`: the worker's own log on stderr; without a style it is console on a terminal, else json."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    style: Literal["", "console", "json"] = ""


class Settings(_Section):
    """All settings; those of a section that is not written keep their defaults."""

    secrets_dir: str = ""
    database: DatabaseSettings = DatabaseSettings()
    issuers: dict[IssuerName, IssuerSettings] = Field(default_factory=dict)
    execution: ExecutionSettings = ExecutionSettings()
    web: WebSettings = WebSettings()
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()

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
    return check(gather(config_path, overrides, environ))


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
    said = _from_file(config_path or environ.get(f"{PREFIX}CONFIG") or _found_config())
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
    tree: dict[str, Any] = {}
    for keys, (value, where) in said.items():
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise ConfigurationError(f"{where}: {key} is a section, not a value")
        if value != {} or keys[-1] not in branch:
            branch[keys[-1]] = value
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(said, fault) for fault in error.errors(include_url=False, include_input=False)]
        raise ConfigurationError(
            "; ".join(faults), fix="config/worker.toml explains every setting with its unit and default"
        ) from None


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
        raise ConfigurationError(f"{path} is no TOML: {error}") from None


def _found_config() -> str | None:
    return next((place for place in CONFIG_PLACES if Path(place).is_file()), None)


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
        raise ConfigurationError(f"a file of secrets_dir {directory} cannot be read: {error}") from None
    return said


def _fault(said: Said, fault: Any) -> str:
    keys: Keys = tuple(key for key in fault["loc"] if isinstance(key, str) and key != "[key]")
    # What is missing was said nowhere: name the place that says the rest of its section.
    depth = len(keys) - (fault["type"] == "missing")
    where = next((place for named, (_, place) in said.items() if named[:depth] == keys[:depth]), "")
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
    section = IssuerSettings if keys[0] == "issuers" else Settings.model_fields[keys[0]].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
