"""Landlock: limits a process and its descendants in files, signals and abstract sockets.

Three system calls through ctypes, with the same numbers on every architecture; see landlock(7). A
restriction cannot be lifted, and child processes inherit it.
"""

from __future__ import annotations

import ctypes
import os
import struct

_CREATE_RULESET = 444
_ADD_RULE = 445
_RESTRICT_SELF = 446
_VERSION = 1 << 0
_PATH_BENEATH = 1
_PR_SET_NO_NEW_PRIVS = 38

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_MAKE_CHAR = 1 << 6
_MAKE_BLOCK = 1 << 11
_MAKE_SYM = 1 << 12
_REFER = 1 << 13
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV

READ = _READ_FILE | _READ_DIR
READ_AND_EXECUTE = READ | _EXECUTE
# A device node could be any disk of the machine, so making one is never allowed.
WRITE = (_MAKE_SYM << 1) - 1 & ~(_MAKE_CHAR | _MAKE_BLOCK) | _REFER | _TRUNCATE | _IOCTL_DEV

# The first version of the kernel's interface that confines signals and abstract sockets (Linux 6.12).
SCOPES = 6
# The first version that confines TCP (Linux 6.7), by its two rights.
NETWORK = 4
_BIND_AND_CONNECT = 3
# What versions before the number do not confine.
LATER = {3: "truncating files by path", 5: "ioctl on devices", SCOPES: "signals and abstract sockets"}
_SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
_SCOPE_SIGNAL = 1 << 1

_libc = ctypes.CDLL(None, use_errno=True)
# A function object for each call, for its own argument types.
_create_ruleset, _add_rule, _restrict_self = _libc["syscall"], _libc["syscall"], _libc["syscall"]
for _call in (_create_ruleset, _add_rule, _restrict_self):
    _call.restype = ctypes.c_long
_create_ruleset.argtypes = (ctypes.c_long, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint32)
_add_rule.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_restrict_self.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_uint32)


def abi() -> int:
    """The version of the kernel's interface; 0 if it is missing, turned off or filtered."""
    return max(int(_create_ruleset(_CREATE_RULESET, None, 0, _VERSION)), 0)


def rule(descriptor: int, access: int, version: int, *, is_folder: bool) -> bytes | None:
    """A rule for an open path, for every ruleset of this version; None if it allows nothing."""
    access &= handled(version) if is_folder else handled(version) & _OF_FILES
    return struct.pack("=Qi", access, descriptor) if access else None


class Ruleset:
    """What is allowed; everything else that `version` handles is denied. Calls raise OSError.

    With `files` false it denies TCP and nothing else.
    """

    def __init__(self, version: int, *, files: bool = True) -> None:
        self._version = version
        scoped = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= SCOPES else 0
        # Words for files, network and scopes; later versions have more.
        size = 24 if version >= SCOPES else 16 if version >= NETWORK else 8
        words = (handled(version), 0, scoped) if files else (0, _BIND_AND_CONNECT, 0)
        attributes = struct.pack("=QQQ", *words)
        self.descriptor = _checked(_create_ruleset(_CREATE_RULESET, attributes, size, 0), "create_ruleset")

    def add(self, rule: bytes) -> None:
        """Add a rule whose descriptor is still open."""
        _checked(_add_rule(_ADD_RULE, self.descriptor, _PATH_BENEATH, rule, 0), "add_rule")

    def allow(self, descriptor: int, access: int, *, is_folder: bool) -> None:
        """Allow this access to an open path."""
        if (allowed := rule(descriptor, access, self._version, is_folder=is_folder)) is not None:
            self.add(allowed)

    # Called in a process that was just forked, where each function's first call copies pages.

    def allow_reading(self, folder: int) -> None:
        """Allow reading an open folder."""
        rule = struct.pack("=Qi", READ, folder)
        if _add_rule(_ADD_RULE, self.descriptor, _PATH_BENEATH, rule, 0) != 0:
            _checked(-1, "add_rule")

    def restrict(self) -> None:
        """Confine this thread and its descendants for good; closes the ruleset."""
        gain_no_privileges()
        if _restrict_self(_RESTRICT_SELF, self.descriptor, 0) != 0:
            _checked(-1, "restrict_self")
        os.close(self.descriptor)

    def close(self) -> None:
        os.close(self.descriptor)


def gain_no_privileges() -> None:
    """Let this process gain no rights by exec, which the kernel requires before restrictions."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        _checked(-1, "no_new_privs")


def handled(version: int) -> int:
    """Every access to files that the version can deny."""
    access = (_MAKE_SYM << 1) - 1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV)):
        access |= right if version >= since else 0
    return access


def _checked(result: int, call: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"landlock: {call}: {os.strerror(number)}")
    return int(result)
