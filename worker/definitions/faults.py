"""The errors of a file, collected so that all are reported at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from worker.errors import DefinitionError

# Errors that are reported at once; a file that a program made can have thousands of the same one.
MAX_ERRORS = 20


class Faults:
    """Collects errors; raises the first one with the others, at the latest when there are MAX_ERRORS."""

    def __init__(self) -> None:
        self._found: list[DefinitionError] = []

    def add(self, error: DefinitionError) -> None:
        """Note an error; raises DefinitionError if it is the last one that is reported."""
        self._found.append(error)
        if len(self._found) >= MAX_ERRORS:
            self.check()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note an error that ends the block."""
        try:
            yield
        except DefinitionError as error:
            if error not in self._found:
                self.add(error)

    def check(self) -> None:
        """Raise DefinitionError if there is any."""
        if self._found:
            first, *others = self._found
            first.others = tuple(others)
            raise first
