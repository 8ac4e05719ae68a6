"""Features: what the core runs without. Each is named by text, and imported where it is used.

`app.features` lists them, and `use` says at the start of a process which there are. The core asks for a
`Point`, and gets what an installed feature gives there, or None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Generic, TypeVar

from worker.errors import ConfigurationError, UsageError

T = TypeVar("T")
FOLDER = "worker.features"


@dataclass(frozen=True, slots=True)
class Feature:
    """One folder below `worker/features`. All that it gives is named as `MODULE:NAME`, below that folder.

    `verbs` are a verb, a noun, or a verb of a noun of the core, as a person types it. `gives` is by the
    names of points. `settings` are the sections of worker.toml that only it reads, and `tables` those that
    only it writes: both are in every wheel, with or without it.
    """

    name: str
    verbs: Mapping[str, str] = field(default_factory=dict)
    gives: Mapping[str, str] = field(default_factory=dict)
    settings: Sequence[str] = ()
    tables: Sequence[str] = ()

    @property
    def package(self) -> str:
        return f"{FOLDER}.{self.name}"

    def load(self, place: str) -> Any:
        """What is at `MODULE:NAME`, or the module. Raises ModuleNotFoundError without the feature."""
        module, _, name = place.partition(":")
        found = import_module(f"{self.package}.{module}")
        return getattr(found, name) if name else found

    def is_installed(self) -> bool:
        """Whether this wheel has it; imports its package, which is empty."""
        try:
            import_module(self.package)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith(FOLDER):
                raise
            return False
        return True


@dataclass(frozen=True, slots=True)
class Point(Generic[T]):
    """A place where the core takes what a feature gives; `needed_for` is what cannot be done without it."""

    name: str
    needed_for: str

    def find(self) -> T | None:
        """What the feature gives that has this point; None if it is not installed."""
        for feature in _in_use():
            if self.name in feature.gives and feature.is_installed():
                found: T = feature.load(feature.gives[self.name])
                return found
        return None

    def require(self) -> T:
        """As `find`; raises UsageError if no installed feature has it."""
        found = self.find()
        if found is None:
            raise not_installed(self.needed_for, self.name.partition(".")[0])
        return found


_features: Sequence[Feature] | None = None


def use(features: Sequence[Feature]) -> None:
    """Say which features there are, at the start of a process."""
    global _features
    _features = features


def _in_use() -> Sequence[Feature]:
    # A process that forgot it would run without its listeners, and say nothing.
    if _features is None:
        raise RuntimeError("call worker.kit.feature.use() at the start of the process")
    return _features


def refuse_settings(settings: Any) -> None:
    """Raise ConfigurationError for a section that only a feature reads which is not installed."""
    for feature in _in_use():
        for path in feature.settings:
            if _is_set(settings, path.split(".")) and not feature.is_installed():
                error = not_installed(f"[{path}]", feature.name)
                raise ConfigurationError(error.message, fix=f"{error.fix}, or remove the section")


def _is_set(section: Any, keys: Sequence[str]) -> bool:
    if not keys:
        return True
    if isinstance(section, Mapping):
        return any(_is_set(each, keys[1:]) for each in section.values())
    return keys[0] in section.model_fields_set and _is_set(getattr(section, keys[0]), keys[1:])


def not_installed(what: str, feature: str) -> UsageError:
    """The error of what needs a feature that this wheel does not have."""
    return UsageError(
        f"{what} needs the feature {feature}, which is not installed",
        fix="install the whole package orgworker; this one was built without it",
    )
