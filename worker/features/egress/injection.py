"""Injection: values in the place of placeholders in a request, and masks over them in its answer. Pure."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

MASK = b"[masked]"
Headers = list[tuple[bytes, bytes]]
# Bytes that one call of a decoder may give.
_DECODED = 64 * 1024
# The first bytes of a form that are searched for.
_HINT = 3


@dataclass(frozen=True, slots=True)
class Value:
    """A value for requests to one origin; it goes into the place of its placeholder, or into `header`."""

    placeholder: bytes
    text: bytes = field(repr=False)
    header: bytes | None = None


def inject(headers: Headers, values: Iterable[Value]) -> tuple[Headers, list[bytes]]:
    """The headers with these values, and the texts of the values that are in them now."""
    injected: list[bytes] = []
    for value in values:
        if value.header is not None:
            headers = [(name, text) for name, text in headers if name.lower() != value.header]
            headers.append((value.header, value.text))
            injected.append(value.text)
        before = headers
        headers = [(name, _replaced(name, text, value)) for name, text in headers]
        if headers != before:
            injected.append(value.text)
    return headers, injected


def _replaced(name: bytes, text: bytes, value: Value) -> bytes:
    if value.placeholder in text:
        return text.replace(value.placeholder, value.text)
    scheme, _, rest = text.partition(b" ")
    if name.lower() in (b"authorization", b"proxy-authorization") and scheme.lower() == b"basic":
        try:
            plain = base64.b64decode(rest.strip(), validate=True)
        except (binascii.Error, ValueError):
            return text
        if value.placeholder in plain:
            return scheme + b" " + base64.b64encode(plain.replace(value.placeholder, value.text))
    return text


def forms(value: bytes) -> set[bytes]:
    """How a service may give a value back: as it is, percent-encoded, in JSON, in base64 at any offset."""
    found = {value, b"".join(b"%%%02X" % byte for byte in value)}
    found |= {quote(value, safe=kept).encode() for kept in ("", "/", "+/=")}
    found |= {re.sub(rb"%[0-9A-F]{2}", lambda code: code[0].lower(), form) for form in found}
    quoted = json.dumps(value.decode("latin-1"))[1:-1].encode()
    found |= {quoted, quoted.replace(b"/", b"\\/")}
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(bytes(offset) + value).rstrip(b"=")
            # Without the characters that the bytes before and after it are part of.
            start, end = (0, 2, 3)[offset], len(encoded) - (1 if (offset + len(value)) % 3 else 0)
            found.add(encoded[start:end])
    return {form for form in found if form}


class Mask:
    """Masks values in texts, and in a body that arrives in parts; a value may be cut between two of them."""

    def __init__(self, values: Iterable[bytes]) -> None:
        found = sorted({form for value in values for form in forms(value)}, key=len, reverse=True)
        self._forms: Sequence[bytes] = found
        self._pattern = re.compile(b"|".join(map(re.escape, found)))
        self._longest = max(map(len, found))
        hints = {form[:_HINT] for form in found}
        self._hints = re.compile(b"|".join(b"(?=%b)" % re.escape(hint) for hint in sorted(hints)))
        self._kept = b""

    def text(self, text: bytes) -> bytes:
        return self._pattern.sub(MASK, text)

    def feed(self, part: bytes) -> bytes:
        """What of the body can be passed on: all but an end that may be the beginning of a value."""
        data = self.text(self._kept + part)
        at = self._suspicious(data)
        data, self._kept = data[:at], data[at:]
        return data

    def end(self) -> bytes:
        kept, self._kept = self._kept, b""
        return kept

    def _suspicious(self, data: bytes) -> int:
        """Where an end of the data begins that is the beginning of a form."""
        start = max(0, len(data) - self._longest + 1)
        places = [found.start() for found in self._hints.finditer(data, start)]
        places += range(max(start, len(data) - _HINT + 1), len(data))
        for place in places:
            rest = data[place:]
            if any(form.startswith(rest) for form in self._forms):
                return place
        return len(data)


class Decoder(Protocol):
    """Undoes the encoding of a body, so that it can be masked."""

    def feed(self, data: bytes) -> Iterator[bytes]: ...


class NoDecoder:
    def feed(self, data: bytes) -> Iterator[bytes]:
        yield data


class ZlibDecoder:
    """For gzip and deflate; a part at a time, however much there is in it."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The decoded parts. Raises zlib.error."""
        while data and not self._decoder.eof:
            part = self._decoder.decompress(data, _DECODED)
            if part:
                yield part
            data = self._decoder.unconsumed_tail


def decoder_of(encoding: bytes) -> Decoder | None:
    """The decoder for a Content-Encoding; None for one that is not known."""
    match encoding.strip().lower():
        case b"" | b"identity":
            return NoDecoder()
        case b"gzip" | b"x-gzip" | b"deflate":
            return ZlibDecoder()
    return None
