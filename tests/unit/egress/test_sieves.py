"""The filters of sealed runs and of the broker, run as the kernel does, for each machine."""

from __future__ import annotations

import errno
import struct

import pytest

from worker.engine.runners.child import seccomp

ALLOWED = 0x7FFF0000
DENIED = 0x50000 | errno.EACCES
NO_CALL = 0x50000 | errno.ENOSYS
KILLED = 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
OTHERS = {"x86_64": (0x40000003, 0xC00000B7), "aarch64": (0x40000028, 0xC000003E)}
# As the kernel's tables have them, apart from those of the module.
NUMBERS = {
    "x86_64": {
        **{"read": 0, "write": 1, "close": 3, "mmap": 9, "sendto": 44, "recvfrom": 45, "sendmsg": 46},
        **{"socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "socketpair": 53},
        **{"clone": 56, "fork": 57, "vfork": 58, "execve": 59, "ptrace": 101, "unshare": 272, "accept4": 288},
        **{"setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "bpf": 321},
        **{"execveat": 322, "userfaultfd": 323, "perf_event_open": 298, "io_uring_setup": 425},
        **{"io_uring_enter": 426, "io_uring_register": 427, "clone3": 435, "pidfd_getfd": 438},
        **{
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "mq_open": 240,
            "openat": 257,
            "epoll_wait": 232,
        },
    },
    "aarch64": {
        **{"read": 63, "write": 64, "close": 57, "mmap": 222, "sendto": 206, "recvfrom": 207, "sendmsg": 211},
        **{"socket": 198, "connect": 203, "accept": 202, "bind": 200, "listen": 201, "socketpair": 199},
        **{"clone": 220, "execve": 221, "ptrace": 117, "unshare": 97, "accept4": 242, "setns": 268},
        **{"process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "bpf": 280, "execveat": 281},
        **{"userfaultfd": 282, "perf_event_open": 241, "io_uring_setup": 425, "io_uring_enter": 426},
        **{"io_uring_register": 427, "clone3": 435, "pidfd_getfd": 438, "add_key": 217, "request_key": 218},
        **{"keyctl": 219, "mq_open": 180, "openat": 56, "epoll_wait": 22},
    },
}
REACHING = {
    *("ptrace", "unshare", "setns", "process_vm_readv", "process_vm_writev", "kcmp", "bpf", "userfaultfd"),
    *("perf_event_open", "io_uring_setup", "io_uring_enter", "io_uring_register", "pidfd_getfd"),
    *("add_key", "request_key", "keyctl", "mq_open", "listen", "accept", "accept4"),
}
PLAIN = {"read", "write", "close", "mmap", "sendto", "recvfrom", "sendmsg", "openat", "epoll_wait"}
UNIX, INET, INET6, NETLINK, PACKET, VSOCK, ALG = 1, 2, 10, 16, 17, 40, 38
STREAM, DGRAM, RAW, SEQPACKET, NONBLOCK, CLOEXEC = 1, 2, 3, 5, 0x800, 0x80000
THREAD = 0x003D0F00
VFORK = 0x00004111


def verdict(sieve: seccomp.Sieve, machine: str, number: int, *arguments: int, architecture: int = 0) -> int:
    """What the kernel does with a call: classic BPF with the instructions that the filters have."""
    code = list(struct.iter_unpack("=HBBI", seccomp.sieve_program(sieve, machine)))
    words = [number, architecture or ARCHITECTURES[machine], 0, 0]
    for argument in (*arguments, *(0,) * (6 - len(arguments))):
        words += [argument & 0xFFFFFFFF, argument >> 32]
    at, accumulator = 0, 0
    while True:
        kind, if_true, if_false, value = code[at]
        at += 1
        match kind:
            case 0x06:
                return int(value)
            case 0x20:
                accumulator = words[value // 4]
                continue
            case 0x54:
                accumulator &= value
                continue
            case 0x15:
                holds = accumulator == value
            case 0x35:
                holds = accumulator >= value
            case 0x45:
                holds = bool(accumulator & value)
            case _:
                raise AssertionError(f"an instruction of kind {kind:#x}")
        at += if_true if holds else if_false


def of(sieve: seccomp.Sieve, machine: str, name: str, *arguments: int) -> int:
    return verdict(sieve, machine, NUMBERS[machine][name], *arguments)


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("sieve", [seccomp.SEALED, seccomp.BROKER])
def test_no_call_reaches_other_processes_or_past_the_filter(sieve: seccomp.Sieve, machine: str) -> None:
    assert {name for name in NUMBERS[machine] if of(sieve, machine, name) == DENIED} >= REACHING
    assert {name for name in PLAIN if of(sieve, machine, name) == ALLOWED} == PLAIN
    assert of(sieve, machine, "clone3") == NO_CALL
    for other in OTHERS[machine]:
        assert verdict(sieve, machine, 0, architecture=other) == KILLED


def test_x32_is_no_interface() -> None:
    for sieve in (seccomp.SEALED, seccomp.BROKER):
        for number in (0x40000000 + 41, 0x40000000, 0xFFFFFFFF):
            assert verdict(sieve, "x86_64", number) == NO_CALL


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_a_sealed_run_makes_no_socket_but_pairs_that_lead_nowhere(machine: str) -> None:
    for family in range(64):
        for kind in range(16):
            assert of(seccomp.SEALED, machine, "socket", family, kind) == DENIED
            pair = of(seccomp.SEALED, machine, "socketpair", family, kind)
            assert pair == (ALLOWED if family == UNIX and kind in (STREAM, SEQPACKET) else DENIED)
    for flags in (NONBLOCK, CLOEXEC, NONBLOCK | CLOEXEC):
        assert of(seccomp.SEALED, machine, "socketpair", UNIX, STREAM | flags) == ALLOWED
        assert of(seccomp.SEALED, machine, "socketpair", UNIX, DGRAM | flags) == DENIED
        assert of(seccomp.SEALED, machine, "socketpair", UNIX, RAW | flags) == DENIED
    # The kernel takes the lower half of an `int`.
    assert of(seccomp.SEALED, machine, "socketpair", UNIX, STREAM << 32 | DGRAM) == DENIED
    for name in ("connect", "bind"):
        assert of(seccomp.SEALED, machine, name) == DENIED


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_a_sealed_run_starts_processes_but_no_namespaces(machine: str) -> None:
    for flags in (THREAD, VFORK, 17):
        assert of(seccomp.SEALED, machine, "clone", flags) == ALLOWED
    for namespace in (0x20000, *(1 << bit for bit in range(25, 31))):
        assert of(seccomp.SEALED, machine, "clone", 17 | namespace) == DENIED
    assert of(seccomp.SEALED, machine, "execve") == ALLOWED


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_broker_starts_threads_and_no_processes(machine: str) -> None:
    assert of(seccomp.BROKER, machine, "clone", THREAD) == ALLOWED
    for flags in (17, VFORK, 0):
        assert of(seccomp.BROKER, machine, "clone", flags) == DENIED
    for name in {"fork", "vfork", "execve", "execveat"} & NUMBERS[machine].keys():
        assert of(seccomp.BROKER, machine, name) == DENIED
    allowed = {family for family in range(64) if of(seccomp.BROKER, machine, "socket", family) == ALLOWED}
    assert allowed == {UNIX, INET, INET6, NETLINK}


def test_the_numbers_are_those_of_the_kernel() -> None:
    for machine, numbers in NUMBERS.items():
        known = seccomp._CALLS[machine]
        assert {name: numbers[name] for name in known} == dict(known)
