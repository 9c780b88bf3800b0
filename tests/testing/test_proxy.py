"""The fault proxy, in front of a server that echoes."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pubsub_core.testing.proxy import HELD, Direction, FaultProxy
from tests.servers import eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

CLOSED = (ConnectionResetError, asyncio.IncompleteReadError)


class Echo:
    """A server that sends back what it gets, and notes how its connections ended."""

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.received = 0
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.received += len(data)
                writer.write(data)
                await writer.drain()
            self.ends.append("fin")
        except ConnectionError:
            self.ends.append("reset")
        finally:
            writer.close()


@pytest.fixture
async def echo() -> AsyncIterator[Echo]:
    found = Echo()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0)
    found.port = server.sockets[0].getsockname()[1]
    yield found
    server.close()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[FaultProxy]:
    async with asyncio.timeout(30), FaultProxy("127.0.0.1", echo.port) as found:
        yield found


@asynccontextmanager
async def connected(
    proxy: FaultProxy,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing can be read for a moment."""
    try:
        async with asyncio.timeout(0.1):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_passes_everything_on_in_both_directions(proxy: FaultProxy, echo: Echo) -> None:
    data = bytes(range(256)) * 8192
    async with connected(proxy) as (reader, writer):
        writer.write(data)
        assert await reader.readexactly(len(data)) == data
        assert proxy.passed == {Direction.UP: len(data), Direction.DOWN: len(data)}
        assert proxy.taken == proxy.passed
        assert (proxy.accepted, proxy.connections) == (1, 1)
    await eventually(lambda: proxy.connections == 0)
    assert echo.received == len(data)


async def test_an_end_travels_after_the_bytes_before_it(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        assert await reader.read() == b"last words"
    assert echo.ends == ["fin"]
    await eventually(lambda: proxy.connections == 0)


async def test_a_reset_of_the_client_reaches_the_server(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await eventually(lambda: echo.ends == ["reset"])


async def test_cut_resets_both_sides(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer), connected(proxy) as (other, _):
        writer.write(b"x")
        await reader.readexactly(1)
        await eventually(lambda: proxy.connections == 2)
        assert await proxy.cut() == 2
        assert proxy.connections == 0
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        with pytest.raises(ConnectionResetError):
            await other.readexactly(1)
    await eventually(lambda: echo.ends == ["reset", "reset"])
    async with connected(proxy) as (reader, writer):
        writer.write(b"again")
        assert await reader.readexactly(5) == b"again"


async def test_cut_in_good_order_is_an_end_of_file(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        assert await proxy.cut(reset=False) == 1
        assert await reader.read() == b""
    await eventually(lambda: echo.ends == ["fin"])


async def test_refuse_turns_new_connections_away_and_keeps_the_port(proxy: FaultProxy) -> None:
    port = proxy.port
    async with connected(proxy) as (reader, writer):
        proxy.refuse()
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            async with connected(proxy):
                pass
        with pytest.raises(OSError, match="in use"), socket.create_server(("127.0.0.1", port)):
            pass
        writer.write(b"still here")
        assert await reader.readexactly(10) == b"still here"
    proxy.refuse(False)
    assert proxy.port == port
    async with connected(proxy) as (reader, writer):
        writer.write(b"back")
        assert await reader.readexactly(4) == b"back"


async def test_a_server_that_is_down_is_a_reset(echo: Echo) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        async with FaultProxy("127.0.0.1", nobody.getsockname()[1]) as proxy:
            async with connected(proxy) as (reader, _):
                with pytest.raises(CLOSED):
                    await reader.readexactly(1)
            await eventually(lambda: proxy.connections == 0)


async def test_a_black_hole_takes_bytes_and_gives_none(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"before")
        await reader.readexactly(6)
        proxy.blackhole()
        writer.write(b"lost")
        await eventually(lambda: proxy.lost[Direction.UP] == 4)
        assert await silent(reader)
        assert echo.received == 6


async def test_a_black_hole_swallows_the_end_of_a_client(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.blackhole(direction=Direction.UP)
    async with connected(proxy) as (reader, _):
        assert await silent(reader)
    assert echo.ends == []
    proxy.blackhole(False)
    await eventually(lambda: echo.ends[:1] == ["reset"])


async def test_a_black_hole_may_have_one_direction(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        proxy.blackhole(direction=Direction.DOWN)
        writer.write(b"heard")
        await eventually(lambda: echo.received == 6)
        await eventually(lambda: proxy.lost[Direction.DOWN] == 5)
        assert proxy.lost[Direction.UP] == 0


async def test_after_a_black_hole_only_what_it_harmed_is_cut(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer), connected(proxy) as (quiet, quiet_writer):
        writer.write(b"x")
        await reader.readexactly(1)
        quiet_writer.write(b"y")
        await quiet.readexactly(1)
        proxy.blackhole()
        writer.write(b"lost")
        await eventually(lambda: proxy.lost[Direction.UP] == 4)
        proxy.blackhole(False)
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
        quiet_writer.write(b"unharmed")
        assert await quiet.readexactly(8) == b"unharmed"


async def test_a_stall_holds_back_and_then_delivers(proxy: FaultProxy, echo: Echo) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.stall()
        writer.write(b"one")
        await eventually(lambda: proxy.taken[Direction.UP] == 3)
        assert echo.received == 0
        writer.write(b"two")
        proxy.stall(False)
        assert await reader.readexactly(6) == b"onetwo"


async def test_a_stall_slows_the_sender_down(proxy: FaultProxy) -> None:
    data = b"x" * (8 * HELD)
    async with connected(proxy) as (reader, writer):
        proxy.stall(direction=Direction.UP)
        writer.write(data)
        await eventually(lambda: proxy.taken[Direction.UP] > HELD)
        before = proxy.taken[Direction.UP]
        assert await silent(reader)
        assert proxy.taken[Direction.UP] == before < HELD + 1024 * 1024
        proxy.stall(False)
        assert len(await reader.readexactly(len(data))) == len(data)


async def test_a_delay_keeps_the_order(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.delay(0.1, Direction.UP)
        began = time.monotonic()
        writer.write(b"one ")
        await eventually(lambda: proxy.taken[Direction.UP] == 4)
        proxy.delay(0, Direction.UP)
        writer.write(b"two")
        assert await reader.readexactly(7) == b"one two"
        # A delay is no less than asked for; how much more it is, the machine decides.
        assert time.monotonic() - began >= 0.1


async def test_a_dribble_gives_so_many_bytes_at_a_time(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.dribble(2, 0.02, Direction.DOWN)
        began = time.monotonic()
        writer.write(b"0123456789")
        pieces = [await reader.read(100)]
        while sum(map(len, pieces)) < 10:
            pieces.append(await reader.read(100))
        assert b"".join(pieces) == b"0123456789"
        assert len(pieces[0]) == 2
        assert time.monotonic() - began >= 4 * 0.02
        proxy.dribble(0, 0, Direction.DOWN)
        writer.write(b"fast" * 100)
        assert len(await reader.readexactly(400)) == 400


async def test_the_end_of_a_dribble_delivers_the_rest(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        proxy.dribble(1, 60.0, Direction.UP)
        writer.write(b"abc")
        assert await reader.readexactly(1) == b"a"
        proxy.dribble(0, 0)
        assert await reader.readexactly(2) == b"bc"


async def test_drop_after_passes_exactly_so_many_bytes(proxy: FaultProxy, echo: Echo) -> None:
    proxy.drop_after(5)
    async with connected(proxy) as (reader, writer):
        writer.write(b"123456789")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(9)
    assert proxy.passed[Direction.UP] == 5
    async with connected(proxy) as (reader, writer):
        writer.write(b"123456789")
        assert await reader.readexactly(9) == b"123456789"


async def test_drop_after_may_hit_every_connection(proxy: FaultProxy) -> None:
    proxy.drop_after(3, Direction.DOWN, once=False)
    for _ in range(2):
        async with connected(proxy) as (reader, writer):
            writer.write(b"123456789")
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(9)
    proxy.heal()
    async with connected(proxy) as (reader, writer):
        writer.write(b"123456789")
        assert await reader.readexactly(9) == b"123456789"


async def test_heal_takes_every_fault_back(proxy: FaultProxy) -> None:
    proxy.refuse()
    proxy.delay(60)
    proxy.dribble(1, 60)
    proxy.drop_after(0)
    proxy.stall()
    proxy.blackhole()
    proxy.heal()
    async with connected(proxy) as (reader, writer):
        writer.write(b"healthy")
        assert await reader.readexactly(7) == b"healthy"


async def test_stop_ends_everything_and_start_keeps_the_port(proxy: FaultProxy) -> None:
    port = proxy.port
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)
        await proxy.stop()
        with pytest.raises(CLOSED):
            await reader.readexactly(1)
    with pytest.raises(ConnectionRefusedError):
        async with connected(proxy):
            pass
    await proxy.start()
    assert proxy.port == port
    async with connected(proxy) as (reader, writer):
        writer.write(b"x")
        await reader.readexactly(1)


async def test_a_client_that_is_gone_before_it_was_accepted_harms_nothing(
    proxy: FaultProxy,
) -> None:
    with socket.create_connection((proxy.host, proxy.port)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    async with connected(proxy) as (reader, writer):
        writer.write(b"fine")
        assert await reader.readexactly(4) == b"fine"
