"""The NATS client protocol, with no sockets in it: bytes in, events out.

A dozen verbs in text; payloads and header blocks are counted in bytes. Lines are split at single
spaces only: a subject may hold VT, FF, NUL and bytes that are no UTF-8, and splitting at any
white space would shift every field behind it. Subjects therefore stay bytes here.

The server speaks first, and what it says first is ``INFO``; a peer that says anything else is no
NATS server.

Source: docs.nats.io, "Client Protocol"; observed on nats-server 2.9.10 to 2.15.1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

import msgspec

__all__ = [
    "MAX_HEADERS",
    "MAX_LINE",
    "PING",
    "PONG",
    "Err",
    "Event",
    "Info",
    "Msg",
    "Ok",
    "Parser",
    "Ping",
    "Pong",
    "ProtocolError",
    "encode_connect",
    "encode_pub",
    "encode_sub",
    "encode_unsub",
    "unquote",
]

MAX_LINE = 256 * 1024
"""Longest control line that is read, in bytes: an INFO lists every server of a cluster."""

MAX_HEADERS = 64 * 1024
"""Bytes beyond ``max_payload`` that a message may have: the server adds headers of its own."""

_DEFAULT_PAYLOAD = 1024 * 1024
# The server's protocol has no more than 31 bits for a size.
_MOST_PAYLOAD = 2**31 - 1

PING = b"PING\r\n"
PONG = b"PONG\r\n"


class ProtocolError(Exception):
    """The peer sent what no NATS server sends; the connection cannot go on."""


class Msg(msgspec.Struct, frozen=True, gc=False):
    """One message for the subscription *sid*.

    Attributes:
        reply: Where an answer goes, or ``b""``.
        header: The header block, or ``b""``.
    """

    subject: bytes
    sid: int
    reply: bytes
    header: bytes
    payload: bytes


class Info(msgspec.Struct, frozen=True):
    """What the server tells of itself; it may come at any time."""

    fields: Mapping[str, Any]


class Err(msgspec.Struct, frozen=True):
    """An error, without its quotes. Whether the connection lives on depends on the text."""

    text: str


class Ping(msgspec.Struct, frozen=True):
    """The server wants a PONG."""


class Pong(msgspec.Struct, frozen=True):
    """The server has acted upon everything before our PING."""


class Ok(msgspec.Struct, frozen=True):
    """Only in verbose mode."""


Event: TypeAlias = Msg | Info | Err | Ping | Pong | Ok

_PING = Ping()
_PONG = Pong()
_OK = Ok()


class Parser:
    """Turns the server's bytes into events.

    Good events come before the `ProtocolError` of the bad bytes behind them; after that the
    parser stays broken. What it holds is bounded by one line, or by one message of the size
    that the server itself announced.

    Attributes:
        max_payload: The most that any INFO of this connection allowed.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        # Bytes that the rest must reach before looking at it again is of use.
        self._needed = 0
        self._greeted = False
        self._broken: ProtocolError | None = None
        self.max_payload = 0

    @property
    def pending(self) -> int:
        """Bytes that wait for the rest of their event."""
        return len(self._rest)

    def receive(self, data: bytes) -> Iterator[Event]:
        """Yield the events that *data* completes; iterate to the end.

        Raises:
            ProtocolError: See the class.
        """
        if self._broken is not None:
            raise self._broken
        rest = self._rest
        if rest:
            searched = len(rest)
            rest += data
            if len(rest) < self._needed:
                return
            if not self._needed and b"\n" not in data:
                self._check_line(bytes(rest[:8]), searched + len(data))
                return
            data = bytes(rest)
            rest.clear()
        self._needed = 0
        position = 0
        size = len(data)
        try:
            while position < size:
                end = data.find(b"\r\n", position)
                if end < 0:
                    self._check_line(data[position : position + 8], size - position)
                    break
                if end - position > MAX_LINE:
                    raise _long_line()
                # The hot path: everything else is rare.
                if data.startswith(b"MSG ", position) and self._greeted:
                    parts = data[position + 4 : end].split(b" ")
                    start = end + 2
                    try:
                        if len(parts) == 3:
                            subject, sid, count = parts
                            reply = b""
                        else:
                            subject, sid, reply, count = parts
                        length = _number(count)
                        number = _number(sid)
                    except ValueError:
                        raise ProtocolError("a MSG whose fields cannot be read") from None
                    if length > self.max_payload + MAX_HEADERS:
                        raise _too_large(length, self.max_payload)
                    stop = start + length
                    if stop + 2 > size:
                        self._needed = stop + 2 - position
                        break
                    if not data.startswith(b"\r\n", stop):
                        raise ProtocolError("a payload that does not end where it must")
                    position = stop + 2
                    yield Msg(subject, number, reply, b"", data[start:stop])
                    continue
                line = data[position:end]
                if not line.startswith(b"HMSG ") or not self._greeted:
                    event = self._control(line)
                    position = end + 2
                    yield event
                    continue
                parts = line[5:].split(b" ")
                start = end + 2
                try:
                    if len(parts) == 4:
                        subject, sid, header, total = parts
                        reply = b""
                    else:
                        subject, sid, reply, header, total = parts
                    number, split, length = _number(sid), _number(header), _number(total)
                except ValueError:
                    raise ProtocolError("an HMSG whose fields cannot be read") from None
                if split > length:
                    raise ProtocolError(f"headers of {split} bytes in a message of {length}")
                if length > self.max_payload + MAX_HEADERS:
                    raise _too_large(length, self.max_payload)
                stop = start + length
                if stop + 2 > size:
                    self._needed = stop + 2 - position
                    break
                if not data.startswith(b"\r\n", stop):
                    raise ProtocolError("a payload that does not end where it must")
                position = stop + 2
                split += start
                yield Msg(subject, number, reply, data[start:split], data[split:stop])
        except ProtocolError as error:
            self._broken = error
            raise
        if position < size:
            rest += data[position:]

    def _check_line(self, begin: bytes, length: int) -> None:
        """Check a line whose end has not come yet."""
        if not self._greeted and not b"INFO ".startswith(begin[:5].upper()):
            raise self._no_server()
        if length > MAX_LINE:
            raise self._fail(_long_line())

    def _fail(self, error: ProtocolError) -> ProtocolError:
        self._broken = error
        return error

    def _no_server(self) -> ProtocolError:
        return self._fail(ProtocolError("the first bytes are no INFO"))

    def _control(self, line: bytes) -> Event:
        verb, _, rest = line.partition(b" ")
        verb = verb.upper()
        if not self._greeted and verb != b"INFO":
            raise self._no_server()
        match verb:
            case b"PONG":
                return _PONG
            case b"PING":
                return _PING
            case b"+OK":
                return _OK
            case b"-ERR":
                return Err(rest.strip().strip(b"'").decode("utf-8", "replace"))
            case b"INFO":
                return self._info(rest)
            case _:
                raise ProtocolError("a verb that no NATS server has")

    def _info(self, text: bytes) -> Info:
        try:
            fields: object = json.loads(text)
        except (ValueError, RecursionError):
            raise ProtocolError("an INFO that is no JSON") from None
        if not isinstance(fields, dict):
            raise ProtocolError("an INFO that is no JSON object")
        told: object = cast("dict[str, object]", fields).get("max_payload", _DEFAULT_PAYLOAD)
        if not isinstance(told, int) or not 0 < told <= _MOST_PAYLOAD:
            raise ProtocolError("an INFO with an impossible max_payload")
        # A server may allow less from now on, and still deliver what it took before.
        self.max_payload = max(self.max_payload, told)
        self._greeted = True
        return Info(cast("dict[str, Any]", fields))


def _number(text: bytes) -> int:
    # int() alone takes signs, spaces and underscores, and as many digits as there are.
    if not text.isdigit() or len(text) > 19:
        raise ValueError("no number")
    return int(text)


def _too_large(length: int, limit: int) -> ProtocolError:
    return ProtocolError(f"a message of {length} bytes where the server announced {limit}")


def _long_line() -> ProtocolError:
    return ProtocolError(f"a line of more than {MAX_LINE} bytes")


def encode_connect(fields: Mapping[str, object]) -> bytes:
    """Return a CONNECT."""
    return b"CONNECT " + json.dumps(fields, separators=(",", ":")).encode() + b"\r\n"


def encode_pub(subject: bytes, payload: bytes, header: bytes = b"", reply: bytes = b"") -> bytes:
    """Return a PUB, or an HPUB where there is a header block."""
    to = subject + b" " + reply if reply else subject
    if header:
        return b"HPUB %b %d %d\r\n%b%b\r\n" % (
            to,
            len(header),
            len(header) + len(payload),
            header,
            payload,
        )
    return b"PUB %b %d\r\n%b\r\n" % (to, len(payload), payload)


def encode_sub(subject: bytes, sid: int, queue: bytes = b"") -> bytes:
    """Return a SUB, in the queue group *queue* where that is not empty."""
    if queue:
        return b"SUB %b %b %d\r\n" % (subject, queue, sid)
    return b"SUB %b %d\r\n" % (subject, sid)


def encode_unsub(sid: int) -> bytes:
    """Return an UNSUB that takes effect at once."""
    return b"UNSUB %d\r\n" % sid


_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))")
_ESCAPES = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def unquote(text: str) -> str:
    r"""Return what Go's ``%q`` made *text* of, without its quotes.

    >>> unquote(r"a\vb\"c")
    'a\x0bb"c'
    """

    def plain(found: re.Match[str]) -> str:
        number = found[1] or found[2] or found[3]
        if number is None:
            return _ESCAPES.get(found[4], found[4])
        code = int(number, 16)
        return chr(code) if code <= 0x10FFFF else found[0]

    return _ESCAPE.sub(plain, text)
