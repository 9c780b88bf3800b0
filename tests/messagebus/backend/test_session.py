"""Sessions: the sign of life, servers that confirm nothing, credentials that change."""

from __future__ import annotations

import asyncio
import logging
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import Status, StatusChanged, connect
from pubsub_core.capabilities import Cap
from pubsub_core.errors import AuthenticationFailed, ConnectError, NotSupported
from pubsub_core.events import Notice
from pubsub_core.interfaces import Address
from pubsub_core.testing.clock import VirtualClock
from pubsub_messagebus.backend import backend as module
from pubsub_messagebus.backend.link import Link
from pubsub_messagebus.backend.session import Session
from pubsub_messagebus.protocol import Decoder, Fence, encode_forwarded_subscription
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import PasswordFile
from pubsub_messagebus.server.roles import FeedPolicy, Policy, Role, RoleChange
from tests.messagebus.original import RESTRICTIVE, original
from tests.messagebus.raw import Raw
from tests.messagebus.scripted import Scripted
from tests.messagebus.vectors import PASSWORDS
from tests.servers import eventually

WITHIN = 20.0


# --- the sign of life --------------------------------------------------------------------------


class Deaf:
    """A receiver and a sink that nobody needs here."""

    def take(self, link: Any, message: Any) -> None:
        raise AssertionError

    def ended(self, link: Any) -> None:
        pass


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.aborted = False

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_extra_info(self, name: str) -> Any:
        return None

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("last", [0.0, 0.1, 3.0, 9.9, 10.0, 12.0])
async def test_a_dead_peer_is_noticed_within_one_and_a_half_intervals(last: float) -> None:
    clock, wire = VirtualClock(), Wire()
    link = Link(Deaf(), Decoder("client"), clock.monotonic)
    link.connection_made(wire)  # type: ignore[arg-type]  # stands in for a transport
    session = Session(link, Deaf(), Address("messagebus", "h"), clock, backend="messagebus")  # type: ignore[arg-type]
    session.spawn(session.keep_alive(10.0), "keepalive")
    await clock.advance(last)
    link.data_received(b"")  # its last sign of life
    await clock.advance(14.9)
    assert wire.written, "it was asked"
    assert not wire.aborted
    await clock.advance(0.2)
    assert wire.aborted
    assert "no sign of life for 15 s" in str(link.error)
    session.end()
    await session.ended()


async def test_a_peer_that_answers_is_asked_once_per_interval() -> None:
    clock, wire = VirtualClock(), Wire()
    link = Link(Deaf(), Decoder("client"), clock.monotonic)
    link.connection_made(wire)  # type: ignore[arg-type]  # stands in for a transport
    session = Session(link, Deaf(), Address("messagebus", "h"), clock, backend="messagebus")  # type: ignore[arg-type]
    session.spawn(session.keep_alive(10.0), "keepalive")
    for _ in range(10):
        await clock.advance(10.5)
        link.data_received(b"")
    assert len(wire.written) in (9, 10)
    assert not wire.aborted
    session.end()
    await session.ended()


async def test_answers_of_the_fence_come_back_in_order() -> None:
    fence = Fence()
    assert fence.feed.encode() in fence.ask()
    assert fence.ask()[0] == 5, "the feed is listened to once"
    told = Decoder("client")
    own = socket.gethostname()
    identifier = uuid.uuid4()
    told.feed(encode_forwarded_subscription("u", own, identifier, fence.feed, "x", False))
    told.feed(encode_forwarded_subscription("u", own, identifier, fence.feed, "x", True))
    removed: Any = told.next_message()
    added: Any = told.next_message()
    assert fence.owns(removed)
    assert fence.take(removed) is None
    answer = fence.take(added)
    assert answer is not None
    assert answer[0] == 5
    assert fence.client_id == identifier


# --- few roles ---------------------------------------------------------------------------------


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[tuple[Any, list[Notice]]]:
    """Open a bus, and keep its notices."""
    notices: list[Notice] = []
    bus = connect(url, **options)

    async def collect() -> None:
        async with bus.events() as events:
            listening.set()
            async for event in events:
                notices.extend([event] if isinstance(event, Notice) else [])

    listening = asyncio.Event()
    collecting = asyncio.create_task(collect())
    await listening.wait()
    try:
        async with asyncio.timeout(WITHIN):
            await bus.open()
        yield bus, notices
    finally:
        await bus.close()
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)


async def test_our_distributor_confirms_to_users_of_any_roles() -> None:
    async with MessageBusServer(password_file=str(PASSWORDS), policy=RESTRICTIVE) as server:
        url = f"messagebus://guest:right@127.0.0.1:{server.port}"
        async with opened(url) as (bus, notices):
            assert await bus.ping() >= 0
            async with bus.notifications("OPEN/#") as interest:
                async with bus.subscribe("OPEN/T") as messages, bus.subscribe("SHUT/T") as nothing:
                    await bus.publish("SHUT/T", b"x")
                    await bus.publish("OPEN/T", b"y")
                    assert (await messages.get(5)).payload == b"y"
                    assert nothing.stats.received == 0
                while not (await interest.get(5)).left:
                    pass
            assert not notices


async def test_the_original_does_not_confirm_to_users_of_few_roles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_SILENCE", 0.2)
    async with original(RESTRICTIVE, password_file=str(PASSWORDS)) as server:
        url = f"messagebus://guest:right@127.0.0.1:{server.port}"
        with caplog.at_level(logging.WARNING, "pubsub_messagebus"):
            async with opened(url, keepalive=5) as (bus, notices):
                await eventually(lambda: notices)
                assert notices[0].kind == "unconfirmed"
                assert "Subscribe on feeds whose names begin with '__sync__'" in notices[0].text
                assert notices[0].text in caplog.text
                assert "right@" not in caplog.text
                with pytest.raises(NotSupported, match="role Subscribe"):
                    await bus.ping()
                with pytest.raises(NotSupported, match="role Subscribe"):
                    async with bus.presence("OPEN/T"):
                        pass
                async with bus.subscribe("OPEN/T") as messages:
                    await eventually(lambda: server.broker.subscribers("OPEN", "T"))
                    await bus.publish("OPEN/T", b"y")
                    assert (await messages.get(5)).payload == b"y"
                # Its own link is watched by the kernel instead.
                session = bus.native(module.MessageBusBackend)._current.session
                sock = session.link.transport.get_extra_info("socket")
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 5


async def test_interest_is_told_without_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE", 0.2)
    async with original(RESTRICTIVE) as server:
        async with opened(server.url) as (bus, _), Raw(server.port) as early:
            early.add("OPEN", "A")
            await eventually(lambda: server.broker.subscribers("OPEN", "A"))
            async with bus.notifications("OPEN/#") as interest:
                async with Raw(server.port) as late:
                    for _ in range(2):
                        late.add("OPEN", "B")
                    seen = [await interest.get(5) for _ in range(3)]
                    assert sorted((event.kind.value, event.topic) for event in seen) == [
                        ("joined", "OPEN/A"),
                        ("joined", "OPEN/B"),
                        ("synced", "OPEN/#"),
                    ]
                early.reset()
                left = await interest.get(5)
                assert (left.kind.value, left.topic) == ("left", "OPEN/A")


async def test_a_fence_that_comes_late_confirms_after_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE", 0.05)
    async with Scripted() as server:
        async with opened(f"messagebus://127.0.0.1:{server.port}") as (bus, notices):
            await eventually(lambda: notices)
            native = bus.native(module.MessageBusBackend)
            assert not native._current.session.confirms
            feed = server.messages()[0].feed
            identifier = uuid.uuid4()
            server.writers[0].write(
                encode_forwarded_subscription("u", "h", identifier, feed, "x", True)
            )
            await eventually(lambda: native._current.session.confirms)
            assert native.client_id == identifier
            # From now on it waits for them.
            subscribing = asyncio.create_task(native.ping())
            await eventually(lambda: len(server.messages()) == 4)
            assert not subscribing.done()
            server.writers[0].write(
                encode_forwarded_subscription("u", "h", identifier, feed, "x", True)
            )
            assert await subscribing >= 0


# --- credentials -------------------------------------------------------------------------------


async def test_a_password_that_was_changed_ends_the_attempts(tmp_path: Path) -> None:
    passwords = PasswordFile(tmp_path / "passwords.json")
    passwords.add("tom", "canary")
    async with MessageBusServer(password_file=str(passwords.path)) as server:
        bus = connect(f"messagebus://tom:canary@127.0.0.1:{server.port}")
        async with bus, bus.events() as events:
            passwords.add("tom", "another")
            await server.restart()
            errors = []
            async with asyncio.timeout(WITHIN):
                async for event in events:
                    if isinstance(event, StatusChanged) and event.error is not None:
                        errors.append(event.error)
                        if event.status is Status.FAILED:
                            break
    assert isinstance(errors[-1], AuthenticationFailed)
    refusals = [error for error in errors if "after the handshake" in str(error)]
    assert refusals
    for error in refusals:
        assert "password" in str(error)
        assert "it took them before" in str(error)
        assert "canary" not in str(error)


async def test_a_server_that_wants_a_login_is_told_from_one_that_is_gone(tmp_path: Path) -> None:
    async with MessageBusServer(password_file=str(PASSWORDS), handshake_timeout=0.1) as server:
        with pytest.raises(ConnectError, match="does the server want a user name"):
            await connect(server.url)


# --- what our distributor grants ---------------------------------------------------------------


async def test_notifying_and_subscribing_are_told_apart_by_roles() -> None:
    feeds = {"F": FeedPolicy(change=RoleChange(Role.SUBSCRIBE | Role.PUBLISH))}
    policy = Policy(change=RoleChange(deny=Role.ALL), feeds=feeds)
    async with MessageBusServer(policy=policy) as server:
        async with opened(server.url) as (bus, _):
            assert bus.supports(Cap.PRESENCE)
            async with bus.presence("F/T") as room, bus.subscribe("F/T"):
                await bus.ping()
                assert room.count == 0, "without the role Notify nothing is told"
