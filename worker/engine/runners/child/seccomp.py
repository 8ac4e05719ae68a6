"""Seccomp: denies system calls that reach other runs and that Landlock does not confine; see seccomp(2).

Watches deliver the names of files in folders that a process may not list. The objects of System V IPC belong
to the account: they outlive a run, and no memory cap counts them. Denied calls fail with EACCES, as those
that Landlock denies, so that libraries fall back to polling. The filter cannot be lifted; child processes
inherit it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from worker.engine.runners.child import landlock

_PR_SET_SECCOMP = 22
_MODE_FILTER = 2

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

# Instructions of classic BPF, and where `struct seccomp_data` has the call's number and its architecture.
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_NUMBER = 0
_ARCHITECTURE = 4
# Numbers from here on are calls of x32, a third interface of x86_64.
_X32 = 0x40000000


@dataclass(frozen=True, slots=True)
class Interface:
    """One interface of a kernel for system calls: its AUDIT_ARCH number, and the calls denied in it."""

    architecture: int
    denied: Mapping[str, int]


_X86_64 = Interface(
    0xC000003E,
    {"inotify_add_watch": 254, "fanotify_mark": 301, "shmget": 29, "semget": 64, "msgget": 68},
)
_I386 = Interface(
    0x40000003,
    # `ipc` is the older call for all of System V IPC.
    {"inotify_add_watch": 292, "fanotify_mark": 339, "shmget": 395, "semget": 393, "msgget": 399, "ipc": 117},
)
_AARCH64 = Interface(
    0xC00000B7,
    {"inotify_add_watch": 27, "fanotify_mark": 263, "shmget": 194, "semget": 190, "msgget": 186},
)
_ARM = Interface(
    0x40000028,
    {"inotify_add_watch": 317, "fanotify_mark": 368, "shmget": 307, "semget": 299, "msgget": 303},
)
# By machine: its own interface, and that of 32-bit programs, which would bypass a filter of one.
MACHINES: Mapping[str, tuple[Interface, ...]] = {
    "x86_64": (_X86_64, _I386),
    "aarch64": (_AARCH64, _ARM),
}


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


_prctl = ctypes.CDLL(None, use_errno=True)["prctl"]
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)


def restrict() -> None:
    """Filter the calls of this thread and its descendants for good; raises OSError."""
    landlock.gain_no_privileges()
    code = program(MACHINES[os.uname().machine])
    filter_ = _Program(len(code) // _INSTRUCTION.size, code)
    if _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(filter_), 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def known() -> bool:
    """Whether there is a filter for this machine's architecture."""
    return os.uname().machine in MACHINES


def lacking() -> str | None:
    """Why system calls cannot be filtered on this machine, or None if they can."""
    if not known():
        return f"no filter for {os.uname().machine}"
    # Without a program the kernel reports EFAULT, unless it has no filters or another filter denies this.
    if _prctl(_PR_SET_SECCOMP, _MODE_FILTER, None, 0, 0) != 0 and ctypes.get_errno() != errno.EFAULT:
        return "the kernel has none, or it is filtered"
    return None


_INSTRUCTION = struct.Struct("=HBBI")


def program(interfaces: tuple[Interface, ...]) -> bytes:
    """The instructions of a filter for a kernel with these interfaces.

    The architecture comes first, since each has its own numbers. A call of another one, which these kernels
    do not have, ends the process.
    """
    code = [_instruction(_LOAD, _ARCHITECTURE)]
    for interface in interfaces:
        part = list(_of_interface(interface))
        code += [_instruction(_IF_EQUAL, interface.architecture, 0, len(part)), *part]
    return b"".join([*code, _instruction(_RETURN, _KILL_PROCESS)])


def _of_interface(interface: Interface) -> Iterator[bytes]:
    yield _instruction(_LOAD, _NUMBER)
    if interface is _X86_64:
        # As on a kernel without x32.
        yield _instruction(_IF_AT_LEAST, _X32, 0, 1)
        yield _instruction(_RETURN, _ERRNO | errno.ENOSYS)
    numbers = list(interface.denied.values())
    for place, number in enumerate(numbers):
        yield _instruction(_IF_EQUAL, number, len(numbers) - place, 0)
    yield _instruction(_RETURN, _ALLOW)
    yield _instruction(_RETURN, _ERRNO | errno.EACCES)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, value)
