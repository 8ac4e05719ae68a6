"""The sandbox of handlers, as `[execution]` wants it and this kernel has it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from worker.errors import ConfigurationError
from worker.execution.runners.child import landlock
from worker.execution.runners.child.sandbox import Narrowed, Planner, Rules, Secret, level
from worker.handlers.catalogue import DESCRIBE
from worker.handlers.installed import FOLDERS
from worker.settings import CONFIG_PLACES, MOUNTED_SECRETS, Settings
from worker.telemetry.events import emit

OFF = 'off: [execution] sandbox = "off"'
_CONFINED = (sys.executable, "-P", "-m", "worker.execution.runners.child.sandbox")


@dataclass(frozen=True, slots=True)
class Confinement:
    """What confines handlers: nothing without `rules`. `level` says it in words."""

    level: str
    version: int
    rules: Rules | None = None
    narrowed: tuple[Narrowed, ...] = ()

    @property
    def describe(self) -> tuple[str, ...]:
        """The command of the catalogue's children."""
        return DESCRIBE if self.rules is None else (*_CONFINED, self.rules.as_json())

    def warn(self) -> None:
        """Report once what is missing, and what was left out."""
        if self.rules is None or self.version < landlock.SCOPES:
            emit("sandbox.incomplete", sandbox=self.level)
        for narrowed in self.narrowed:
            emit("sandbox.narrowed", path=narrowed.root, error=in_words(narrowed))


def confinement_of(settings: Settings, *, version: int | None = None) -> Confinement:
    """How handlers are confined; `version` is that of the kernel's interface, by default this kernel's.

    Raises:
        ConfigurationError: the sandbox is required and the kernel has less than all of it,
            or a path that handlers may use contains a secret.
    """
    execution = settings.execution
    if execution.sandbox == "off":
        return Confinement(OFF, 0)
    version = landlock.abi() if version is None else version
    required = execution.sandbox == "require"
    if required and version < landlock.SCOPES:
        raise ConfigurationError(
            f'[execution] sandbox = "require": {level(version)}',
            fix="use Linux 6.12 or newer with Landlock turned on, or set sandbox to auto",
        )
    if version == 0:
        return Confinement(level(version), version)
    planner = Planner(list(_secrets(settings)), planted=list(_configuration(CONFIG_PLACES)))
    rules = planner.rules(execution.read_paths, execution.write_paths)
    if required and planner.narrowed:
        raise ConfigurationError(
            f'[execution] sandbox = "require": {found_in(planner.narrowed[0])}',
            fix="move it elsewhere, or let handlers use a smaller folder",
        )
    return Confinement(level(version), version, rules, tuple(planner.narrowed))


def found_in(narrowed: Narrowed) -> str:
    """What a path that handlers may use leads to."""
    secret = narrowed.secret
    return f"{narrowed.root} is open to handlers, and leads to {secret.name} ({secret.path})"


def in_words(narrowed: Narrowed) -> str:
    """What was found in a path that handlers may use, and what becomes of it."""
    rest = "it is not allowed" if narrowed.left_out else "its other parts are allowed, as they are now"
    return f"{found_in(narrowed)}: {rest}"


def _secrets(settings: Settings) -> Iterator[Secret]:
    """What no handler may reach; a path need not exist."""
    yield Secret("/proc", "all of /proc")
    folders = {settings.secrets_dir, os.environ.get("CREDENTIALS_DIRECTORY", ""), MOUNTED_SECRETS}
    yield from (Secret(os.path.realpath(folder), "secrets_dir") for folder in sorted(folders) if folder)
    with suppress(ConfigurationError):  # there is no place for one
        yield Secret(os.path.realpath(settings.keyring_file), "the key ring")
    file = settings.database.sqlite_file
    if file is not None:
        # Its journals and its lock, and copies of it, are called like it.
        yield Secret(os.path.realpath(file), "the database", stem=True)
    named = (settings.config_file, os.environ.get("WORKER_CONFIG", ""))
    yield from _configuration((*named, *filter(os.path.exists, CONFIG_PLACES)))
    yield Secret(
        os.path.join(os.path.realpath(tempfile.gettempdir()), FOLDERS), "the runs' folders", stem=True
    )


def _configuration(places: Iterable[str]) -> Iterator[Secret]:
    for place in dict.fromkeys(places):
        if place:
            yield Secret(os.path.realpath(place), "the configuration")
