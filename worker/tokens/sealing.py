"""Secrets at rest: AES-256-GCM-SIV bound to their row, under the keys of a key ring file."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from worker.errors import ConfigurationError, Conflict
from worker.model.claims import Digests

NONCE_BYTES = 12
KEY_BYTES = 32
FORMAT = b"\x01"
DIGEST_PURPOSE = b"orgworker: digests of claims"
_RESTORE = "restore the ring from its copy; no other ring opens what it sealed"
HEADER = "# Keys that seal the client secrets in the database. The last line seals, all of them open."


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys that open sealed secrets; the last one added seals new ones.

    The file has a line for each key, `KEY_ID BASE64`; `#` begins a comment.
    """

    path: Path
    _keys: Mapping[str, AESGCMSIV] = field(repr=False)
    _digest_keys: Mapping[str, bytes] = field(repr=False)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the key ring; raises ConfigurationError if it is missing, unreadable or damaged."""
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
        keys: dict[str, AESGCMSIV] = {}
        digest_keys: dict[str, bytes] = {}
        for number, words in enumerate(map(str.split, _key_lines(text.splitlines())), 1):
            key = _decode_key(words[1]) if len(words) == 2 else None
            if key is None or words[0] in keys:
                raise ConfigurationError(f"the key ring {path} is damaged at key {number}", fix=_RESTORE)
            keys[words[0]] = AESGCMSIV(key)
            digest_keys[words[0]] = _derived(key, DIGEST_PURPOSE)
        if not keys:
            raise ConfigurationError(f"the key ring {path} has no key in it", fix=_RESTORE)
        return cls(path, keys, digest_keys)

    @classmethod
    def generate(cls, path: Path) -> Self:
        """Make a key ring with one new key, readable by its owner; raises Conflict if the file exists."""
        with _rewriting(path, create=True) as lines:
            lines.append(_new_line())
        return cls.load(path)

    @classmethod
    def load_or_generate(cls, path: Path) -> Self:
        """Read the key ring, or make it if it does not exist."""
        if not path.exists():
            with suppress(Conflict):
                return cls.generate(path)
        return cls.load(path)

    def with_new_key(self) -> Self:
        """Add a key to the file, which seals from now on; the older ones still open."""
        with _rewriting(self.path) as lines:
            lines.append(_new_line())
        return self.load(self.path)

    def without(self, key_id: str) -> Self:
        """Remove a key that no secret is sealed with any more; raises Conflict for the key that seals."""
        with _rewriting(self.path) as lines:
            if _key_lines(lines)[-1].split()[0] == key_id:
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

    def digests(self, key_id: str | None = None) -> Digests | None:
        """The digests of claims by a key of the ring, by default the newest; None if it is not there."""
        named = key_id or self.sealing_key_id
        key = self._digest_keys.get(named)
        return None if key is None else Digests(named, key)

    def seal(self, secret: str, *, org_id: str, credential_id: str) -> tuple[bytes, str]:
        """The secret sealed for one row, and the id of the key that sealed it."""
        return self._seal(secret, org_id, credential_id)

    def seal_token(self, text: str, place: Sequence[object]) -> tuple[bytes, str]:
        """An access token sealed for one `place`, of JSON values, and the id of the key that sealed it."""
        return self._seal(text, "access token", *place)

    def open_token(self, sealed: bytes, key_id: str, place: Sequence[object]) -> str | None:
        """The access token, or None if the ring lacks its key, or it is of another place or damaged."""
        return self._open(sealed, key_id, "access token", *place)

    def seal_attempt(self, text: str, place: Sequence[object]) -> str:
        """What a worker records of an attempt on a host, sealed for one `place`, of JSON values, as text."""
        sealed, key_id = self._seal(text, "attempt", *place)
        return f"{key_id}.{base64.b64encode(sealed).decode()}"

    def open_attempt(self, sealed: str, place: Sequence[object]) -> str | None:
        """That record, or None if the ring lacks its key, or it is of another place or was changed."""
        key_id, _, encoded = sealed.partition(".")
        try:
            raw = base64.b64decode(encoded, validate=True)
        except ValueError:
            return None
        return self._open(raw, key_id, "attempt", *place)

    def seal_secret(
        self, value: str, *, org_id: str, name: str, generation: int, origin: str | None, header: str | None
    ) -> tuple[bytes, str]:
        """An org's secret sealed for its row and binding, and the id of the key that sealed it."""
        return self._seal(value, *_place_of_secret(org_id, name, generation, origin, header))

    def unseal_secret(
        self,
        sealed: bytes,
        key_id: str,
        *,
        org_id: str,
        name: str,
        generation: int,
        origin: str | None,
        header: str | None,
    ) -> str:
        """An org's secret.

        Raises:
            ConfigurationError: its key is not in the ring, or it was sealed for another row, generation or
                binding, or damaged.
        """
        # `secrets rotate` would seal a new value for whatever origin the row has now.
        fix = (
            f"store it again: `python -m worker secrets remove ORG {name}`, then `secrets add ORG {name}`, "
            "with --for ORIGIN if it was bound"
        )
        if key_id not in self._keys:
            raise ConfigurationError(
                f"the secret {name} is sealed with the key {key_id}, which is not in {self.path}",
                fix=f"put the key's line back into the key ring, or {fix}",
            )
        value = self._open(sealed, key_id, *_place_of_secret(org_id, name, generation, origin, header))
        if value is None:
            raise ConfigurationError(
                f"the secret {name} does not open: it is damaged, from another row, or its binding was "
                "changed in the row",
                fix=fix,
            )
        return value

    def unseal(self, sealed: bytes, key_id: str, *, org_id: str, credential_id: str) -> str:
        """The secret of one row.

        Raises:
            ConfigurationError: its key is not in the ring, or it was sealed for another row or damaged.
        """
        if key_id not in self._keys:
            raise ConfigurationError(
                f"credential {credential_id} is sealed with the key {key_id}, which is not in {self.path}",
                fix="put the key's line back into the key ring, or add the credential again",
            )
        secret = self._open(sealed, key_id, org_id, credential_id)
        if secret is None:
            raise ConfigurationError(
                f"the secret of credential {credential_id} does not open: it is damaged, or from another row",
                fix="add the credential again with `python -m worker credentials add`",
            )
        return secret

    def seal_request(self, data: bytes, place: Sequence[object]) -> bytes:
        """A model request or its result sealed for one `place`, of JSON values; begins with the key's id."""
        sealed, key_id = self._seal_bytes(data, "model request", *place)
        return key_id.encode() + b"." + sealed

    def open_request(self, sealed: bytes, place: Sequence[object]) -> bytes | None:
        """That data, or None if the ring lacks its key, or it is of another place or damaged."""
        key_id, _, raw = sealed.partition(b".")
        return self._open_bytes(raw, key_id.decode("ascii", "replace"), "model request", *place)

    def _seal(self, text: str, *place: object) -> tuple[bytes, str]:
        return self._seal_bytes(text.encode(), *place)

    def _seal_bytes(self, data: bytes, *place: object) -> tuple[bytes, str]:
        key_id, nonce = self.sealing_key_id, os.urandom(NONCE_BYTES)
        ciphertext = self._keys[key_id].encrypt(nonce, data, _associated(key_id, place))
        return FORMAT + nonce + ciphertext, key_id

    def _open(self, sealed: bytes, key_id: str, *place: object) -> str | None:
        opened = self._open_bytes(sealed, key_id, *place)
        return None if opened is None else opened.decode()

    def _open_bytes(self, sealed: bytes, key_id: str, *place: object) -> bytes | None:
        key = self._keys.get(key_id)
        nonce, ciphertext = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
        if key is not None and sealed[:1] == FORMAT and len(ciphertext) >= 16:
            with suppress(InvalidTag):
                return key.decrypt(nonce, ciphertext, _associated(key_id, place))
        return None


@contextmanager
def _rewriting(path: Path, *, create: bool = False) -> Iterator[list[str]]:
    """The file's lines, to be edited; they replace the file as a whole, one process at a time."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        if create:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Lock the folder, not the file, which is replaced: a key that another process adds is not lost.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            lines = [HEADER] if create else path.read_text(encoding="ascii").splitlines()
            yield lines
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
            # A link never replaces an existing file.
            (os.link if create else os.replace)(draft, path)
            os.fsync(folder)
        finally:
            draft.unlink(missing_ok=True)
            os.close(folder)
    except FileExistsError:
        raise Conflict(
            f"the key ring {path} already exists", fix="keep it; `keys rekey` seals everything with a new key"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"the key ring {path} cannot be written: {error.strerror}",
            fix="run the command as the owner of its folder, or choose another secrets_dir",
        ) from None


def _key_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _associated(key_id: str, place: Sequence[object]) -> bytes:
    """What a ciphertext is bound to; all but a credential's place begins with a word for what is sealed."""
    # JSON, so that no two places have the same text.
    return json.dumps([*place, key_id]).encode()


def _place_of_secret(
    org_id: str, name: str, generation: int, origin: str | None, header: str | None
) -> tuple[object, ...]:
    """Where an org's secret belongs: a change of the binding in its row cannot redirect it."""
    if origin is None and header is None:
        return "org secret", org_id, name, generation
    return "bound secret", org_id, name, generation, origin, header


def _new_line() -> str:
    key = base64.b64encode(AESGCMSIV.generate_key(KEY_BYTES * 8)).decode()
    return f"k{secrets.token_hex(4)} {key}"


def _derived(key: bytes, purpose: bytes) -> bytes:
    """A key for another purpose (RFC 5869): it tells nothing about the key that seals."""
    return HKDF(SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(key)


def _decode_key(text: str) -> bytes | None:
    try:
        key = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None
