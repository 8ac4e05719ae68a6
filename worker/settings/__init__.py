"""Settings from flags, WORKER_* variables, files in `secrets_dir` and worker.toml, validated once."""

from __future__ import annotations

import difflib
import os
import sys
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import Field, ValidationError

from worker.errors import ConfigurationError
from worker.model.definitions.origins import is_listed, unencrypted
from worker.settings.sections import (
    AlertSettings,
    AttemptsSettings,
    BatchSettings,
    DatabaseSettings,
    ExecutionSettings,
    HostSettings,
    InstallationWord,
    IssuerName,
    IssuerSettings,
    LogSettings,
    PoolName,
    PoolSettings,
    PriceSettings,
    ProvisioningSettings,
    RelaySettings,
    RetentionSettings,
    Section,
    TelemetrySettings,
    TemporalSettings,
    TokenSettings,
    TracingSettings,
    WebSettings,
)
from worker.telemetry.masking import masker, secrets_of_url

PREFIX = "WORKER_"
# Searched for worker.toml in this order: a handler could have written one to the working directory.
CONFIG_PLACES = ("/etc/orgworker/worker.toml", "worker.toml")
MOUNTED_SECRETS = "/run/secrets"

# The sections that a host has besides `[web] health_listen`, and what its workers decide for it.
HOST_SECTIONS = ("host", "execution", "log", "tracing", "telemetry", "temporal")
NOT_OF_HOSTS = ("pools", "lease", "renew", "poll", "private_origins", "insecure_origins", "egress")
TOLD_TO_HOSTS = ("namespace", "place_timeout")

# Variables of settings that are in no section.
_WITHOUT_SECTION = (f"{PREFIX}SECRETS_DIR", f"{PREFIX}INSTALLATION")

# The table whose keys are names of variables.
_OF_VARIABLES = ("execution", "bind_environment")

# URLs whose path may be a secret.
_SECRET_PATHS = ("webhook_url", "deadman_url", "endpoint")

Keys = tuple[str, ...]
# By key, for settings that are not at their default: value and source.
Sourced = dict[Keys, tuple[Any, str]]


class Settings(Section):
    """All settings."""

    secrets_dir: str = ""
    installation: InstallationWord = ""
    database: DatabaseSettings = DatabaseSettings()
    issuers: dict[IssuerName, IssuerSettings] = Field(default_factory=dict)
    tokens: TokenSettings = TokenSettings()
    execution: ExecutionSettings = ExecutionSettings()
    pools: dict[PoolName, PoolSettings] = Field(default_factory=dict)
    temporal: TemporalSettings = TemporalSettings()
    web: WebSettings = WebSettings()
    attempts: AttemptsSettings = AttemptsSettings()
    alerts: AlertSettings = AlertSettings()
    prices: PriceSettings = PriceSettings()
    tracing: TracingSettings = TracingSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    provisioning: ProvisioningSettings = ProvisioningSettings()
    batches: dict[IssuerName, BatchSettings] = Field(default_factory=dict)
    retention: RetentionSettings = RetentionSettings()
    log: LogSettings = LogSettings()
    host: HostSettings = HostSettings()
    relay: RelaySettings = RelaySettings()

    @cached_property
    def config_file(self) -> str:
        """The file that `load` has read, as it was named, or "". Not a setting."""
        return ""

    @property
    def api_origins(self) -> dict[str, tuple[str, ...]]:
        """The `api_origins` of each issuer."""
        return {name: issuer.api_origins for name, issuer in self.issuers.items()}

    @property
    def pool_rules(self) -> dict[str, dict[str, Any]]:
        """What each pool requires, of those that require something."""
        return {name: pool.requires for name, pool in self.pools.items() if pool.requires}

    @property
    def placed_by_temporal(self) -> tuple[str, ...]:
        """The pools whose runs Temporal places on hosts."""
        return tuple(name for name, pool in self.pools.items() if pool.placer == "temporal")

    @property
    def keyring_file(self) -> Path:
        """The path of the key ring: in `secrets_dir`, or by default beside the SQLite database.

        Raises ConfigurationError if `secrets_dir` is not set and the database is PostgreSQL.
        """
        mounted = Path(self.secrets_dir, "keyring") if self.secrets_dir else None
        file = self.database.sqlite_file
        if mounted is not None and (file is None or mounted.exists()):
            return mounted
        if file is None:
            raise ConfigurationError(
                "there is no place for the key ring: secrets_dir is not set",
                fix="set secrets_dir in worker.toml, then run `python -m worker keys generate`",
            )
        return file.with_name("keyring")


def load(
    config_path: str | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    of_host: bool = False,
) -> Settings:
    """The effective settings; `overrides` are dotted names and texts from the command line.

    Those `of_host` have a sandbox unless it is turned off.

    Raises ConfigurationError for an unreadable file, an unknown setting or an invalid value, and for what a
    host must not have: above all a database, an issuer or a key ring.
    """
    values = gather(config_path, overrides, environ)
    settings = _check_host(values) if of_host else check(values)
    file = _config_of(config_path, os.environ if environ is None else environ)
    vars(settings)["config_file"] = file or ""
    return settings


def _check_host(values: Sourced) -> Settings:
    for keys, (_, where) in values.items():
        if not _is_of_host(keys):
            raise ConfigurationError(
                f"{where}: a host does not take {'.'.join(keys)}",
                fix="remove it; a host has [host], [execution], [log], [tracing], [telemetry], "
                "[temporal] and [web] health_listen, and learns everything else from the workers in "
                "[host] control",
            )
    settings = check(values)
    host = settings.host
    for name in ("control", "token_file"):
        if not getattr(host, name):
            raise ConfigurationError(
                f"host.{name} is not set", fix="see config/host.toml, an example with every setting of a host"
            )
    if settings.secrets_dir and _exists(ring := str(Path(settings.secrets_dir, "keyring"))):
        raise ConfigurationError(
            f"secrets_dir: a host must not have a key ring, and there is {ring}",
            fix="remove the file; only workers open what is sealed with it",
        )
    if ("execution", "sandbox") not in values:
        execution = settings.execution.model_copy(update={"sandbox": "require"})
        settings = settings.model_copy(update={"execution": execution})
    return settings


def _is_of_host(keys: Keys) -> bool:
    if keys[0] == "execution" and keys[1:2] and keys[1] in NOT_OF_HOSTS:
        return False
    if keys[0] == "temporal" and keys[-1] in TOLD_TO_HOSTS:
        return False
    return keys[0] in HOST_SECTIONS or keys in (("web", "health_listen"), ("secrets_dir",))


def gather(
    config_path: str | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Sourced:
    """Values by precedence: flags, variables, secret files, worker.toml; not validated.

    Raises ConfigurationError if a file cannot be read.
    """
    environ = os.environ if environ is None else environ
    values = _from_file(_config_of(config_path, environ))
    variables = _from_variables(environ)
    flags = {tuple(name.split(".")): (value, f"--set {name}") for name, value in (overrides or {}).items()}
    named = [source[keys] for source in (flags, variables, values) if (keys := ("secrets_dir",)) in source]
    chosen = next((entry for entry in named if entry[0]), None) or _mounted_secrets(environ)
    if chosen is not None:
        flags[("secrets_dir",)] = chosen
    return values | _from_secrets(str(chosen[0]) if chosen else "") | variables | flags


def check(values: Sourced) -> Settings:
    """Validate the values; raises ConfigurationError with the source of an unknown or invalid setting."""
    _register_secrets(values)
    tree: dict[str, Any] = {}
    for keys, (value, where) in values.items():
        branch = tree
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
            if not isinstance(branch, dict):
                raise ConfigurationError(
                    f"{where}: {key} is a section, not a value",
                    fix=f"write it as {key}.NAME; config/worker.toml explains every setting",
                )
        if value != {} or keys[-1] not in branch:
            branch[keys[-1]] = value
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        faults = [_fault(values, fault) for fault in error.errors(include_url=False, include_input=False)]
        raise ConfigurationError(
            "; ".join(faults), fix="config/worker.toml explains every setting with its unit and default"
        ) from None
    login = settings.web.login
    if login.issuer and login.issuer not in settings.issuers:
        raise ConfigurationError(
            f"web.login.issuer: there is no issuer {login.issuer!r}; worker.toml has "
            f"{', '.join(sorted(settings.issuers)) or 'none'}",
            fix=f"add a table [issuers.{login.issuer}] to worker.toml, or correct the name",
        )
    if login.issuer and login.claims_from == "access_token" and not settings.issuers[login.issuer].audience:
        raise ConfigurationError(
            'web.login.claims_from = "access_token" needs an audience to verify that token for',
            fix=f"set audience in [issuers.{login.issuer}]",
        )
    _check_placers(settings)

    def written(*setting: str) -> str:
        return (f"{values[setting][1]}: " if setting in values else "") + ".".join(setting)

    for name, issuer in settings.issuers.items():
        for origin in unencrypted(issuer.api_origins, settings.execution.insecure_origins):
            named = written("issuers", name, "api_origins")
            raise ConfigurationError(
                f"{named}: {origin} would carry each org's token unencrypted",
                fix=f'write https://; to accept it, add "{origin}" to [execution] insecure_origins',
            )
        if issuer.api_base_url and not is_listed(issuer.api_base_url, issuer.api_origins):
            named = written("issuers", name, "api_base_url")
            raise ConfigurationError(
                f"{named}: its origin is not in api_origins, so no token would go there",
                fix=f"add its origin to api_origins of [issuers.{name}], or correct it",
            )
    return settings


def _check_placers(settings: Settings) -> None:
    for name in settings.placed_by_temporal:
        if not settings.temporal.address:
            raise ConfigurationError(
                f'pools.{name}.placer = "temporal", and temporal.address is not set',
                fix="set address in [temporal], such as 127.0.0.1:7233, or placer to pull",
            )
        if name in settings.execution.pools:
            raise ConfigurationError(
                f"execution.pools names {name}, whose runs Temporal places on hosts",
                fix=f'remove {name} from [execution] pools, or set placer = "pull" in [pools.{name}]',
            )


def _register_secrets(values: Sourced) -> None:
    """Register the secrets in settings with the masker first: messages of libraries may contain them."""
    for keys, (value, _) in values.items():
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


def _from_file(path: str | None) -> Sourced:
    if path is None:
        return {}
    try:
        with Path(path).open("rb") as file:
            return _flat(tomllib.load(file), path)
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be read: {error.strerror}", fix="name another file with --config or WORKER_CONFIG"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}", fix="correct the file there") from None


def _config_of(named: str | None, environ: Mapping[str, str]) -> str | None:
    if chosen := named or environ.get(f"{PREFIX}CONFIG"):
        return chosen
    found = [place for place in CONFIG_PLACES if _exists(place)]
    for ignored in found[1:]:
        if ignored not in _reported and not Path(ignored).samefile(found[0]):
            _reported.add(ignored)
            print(
                f"{Path(ignored).absolute()} is ignored because {found[0]} exists; --config chooses another",
                file=sys.stderr,
            )
    return found[0] if found else None


# Ignored files are reported once per process.
_reported: set[str] = set()


def _exists(place: str) -> bool:
    try:
        return Path(place).is_file()
    except PermissionError:
        return True  # not skipped: reading it reports the error


def _flat(table: Mapping[str, Any], where: str, above: Keys = ()) -> Sourced:
    values: Sourced = {}
    for key, value in table.items():
        if isinstance(value, dict) and value:
            values |= _flat(value, where, (*above, key))
        else:
            values[(*above, key)] = (value, where)
    return values


def _from_variables(environ: Mapping[str, str]) -> Sourced:
    # Names with a section, and two others: container engines set variables such as WORKER_PORT.
    return {
        _keys(name.removeprefix(PREFIX)): (value, name)
        for name, value in environ.items()
        if name.startswith(PREFIX) and ("__" in name or name in _WITHOUT_SECTION)
    }


def _keys(name: str) -> Keys:
    """The keys that a variable names: in lower case, but for the name of another variable."""
    named = tuple(name.split("__"))
    keys = tuple(key.lower() for key in named)
    return (*keys[:2], *named[2:3], *keys[3:]) if keys[:2] == _OF_VARIABLES else keys


def _mounted_secrets(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The secrets of systemd's `LoadCredential` or of a container engine."""
    if directory := environ.get("CREDENTIALS_DIRECTORY"):
        return directory, "CREDENTIALS_DIRECTORY"
    return (MOUNTED_SECRETS, "its default") if Path(MOUNTED_SECRETS).is_dir() else None


def _from_secrets(directory: str) -> Sourced:
    """Files named `section__key`; other files are ignored."""
    values: Sourced = {}
    try:
        files = sorted(Path(directory).iterdir()) if directory and Path(directory).is_dir() else []
        for file in files:
            keys = tuple(file.name.split("__"))
            if len(keys) > 1 and keys[0] in Settings.model_fields and file.is_file():
                values[keys] = (file.read_text(encoding="utf-8").rstrip("\r\n"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"a file of secrets_dir {directory} cannot be read: {error}",
            fix="let the worker's user read it, or remove it",
        ) from None
    return values


def _fault(values: Sourced, fault: Any) -> str:
    keys: Keys = tuple(key for key in fault["loc"] if isinstance(key, str) and key != "[key]")
    # A missing setting has no source: name that of its section.
    depth = len(keys) - (fault["type"] == "missing")
    sources = (source for named, (_, source) in values.items() if named[:depth] == keys[: len(named)][:depth])
    source = next(sources, "")
    name = ".".join(keys)
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(keys[-1], _names_beside(keys), 1)
        text = f"unknown setting {name}" + (f"; did you mean {close[0]}?" if close else "")
    else:
        text = f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    return f"{source}: {text}" if source else text


def _names_beside(keys: Keys) -> list[str]:
    """The settings of the section that is named by all keys but the last."""
    kind: Any = Settings
    for key in keys[:-1]:
        of_table = get_args(kind)[1:2]
        kind = of_table[0] if of_table else kind.model_fields[key].annotation
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
    return list(kind.model_fields)
