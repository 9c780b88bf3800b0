"""The native client: the package's interface, without the package's faults."""

from __future__ import annotations

import asyncio
import ssl
import uuid
from pathlib import Path
from typing import Any, Self

import pytest

from pubsub_messagebus import (
    BasicAuthenticator,
    CallbackClient,
    Client,
    DataPacket,
    NullAuthenticator,
    ProtocolError,
    TokenAuthenticator,
)
from pubsub_messagebus.authentication import Authenticator
from pubsub_messagebus.io import DataReader, DataWriter
from pubsub_messagebus.protocol import (
    MulticastData,
    SubscriptionRequest,
    encode_authorization_request,
    encode_forwarded_multicast,
    encode_forwarded_subscription,
    encode_forwarded_unicast,
    encode_subscription_request,
)
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import PasswordFile
from pubsub_messagebus.server.roles import FeedPolicy, Policy
from tests.messagebus.scripted import Scripted
from tests.servers import Authority, LeakCheck, eventually

DATA = encode_forwarded_multicast("u", "h", "F", "T", False, [DataPacket(None, b"x")])


async def within(work: Any, seconds: float = 5) -> Any:
    async with asyncio.timeout(seconds):
        return await work


class Running:
    """A client whose `start` runs in a task; everything about its end can be looked at."""

    def __init__(self, port: int, **options: Any) -> None:
        self.port = port
        self.options = options
        self.closed: list[bool] = []
        self.data: list[tuple[Any, ...]] = []

    async def __aenter__(self) -> Self:
        self.client = await within(CallbackClient.create("127.0.0.1", self.port, **self.options))

        async def on_closed(is_faulted: bool) -> None:
            self.closed.append(is_faulted)

        async def on_data(*arguments: Any) -> None:
            self.data.append(arguments)

        self.client.closed_handlers.append(on_closed)
        self.client.data_handlers.append(on_data)
        self.task = asyncio.create_task(self.client.start())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.stop()
        await within(asyncio.wait([self.task]))


async def test_the_subclass_style_and_the_constructor() -> None:
    seen: list[tuple[Any, ...]] = []

    class Mine(Client):  # as it was written for 3.0.1: no on_closed
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = True

        async def on_authorization(
            self, client_id: uuid.UUID, host: str, user: str, feed: str, topic: str
        ) -> None:
            seen.append(("authorization", client_id, host, user, feed, topic))
            await self.authorize(client_id, feed, topic, True, {1})

        async def on_data(self, *arguments: Any, **keywords: Any) -> None:
            seen.append(("data", *arguments))

        async def on_forwarded_subscription_request(self, *arguments: Any, **keywords: Any) -> None:
            seen.append(("notification", *arguments))

    policy = Policy(feeds={"AUTH": FeedPolicy(is_authorized=True)})
    async with MessageBusServer(policy=policy) as server:
        client = await Mine.create("127.0.0.1", server.port)
        assert client.mine
        async with client:
            await client.add_notification("AUTH")
            await client.add_subscription("AUTH", "T")
            mine = await within(client.sync())
            await eventually(lambda: len(seen) == 2)
            await client.publish("AUTH", "T", False, [DataPacket({1}, b"y"), DataPacket({2}, b"n")])
            await client.send(mine, "AUTH", "T", True, [DataPacket({1}, b"image")])
            await eventually(lambda: len(seen) == 4)
    host = seen[0][2]
    assert seen == [
        ("authorization", mine, host, "nobody", "AUTH", "T"),
        ("notification", mine, "nobody", host, "AUTH", "T", True),
        ("data", "nobody", host, "AUTH", "T", [DataPacket({1}, b"y")], False),
        ("data", "nobody", host, "AUTH", "T", [DataPacket({1}, b"image")], True),
    ]


async def test_handler_lists_are_live_and_have_their_old_names() -> None:
    async with Scripted() as server, Running(server.port) as running:
        client = running.client
        assert client.data_handlers is client._data_handlers
        assert client.notification_handlers is client._notification_handlers
        assert client.authorization_handlers is client._authorization_handlers
        assert client.closed_handlers is client._closed_handlers
        order: list[str] = []

        async def second(*_: Any) -> None:
            order.append("second")

        async def first(*_: Any) -> None:
            order.append("first")
            if second not in client.data_handlers:
                client.data_handlers.append(second)
            else:
                client.data_handlers.remove(first)

        client.data_handlers[:] = [first]
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA * 3)
        await eventually(lambda: len(order) == 4)
        assert order == ["first", "first", "second", "second"]


async def test_handlers_get_the_packages_arguments_in_its_order() -> None:
    somebody = uuid.uuid4()
    seen: list[tuple[Any, ...]] = []

    async def on_any(*arguments: Any) -> None:
        seen.append(arguments)

    async with Scripted() as server, Running(server.port) as running:
        running.client.notification_handlers.append(on_any)
        running.client.authorization_handlers.append(on_any)
        await eventually(lambda: server.writers)
        server.writers[0].write(
            encode_forwarded_subscription("user", "host", somebody, "F", "T", True)
            + encode_authorization_request(somebody, "host", "user", "F", "T")
        )
        await eventually(lambda: len(seen) == 2)
    assert seen == [
        (somebody, "user", "host", "F", "T", True),
        (somebody, "host", "user", "F", "T"),
    ]


def test_the_compatible_modules() -> None:
    from pubsub_messagebus import authentication, io

    for name in ("Authenticator", "NullAuthenticator", "BasicAuthenticator", "TokenAuthenticator"):
        assert hasattr(authentication, name)
    for name in ("DataReader", "DataWriter", "DataPacket"):
        assert hasattr(io, name)


async def test_primitives_of_a_written_authenticator() -> None:
    class Own(Authenticator):
        async def authenticate(self, reader: DataReader, writer: DataWriter) -> None:
            writer.write_string("é")
            writer.write_boolean(1)
            writer.write_byte(-1)
            writer.write_int(-2)
            writer.write_long(3)
            writer.write_uuid(uuid.UUID(int=1))
            writer.write_int_set({4})
            writer.write_byte_array(b"b")
            writer.write_data_packet_array([DataPacket({1}, b"x")])
            await writer.drain()

    async with Scripted() as server, Running(server.port, authenticator=Own()):
        await eventually(lambda: server.received and len(server.received[0]) == 66)
        stream = asyncio.StreamReader()
        stream.feed_data(bytes(server.received[0]))
        reader = DataReader(stream)
        assert await reader.read_string() == "é"
        assert await reader.read_boolean() is True
        assert await reader.read_byte() == -1
        assert await reader.read_int() == -2
        assert await reader.read_long() == 3
        assert await reader.read_uuid() == uuid.UUID(int=1)
        assert await reader.read_int_set() == {4}
        assert await reader.read_byte_array() == b"b"
        assert await reader.read_data_packet_array() == [DataPacket({1}, b"x")]


# --- none of the package's faults ----------------------------------------------------------------


async def test_c1_start_returns_when_the_server_closes() -> None:
    leaks = LeakCheck()
    async with Scripted() as server, Running(server.port) as running:
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA * 3)
        await server.writers[0].drain()
        server.writers[0].close()
        await within(running.task)
        assert running.closed == [True]
        assert isinstance(running.client.error, ConnectionError)
        assert not running.client.is_connected
        assert len(running.data) == 3  # what had arrived was handled
        with pytest.raises(ConnectionError):
            await running.client.publish("F", "T", False, None)
    await eventually(lambda: not leaks.leaks())


async def test_c2_c3_stop_ends_start_cleanly_and_closes_the_socket() -> None:
    async with MessageBusServer() as server, Running(server.port) as running:
        await running.client.add_subscription("F", "T")
        await within(running.client.sync())
        assert running.client.is_connected
        assert server.broker.subscribers("F", "T")
        running.client.stop()
        assert await within(running.task) is None
        assert running.closed == [False]
        assert running.client.error is None
        await eventually(lambda: not server.broker.subscribers("F", "T"))


async def test_c4_what_was_queued_before_stop_is_sent() -> None:
    async with Scripted() as server, Running(server.port) as running:
        for number in range(500):
            await running.client.publish("F", str(number), False, [DataPacket(None, bytes(1000))])
        running.client.stop()
        await within(running.task)
        await eventually(lambda: server.ended == 1)
        assert [message.topic for message in server.messages()] == [str(n) for n in range(500)]  # type: ignore[union-attr]


async def test_c4_even_if_it_is_more_than_the_system_takes_at_once() -> None:
    async with Scripted() as server, Running(server.port) as running:
        server.reading.clear()
        publishing = asyncio.create_task(publish_many(running.client, 100, 100_000))
        await eventually(lambda: running.client._out_bytes > 1_000_000)
        running.client.stop()
        server.reading.set()
        await within(running.task)
        sent = await within(publishing)
        await eventually(lambda: server.ended == 1)
        assert len(server.messages()) == sent


async def publish_many(client: CallbackClient, count: int, size: int) -> int:
    """Publish until the client stops; return how many calls were made."""
    for number in range(count):
        await client.publish("F", str(number), False, [DataPacket(None, bytes(size))])
        if client._stopping.is_set():
            return number + 1
    return count


async def test_c5_stop_before_start() -> None:
    async with Scripted() as server:
        client = await CallbackClient.create("127.0.0.1", server.port)
        closed: list[bool] = []

        async def on_closed(is_faulted: bool) -> None:
            closed.append(is_faulted)

        client.closed_handlers.append(on_closed)
        client.stop()
        assert await within(client.start()) is None
        assert closed == [False]
        await eventually(lambda: server.ended == 1)
        assert server.received == [b""]


async def test_c6_a_handlers_exception_ends_start_after_everything_is_closed() -> None:
    leaks = LeakCheck()

    async def fails(*_: Any) -> None:
        raise LookupError("a fault of the handler")

    async with Scripted() as server, Running(server.port) as running:
        running.client.data_handlers.insert(0, fails)
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA)
        with pytest.raises(LookupError):
            await within(running.task)
        assert running.closed == [True]
        await eventually(lambda: server.ended == 1)
    await eventually(lambda: not leaks.leaks())
    async with Scripted() as server, Running(server.port, handler_errors="log") as running:
        running.client.data_handlers.insert(0, fails)
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA)
        running_still = asyncio.create_task(within(running.client.sync(), 0.2))
        with pytest.raises(TimeoutError):
            await running_still
        assert running.client.is_connected


@pytest.mark.parametrize("turns", range(12))
async def test_c7_cancelling_start_leaves_nothing_and_cuts_no_message(turns: int) -> None:
    leaks = LeakCheck()
    async with Scripted() as server, Running(server.port) as running:
        server.reading.clear()
        sending = asyncio.create_task(_flood(running.client))
        for _ in range(turns * 3):
            await asyncio.sleep(0)
        running.task.cancel()
        await asyncio.sleep(0)
        server.reading.set()
        await within(asyncio.wait([running.task]))
        assert running.task.cancelled()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        if server.writers:
            await eventually(lambda: server.ended == 1)
            server.messages()  # raises where the stream ends inside a message
    await eventually(lambda: not leaks.leaks())


async def _flood(client: Client) -> None:
    for number in range(10_000):
        await client.publish("F", str(number), False, [DataPacket(None, bytes(3000))])


async def test_c8_a_running_handler_does_not_stall_writing() -> None:
    async with Scripted() as server, Running(server.port) as running:
        go_on = asyncio.Event()

        async def slow(*_: Any) -> None:
            for number in range(4):
                await running.client.publish("F", str(number), False, None)
            await go_on.wait()

        running.client.data_handlers[:] = [slow]
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA)
        await eventually(lambda: len(server.messages()) == 4)
        go_on.set()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("F", "T", False, [DataPacket({2**40}, b"x")]), ValueError),
        (("F", "T", False, [DataPacket(None, b"ok"), "packet"]), TypeError),
        ((None, "T\ud800", False, None), ValueError),
    ],
)
async def test_c9_what_cannot_be_encoded_is_refused_in_the_call(
    arguments: Any, error: type[Exception]
) -> None:
    async with Scripted() as server, Running(server.port) as running:
        with pytest.raises(error):
            await running.client.publish(*arguments)
        await running.client.publish("F", "after", False, None)
        await eventually(lambda: server.received and server.messages())
        assert [message.topic for message in server.messages()] == ["after"]  # type: ignore[union-attr]


async def test_c10_accents_work() -> None:
    async with MessageBusServer() as server, Running(server.port) as running:
        await running.client.add_subscription("café", "日本😀")
        await running.client.publish("café", "日本😀", False, [DataPacket(None, b"x")])
        await eventually(lambda: running.data)
        assert running.data[0][2:4] == ("café", "日本😀")


@pytest.mark.parametrize(
    "wire",
    [
        b"\x00",
        b"\xff",
        b"\x08\xff\xff\xff\xff",
        b"\x08\0\0\0\x01\xff",
        encode_subscription_request("F", "T", True),
    ],
)
async def test_c11_c12_a_bad_frame_is_the_end(wire: bytes) -> None:
    async with Scripted() as server, Running(server.port) as running:
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA + wire)
        await within(running.task)
        assert len(running.data) == 1
        assert running.closed == [True]
        assert isinstance(running.client.error, ProtocolError)


async def test_c13_any_truth_is_an_image() -> None:
    async with Scripted() as server, Running(server.port) as running:
        for flag in (1, "yes" == "yes", [0], None, 0, ""[:0] or None):
            await running.client.publish("F", "T", flag, None)
        await eventually(lambda: server.received and len(server.messages()) == 6)
        flags = [
            message.flag for message in server.messages() if isinstance(message, MulticastData)
        ]
        assert flags == [True, True, True, False, False, False]


async def test_c14_data_messages_of_both_types_reach_the_data_handlers() -> None:
    async with Scripted() as server, Running(server.port) as running:
        await eventually(lambda: server.writers)
        unicast = encode_forwarded_unicast("u", "h", uuid.uuid4(), "F", "T", True, None)
        server.writers[0].write(DATA + unicast)
        await eventually(lambda: len(running.data) == 2)
        assert [data[5] for data in running.data] == [False, True]


async def test_c15_heartbeats_come_as_data_or_apart() -> None:
    async with MessageBusServer(heartbeat_interval=0.02) as server:
        async with Running(server.port, monitor_heartbeat=True) as running:
            await eventually(lambda: len(running.data) >= 2)
            assert running.data[0][:4] == ("admin", "localhost", "__admin__", "heartbeat")
        beats: list[None] = []

        async def beat() -> None:
            beats.append(None)

        async with Running(server.port, monitor_heartbeat=True, on_heartbeat=beat) as running:
            await eventually(lambda: len(beats) >= 2)
            assert not running.data


# --- order, pressure ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.slow)])
async def test_nothing_is_sent_before_start_and_then_in_order(count: int) -> None:
    async with Scripted() as server:
        client = await CallbackClient.create(
            "127.0.0.1",
            server.port,
            authenticator=BasicAuthenticator("u", "p"),
            monitor_heartbeat=True,
        )
        for number in range(count):
            await client.publish("F", str(number), False, None)
        await eventually(lambda: server.writers)
        assert server.received == [b""]
        async with client:
            await eventually(lambda: b"heartbeat" in server.received[0], within=20)
        del server.received[0][: len(b"\0\0\0\x01u\0\0\0\x01p" + bytes(8))]
        *messages, last = server.messages()
        assert [message.topic for message in messages] == [str(n) for n in range(count)]  # type: ignore[union-attr]
        assert last == SubscriptionRequest("__admin__", "heartbeat", True)


async def test_publishing_waits_while_much_is_unsent() -> None:
    async with Scripted() as server, Running(server.port) as running:
        server.reading.clear()
        packets = [DataPacket(None, bytes(100_000))]
        sent = 0

        async def publish() -> None:
            nonlocal sent
            while True:
                await running.client.publish("F", "T", False, packets)
                sent += 1

        with pytest.raises(TimeoutError):
            await within(publish(), 0.3)
        assert sent < 300
        # And they go on when there is room.
        server.reading.set()
        publishing = asyncio.create_task(publish())
        await eventually(lambda: sent > 300 or publishing.done())
        publishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publishing


async def test_no_more_is_read_than_handlers_can_take() -> None:
    async with Scripted() as server, Running(server.port, read_ahead=10) as running:
        held = asyncio.Event()

        async def hold(*_: Any) -> None:
            await held.wait()

        running.client.data_handlers.append(hold)
        await eventually(lambda: server.writers)
        # More than sockets and streams take by themselves.
        server.writers[0].write(DATA * 200_000)
        await eventually(lambda: len(running.client._inbox) >= 10)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(running.client._inbox) == 10
        assert server.writers[0].transport.get_write_buffer_size() > 0
        held.set()
        await eventually(lambda: len(running.data) > 1000)


async def test_a_handler_may_wait_for_what_another_task_answers() -> None:
    async with MessageBusServer() as server:
        async with Running(server.port) as asking, Running(server.port) as answering:
            answered = asyncio.Event()

            async def question(*_: Any) -> None:
                await asking.client.publish("F", "question", False, None)
                await answered.wait()

            async def answer(*_: Any) -> None:
                answered.set()

            asking.client.data_handlers.append(question)
            answering.client.data_handlers.append(answer)
            await asking.client.add_subscription("F", "T")
            await answering.client.add_subscription("F", "question")
            await within(asking.client.sync())
            await within(answering.client.sync())
            await answering.client.publish("F", "T", False, None)
            await within(answered.wait())


async def test_sync_within_a_handler_behind_many_messages() -> None:
    async with MessageBusServer() as server, Running(server.port, read_ahead=10) as running:
        found: list[uuid.UUID] = []

        async def handler(*_: Any) -> None:
            if not found:
                found.append(await running.client.sync())

        running.client.data_handlers.append(handler)
        await running.client.add_subscription("F", "T")
        for _ in range(500):
            await running.client.publish("F", "T", False, None)
        await eventually(lambda: len(running.data) == 500)
        assert found == [running.client.client_id]


async def test_sync_leaves_no_subscription_and_fails_with_the_connection() -> None:
    async with MessageBusServer() as server:
        async with Running(server.port) as running:
            for _ in range(3):
                assert await within(running.client.sync())
            await eventually(lambda: server.stats()["subscriptions"] == 0)
            assert server.stats()["listeners"] == 1  # of the feed of its own, until it ends
    async with Scripted() as silent, Running(silent.port) as running:
        waiting = asyncio.create_task(running.client.sync())
        await eventually(lambda: silent.received and silent.received[0])
        silent.writers[0].close()
        with pytest.raises(ConnectionError):
            await within(waiting)
    async with Scripted() as silent, Running(silent.port) as running:
        waiting = asyncio.create_task(running.client.sync())
        await eventually(lambda: silent.received and silent.received[0])
        running.client.stop()
        with pytest.raises(ConnectionError):
            await within(waiting)


async def test_data_after_an_unsubscribe_is_dropped() -> None:
    async with Scripted() as server, Running(server.port) as running:
        await running.client.add_subscription("F", "T")
        await running.client.remove_subscription("F", "T")
        await eventually(lambda: server.writers)
        forced = encode_forwarded_multicast("u", "h", "F", "never subscribed", False, None)
        server.writers[0].write(DATA + forced)
        await eventually(lambda: running.data)
        assert [data[3] for data in running.data] == ["never subscribed"]
    async with Scripted() as server, Running(server.port, filter_unsubscribed=False) as running:
        await running.client.add_subscription("F", "T")
        await running.client.remove_subscription("F", "T")
        await eventually(lambda: server.writers)
        server.writers[0].write(DATA)
        await eventually(lambda: running.data)


async def test_data_that_waits_for_a_handler_is_dropped_after_an_unsubscribe() -> None:
    async with Scripted() as server, Running(server.port) as running:

        async def unsubscribe(*_: Any) -> None:
            await running.client.remove_subscription("F", "T")

        running.client.data_handlers.append(unsubscribe)
        await running.client.add_subscription("F", "T")
        await eventually(lambda: server.writers)
        last = encode_forwarded_multicast("u", "h", "F", "never subscribed", False, None)
        server.writers[0].write(DATA * 3 + last)
        await eventually(lambda: len(running.data) > 1)
        assert [data[3] for data in running.data] == ["T", "never subscribed"]


# --- connecting ----------------------------------------------------------------------------


async def test_reconnecting_restores_subscriptions_and_notifications() -> None:
    async with MessageBusServer() as server:
        async with Running(server.port, reconnect=True, reconnect_max=0.1) as running:
            told: list[Any] = []

            async def on_notification(*arguments: Any) -> None:
                told.append(arguments)

            running.client.notification_handlers.append(on_notification)
            await running.client.add_notification("F")
            for _ in range(2):
                await running.client.add_subscription("F", "T")
            await running.client.add_subscription("F", "gone")
            await running.client.remove_subscription("F", "gone")
            first = await within(running.client.sync())
            await server.restart()
            await eventually(lambda: server.stats()["clients"] == 1)
            await eventually(lambda: running.client.is_connected)
            second = await within(running.client.sync())
            assert first != second
            assert list(server.broker.subscribers("F", "T").values()) == [2]
            assert not server.broker.subscribers("F", "gone")
            await eventually(lambda: len(told) >= 5)
            assert told[-1][0] == second
            await running.client.publish("F", "T", False, None)
            await eventually(lambda: any(data[0] for data in running.data))
        assert running.closed == [False]


@pytest.mark.parametrize("form", ["strings", "connection-string"])
async def test_login(tmp_path: Path, form: Any) -> None:
    PasswordFile(tmp_path / "p").add("tom", "pässwort")
    async with MessageBusServer(password_file=str(tmp_path / "p")) as server:
        authenticator = BasicAuthenticator("tom", "pässwort", handshake=form)
        async with Running(server.port, authenticator=authenticator) as running:
            assert await within(running.client.sync())
        wrong = BasicAuthenticator("tom", "canary", handshake=form)
        assert "canary" not in repr(wrong)
        assert "canary" not in repr(TokenAuthenticator("canary"))
        async with Running(server.port, authenticator=wrong) as running:
            with pytest.raises(ConnectionError):
                await within(running.client.sync())
            await eventually(lambda: running.closed == [True])
    assert isinstance(NullAuthenticator(), Authenticator)
    with pytest.raises(ValueError, match="cannot carry"):
        BasicAuthenticator("tom", "a;b", handshake="connection-string")


async def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    own = authority.issue("server")
    async with MessageBusServer(certfile=own.certfile, keyfile=own.keyfile) as server:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority.cafile)
        async with Running(server.port, ssl=context) as running:
            assert await within(running.client.sync())


async def test_the_other_dialect() -> None:
    async with MessageBusServer(dialect="content_type") as server:
        async with Running(server.port, dialect="content_type") as running:
            await running.client.add_subscription("F", "T")
            await running.client.publish("F", "T", "text/plain", [DataPacket(None, b"x")])
            await eventually(lambda: running.data)
            assert running.data[0][5] == "text/plain"
            with pytest.raises(TypeError):
                await running.client.publish("F", "T", True, None)


async def test_a_client_is_for_one_use() -> None:
    async with MessageBusServer() as server:
        client = await CallbackClient.create("127.0.0.1", server.port)
        async with client:
            with pytest.raises(RuntimeError, match="one use"):
                await client.start()
        await client.aclose()
        unused = await CallbackClient.create("127.0.0.1", server.port)
        await unused.aclose()
        await eventually(lambda: not server.connections)
