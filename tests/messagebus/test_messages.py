"""The compatible message classes, by the recorded bytes."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest

from pubsub_messagebus.io import DataPacket, DataReader, DataWriter
from pubsub_messagebus.messages import (
    AuthorizationRequest,
    AuthorizationResponse,
    ForwardedMulticastData,
    ForwardedSubscriptionRequest,
    ForwardedUnicastData,
    Message,
    MessageType,
    MulticastData,
    NotificationRequest,
    SubscriptionRequest,
    UnicastData,
)

from .vectors import MESSAGES

VECTORS = [vector for vector in MESSAGES if "is_image" in vector["dialects"]]


class Stream:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    async def drain(self) -> None:
        """There is always room."""


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["id"])
async def test_what_is_read_is_written_again(vector: dict[str, Any]) -> None:
    wire = bytes.fromhex(vector["hex"])
    stream = asyncio.StreamReader()
    stream.feed_data(wire)
    message = await Message.read(DataReader(stream))
    assert type(message).__name__ == vector["message"]
    assert message.message_type.value == vector["type"]
    for name, value in vector["decoded"].items():
        if name not in ("data_packets", "entitlements"):
            found = getattr(message, name)
            assert (str(found) if isinstance(found, UUID) else found) == value
    kept: Any = Stream()
    await message.write(DataWriter(kept))
    assert sorted(kept.data) == sorted(wire)  # the order within a set is free
    stream.feed_data(kept.data)
    assert await Message.read(DataReader(stream)) == message


IDENTIFIER = UUID("12345678-1234-5678-1234-567812345678")
PACKETS = [DataPacket({1, 2}, b"first"), DataPacket(None, b"second")]
EXAMPLES: list[Message] = [
    MulticastData("F", "T", True, PACKETS),
    UnicastData(IDENTIFIER, "F", "T", True, PACKETS),
    ForwardedSubscriptionRequest("user", "host", IDENTIFIER, "F", "T", True),
    NotificationRequest("F", True),
    SubscriptionRequest("F", "T", True),
    AuthorizationRequest(IDENTIFIER, "host", "user", "F", "T"),
    AuthorizationResponse(IDENTIFIER, "F", "T", True, {1, 2, 3}),
    ForwardedMulticastData("user", "host", "F", "T", True, PACKETS),
    ForwardedUnicastData("user", "host", IDENTIFIER, "F", "T", True, PACKETS),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
async def test_a_message_equals_what_is_read_of_it(message: Message) -> None:
    kept: Any = Stream()
    await message.write(DataWriter(kept))
    stream = asyncio.StreamReader()
    stream.feed_data(kept.data)
    again = await Message.read(DataReader(stream))
    assert again == message
    assert again is not message
    for other in EXAMPLES:
        assert (other == again) is (other is message)


def test_arguments_and_text() -> None:
    message = SubscriptionRequest("F", "T", is_add=True)
    assert str(message) == 'SubscriptionRequest(feed="F",topic="T",is_add=True)'
    assert message == SubscriptionRequest("F", "T", True)
    assert MessageType.FORWARDED_UNICAST_DATA.value == 9
    for arguments in ((), ("F",), ("F", "T", True, 1)):
        with pytest.raises(TypeError, match="takes feed"):
            SubscriptionRequest(*arguments)
