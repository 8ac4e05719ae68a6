"""Door: the descriptor by which a run reaches the broker. Without httpx: most runs send nothing."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct

# A message that passes a stream, and one that asks the broker for one.
PASS = b"s"
GIVE = b"give"
# Times that it is asked, and seconds that each answer may take: it may be starting again.
ASKED = 5
PATIENCE = 0.5
_INT = struct.Struct("i")
_RECEIVE = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Door:
    """The descriptor by which a run's process reaches the broker."""

    def __init__(self, descriptor: int) -> None:
        # With its kind given, the kernel need not be asked for that.
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, descriptor)

    def connect(self) -> socket.socket:
        """A stream to the broker. Raises OSError once the attempt has ended."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                socket.send_fds(self._door, [PASS], [theirs.fileno()])
        except OSError as error:
            ours.close()
            if error.errno != errno.ETOOMANYREFS:
                raise
            return self._given()
        return ours

    def _given(self) -> socket.socket:
        """A stream that the broker makes, since this process may pass none.

        The kernel counts the descriptors in flight by account, and compares them with the limit of each
        process: another run has as many in flight as a run may have, and the broker may have more. All
        streams are alike, so it does not matter which process of the run gets which.
        """
        answered = select.poll()
        answered.register(self._door, select.POLLIN)
        for _ in range(ASKED):
            self._door.send(GIVE)
            if answered.poll(PATIENCE * 1000):
                try:
                    # Not `recv_fds`, which ignores its flags.
                    data, rights, _, _ = self._door.recvmsg(16, socket.CMSG_SPACE(_INT.size), _RECEIVE)
                except BlockingIOError:  # another thread or process has taken it
                    continue
                if not data:
                    raise BrokenPipeError(errno.EPIPE, "the attempt has ended")
                if rights:
                    return socket.socket(fileno=_INT.unpack_from(rights[0][2])[0])
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
