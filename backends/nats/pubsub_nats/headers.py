"""The header block of a message: ``NATS/1.0``, an optional status, names and values.

The server forwards a block as it is, so what stands in one is between the clients, except for
names that it obeys itself (``Nats-Rollup``, ``Nats-TTL`` and so on). No name of a user's may be
taken for one of those: what could be, and what the block cannot carry, goes as JSON under a name
of our own.

Source: NATS ADR-4; what the server does was observed on 2.15.1 and 2.9.10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NamedTuple, cast

__all__ = [
    "CONTENT_TYPE",
    "EXPIRES",
    "FROM",
    "Block",
    "encode_block",
    "encode_lines",
    "encode_user",
    "parse_block",
    "user_pairs",
]

CONTENT_TYPE = "Content-Type"
FROM = "Pubsub-From"
"""Session of the publisher, on messages that it does not want back."""
EXPIRES = "Pubsub-Expires"
"""Unix seconds after which the message is not to be delivered, by the publisher's clock."""
_ALL = "Pubsub-Headers"

_VERSION = b"NATS/1.0"
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_OURS = ("nats-", "nmqtt-", "pubsub-", "kv-")
_MOST_JSON = 1024 * 1024


class Block(NamedTuple):
    """A header block.

    Attributes:
        status: Of a message that the server made, e.g. 503 for "no responders"; 0 for none.
        text: What stands behind the status.
        pairs: Names and values in order; names may repeat.
    """

    status: int
    text: str
    pairs: list[tuple[str, str]]

    def get(self, name: str) -> str | None:
        """Return the last value of *name*, compared as it is."""
        found = None
        for key, value in self.pairs:
            if key == name:
                found = value
        return found


_NOTHING = Block(0, "", [])


def parse_block(block: bytes) -> Block:
    """Return what stands in *block*; lines that cannot be read are left out."""
    lines = block.split(b"\r\n")
    first = lines[0]
    if not first.startswith(_VERSION):
        return _NOTHING
    status, _, text = first[len(_VERSION) :].strip().partition(b" ")
    pairs: list[tuple[str, str]] = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if colon and name:
            pairs.append(
                (name.decode("utf-8", "replace"), value.strip(b" \t").decode("utf-8", "replace"))
            )
    number = int(status) if status.isdigit() and len(status) == 3 else 0
    return Block(number, text.decode("utf-8", "replace"), pairs)


def encode_lines(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Return the lines of *pairs*, which hold no line breaks."""
    return "".join([f"{name}: {value}\r\n" for name, value in pairs]).encode()


def encode_block(pairs: Iterable[tuple[str, str]]) -> bytes:
    """Return the block of *pairs*, which hold no line breaks."""
    return b"NATS/1.0\r\n%b\r\n" % encode_lines(pairs)


def encode_user(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return a user's headers as they travel: as they are where that is safe, else as JSON."""
    given = list(pairs)
    if all(_plain(name, value) for name, value in given):
        return given
    return [(_ALL, json.dumps(given, separators=(",", ":")))]


def user_pairs(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the headers that a user sees, whoever published them."""
    found: list[tuple[str, str]] = []
    for name, value in pairs:
        if name == _ALL:
            found.extend(_from_json(value))
        elif not _reserved(name):
            found.append((name, value))
    return found


def _reserved(name: str) -> bool:
    lower = name.lower()
    return lower == "content-type" or lower.startswith(_OURS)


def _plain(name: str, value: str) -> bool:
    return (
        _NAME.fullmatch(name) is not None
        and not _reserved(name)
        and value == value.strip(" \t")
        and "\r" not in value
        and "\n" not in value
        and _utf8(value)
    )


def _utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_json(text: str) -> list[tuple[str, str]]:
    if len(text) > _MOST_JSON:
        return []
    try:
        loaded: object = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(loaded, list):
        return []
    pairs: list[tuple[str, str]] = []
    for each in cast("list[object]", loaded):
        match each:
            case [str() as name, str() as value]:
                pairs.append((name, value))
            case _:
                return []
    return pairs
