"""What each of the compatible authenticators sends, and shows of itself."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pubsub_messagebus.authentication import (
    Authenticator,
    BasicAuthenticator,
    NullAuthenticator,
    TokenAuthenticator,
)
from pubsub_messagebus.io import DataReader, DataWriter
from tests.messagebus.test_io import Kept


def connection_string(text: str) -> bytes:
    return len(text).to_bytes(4, "big") + text.encode()


@pytest.mark.parametrize(
    ("authenticator", "wire"),
    [
        (NullAuthenticator(), b""),
        (
            BasicAuthenticator("tom", "right"),
            b"\0\0\0\x03tom\0\0\0\x05right" + bytes(8),
        ),
        (
            BasicAuthenticator("tom", "right", None, None, "app"),
            connection_string("Username=tom;Password=right;Application=app"),
        ),
        (
            BasicAuthenticator("tom", "right", "dick", "host", handshake="connection-string"),
            connection_string("Username=tom;Password=right;Impersonating=dick;ForwardedFor=host"),
        ),
        (
            TokenAuthenticator("a.b.c", application="app"),
            connection_string("Token=a.b.c;Application=app"),
        ),
        (TokenAuthenticator("a.b.c"), b"\0\0\0\x05a.b.c" + bytes(8)),
    ],
)
async def test_what_is_sent(authenticator: Authenticator, wire: bytes) -> None:
    kept: Any = Kept()
    await authenticator.authenticate(DataReader(asyncio.StreamReader()), DataWriter(kept))
    assert kept.data == wire
    assert "right" not in repr(authenticator)
    assert "a.b.c" not in repr(authenticator)


def test_arguments_are_attributes() -> None:
    basic = BasicAuthenticator("tom", "right", "dick", "host", "app")
    assert (basic.username, basic.password) == ("tom", "right")
    assert (basic.impersonating, basic.forwarded_for, basic.application) == ("dick", "host", "app")
    assert TokenAuthenticator("a.b.c").token == "a.b.c"
