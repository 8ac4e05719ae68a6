"""Ways by sockets, rings, queues and other processes: past the broker."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import Context

from .common import LOCAL, Places, checked, connected, libc, tried, way


@way
async def tcp(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with connected(places) as out:
        out.sendall(has)


@way
async def tcp_of_a_thread(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    await asyncio.to_thread(lambda: connected(places).sendall(has))


@way
async def tcp_fast_open(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket() as out:
        out.sendto(has, socket.MSG_FASTOPEN, (LOCAL, places["tcp"]))


@way
async def mptcp(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as out:
        out.connect((LOCAL, places["tcp"]))
        out.sendall(has)


@way
async def udp(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(type=socket.SOCK_DGRAM) as out:
        out.sendto(has, (LOCAL, places["udp"]))


@way
async def udp_of_a_mapped_address(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as out:
        out.sendto(has, (f"::ffff:{LOCAL}", places["udp"]))


@way
async def quic(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    initial = (
        b"\xc3\x00\x00\x00\x01\x08" + bytes(8) + b"\x00\x00" + struct.pack("!H", 0x4000 + len(has)) + has
    )
    with socket.socket(type=socket.SOCK_DGRAM) as out:
        out.sendto(initial.ljust(1200, b"\0"), (LOCAL, places["quic"]))


@way
async def dns(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """A name whose labels are the values, asked of a resolver of one's own."""
    labels = [has[at : at + 63] for at in range(0, len(has), 63)]
    asked = struct.pack("!6H", 1, 0x100, 1, 0, 0, 0) + b"".join(bytes([len(each)]) + each for each in labels)
    with socket.socket(type=socket.SOCK_DGRAM) as out:
        out.sendto(asked + b"\0\0\x01\0\x01", (LOCAL, places["dns"]))


@way
async def icmp(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as out:
        out.sendto(struct.pack("!BBHHH", 8, 0, 0, 1, 1) + has, (LOCAL, 0))


@way
async def raw(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as out:
        out.sendto(has, (LOCAL, 0))


@way
async def packet(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out:
        out.bind(("lo", 0x88B5))
        out.send(bytes(12) + b"\x88\xb5" + has)


@way
async def netlink(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 2) as out:
        out.sendto(struct.pack("=IHHII", 16 + len(has), 16, 0, 1, 0) + has, (places["netlink"], 0))


@way
async def vsock(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as out:
        out.connect((1, 25_253))
        out.sendall(has)


@way
async def path(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_UNIX) as out:
        out.connect(places["path"])
        out.sendall(has)


@way
async def path_of_datagrams(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(has, places["datagrams"])


@way
async def pair_of_datagrams(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        one, other = socket.socketpair(socket.AF_UNIX, kind)
        with one, other:
            one.sendto(has, places["datagrams"])


@way
async def pair_of_streams(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """A pair that is connected already; the control takes a pair of datagrams."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        tried(lambda kind=kind: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(has, places["datagrams"]))


@way
async def abstract(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    with socket.socket(socket.AF_UNIX) as out:
        out.connect(places["abstract"])
        out.sendall(has)


@way
async def inherited(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """Whatever socket the process has, with an address; the control leaves one open."""
    left = tried(lambda: connected(places))
    found = []
    for descriptor in range(1024):
        try:
            out = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        found.append([int(out.family), int(out.type)])
        for target in ((LOCAL, places["udp"]), places["path"], places["datagrams"]):
            tried(lambda out=out, target=target: out.sendto(has, socket.MSG_DONTWAIT, target))
            tried(lambda out=out, target=target: out.connect(target))
        if out.family == socket.AF_INET:
            out.sendall(has)
    return [found, isinstance(left, socket.socket)]


@way
async def child_process(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    connect = "socket.create_connection(('127.0.0.1', int(sys.argv[1])))"
    code = f"import socket,sys; {connect}.sendall(sys.argv[2].encode())"
    done = subprocess.run([sys.executable, "-c", code, str(places["tcp"]), has], capture_output=True)
    return done.stderr.decode()[-300:]


@way
async def orphan(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """A process that has left session and parent."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            tried(lambda: connected(places).sendall(has))
        os._exit(0)
    time.sleep(0.3)


@way
async def descriptor_of_another(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """pidfd_getfd, of a process that has a connection; in the control it is a child."""
    denied = []
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = tried(lambda: connected(places))
        os.write(tell, bytes([held.fileno() if isinstance(held, socket.socket) else 0]))
        time.sleep(5)
        os._exit(0)
    others = [(child, os.read(ready, 1)[0]), *((os.getppid(), number) for number in range(64))]
    for pid, number in others:
        if pid <= 0:
            continue
        try:
            descriptor = checked(libc.syscall(438, os.pidfd_open(pid), number, 0))
            os.write(descriptor, has)
        except OSError as error:
            denied.append(error.strerror)
    os.kill(child, 9)
    os.waitpid(child, 0)  # noqa: ASYNC222 - it is killed
    return sorted(set(denied))


class _Ring:
    """An io_uring of one entry, by its system calls."""

    def __init__(self) -> None:
        self._given = ctypes.create_string_buffer(120)
        self._ring = checked(libc.syscall(425, 4, self._given))
        words = struct.unpack_from("30I", self._given.raw)
        self._head, self._tail, self._mask, _, _, _, self._array = words[10:17]
        self._cq = words[20:28]
        self._sq = mmap.mmap(self._ring, self._array + words[0] * 4)
        self._done = mmap.mmap(self._ring, self._cq[5] + words[1] * 16, offset=0x8000000)
        self._entries = mmap.mmap(self._ring, words[0] * 64, offset=0x10000000)

    def run(
        self, code: int, descriptor: int, address: int, length: int, offset: int = 0, flags: int = 0
    ) -> int:
        entry = (code, 0, 0, descriptor, offset, address, length, flags, 1)
        self._entries[:64] = struct.pack("<BBHiQQIIQ", *entry).ljust(64, b"\0")
        tail = struct.unpack_from("I", self._sq, self._tail)[0]
        struct.pack_into("I", self._sq, self._array + (tail & 3) * 4, 0)
        struct.pack_into("I", self._sq, self._tail, tail + 1)
        checked(libc.syscall(426, self._ring, 1, 1, 1, None, 0))
        at = struct.unpack_from("I", self._done, self._cq[0])[0]
        _, result = struct.unpack_from("<Qi", self._done, self._cq[5] + (at % self._cq[3]) * 16)
        struct.pack_into("I", self._done, self._cq[0], at + 1)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return int(result)


@way
async def io_uring(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    """Socket, connection and data by a ring, which no filter of system calls sees."""
    ring = _Ring()
    out = ring.run(45, socket.AF_INET, 0, 0, offset=socket.SOCK_STREAM)
    address = ctypes.create_string_buffer(
        struct.pack("<H", 2) + struct.pack("!H4s8x", places["tcp"], b"\x7f\0\0\1"), 16
    )
    ring.run(16, out, ctypes.addressof(address), 0, offset=16)
    data = ctypes.create_string_buffer(has)
    return ring.run(26, out, ctypes.addressof(data), len(has))


@way
async def message_queue(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    number = {"x86_64": 240, "aarch64": 180}[os.uname().machine]
    queue = checked(libc.syscall(number, places["queue"].encode(), os.O_WRONLY, 0, None))
    checked(libc.syscall(number + 2, queue, has, len(has), 0, None))


@way
async def shared_memory(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    libc.shmat.restype = ctypes.c_void_p
    number = checked(libc.shmget(places["segment"], 4096, 0o600))
    ctypes.memmove(libc.shmat(number, None, 0), has, len(has))


@way
async def file(ctx: Context[Any, Any], places: Places, has: bytes) -> Any:
    Path(places["file"]).write_bytes(has)
