"""The Emitter protocol, with no sockets in it: channels, options, requests, answers, errors.

Emitter speaks MQTT 3.1.1, but a topic on its wire is ``key/channel/?options``, and a client
asks the broker something by publishing JSON to ``emitter/<request>/``. Both directions are
here, so the client, the broker and the tests use the same code.

Sources: emitter-io/emitter, ``internal/security/channel.go``, ``internal/errors/error.go``,
``internal/service/*`` and ``internal/message/id.go``; its JSON is Go's ``encoding/json``.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec

__all__ = [
    "API",
    "BAD_REQUEST",
    "ERROR_TOPIC",
    "FORBIDDEN",
    "LINK_INVALID",
    "LONGEST_KEEPALIVE",
    "MAX_PACKET",
    "MAX_TTL",
    "NOT_FOUND",
    "OLDEST_TIME",
    "RETAINED_TTL",
    "SERVER_ERROR",
    "SHARE",
    "TARGET_INVALID",
    "TARGET_TOO_LONG",
    "TIME_ORIGIN",
    "UNAUTHORIZED",
    "UNAUTHORIZED_EXTEND",
    "YOUNGEST_TIME",
    "BadRequest",
    "Channel",
    "Fault",
    "HistoryRequest",
    "InvalidChannel",
    "KeybanRequest",
    "KeygenRequest",
    "LinkRequest",
    "MessageId",
    "PresenceRequest",
    "answer",
    "build_topic",
    "effective_keepalive",
    "is_link_name",
    "is_option",
    "normalize_subscription",
    "parse_channel",
    "split_share",
]

API: Final = "emitter"
"""Takes the place of the key in requests to the broker."""

ERROR_TOPIC: Final = "emitter/error/"
"""Where the broker reports refusals."""

SHARE: Final = "$share"
"""First segment of a subscription within a share group."""

MAX_PACKET: Final = 65536
"""Longest MQTT packet, as its remaining length counts it, in both directions."""

LONGEST_KEEPALIVE: Final = 90
"""Seconds. A broker in Go closes links that were silent for 120 s, whatever CONNECT said."""

OLDEST_TIME: Final = 1_514_764_800
"""2018-01-01: ``from`` and ``until`` before that count as absent."""

YOUNGEST_TIME: Final = 3_029_529_600
"""2066-01-01: ``from`` and ``until`` after that count as absent."""

TIME_ORIGIN: Final = OLDEST_TIME
"""Unix seconds that the time in a message id counts from."""

RETAINED_TTL: Final = 30 * 24 * 3600
"""Seconds that a message published with the retain flag is stored for."""

MAX_TTL: Final = 0xFFFF_FFFF
"""Longest time that a message is stored for, in seconds; more counts as this."""


class InvalidChannel(ValueError):
    """A topic that is no ``key/channel/?options``. The topic, which holds a key, is not in it."""


class BadRequest(ValueError):
    """The JSON of a request cannot be read, or holds a value of the wrong type."""


# --- errors ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """The broker's answer to a refused request; generic, so that it gives nothing away."""

    status: int
    message: str

    def body(self, req: int = 0) -> bytes:
        """Return the JSON; *req* is the packet id of the refused packet, 0 for none."""
        return answer({"status": self.status, "message": self.message}, req)


BAD_REQUEST: Final = Fault(400, "the request was invalid or cannot be otherwise served")
UNAUTHORIZED: Final = Fault(
    401, "the security key provided is not authorized to perform this operation"
)
UNAUTHORIZED_EXTEND: Final = Fault(
    401, "the security key with extend permission can only be used for private links"
)
FORBIDDEN: Final = Fault(
    403, "the request is understood, but it has been refused or access is not allowed"
)
NOT_FOUND: Final = Fault(404, "the resource requested does not exist")
TARGET_INVALID: Final = Fault(
    400, "channel should end with `/` for strict types or `/#/` for wildcards"
)
TARGET_TOO_LONG: Final = Fault(400, "channel can not have more than 23 parts")
LINK_INVALID: Final = Fault(400, "the link must be an alphanumeric string of 1 or 2 characters")
SERVER_ERROR: Final = Fault(
    500, "an unexpected condition was encountered and no more specific message is suitable"
)


# --- channels --------------------------------------------------------------------------

# One pass over a topic of any length: every alternative begins with another character.
_SEGMENT: Final = r"(?:[+#*]|[$\-.0-9:A-Za-z\[\\\]^_`]+)/"
_PAIR: Final = r"[A-Za-z0-9]+=[A-Za-z0-9]+"
_TOPIC: Final = re.compile(
    rf"(?P<key>[^/]+)/(?P<channel>(?:{_SEGMENT})+)"
    rf"(?P<query>\?(?P<options>(?:{_PAIR}(?:&{_PAIR})*&?)?))?",
    re.ASCII,
)
_OPTION: Final = re.compile(_PAIR, re.ASCII)
_LINK: Final = re.compile(r"[A-Za-z0-9]{1,2}", re.ASCII)
_INT64: Final = 1 << 63


@dataclass(frozen=True, slots=True)
class Channel:
    """A topic, taken apart. Its repr does not show the key.

    Attributes:
        key: Not checked; ``emitter`` in a request to the broker.
        name: The channel without key and options, with its trailing slash.
        options: Names and values in their order; names may repeat.
        is_static: Whether it has no wildcard.
    """

    key: str
    name: str
    options: tuple[tuple[str, str], ...] = ()
    is_static: bool = True

    def __repr__(self) -> str:
        return f"Channel({self.name!r}, options={self.options!r})"

    @property
    def segments(self) -> tuple[str, ...]:
        """The parts between the slashes."""
        return tuple(self.name[:-1].split("/"))

    @property
    def query(self) -> str:
        """The options as they stand in a topic, with their ``?``, or ``""``."""
        if not self.options:
            return ""
        return "?" + "&".join(f"{name}={value}" for name, value in self.options)

    @property
    def ttl(self) -> int | None:
        """Seconds to store a message for."""
        return self._number("ttl")

    @property
    def last(self) -> int | None:
        """How many stored messages to replay."""
        return self._number("last")

    @property
    def since(self) -> int | None:
        """Unix seconds that replay begins at; None for the beginning."""
        return self._time("from")

    @property
    def until(self) -> int | None:
        """Unix seconds that replay ends at, inclusive; None for no end."""
        return self._time("until")

    @property
    def excludes_publisher(self) -> bool:
        """Whether the publisher does not want its own message (``me=0``)."""
        return self._number("me") == 0

    def _number(self, name: str) -> int | None:
        for found, value in self.options:
            if found == name:
                # At most 19 digits: int() of a long text takes quadratic time.
                if not value.isdecimal() or len(value.lstrip("0")) > 19:
                    return None
                number = int(value)
                return number if number < _INT64 else None
        return None

    def _time(self, name: str) -> int | None:
        value = self._number(name)
        return value if value is not None and OLDEST_TIME <= value <= YOUNGEST_TIME else None


def parse_channel(topic: str) -> Channel:
    """Take a topic apart.

    >>> parse_channel("key/demo/room/?ttl=60&me=0")
    Channel('demo/room/', options=(('ttl', '60'), ('me', '0')))

    Raises:
        InvalidChannel: It has no key, no trailing slash, an empty segment, a character that
            channels cannot have, a wildcard beside other text, or options that are not
            ``name=value``.
    """
    found = _TOPIC.fullmatch(topic)
    if found is None:
        raise InvalidChannel(
            "not a channel: segments of A-Z a-z 0-9 and $ - . : [ \\ ] ^ _ `, a '/' after each, "
            "then at most '?' and options"
        )
    name = found["channel"]
    is_static = not ("+" in name or "#" in name or "*" in name)
    options: tuple[tuple[str, str], ...] = ()
    if found["options"]:
        pairs = found["options"].removesuffix("&").split("&")
        options = tuple(cast("tuple[str, str]", tuple(pair.split("=", 1))) for pair in pairs)
    return Channel(found["key"], name, options, is_static)


def normalize_subscription(topic: str) -> str:
    """Return a topic as SUBSCRIBE means it: ``k/a/#`` is ``k/a/#/``.

    One pass for ``#`` and one for ``//``, over the whole topic, as the Go broker does it.
    """
    return topic.replace("#", "#/").replace("//", "/")


def split_share(channel: str) -> tuple[str | None, str]:
    """Return the share group of a channel, or None, and the channel within it.

    >>> split_share("$share/workers/jobs/")
    ('workers', 'jobs/')
    """
    first, _, rest = channel.partition("/")
    if first != SHARE or not rest:
        return None, channel
    group, _, inner = rest.partition("/")
    return group, inner


def effective_keepalive(seconds: int) -> int:
    """Return a keepalive that no broker takes for an idle link; 0, for none, is no such."""
    return min(seconds or LONGEST_KEEPALIVE, LONGEST_KEEPALIVE)


def is_link_name(name: str) -> bool:
    """Whether *name* can be the name of a link: one or two letters or digits."""
    return _LINK.fullmatch(name) is not None


def is_option(name: str, value: str) -> bool:
    """Whether a topic can have that option: letters and digits on both sides."""
    return _OPTION.fullmatch(f"{name}={value}") is not None


def build_topic(
    key: str, channel: str, options: Iterable[tuple[str, str]] = (), *, group: str = ""
) -> str:
    """Return ``key/channel/?options``; slashes around key, channel and group do not matter.

    >>> build_topic("K", "a/b", [("ttl", "5")])
    'K/a/b/?ttl=5'
    """
    parts = [key.strip("/")] if key else []
    if group:
        parts += [SHARE, group.strip("/")]
    parts.append(channel.strip("/"))
    query = "&".join(f"{name}={value}" for name, value in options)
    return "/".join(parts) + ("/?" + query if query else "/")


# --- requests --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeygenRequest:
    """Make a key, or with an extendable key a private channel."""

    key: str = ""
    channel: str = ""
    type: str = ""
    ttl: int = 0

    @classmethod
    def decode(cls, payload: bytes) -> KeygenRequest:
        """Read the JSON; raises `BadRequest`."""
        body = _Body(payload)
        return cls(body.text("key"), body.text("channel"), body.text("type"), body.int32("ttl"))


@dataclass(frozen=True, slots=True)
class KeybanRequest:
    """Ban a key, or lift a ban."""

    secret: str = ""
    target: str = ""
    banned: bool = False

    @classmethod
    def decode(cls, payload: bytes) -> KeybanRequest:
        """Read the JSON; raises `BadRequest`."""
        body = _Body(payload)
        return cls(body.text("secret"), body.text("target"), bool(body.flag("banned")))


@dataclass(frozen=True, slots=True)
class LinkRequest:
    """Give a channel a short name on this connection."""

    key: str = ""
    channel: str = ""
    name: str = ""
    subscribe: bool = False

    @classmethod
    def decode(cls, payload: bytes) -> LinkRequest:
        """Read the JSON; raises `BadRequest`."""
        body = _Body(payload)
        return cls(
            body.text("key"), body.text("channel"), body.text("name"), bool(body.flag("subscribe"))
        )


@dataclass(frozen=True, slots=True)
class PresenceRequest:
    """Ask who is subscribed, or for changes of that.

    Attributes:
        status: Whether the present state is wanted.
        changes: True starts reports, False stops them, None leaves them as they are.
    """

    key: str = ""
    channel: str = ""
    status: bool = True
    changes: bool | None = None

    @classmethod
    def decode(cls, payload: bytes) -> PresenceRequest:
        """Read the JSON; raises `BadRequest`."""
        body = _Body(payload)
        channel = body.text("channel")
        status = body.flag("status")
        return cls(
            body.text("key"),
            channel if channel.endswith("/") else channel + "/",
            True if status is None else status,
            body.flag("changes"),
        )


@dataclass(frozen=True, slots=True)
class HistoryRequest:
    """Ask for stored messages.

    Attributes:
        topic: ``key/channel/?options``: here the key stands within.
        before: Continue with messages older than that one, or None.
    """

    topic: str = ""
    before: MessageId | None = None

    @classmethod
    def decode(cls, payload: bytes) -> HistoryRequest:
        """Read the JSON; raises `BadRequest`."""
        body = _Body(payload)
        text = body.text("startFromID")
        try:
            return cls(body.text("channel"), MessageId.parse(text) if text else None)
        except ValueError as exc:
            raise BadRequest("startFromID is no message id") from exc


class _Body:
    """A request's JSON, read as Go reads it into a struct.

    Names match in any case, the last of several wins, null leaves the default, and a value of
    another type is an error even where a number could be read from it.
    """

    def __init__(self, payload: bytes) -> None:
        try:
            found: object = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise BadRequest("the request is not JSON") from exc
        if found is None:
            found = {}
        if not isinstance(found, dict):
            raise BadRequest("the request is JSON, but no object")
        fields = cast("dict[str, object]", found)
        self._fields = {name.lower(): value for name, value in fields.items() if value is not None}

    def text(self, name: str) -> str:
        value = self._fields.get(name.lower(), "")
        if not isinstance(value, str):
            raise BadRequest(f"{name} must be text")
        return value

    def flag(self, name: str) -> bool | None:
        value = self._fields.get(name.lower())
        if value is not None and not isinstance(value, bool):
            raise BadRequest(f"{name} must be true or false")
        return value

    def int32(self, name: str) -> int:
        value = self._fields.get(name.lower(), 0)
        if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
            raise BadRequest(f"{name} must be a whole number of 32 bits")
        return value


# --- answers ---------------------------------------------------------------------------


def answer(body: Mapping[str, Any], req: int = 0) -> bytes:
    """Return an answer's JSON: compact, *req* first where the request had a packet id."""
    return msgspec.json.encode({"req": req, **body} if req else body)


# --- message ids -----------------------------------------------------------------------

_ID: Final = struct.Struct(">IIII")


@dataclass(frozen=True, slots=True)
class MessageId:
    """Identifies a stored message; sorts by age within a channel.

    Attributes:
        bucket: Contract XOR hash of the first segment.
        time: Unix seconds.
        counter: Running number; of two messages the greater is the younger.
        process: Random number of the broker's process.
        tail: Contract and hashes of the segments, four bytes each.
    """

    bucket: int
    time: int
    counter: int
    process: int = 0
    tail: bytes = b""

    @property
    def age(self) -> tuple[int, int]:
        """Sort key; the oldest comes first."""
        return self.time, self.counter

    def to_bytes(self) -> bytes:
        """Return the id as it is sent; times and counters fall, so that bytes sort youngest first.

        The layout is the Go broker's.
        """
        since = (0xFFFF_FFFF - (self.time - TIME_ORIGIN)) & 0xFFFF_FFFF
        count = (0xFFFF_FFFF - self.counter) & 0xFFFF_FFFF
        return _ID.pack(self.bucket, since, count, self.process) + self.tail

    def __str__(self) -> str:
        return base64.b64encode(self.to_bytes()).decode()

    @classmethod
    def parse(cls, text: str) -> MessageId:
        """Read an id as it is sent.

        Raises:
            ValueError: It is none.
        """
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise ValueError("a message id is base64") from exc
        if len(data) < _ID.size:
            raise ValueError(f"a message id has {_ID.size} bytes at least, not {len(data)}")
        bucket, since, count, process = _ID.unpack_from(data)
        return cls(
            bucket,
            0xFFFF_FFFF - since + TIME_ORIGIN,
            0xFFFF_FFFF - count,
            process,
            data[_ID.size :],
        )
