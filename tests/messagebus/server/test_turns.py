"""Many clients with much to do: nobody waits behind all the others."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_messagebus.protocol import (
    basic_handshake,
    encode_subscription_request,
)
from pubsub_messagebus.server import MessageBusServer
from tests.messagebus.raw import Raw
from tests.servers import eventually


async def test_a_flood_leaves_turns_to_others() -> None:
    async with MessageBusServer() as server:
        async with Raw(server.port) as flooding, Raw(server.port) as other:
            flooding.send(encode_subscription_request("F", "T", True) * 30_000)
            watch = Stopwatch()
            await other.fence()
            assert watch.seconds < 1
            await flooding.fence()
            assert list(server.broker.subscribers("F", "T").values()) == [30_000]


async def test_more_bursts_than_can_be_worked_off_at_once() -> None:
    burst = encode_subscription_request("F", "T", True) * 3000
    async with MessageBusServer() as server:
        async with Raw(server.port) as established:
            await established.fence()
            flooding = [await Raw(server.port).__aenter__() for _ in range(60)]
            for client in flooding:
                client.send(burst)
            watch = Stopwatch()
            await established.fence()
            assert watch.seconds < 2
            # What they sent counts, although they have gone.
            for client in flooding:
                await client.__aexit__()
            async with Raw(server.port) as late:
                await late.fence()
            await eventually(lambda: server.stats()["received"] >= 60 * 3000, within=20)
            await eventually(lambda: server.stats()["clients"] == 1)
            assert server.stats()["subscriptions"] == 0


@pytest.mark.slow
async def test_newcomers_do_not_wait_for_all_who_are_busy() -> None:
    # So much that the trips of a newcomer take far less than half of the work.
    count, each = 60, 20_000
    burst = encode_subscription_request("F", "T", True) * each
    async with MessageBusServer() as server, contextlib.AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(Raw(server.port)) for _ in range(count)]
        for client in busy:
            client.send(burst)
        await eventually(lambda: server.stats()["received"] > count * each / 20, within=40)
        async with Raw(server.port) as newcomer:
            await newcomer.fence(40)
        assert server.stats()["received"] < count * each / 2
        for client in busy:
            client.reset()


async def test_newcomers_are_turned_away_while_too_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pubsub_messagebus.server.turns._CROWD", 3)
    monkeypatch.setattr("pubsub_messagebus.server.turns._ROUND", 0)  # one of those who wait
    burst = encode_subscription_request("F", "T", True) * 15_000
    async with MessageBusServer() as server, contextlib.AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(Raw(server.port)) for _ in range(10)]
        for client in busy:
            client.send(burst)
        while not server.turns.full:
            await asyncio.sleep(0)
        async with Raw(server.port) as newcomer:
            assert await newcomer.closed() == b""
        assert server.stats()["turned_away"] == 1
        for client in busy:
            await client.fence(20)
        async with Raw(server.port) as late:
            await late.fence()
        assert list(server.broker.subscribers("F", "T").values()) == [15_000] * 10


async def test_what_came_with_a_login_waits_for_its_turns_like_any_burst(passwords: Path) -> None:
    # More than one turn's work behind the handshake, and more of it than is read at once.
    burst = encode_subscription_request("F", "T", True) * 60_000
    async with MessageBusServer(password_file=str(passwords)) as server:
        async with Raw(server.port) as client:
            client.send(basic_handshake("tom", "tomsPassword"), burst)
            await client.fence()
            assert list(server.broker.subscribers("F", "T").values()) == [60_000]


async def test_many_half_handshakes_do_not_keep_a_good_client_out(passwords: Path) -> None:
    async with MessageBusServer(password_file=str(passwords)) as server:
        half = [await Raw(server.port).__aenter__() for _ in range(200)]
        for client in half:
            client.send(basic_handshake("tom", "x")[:9])
        async with Raw(server.port) as good:
            good.send(basic_handshake("tom", "tomsPassword"))
            await good.fence()
            assert server.count.timeouts == 0, "it waited until the others were given up"
        for client in half:
            await client.__aexit__()
