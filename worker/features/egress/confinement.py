"""What the broker denies itself for good, before it hears of an org: files, programs, dumps of its memory."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence

from worker.engine.runners.child import landlock, linux, seccomp

# The files that resolving a name and checking a certificate need while it runs.
FILES = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/nsswitch.conf"),
    *("/etc/services", "/etc/localtime", "/dev/urandom"),
)
# Libraries that are loaded at a first use.
CODE = ("/usr/lib", "/lib", "/lib64", "/usr/lib64")
# Device and inode; None for a file that does not exist.
FileId = tuple[int, int] | None


def resolver_files() -> list[FileId]:
    """The files that resolving needs, as they are now. They are replaced as networks change."""

    def identity(path: str) -> FileId:
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    return [identity(path) for path in FILES]


def confine(*, landlocked: bool, filtered: bool) -> Sequence[FileId] | None:
    """Confine this process for good; the files of `FILES` that it may read, None if all. Raises OSError."""
    files = resolver_files() if landlocked else None
    linux.hide_memory()
    linux.lower_limit(resource.RLIMIT_CORE, 1, 1)  # 1 also turns off a program that gets cores
    if landlocked:
        ruleset = landlock.Ruleset(landlock.abi())
        for path, access in ((FILES, landlock.READ), (CODE, landlock.READ_AND_EXECUTE)):
            for each in path:
                _allow(ruleset, each, access)
        ruleset.restrict()
    if filtered:
        seccomp.restrict()
        seccomp.restrict(seccomp.BROKER)
    return files


def _allow(ruleset: landlock.Ruleset, path: str, access: int) -> None:
    try:
        descriptor = os.open(os.path.realpath(path), os.O_PATH | os.O_CLOEXEC)
    except OSError:  # it does not exist
        return
    try:
        ruleset.allow(descriptor, access, is_folder=os.path.isdir(path))
    finally:
        os.close(descriptor)
