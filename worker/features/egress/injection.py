"""Injection: values in the place of placeholders in a request, and masks over them in its answer. Pure."""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

MASK = b"[masked]"
Headers = list[tuple[bytes, bytes]]
# Bytes that one call of a decoder may give.
_DECODED = 64 * 1024
# What is held back of a body is a multiple of this, so that it does not give away a value's length.
_HELD = 256
# The first bytes of a form that are searched for: too many to guess by how long a search takes.
_START = 32
# Bytes between which a body is never held back: lines of server-sent events and of JSON end with one.
_BREAKS = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class InjectedValue:
    """A value for requests to one origin; it goes into the place of its placeholder, or into `header`."""

    placeholder: bytes
    text: bytes = field(repr=False)
    header: bytes | None = None


def inject(headers: Headers, values: Iterable[InjectedValue]) -> Headers:
    """The headers with these values."""
    for value in values:
        if value.header is not None:
            headers = [(name, text) for name, text in headers if name.lower() != value.header]
            headers.append((value.header, value.text))
        headers = [(name, _replaced(name, text, value)) for name, text in headers]
    return headers


def _replaced(name: bytes, text: bytes, value: InjectedValue) -> bytes:
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
    """How a service may give a value back: as it is, escaped for URLs, JSON or HTML, in UTF-16 or base64."""
    found = {value, b"".join(b"%%%02X" % byte for byte in value)}
    # As Python, Java and JavaScript encode URLs, and forms.
    found |= {
        quote(value, safe=kept).encode() for kept in ("", "/", "+/=", "*-._", "!'()*", "!'()*;,/?:@&=+$#")
    }
    found |= {form.replace(b"%20", b"+") for form in found if b" " in value}
    found |= {re.sub(rb"%[0-9A-F]{2}", lambda code: code[0].lower(), form) for form in found}
    for text in {value.decode("latin-1"), value.decode(errors="replace")}:
        quoted = json.dumps(text)[1:-1].encode()
        found |= {quoted, quoted.replace(b"/", b"\\/"), json.dumps(text, ensure_ascii=False)[1:-1].encode()}
        # As encoders write it that expect HTML around it.
        found.add(re.sub(rb"[<>&'+]", lambda sign: b"\\u%04x" % ord(sign[0]), quoted))
        found |= {
            _escaped(text).encode(),
            _escaped(text, quote=False).encode(),
            _escaped(text).encode("latin-1", "replace"),
        }
        found |= {text.encode("utf-16-le"), text.encode("utf-16-be")}
    for offset in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(bytes(offset) + value).rstrip(b"=")
            # Without the characters that the bytes before and after it are part of.
            start, end = (0, 2, 3)[offset], len(encoded) - (1 if (offset + len(value)) % 3 else 0)
            found.add(encoded[start:end])
    return {form for form in found if form}


# As `html.escape` does, whose module has a table of 0.4 MB.
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_QUOTES = str.maketrans({'"': "&quot;", "'": "&#x27;"})


def _escaped(text: str, *, quote: bool = True) -> str:
    text = text.translate(_ENTITIES)
    return text.translate(_QUOTES) if quote else text


class MaskForms:
    """The forms of some values, for masks of many answers.

    They are searched for one by one: `re` would keep a pattern, and so the values, after their attempt, and
    takes longer to compile it than a request takes.
    """

    def __init__(self, values: Iterable[bytes]) -> None:
        self._values = tuple(values)
        found = self._all()
        # All of them take ten times what a value takes, and most answers have none.
        self._starts = {form[:_START] for form in found}
        self.longest = -(-max(map(len, found), default=0) // _HELD) * _HELD
        self.breaks = b"" if any(sign in form for form in found for sign in _BREAKS) else _BREAKS

    def spans(self, text: bytes) -> list[tuple[int, int]]:
        """Where the values are, in order; forms that overlap are one span."""
        found: list[tuple[int, int]] = []
        if not any(start in text for start in self._starts):
            return found
        for form in self._all():
            at = text.find(form)
            while at >= 0:
                found.append((at, at + len(form)))
                at = text.find(form, at + 1)
        found.sort()
        merged: list[tuple[int, int]] = []
        for start, end in found:
            if merged and start < merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        return merged

    def _all(self) -> list[bytes]:
        return sorted({form for value in self._values for form in forms(value)})

    def mask(self, text: bytes) -> bytes:
        return self.masked(text, len(text))[0]

    def headers(self, headers: Headers) -> Headers:
        """The headers masked; most have no value, which one search tells."""
        if not self.spans(b"\n".join(part for header in headers for part in header)):
            return headers
        return [(self.mask(name), self.mask(value)) for name, value in headers]

    def masked(self, text: bytes, until: int) -> tuple[bytes, int]:
        """The text up to a place, masked, and where it ends: a value that begins before that is whole."""
        passed, at = [], 0
        for start, end in self.spans(text):
            if start >= until:
                break
            passed += [text[at:start], MASK]
            at = end
        place = max(at, until)
        return b"".join([*passed, text[at:place]]), place


class Mask:
    """Masks values in a body that arrives in parts; a value may be cut between two of them.

    `forms` gives those of the values that are masked now. What is held back must not depend on the values.
    Else a run could have a service give its guess back, see from the parts of the answer whether it was held
    back, and so find a value one character after the other.
    """

    def __init__(self, forms: Callable[[], MaskForms]) -> None:
        self._forms = forms
        self._kept = b""

    def feed(self, part: bytes) -> bytes:
        """What of the body can be passed on: up to the last break, or to as far as a value may reach."""
        data, forms = self._kept + part, self._forms()
        safe = max(len(data) - forms.longest + 1, *(data.rfind(sign) + 1 for sign in forms.breaks), 0)
        passed, end = forms.masked(data, safe)
        self._kept = data[end:]
        return passed

    def end(self) -> bytes:
        kept, self._kept = self._kept, b""
        return self._forms().mask(kept)


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
        while True:
            part = self._decoder.decompress(data, _DECODED)
            if part:
                yield part
            data = self._decoder.unconsumed_tail
            if self._decoder.eof:
                data = self._decoder.unused_data
                if not data:
                    return
                # Files in gzip may follow one another.
                self._decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
            elif not data and len(part) < _DECODED:
                return


def decoder_of(encoding: bytes) -> Decoder | None:
    """The decoder for a Content-Encoding; None for one that is not known."""
    match encoding.strip().lower():
        case b"" | b"identity":
            return NoDecoder()
        case b"gzip" | b"x-gzip" | b"deflate":
            return ZlibDecoder()
    return None
