"""The sandbox of a handler's process: the paths it may use, planned once, applied after each fork.

The worker plans the rules, since it knows where the secrets are. The zygote opens the paths. Folders are
opened once, so a folder that later replaces one of them is not allowed. System files, which are replaced
when they change, are opened again.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from glob import escape, glob
from pathlib import Path
from urllib.parse import unquote, urlsplit

from worker.engine.runners.child import landlock, linux, seccomp
from worker.handlers import describe
from worker.handlers.calling import sandboxed
from worker.handlers.parts import trusted

# A root that contains a secret is split into at most this number of paths, or else left out.
MAX_PARTS = 256

# Seconds between two checks for replaced system files.
CHECK_EVERY = 1.0

SYSTEM = ("/usr", "/bin", *sorted(glob("/lib*")))
# Resolver, accounts, time zone, dynamic linker, certificate authorities: none of it is secret.
FILES = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/nsswitch.conf"),
    *("/etc/services", "/etc/protocols", "/etc/passwd", "/etc/group"),
    *("/etc/localtime", "/etc/timezone", "/etc/locale.alias", "/etc/mime.types", "/etc/os-release"),
    *("/etc/ld.so.cache", "/etc/ld.so.preload"),
    *("/etc/ssl/openssl.cnf", "/etc/ssl/cert.pem", "/etc/pki/tls/cert.pem", "/etc/pki/tls/openssl.cnf"),
    *("/dev/zero", "/dev/random", "/dev/urandom"),
    # What runtimes and libraries size themselves by.
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory"),
)
FOLDERS_READ = (
    *("/etc/ssl/certs", "/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted", "/etc/ca-certificates"),
    *("/etc/crypto-policies", "/sys/fs/cgroup", "/sys/devices/system/cpu"),
)
# Variables by which OpenSSL and the HTTP libraries find certificate authorities.
AUTHORITIES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@dataclass(frozen=True, slots=True)
class SecretPath:
    """A path that handlers may not reach; with `stem` also each sibling whose name starts with its own."""

    path: str
    name: str
    stem: bool = False

    def covers(self, path: str) -> bool:
        if path == self.path or _is_below(path, self.path):
            return True
        return self.stem and path.startswith(self.path) and "/" not in path[len(self.path) :]


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A root that contains a secret, and so is allowed only in part, or left out."""

    root: str
    secret: SecretPath
    left_out: bool


@dataclass(frozen=True, slots=True)
class SandboxRules:
    """Paths by access, which others can read. `write` allows everything except making device nodes.

    With `filtered` system calls are filtered, from the process on that forks those of handlers.
    """

    execute: tuple[str, ...] = ()
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    filtered: bool = True

    def as_json(self) -> str:
        """For the command line of a process that confines itself."""
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Planner:
    """Makes rules in which no root contains one of `secrets`, and no writable root one of `planted`.

    The latter are paths that the worker would read if a handler created them.
    """

    secrets: Sequence[SecretPath]
    planted: Sequence[SecretPath] = ()
    narrowed: list[Narrowed] = field(default_factory=list)

    def rules(self, read_paths: Iterable[str], write_paths: Iterable[str]) -> SandboxRules:
        """The rules for a process of this interpreter, with the operator's paths."""
        code = list(_code())
        modules = [SecretPath(os.path.realpath(path), "code that the worker imports") for path in code]
        kept = [*self.secrets, *self.planted, *modules]
        write = _outermost(self._allowed(write_paths, kept, within=modules))
        read = _outermost(self._allowed([*FOLDERS_READ, *_authorities()], self.secrets))
        execute = _outermost(self._allowed([*SYSTEM, *code, *read_paths], self.secrets))
        # Do not open again a path in a writable folder, which a handler could replace by a link to a secret.
        execute = tuple(path for path in execute if not any(_is_below(path, root) for root in write))
        # Each rule costs each start some microseconds, and links into /usr need none.
        files = [
            file for file in FILES if not any(_is_below(os.path.realpath(file), root) for root in execute)
        ]
        return SandboxRules(execute=execute, read=(*files, *read), write=write)

    def _allowed(
        self, roots: Iterable[str], secrets: Sequence[SecretPath], within: Sequence[SecretPath] = ()
    ) -> Iterator[str]:
        """The roots without the secrets in them; a root in one of `within` is the operator's choice."""
        for root in dict.fromkeys(os.path.realpath(root) for root in roots):
            near = [secret for secret in secrets if secret.covers(root) or _is_below(secret.path, root)]
            near = [secret for secret in near if secret not in within or not _is_below(root, secret.path)]
            parts = [root] if not near else list(_without(root, near))
            if near:
                parts = parts if len(parts) <= MAX_PARTS else []
                self.narrowed.append(Narrowed(root, near[0], not parts))
            yield from parts


class Sandbox:
    """Rules with all their paths open, in the process that starts handlers.

    They stay open because the kernel identifies a path by its inode, and some file systems create a new one
    once no process holds it. A system file that was replaced is opened again; a replaced folder is denied.
    """

    def __init__(self, rules: SandboxRules) -> None:
        self._version = landlock.abi()
        self._rules: dict[str, bytes] = {}
        # The system files, each with its descriptor, access and inode.
        self._files: dict[str, tuple[int, int, tuple[int, int] | None]] = {}
        self.checked_at = time.monotonic()
        self.replacements = 0  # system files that were opened again
        self._next: landlock.Ruleset | None = None
        kinds = (
            (rules.execute, landlock.READ_AND_EXECUTE),
            (rules.read, landlock.READ),
            (rules.write, landlock.WRITE),
            ((os.devnull,), landlock.WRITE),
        )
        for paths, access in kinds:
            for path in paths:
                self._open(path, access)
        self.prepare()

    def ruleset(self, folder: str) -> landlock.Ruleset:
        """The rules for one process, and its folder. Call `used` once it is forked. Raises OSError."""
        self.check()
        if self._next is None:
            self._next = self._new_ruleset()
        descriptor = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        try:
            self._next.allow(descriptor, landlock.WRITE, is_folder=True)
        finally:
            os.close(descriptor)
        return self._next

    def used(self) -> None:
        """Drop the prepared rules: their process is forked, or could not be."""
        if self._next is not None:
            self._next.close()
            self._next = None

    def prepare(self) -> None:
        """Prepare the rules of the next process in advance."""
        self.used()
        with suppress(OSError):  # no descriptors or memory now: `ruleset` tries again
            self._next = self._new_ruleset()

    def _new_ruleset(self) -> landlock.Ruleset:
        ruleset = landlock.Ruleset(self._version)
        for rule in self._rules.values():
            ruleset.add(rule)
        return ruleset

    def check(self) -> None:
        """Open replaced files again, such as resolv.conf after a network change; at most once a second."""
        now = time.monotonic()
        if now < self.checked_at + CHECK_EVERY:
            return
        self.checked_at, before = now, self.replacements
        for path, (descriptor, access, inode) in list(self._files.items()):
            if _inode(path) != inode:
                os.close(descriptor)
                del self._files[path], self._rules[path]
                self._open(path, access)
                self.replacements += 1
        if self.replacements > before:
            self.used()  # the prepared rules allow the replaced files, not the new ones

    def _open(self, path: str, access: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # it does not exist
            return
        is_folder = os.path.isdir(path)
        rule = landlock.rule(descriptor, access, self._version, is_folder=is_folder)
        if rule is None:
            os.close(descriptor)
            return
        self._rules[path] = rule
        if not is_folder:
            self._files[path] = (descriptor, access, _inode(path))


def allow_own_proc(ruleset: landlock.Ruleset) -> int:
    """Allow a process that was just forked to read its /proc/self, a different inode in each; raises OSError.

    Returns a descriptor to be kept open. Processes that it starts cannot read their own /proc/self.
    """
    descriptor = os.open("/proc/self", os.O_PATH | os.O_CLOEXEC)
    ruleset.allow_reading(descriptor)
    return descriptor


def main() -> None:
    """`python -m worker.engine.runners.child.sandbox RULES`: what describes handlers, confined."""
    describe_handlers(trusted(SandboxRules).read(json.loads(sys.argv.pop(1))))


def describe_handlers(rules: SandboxRules | None) -> None:
    """Describe handlers for the catalogue, each distribution in a confined process if there are rules."""

    def confine() -> None:
        if rules is not None:
            ruleset = Sandbox(rules).ruleset(os.getcwd())
            allow_own_proc(ruleset)
            ruleset.restrict()
            if rules.filtered:
                seccomp.restrict()
            sandboxed()

    linux.name_process(linux.ProcessName.DESCRIBE)
    describe.main(confine)


def level(version: int, unfiltered: str | None = None) -> str:
    """What this version of Landlock confines, in words; `unfiltered` is why system calls are not filtered."""
    if version == 0:
        return "none: the kernel has no Landlock, or it is turned off or filtered"
    lacks = [what for since, what in landlock.LATER.items() if version < since]
    if unfiltered is not None:
        lacks.append("watches of folders and System V IPC")
    used = f"Landlock {version}" + (f" without seccomp ({unfiltered})" if unfiltered else " and seccomp")
    if lacks:
        return f"partial: {used}, which does not confine {', '.join(lacks)}"
    return f"full: {used}"


def _code() -> Iterator[str]:
    """The paths of this interpreter and of everything it imports, editable installs included."""
    yield from (sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.executable))
    for entry in sys.path:
        if entry and os.path.exists(entry):
            yield entry
            # An import hook may provide an editable install, instead of a folder of sys.path.
            for record in glob(os.path.join(escape(entry), "*.dist-info", "direct_url.json")):
                with suppress(OSError, ValueError, LookupError, AttributeError):
                    origin = json.loads(Path(record).read_text())
                    if origin["dir_info"].get("editable"):
                        yield unquote(urlsplit(origin["url"]).path)


def _authorities() -> Iterator[str]:
    paths = ssl.get_default_verify_paths()
    named = (os.environ.get(name) for name in AUTHORITIES)
    yield from (path for path in (paths.openssl_cafile, paths.openssl_capath, *named) if path)


def _without(root: str, secrets: Sequence[SecretPath]) -> Iterator[str]:
    """The current parts of a root that contain none of the secrets."""
    if any(secret.covers(root) for secret in secrets):
        return
    if not any(_is_below(secret.path, root) for secret in secrets):
        yield root
        return
    with suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if not entry.is_symlink():  # its target is outside the root, or is found there
                yield from _without(entry.path, secrets)


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that lie in none of the others."""
    kept: list[str] = []
    for path in sorted(set(paths), key=lambda path: f"{path}/"):
        if not kept or not _is_below(path, kept[-1]):
            kept.append(path)
    return tuple(kept)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


if __name__ == "__main__":
    main()
