"""The recorded bytes, and how their decoded form is compared.

The file's own ``about`` tells where each comes from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from pubsub_messagebus import protocol
from pubsub_messagebus.protocol import DataPacket, Decoder, Dialect, Message, Side

DATA = Path(__file__).parent.parent / "data"
FILE = DATA / "messagebus_vectors.json"
PASSWORDS = DATA / "messagebus_passwords.json"
"""Of tester and guest, whose password is ``right``."""
VECTORS: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
MESSAGES: list[dict[str, Any]] = VECTORS["messages"]
CAPTURES: list[dict[str, Any]] = VECTORS["captures"]
HANDSHAKES: list[dict[str, Any]] = VECTORS["handshakes"]
MALFORMED: list[dict[str, Any]] = VECTORS["malformed"]
MALFORMED_HANDSHAKES: list[dict[str, Any]] = VECTORS["malformed_handshakes"]


def role_of(wire: bytes) -> protocol.Side:
    """Return who receives this message."""
    return "client" if wire[0] in (3, 6, 8, 9) else "server"


def plain(message: Message) -> dict[str, Any]:
    """Return a message in the form of the file, entitlements as sorted lists."""
    result: dict[str, Any] = {}
    for name in message.__struct_fields__:
        value: Any = getattr(message, name)
        if name == "flag":
            result["is_image" if isinstance(value, bool) else "content_type"] = value
        elif name in ("body", "at", "entitled"):
            continue
        elif isinstance(value, UUID):
            result[name] = str(value)
        elif isinstance(value, frozenset):
            result[name] = sorted(value)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        else:
            result[name] = value
    if "body" in message.__struct_fields__:
        packets: list[DataPacket] | None = getattr(message, "data_packets")  # noqa: B009
        result["data_packets"] = packets and [
            {
                "entitlements": packet.entitlements and sorted(packet.entitlements),
                "data": None if packet.data is None else packet.data.hex(),
            }
            for packet in packets
        ]
    return result


def expected(decoded: dict[str, Any]) -> dict[str, Any]:
    """Return a decoded form of the file with its entitlements sorted."""
    result = {name: value for name, value in decoded.items() if name not in ("message", "type")}
    if result.get("entitlements"):
        result["entitlements"] = sorted(result["entitlements"])
    if result.get("data_packets"):
        result["data_packets"] = [
            {
                "entitlements": packet["entitlements"] and sorted(packet["entitlements"]),
                "data": packet["data"],
            }
            for packet in result["data_packets"]
        ]
    return result


def packets_of(listed: list[dict[str, Any]] | None) -> list[DataPacket] | None:
    """Return packets of the file as objects, entitlements in the file's order."""
    if listed is None:
        return None
    return [
        DataPacket(
            # A dict keeps the order that a set would lose.
            dict.fromkeys(packet["entitlements"]) if packet["entitlements"] else None,  # type: ignore[arg-type]  # so that the bytes can be compared
            None if packet["data"] is None else bytes.fromhex(packet["data"]),
        )
        for packet in listed
    ]


def encode(kind: int, fields: dict[str, Any], dialect: Dialect) -> bytes:
    """Return the bytes of a message given in the form of the file."""
    given = dict(fields)
    if given.get("client_id"):
        given["client_id"] = UUID(given["client_id"])
    packets = packets_of(given.get("data_packets"))
    flag = given.get("is_image" if dialect == "is_image" else "content_type")
    who = (given.get("user"), given.get("host"))
    what = (given.get("feed"), given.get("topic"))
    encoders: dict[int, tuple[Any, tuple[Any, ...]]] = {
        1: (protocol.encode_multicast, (*what, flag, packets, dialect)),
        2: (protocol.encode_unicast, (given.get("client_id"), *what, flag, packets, dialect)),
        3: (
            protocol.encode_forwarded_subscription,
            (*who, given.get("client_id"), *what, given.get("is_add")),
        ),
        4: (protocol.encode_notification_request, (given.get("feed"), given.get("is_add"))),
        5: (protocol.encode_subscription_request, (*what, given.get("is_add"))),
        6: (
            protocol.encode_authorization_request,
            (given.get("client_id"), given.get("host"), given.get("user"), *what),
        ),
        7: (
            protocol.encode_authorization_response,
            (
                given.get("client_id"),
                *what,
                given.get("is_authorization_required"),
                given.get("entitlements"),
            ),
        ),
        8: (protocol.encode_forwarded_multicast, (*who, *what, flag, packets, dialect)),
        9: (
            protocol.encode_forwarded_unicast,
            (*who, given.get("client_id"), *what, flag, packets, dialect),
        ),
    }
    function, arguments = encoders[kind]
    wire: bytes = function(*arguments)
    return wire


EVERY = [
    pytest.param(vector, dialect, id=f"{vector['id']}-{dialect}")
    for vector in MESSAGES
    for dialect in vector["dialects"]
]


def drain(decoder: Decoder) -> list[Message]:
    found: list[Message] = []
    while (message := decoder.next_message()) is not None:
        found.append(message)
    return found


def decode(
    wire: bytes, role: Side, dialect: Dialect = "is_image", *, step: int = 1 << 30, **options: Any
) -> list[Message]:
    decoder = Decoder(role, dialect=dialect, **options)
    found: list[Message] = []
    for at in range(0, len(wire), step):
        decoder.feed(wire[at : at + step])
        found += drain(decoder)
    assert not decoder.inside
    return found
