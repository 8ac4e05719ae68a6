"""Secrets at rest: AES-256-GCM-SIV bound to their row, under the keys of a key ring file."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV

from worker.errors import ConfigurationError, Conflict

NONCE_BYTES = 12
KEY_BYTES = 32
FORMAT = b"\x01"
_PUT_BACK = "put the ring back from its copy; what it sealed opens with no other"
HEADER = "# Keys that seal the client secrets in the database. The last line seals, all of them open.\n"


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys that open sealed secrets; the last one added seals new ones.

    The file has a line for each key, `KEY_ID BASE64`; `#` begins a comment.
    """

    path: Path
    _keys: Mapping[str, AESGCMSIV] = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the key ring.

        Raises:
            ConfigurationError: there is no such file, or it is no key ring.
        """
        try:
            text = path.read_text(encoding="ascii")
        except FileNotFoundError:
            raise ConfigurationError(
                f"no key ring at {path}",
                fix="make one with `python -m worker keys generate`, or put the old one back",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"the key ring {path} cannot be read: {error}",
                fix="let the user of this command read it, as the worker's user does",
            ) from None
        lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        keys: dict[str, AESGCMSIV] = {}
        for number, words in enumerate(lines, 1):
            key = _decode_key(words[1]) if len(words) == 2 else None
            if key is None or words[0] in keys:
                raise ConfigurationError(f"the key ring {path} is damaged at key {number}", fix=_PUT_BACK)
            keys[words[0]] = AESGCMSIV(key)
        if not keys:
            raise ConfigurationError(f"the key ring {path} has no key in it", fix=_PUT_BACK)
        return cls(path, keys)

    @classmethod
    def generate(cls, path: Path) -> Self:
        """Make a key ring with one new key, in a file that only its owner can read.

        Raises:
            Conflict: the file is there already; a new one in its place would lose the secrets it seals.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Linked into place when it is whole: of two processes that need it first, one wins.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            _write(draft, HEADER + _new_line())
            os.link(draft, path)
        except FileExistsError:
            raise Conflict(
                f"there is a key ring at {path} already",
                fix="keep it; `keys rekey` seals everything with a new key",
            ) from None
        except OSError as error:
            raise _unwritable(path, error) from None
        finally:
            draft.unlink(missing_ok=True)
        _flush_directory(path.parent)
        return cls.load(path)

    @classmethod
    def load_or_generate(cls, path: Path) -> Self:
        """Read the key ring, or make it where there is none yet."""
        if not path.exists():
            try:
                return cls.generate(path)
            except Conflict:
                pass
        return cls.load(path)

    def with_new_key(self) -> Self:
        """Add a key to the file, which seals from now on; the older ones still open."""
        with _rewriting(self.path) as lines:
            lines.append(_new_line().strip())
        return self.load(self.path)

    def without(self, key_id: str) -> Self:
        """Take a key out of the file. The caller knows that it seals nothing any more.

        Raises:
            Conflict: it is the key that seals.
        """
        with _rewriting(self.path) as lines:
            ids = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
            if key_id == ids[-1]:
                raise Conflict(f"the key {key_id} seals new secrets", fix="`keys rekey` adds another one")
            lines[:] = [line for line in lines if line.split()[:1] != [key_id]]
        return self.load(self.path)

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys, oldest first."""
        return tuple(self._keys)

    @property
    def sealing_key_id(self) -> str:
        """The id of the key that seals."""
        return self.key_ids[-1]

    def seal(self, secret: str, *, org_id: str, credential_id: str) -> tuple[bytes, str]:
        """The sealed secret and the id of the key that sealed it, for one row and no other."""
        key_id = self.sealing_key_id
        nonce = os.urandom(NONCE_BYTES)
        row = _row(org_id, credential_id, key_id)
        return FORMAT + nonce + self._keys[key_id].encrypt(nonce, secret.encode(), row), key_id

    def unseal(self, sealed: bytes, key_id: str, *, org_id: str, credential_id: str) -> str:
        """The secret of one row.

        Raises:
            ConfigurationError: its key is not in the ring, or it was sealed for another row or changed since.
        """
        key = self._keys.get(key_id)
        if key is None:
            raise ConfigurationError(
                f"credential {credential_id} is sealed with the key {key_id}, which is not in {self.path}",
                fix="put the key's line back into the key ring, or add the credential anew",
            )
        nonce, ciphertext = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
        try:
            if sealed[:1] == FORMAT and len(ciphertext) >= 16:
                return key.decrypt(nonce, ciphertext, _row(org_id, credential_id, key_id)).decode()
        except InvalidTag:
            pass
        raise ConfigurationError(
            f"the secret of credential {credential_id} does not open: it is another row's or damaged",
            fix="add the credential anew with `python -m worker credentials add`",
        )


@contextmanager
def _rewriting(path: Path) -> Iterator[list[str]]:
    """The file's lines, to be changed; they replace the file as a whole, one process at a time."""
    try:
        # The folder is locked, not the file, which is replaced: a key that another process adds is not lost.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            lines = path.read_text(encoding="ascii").splitlines()
            yield lines
            _write(draft, "\n".join(lines) + "\n")
            os.replace(draft, path)
            os.fsync(folder)
        finally:
            draft.unlink(missing_ok=True)
            os.close(folder)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"the key ring {path} cannot be written: {error.strerror}",
        fix="give the command as the owner of its folder, or name another one as secrets_dir",
    )


def _row(org_id: str, credential_id: str, key_id: str) -> bytes:
    # As JSON, so that no two rows can have the same text.
    return json.dumps([org_id, credential_id, key_id]).encode()


def _new_line() -> str:
    key = base64.b64encode(AESGCMSIV.generate_key(KEY_BYTES * 8)).decode()
    return f"k{secrets.token_hex(4)} {key}\n"


def _decode_key(text: str) -> bytes | None:
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
