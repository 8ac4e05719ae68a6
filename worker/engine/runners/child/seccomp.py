"""Seccomp: denies system calls that reach other runs and that Landlock does not confine; see seccomp(2).

Watches deliver the names of files in folders that a process may not list. The objects of System V IPC belong
to the account: they outlive a run, and no memory cap counts them. Denied calls fail with EACCES, as those
that Landlock denies, so that libraries fall back to polling. The filter cannot be lifted; child processes
inherit it.

A sealed run gets a second filter, without which it could open a socket: Landlock denies TCP by its ports, but
not TCP Fast Open, MPTCP, UDP or any other family. The broker has one too.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from worker.engine.runners.child import landlock

_PR_SET_SECCOMP = 22
_MODE_FILTER = 2
# seccomp(2), which filters all threads of the process; prctl(2) only the calling one.
_SECCOMP = {"x86_64": 317, "aarch64": 277}
_SET_MODE_FILTER = 1
_ALL_THREADS = 1

_ALLOW = 0x7FFF0000
_KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

# Instructions of classic BPF, and where `struct seccomp_data` has the call's number and its architecture.
_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K
_IF_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_NUMBER = 0
_ARCHITECTURE = 4
# Of its arguments the lower halves, which are those that count of an `int`; these machines are little-endian.
_ARGUMENTS = 16
_ARGUMENT = 8
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


# The numbers of what the filters of sealed runs and of the broker deny, for each machine's own interface.
_CALLS: Mapping[str, Mapping[str, int]] = {
    "x86_64": {
        **{"socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "socketpair": 53},
        **{
            "accept4": 288,
            "clone": 56,
            "fork": 57,
            "vfork": 58,
            "clone3": 435,
            "execve": 59,
            "execveat": 322,
        },
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438},
        **{"unshare": 272, "setns": 308, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298},
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
        **{"add_key": 248, "request_key": 249, "keyctl": 250, "mq_open": 240},
    },
    "aarch64": {
        **{"socket": 198, "connect": 203, "accept": 202, "bind": 200, "listen": 201, "socketpair": 199},
        **{"accept4": 242, "clone": 220, "clone3": 435, "execve": 221, "execveat": 281},
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "pidfd_getfd": 438},
        **{"unshare": 97, "setns": 268, "bpf": 280, "userfaultfd": 282, "perf_event_open": 241},
        **{"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427},
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "mq_open": 180},
    },
}
# What reaches other processes, or calls of the kernel past a filter.
_REACHING = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "unshare", "setns", "bpf"),
    *("userfaultfd", "perf_event_open", "io_uring_setup", "io_uring_enter", "io_uring_register"),
    # A message queue of POSIX belongs to the account, and without Landlock it is open to all runs.
    *("add_key", "request_key", "keyctl", "mq_open"),
)
_AF_UNIX = 1
_AF_INET = 2
_AF_INET6 = 10
_AF_NETLINK = 16
_SOCK_STREAM = 1
_SOCK_SEQPACKET = 5
_SOCK_TYPE = 0xF
_CLONE_THREAD = 0x00010000
# CLONE_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID and _NEWNET.
_CLONE_NAMESPACES = 0x00020000 | 0x7E000000


@dataclass(frozen=True, slots=True)
class Sieve:
    """A filter for the machine's own interface; a call of any other one ends the process.

    `denied` fail with EACCES. `clone3`, whose flags no filter sees, fails with ENOSYS, so that the C library
    uses `clone`. `sockets` and `pairs` are the families, and the types of pairs, that are allowed.
    """

    denied: Sequence[str]
    sockets: Sequence[int]
    pairs: Sequence[int]
    # Bits of the flags of `clone` of which none may be set, and one that must be.
    clone_without: int = 0
    clone_with: int = 0


# A sealed run reaches the broker by its inherited descriptor, over pairs of sockets that it makes itself.
SEALED = Sieve(
    denied=("socket", "connect", "bind", "listen", "accept", "accept4", *_REACHING),
    sockets=(),
    pairs=(_SOCK_STREAM, _SOCK_SEQPACKET),
    clone_without=_CLONE_NAMESPACES,
)
# The broker starts no process and no server; names are resolved by UDP, with a look at the routes.
BROKER = Sieve(
    denied=("listen", "accept", "accept4", "fork", "vfork", "execve", "execveat", *_REACHING),
    sockets=(_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK),
    pairs=(_SOCK_STREAM,),
    clone_with=_CLONE_THREAD,
)


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


_prctl = ctypes.CDLL(None, use_errno=True)["prctl"]
_prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)
_syscall = ctypes.CDLL(None, use_errno=True)["syscall"]
_syscall.argtypes = (ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p)
_syscall.restype = ctypes.c_long


class Filter:
    """A filter that is ready for use: that of a `Sieve`, or the one of all runs."""

    def __init__(self, sieve: Sieve | None = None) -> None:
        machine = os.uname().machine
        code = program(MACHINES[machine]) if sieve is None else sieve_program(sieve, machine)
        self._call = _SECCOMP[machine]
        self._program = _Program(len(code) // _INSTRUCTION.size, code)

    def install(self) -> None:
        """Filter the calls of this process and its descendants for good; raises OSError. Filters add up.

        A module that the zygote has imported may have started threads after the fork: they are filtered too.
        """
        landlock.gain_no_privileges()
        result = _syscall(self._call, _SET_MODE_FILTER, _ALL_THREADS, ctypes.addressof(self._program))
        if result != 0:  # above 0 it is a thread with another filter
            number = ctypes.get_errno() if result < 0 else errno.EBUSY
            raise OSError(number, f"seccomp: {os.strerror(number)}")


def restrict(sieve: Sieve | None = None) -> None:
    """Install a `Filter`."""
    Filter(sieve).install()


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


@cache
def sieve_program(sieve: Sieve, machine: str) -> bytes:
    """The instructions of a `Sieve` on this machine, made once: the zygote does it for its runs."""
    numbers = _CALLS[machine]
    parts: list[tuple[str, list[bytes]]] = [
        ("clone3", [_instruction(_RETURN, _ERRNO | errno.ENOSYS)]),
        (
            "socketpair",
            _unless_equal(0, [_AF_UNIX], _unless_equal(1, sieve.pairs, _ALLOWED, mask=_SOCK_TYPE)),
        ),
    ]
    if sieve.sockets:
        parts.append(("socket", _unless_equal(0, sieve.sockets, _ALLOWED)))
    if sieve.clone_with:
        parts.append(("clone", _bits(sieve.clone_with, _ALLOWED, _DENIED)))
    if sieve.clone_without:
        parts.append(("clone", _bits(sieve.clone_without, _DENIED, _ALLOWED)))
    parts += [(name, _DENIED) for name in sieve.denied]
    interface = MACHINES[machine][0]
    code = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_IF_EQUAL, interface.architecture, 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        _instruction(_LOAD, _NUMBER),
    ]
    if interface is _X86_64:
        code += [_instruction(_IF_AT_LEAST, _X32, 0, 1), _instruction(_RETURN, _ERRNO | errno.ENOSYS)]
    for name, part in parts:
        if (number := numbers.get(name)) is not None:  # `fork` is a `clone` on some machines
            code += [_instruction(_IF_EQUAL, number, 0, len(part)), *part]
    return b"".join([*code, *_ALLOWED])


def _unless_equal(
    place: int, values: Iterable[int], then: list[bytes], *, mask: int | None = None
) -> list[bytes]:
    """Deny unless an argument is one of these; then go on."""
    allowed = list(values)
    tests = [_instruction(_IF_EQUAL, value, len(allowed) - at, 0) for at, value in enumerate(allowed)]
    masked = [] if mask is None else [_instruction(_AND, mask)]
    return [_instruction(_LOAD, _ARGUMENTS + _ARGUMENT * place), *masked, *tests, *_DENIED, *then]


def _bits(bits: int, if_any: list[bytes], if_none: list[bytes]) -> list[bytes]:
    """What follows from the flags of `clone`, its first argument."""
    return [
        _instruction(_LOAD, _ARGUMENTS),
        _instruction(_IF_ANY_BIT, bits, 0, len(if_any)),
        *if_any,
        *if_none,
    ]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, value)


_ALLOWED = [_instruction(_RETURN, _ALLOW)]
_DENIED = [_instruction(_RETURN, _ERRNO | errno.EACCES)]
