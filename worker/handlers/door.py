"""Door: the descriptor by which a run reaches the broker. Without httpx: most runs send nothing."""

from __future__ import annotations

import socket


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
                socket.send_fds(self._door, [b"s"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        return ours
