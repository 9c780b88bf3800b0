"""JetStream's words, with no sockets in them: acknowledgements, answers, errors, positions.

Everything is a message: a request goes to a subject of the API, a confirmation comes to the reply
subject of the publish, and the reply subject of a delivery says where it stands in the stream.

Source: docs.nats.io, "JetStream wire API"; NATS ADR-15, ADR-31, ADR-43; observed on nats-server
2.9.10 to 2.15.1.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from pubsub_core.errors import (
    ConnectError,
    LimitReached,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PubSubError,
    SubscribeFailed,
)
from pubsub_core.message import Verdict

from .errors import printable

__all__ = [
    "TTL",
    "ApiError",
    "Position",
    "PubAck",
    "ack_payload",
    "consumer_name",
    "covers",
    "overlaps",
    "parse_ack",
    "parse_answer",
    "parse_position",
    "parse_ttl",
    "publish_error",
    "stream_error",
    "subscribe_error",
    "whole_seconds",
]

TTL = "Nats-TTL"

NO_RESPONDERS = 503
"""Status of an answer from the server itself: nobody listens."""


class ApiError(Exception):
    """The server answered a request with an error.

    Attributes:
        code: As HTTP has them.
        number: The server's own code, which does not change with its words; 0 where the
            answer came without one.
    """

    def __init__(self, code: int, number: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.number = number
        self.text = printable(text)


class _Error(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class PubAck(msgspec.Struct):
    """What a stream answers to a publish. Beside an error the other fields say nothing."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: _Error | None = None


_PUB_ACK = msgspec.json.Decoder(PubAck)


def parse_ack(payload: bytes) -> PubAck | None:
    """Return a stream's answer; None for what is none, since anybody may answer.

    >>> parse_ack(b'{"stream":"S","seq":7,"duplicate":true}').seq
    7
    """
    try:
        found = _PUB_ACK.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        return None
    return found if found.stream or found.error is not None else None


def parse_answer(payload: bytes) -> Mapping[str, Any]:
    """Return the answer to a request of the API.

    Raises:
        ApiError: It is an error, or no answer at all.
    """
    try:
        found: Any = json.loads(payload)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(0, 0, "an answer that is no JSON object")
    error: Any = found.get("error")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if isinstance(error, dict):
        raise ApiError(
            int(error.get("code", 0)),  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            int(error.get("err_code", 0)),  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
            str(error.get("description", "")),  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        )
    return found  # pyright: ignore[reportUnknownVariableType]


class Position(NamedTuple):
    """Where a delivery stands.

    Attributes:
        delivered: How often it was delivered, this time included.
        stream: Its number in the stream.
        consumer: Its number among the deliveries of the consumer.
        time: Unix seconds, when it was stored.
        pending: Messages behind it that the consumer has yet to deliver.
    """

    delivered: int
    stream: int
    consumer: int
    time: float
    pending: int


def parse_position(reply: bytes) -> Position | None:
    """Return what the reply subject of a delivery says, or None where it is another subject.

    >>> parse_position(b"$JS.ACK.S.c.2.17.5.1700000000500000000.3")
    Position(delivered=2, stream=17, consumer=5, time=1700000000.5, pending=3)
    """
    parts = reply.split(b".")
    # With a domain and an account's hash there are two more in front, and perhaps one behind.
    base = 4 if len(parts) == 9 else 6
    if len(parts) < base + 5 or parts[0] != b"$JS" or parts[1] != b"ACK":
        return None
    try:
        return Position(
            int(parts[base]),
            int(parts[base + 1]),
            int(parts[base + 2]),
            int(parts[base + 3]) / 1e9,
            int(parts[base + 4]),
        )
    except ValueError:
        return None


def ack_payload(verdict: Verdict, delay: float = 0.0, *, working: bool = False) -> bytes:
    """Return the payload that tells a consumer what became of a message.

    Args:
        verdict: What was decided.
        delay: Seconds before a message that is given back comes again.
        working: Nothing was decided yet: the time for acknowledging starts over.
    """
    if working:
        return b"+WPI"
    if verdict is Verdict.ACK:
        return b"+ACK"
    if verdict is Verdict.REJECT:
        return b"+TERM"
    return b'-NAK {"delay": %d}' % round(delay * 1e9) if delay > 0 else b"-NAK"


def whole_seconds(ttl: float) -> str:
    """Return *ttl* as the server takes it: whole seconds, one at least."""
    return f"{max(1, math.ceil(ttl))}s"


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_ttl(text: str | None) -> float | None:
    """Return the seconds of a ``Nats-TTL``; None for never, and for what cannot be read.

    >>> parse_ttl("1m30s"), parse_ttl("5"), parse_ttl("never")
    (90.0, 5.0, None)
    """
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text[:12])
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number[:12]) * _UNITS[unit] for number, unit in parts)


def consumer_name(kind: str, *parts: str) -> str:
    """Return the name of a consumer that several processes find by what it is for.

    A name takes few characters, and creating a consumer again with another filter would
    change it without a word; so the name holds a digest of all of it.

    >>> consumer_name("g", "workers", "jobs/#") == consumer_name("g", "workers", "jobs/#")
    True
    """
    digests = [hashlib.sha256(part.encode()).hexdigest()[:16] for part in parts]
    return "-".join((kind, *digests))


def covers(pattern: str, subject: str) -> bool:
    """Whether a subject with wildcards matches *subject*, which has none."""
    return overlaps(pattern, subject)


def overlaps(one: str, other: str) -> bool:
    """Whether some subject is matched by both.

    >>> overlaps("a.*.c", "a.b.>"), overlaps("a.>", "a"), overlaps("a.*", "b.>")
    (True, False, False)
    """
    left, right = one.split("."), other.split(".")
    for a, b in zip(left, right, strict=False):
        if a == ">" or b == ">":
            return True
        if a not in ("*", b) and b != "*":
            return False
    return len(left) == len(right)


# --- errors ------------------------------------------------------------------------------

_LATER = frozenset({10002, 10008, 10023, 10077})


def publish_error(error: ApiError, topic: str, size: int) -> PublishFailed:
    """Return the error for a publish that a stream refused."""
    match error.number:
        case 10054:
            failure: PublishFailed = PayloadTooLarge(
                size=size,
                limit=size,
                hint="the stream's max_msg_size is smaller; send less, or raise it",
                backend="nats",
                topic=topic,
            )
            failure.outcome = Outcome.REJECTED
            return failure
        case 10060:
            hint = "another stream covers the topic; name it with stream="
        case 10077:
            hint = "the stream is full; raise its limits, or let it discard=old"
        case 10002 | 10023:
            hint = "the server or the account has no room left; raise max_file or the quota"
        case 10109:
            hint = "the stream is sealed; use another"
        case _:
            hint = "look at the stream's configuration with `nats stream info`"
    return PublishFailed(
        f"the stream refused {topic!r}: {error.text} ({error.number})",
        outcome=Outcome.REJECTED,
        reason=error.number,
        hint=hint,
        backend="nats",
        topic=topic,
        retryable=error.number in _LATER,
    )


def subscribe_error(error: ApiError, filter: str) -> PubSubError:
    """Return the error for a consumer that could not be made."""
    if error.number == 10026:
        return LimitReached(
            f"the stream allows no further consumer, so none for {filter!r}",
            hint="raise max_consumers of the stream, or subscribe with wildcards",
            backend="nats",
            topic=filter,
        )
    return SubscribeFailed(
        f"no consumer for {filter!r}: {error.text} ({error.number})",
        reason=error.number,
        hint="look at the stream with `nats consumer ls`",
        backend="nats",
        topic=filter,
        retryable=error.number == 10008,
    )


_HINTS = {
    10059: "create it, or set create=true with subjects= or prefix=",
    10065: "another stream covers some of these subjects; choose others, or another prefix",
    10052: "a stream needs common first levels: set subjects= or prefix=",
    10074: "replicas need a cluster; leave the option out for a single server",
    10039: "give the account jetstream at the server",
    10027: "raise the account's limit of streams",
    10028: "raise max_mem at the server",
    10047: "raise max_file at the server",
}


def stream_error(error: ApiError, stream: str, *, known: bool = False) -> ConnectError:
    """Return the error for a stream that cannot be used.

    Args:
        error: What the server said.
        stream: Its name.
        known: Whether the stream was there before, so that a cluster may merely have lost
            sight of it.
    """
    later = error.number == 10008 or (known and error.number == 10059) or error.code == 0
    if error.code == NO_RESPONDERS and not error.number:
        return ConnectError(
            f"nobody answers for JetStream, so not for the stream {stream!r}",
            hint="enable jetstream at the server, or wait for its cluster to have a leader",
            backend="nats",
            retryable=True,
        )
    return ConnectError(
        f"the stream {stream!r} cannot be used: {error.text} ({error.number})",
        hint=_HINTS.get(error.number, "look at it with `nats stream info`"),
        backend="nats",
        retryable=later,
    )
