"""The examples of the PyPI package's documentation, with two words changed.

They are run as they stand, except that they import our package, and that the TLS context is
made for clients: the one they make cannot dial. They name their server ``myhost.example.com``
and ``localhost:9091``; names and ports are led to ours, below the example.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, Optional
from uuid import UUID

import pytest

from pubsub_messagebus import CallbackClient, DataPacket
from pubsub_messagebus.protocol import Credentials
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import CallableServerAuthenticator, Refused, User
from tests.readme import Document
from tests.servers import Authority, eventually

THEIRS = Document("tests/data/messagebus_package_readme.md")
OVERVIEW, TLS, BASIC, TOKEN, DATA, NOTIFICATION, AUTHORIZATION = THEIRS.blocks("python")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list; every name leads to the port that is put into it, on any event loop."""
    port: list[int] = []
    dial = asyncio.open_connection

    async def redirected(host: str, _: int, **options: Any) -> Any:
        assert host in {"localhost", "myhost.example.com"}
        if options.get("ssl") is not None:
            options["server_hostname"] = host
        return await dial("127.0.0.1", port[0], **options)

    monkeypatch.setattr(asyncio, "open_connection", redirected)
    return port


def compiled(example: str, **names: Any) -> dict[str, Any]:
    """Run the example's top level and return its names."""
    changed = example.replace("jetblack_messagebus", "pubsub_messagebus")
    changed = changed.replace("ssl.Purpose.CLIENT_AUTH", "ssl.Purpose.SERVER_AUTH")
    return THEIRS.execute(changed, **names)


async def end(running: asyncio.Task[Any]) -> None:
    running.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([running])


async def test_the_subscriber_of_the_overview(
    network: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    host = socket.gethostname()
    async with MessageBusServer() as server:
        network.append(server.port)
        running = asyncio.create_task(compiled(OVERVIEW)["main"]())
        await eventually(lambda: server.broker.subscribers("TEST", "FOO"))
        async with await CallbackClient.create("localhost", 9091) as publisher:
            packets = [DataPacket({1}, b"Hello"), DataPacket(None, None)]
            await publisher.publish("TEST", "FOO", True, packets)
            await publisher.publish("TEST", "FOO", False, None)
        expected = [
            f'data: user="nobody",host="{host}",feed="TEST",topic="FOO",is_image=True',
            "packet: entitlements={1},message=Hello",
            "packet: entitlements=None,message=None",
            f'data: user="nobody",host="{host}",feed="TEST",topic="FOO",is_image=False',
            "no data",
            # The publisher left.
            'data: user="",host="",feed="TEST",topic="FOO",is_image=True',
            "no data",
        ]
        shown: list[str] = []

        def complete() -> bool:
            shown.extend(capsys.readouterr().out.splitlines())
            return len(shown) >= len(expected)

        await eventually(complete)
        assert shown == expected
        await end(running)


def check(authentication: str) -> CallableServerAuthenticator | None:
    """Return an authenticator that wants what the example has."""

    async def basic(credentials: Credentials) -> User:
        if (credentials.username, credentials.password.reveal()) != (
            "john.doe@example.com",
            "pa$$word",
        ):
            raise Refused("not the example's")
        return User("john.doe@example.com", "BASIC")

    async def token(credentials: Credentials) -> User:
        # Its token has long expired; here it is enough that it arrives as it is.
        if f'"{credentials.token.reveal()}"' not in TOKEN:
            raise Refused("not the example's")
        return User("john.doe@example.com", "JWT")

    match authentication:
        case "basic":
            return CallableServerAuthenticator(basic)
        case "token":
            return CallableServerAuthenticator(token, handshake="token")
        case _:
            return None


@pytest.mark.parametrize(
    ("example", "authentication", "user"),
    [
        (TLS, "", "nobody"),
        (BASIC, "basic", "john.doe@example.com"),
        (TOKEN, "token", "john.doe@example.com"),
    ],
    ids=["tls", "basic", "token"],
)
async def test_tls_and_authentication(
    example: str,
    authentication: str,
    user: str,
    network: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("server", hosts=("myhost.example.com",))
    # The authorities of the system, as OpenSSL finds them.
    monkeypatch.setenv("SSL_CERT_FILE", authority.cafile)
    async with MessageBusServer(
        certfile=own.certfile, keyfile=own.keyfile, authenticator=check(authentication)
    ) as server:
        network.append(server.port)
        running = asyncio.create_task(compiled(example)["main"]())
        await eventually(
            lambda: running.done() or server.broker.subscribers("TEST", "FOO"), what="subscribed"
        )
        assert not running.done(), running.exception()
        assert [member.user for member in server.broker.interactors()] == [user]
        await end(running)
        await eventually(lambda: server.broker.empty)


async def test_the_context_of_the_documentation_is_refused_with_what_to_write(
    network: list[int],
) -> None:
    network.append(1)
    namespace: dict[str, Any] = {}
    exec(TLS.replace("jetblack_messagebus", "pubsub_messagebus"), namespace)
    with pytest.raises(ValueError, match=r"ssl\.Purpose\.SERVER_AUTH"):
        await namespace["main"]()


@pytest.mark.parametrize(
    ("example", "handlers"),
    [
        (DATA, "data_handlers"),
        (NOTIFICATION, "notification_handlers"),
        (AUTHORIZATION, "authorization_handlers"),
    ],
    ids=["data", "notification", "authorization"],
)
async def test_handlers_are_added_and_removed(example: str, handlers: str) -> None:
    names = {"Optional": Optional, "List": list, "DataPacket": DataPacket, "UUID": UUID}
    async with MessageBusServer() as server:
        client = await CallbackClient.create("127.0.0.1", server.port)
        adding, removing = example.split("# Remove the handler\n")
        found = compiled(adding, client=client, **names)
        (handler,) = getattr(client, handlers)
        assert handler in found.values()
        exec(removing, found)
        assert getattr(client, handlers) == []
        await client.aclose()
