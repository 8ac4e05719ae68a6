"""The sandbox of handlers, as `[execution]` configures it and this kernel supports it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from worker.engine.attempt.plan import NetworkPolicy
from worker.engine.runners.child import landlock, seccomp
from worker.engine.runners.child.sandbox import Narrowed, Planner, SandboxRules, SecretPath, level
from worker.errors import ConfigurationError
from worker.handlers.catalogue import DESCRIBE
from worker.handlers.installed import FOLDERS
from worker.settings import CONFIG_PLACES, MOUNTED_SECRETS, Settings
from worker.telemetry.events import emit

OFF = 'off: [execution] sandbox = "off"'
_CONFINED = (sys.executable, "-P", "-m", "worker.engine.runners.child.sandbox")


@dataclass(frozen=True, slots=True)
class Confinement:
    """How handlers are confined: not at all without `rules`. `level` describes it."""

    level: str
    version: int
    rules: SandboxRules | None = None
    narrowed: tuple[Narrowed, ...] = ()

    @property
    def seals(self) -> bool:
        """Whether a run can be sealed: without all of the sandbox it could read the key ring."""
        return self.rules is not None and self.rules.filtered and self.version >= landlock.SCOPES

    @property
    def unsealed(self) -> str | None:
        """Why no run can be sealed; None if one can."""
        return None if self.seals else self.level

    @property
    def describe(self) -> tuple[str, ...]:
        """The command that describes handlers for the catalogue."""
        return DESCRIBE if self.rules is None else (*_CONFINED, self.rules.as_json())

    def warn(self) -> None:
        """Emit what is missing, and what was left out."""
        if self.rules is None or self.version < landlock.SCOPES or not self.rules.filtered:
            emit("sandbox.incomplete", sandbox=self.level)
        for narrowed in self.narrowed:
            emit("sandbox.narrowed", path=narrowed.root, error=in_words(narrowed))


def confinement_of(settings: Settings, *, version: int | None = None) -> Confinement:
    """How handlers are confined; `version` is that of the kernel's Landlock interface.

    Raises:
        ConfigurationError: the sandbox is required, and the kernel does not support all of it
            or a path that handlers can use contains a secret; or sealed runs are required, and
            no run can be sealed.
    """
    confinement = _confinement_of(settings, version)
    if settings.execution.network == "require" and confinement.unsealed is not None:
        raise ConfigurationError(
            f'[execution] network = "require": no run can be sealed: {confinement.unsealed}',
            fix="use Linux 6.12 or newer with Landlock and seccomp turned on and sandbox not off, or set "
            "network to auto",
        )
    return confinement


def _confinement_of(settings: Settings, version: int | None) -> Confinement:
    execution = settings.execution
    if execution.sandbox == "off":
        return Confinement(OFF, 0)
    version = landlock.abi() if version is None else version
    unfiltered = seccomp.lacking()
    described = level(version, unfiltered)
    required = execution.sandbox == "require"
    # Where this release has no filter for the architecture, handlers can be required to have the rest.
    incomplete = version < landlock.SCOPES or (unfiltered is not None and seccomp.known())
    if required and incomplete:
        raise ConfigurationError(
            f'[execution] sandbox = "require": {described}',
            fix="use Linux 6.12 or newer with Landlock and seccomp turned on, or set sandbox to auto",
        )
    if version == 0:
        return Confinement(described, version)
    planner = Planner(list(_secrets(settings)), planted=list(_configuration(CONFIG_PLACES)))
    rules = planner.rules(execution.read_paths, execution.write_paths)
    if required and planner.narrowed:
        raise ConfigurationError(
            f'[execution] sandbox = "require": {_found_in(planner.narrowed[0])}',
            fix="move it elsewhere, or allow handlers a smaller folder",
        )
    rules = replace(rules, filtered=unfiltered is None)
    return Confinement(described, version, rules, tuple(planner.narrowed))


def network_of(settings: Settings) -> NetworkPolicy:
    """What the operator says of the network of runs; an empty list caps nothing."""
    return NetworkPolicy(settings.execution.network, settings.execution.egress or None)


def in_words(narrowed: Narrowed) -> str:
    """The secret in a path that handlers can use, and what is allowed instead."""
    rest = "it is not allowed" if narrowed.left_out else "its other parts are allowed, as they are now"
    return f"{_found_in(narrowed)}: {rest}"


def readable_management_secrets(settings: Settings) -> list[str]:
    """The management secrets that this process may read, as a worker of the same user and folder could."""
    if not settings.secrets_dir:
        return []
    names = (f"management__{name}" for name in settings.issuers)
    return [name for name in names if os.access(os.path.join(settings.secrets_dir, name), os.R_OK)]


def _found_in(narrowed: Narrowed) -> str:
    secret = narrowed.secret
    return f"{narrowed.root} is open to handlers and contains {secret.name} ({secret.path})"


def _secrets(settings: Settings) -> Iterator[SecretPath]:
    """What handlers must not reach; a path need not exist."""
    yield SecretPath("/proc", "all of /proc")
    folders = {settings.secrets_dir, os.environ.get("CREDENTIALS_DIRECTORY", ""), MOUNTED_SECRETS}
    yield from (SecretPath(os.path.realpath(folder), "secrets_dir") for folder in sorted(folders) if folder)
    with suppress(ConfigurationError):  # no key ring is configured
        yield SecretPath(os.path.realpath(settings.keyring_file), "the key ring")
    if settings.host.token_file:
        yield SecretPath(os.path.realpath(settings.host.token_file), "the host's token")
    file = settings.database.sqlite_file
    if file is not None:
        # The names of its journals, its lock and copies begin with its own.
        yield SecretPath(os.path.realpath(file), "the database", stem=True)
    named = (settings.config_file, os.environ.get("WORKER_CONFIG", ""))
    yield from _configuration((*named, *filter(os.path.exists, CONFIG_PLACES)))
    yield SecretPath(
        os.path.join(os.path.realpath(tempfile.gettempdir()), FOLDERS), "the runs' folders", stem=True
    )


def _configuration(places: Iterable[str]) -> Iterator[SecretPath]:
    for place in dict.fromkeys(places):
        if place:
            yield SecretPath(os.path.realpath(place), "the configuration")
