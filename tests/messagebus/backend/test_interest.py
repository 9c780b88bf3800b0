"""Interest that balances: at our distributor, and at one whose listings keep ghosts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pubsub_core.bus import connect
from pubsub_messagebus.protocol import encode_subscription_request
from pubsub_messagebus.server import MessageBusServer
from tests.messagebus.original import original
from tests.messagebus.raw import Raw
from tests.servers import eventually


def removal(topic: str) -> bytes:
    return encode_subscription_request("LSE", topic, False)


async def within(work: Any, seconds: float = 5) -> Any:
    async with asyncio.timeout(seconds):
        return await work


async def told(interest: Any, count: int) -> list[tuple[str, str]]:
    seen = [await interest.get(5) for _ in range(count)]
    return [(event.kind.value, event.topic) for event in seen]


@pytest.fixture(params=["ours", "the original"])
def server(request: pytest.FixtureRequest) -> MessageBusServer:
    return MessageBusServer() if request.param == "ours" else original()


async def test_a_subscriber_that_was_listed_is_told_to_leave(server: MessageBusServer) -> None:
    async with server, connect(server.url) as bus, Raw(server.port) as early:
        early.add("LSE", "A")
        early.add("LSE", "B")
        await early.fence()
        async with bus.notifications("LSE/#") as interest, bus.presence("LSE/A") as room:
            assert sorted(await told(interest, 3)) == [
                ("joined", "LSE/A"),
                ("joined", "LSE/B"),
                ("synced", "LSE/#"),
            ]
            early.send(removal("A"))
            assert await told(interest, 1) == [("left", "LSE/A")]
            await eventually(lambda: room.count == 0)
            assert not await within(bus.members("LSE/A"))
            # It comes back, and goes with its connection.
            early.add("LSE", "A")
            assert await told(interest, 1) == [("joined", "LSE/A")]
            await eventually(lambda: room.count == 1)
            early.reset()
            assert sorted(await told(interest, 2)) == [("left", "LSE/A"), ("left", "LSE/B")]
            await eventually(lambda: room.count == 0)


async def test_one_of_several_removals_is_no_end(server: MessageBusServer) -> None:
    async with server, connect(server.url) as bus:
        async with bus.notifications("LSE/#") as interest, Raw(server.port) as late:
            for _ in range(3):
                late.add("LSE", "A")
            assert sorted(await told(interest, 2)) == [("joined", "LSE/A"), ("synced", "LSE/#")]
            late.send(removal("A"))
            await late.fence()
            members = await within(bus.members("LSE/A"))
            assert len(members) == 1
            # The end of a connection is told once, however often it had subscribed.
            late.reset()
            assert await told(interest, 1) == [("left", "LSE/A")]
            assert not await within(bus.members("LSE/A"))


async def test_a_ghost_is_no_subscriber_to_those_who_saw_it_leave() -> None:
    async with original() as server, connect(server.url) as bus, Raw(server.port) as early:
        early.add("LSE", "A")
        early.add("LSE", "B")
        early.add("LSE", "B")
        await early.fence()
        async with bus.notifications("LSE/#") as interest:
            await told(interest, 3)
            early.send(removal("A"))
            assert await told(interest, 1) == [("left", "LSE/A")]
            # One removal of three adds leaves a doubt, so the feed is listed again; and the
            # listing still has A.
            for _ in range(3):
                early.add("LSE", "C")
            early.send(removal("C"))
            assert await told(interest, 1) == [("joined", "LSE/C")]
            await early.fence()
            assert len(server.broker.subscribers("LSE", "A")) == 1
            assert not await within(bus.members("LSE/A"))
            early.add("LSE", "A")
            assert await told(interest, 1) == [("joined", "LSE/A")]


async def test_interest_balances_when_a_client_that_subscribed_twice_dies() -> None:
    async with MessageBusServer() as server:
        async with connect(server.url) as bus:
            async with Raw(server.port) as early:
                # Twice before anybody listens: the listing tells of it once.
                early.add("LSE", "VOD")
                early.add("LSE", "VOD")
                await early.fence()
                async with bus.notifications("LSE/#") as interest, bus.presence("LSE/VOD") as room:
                    async with Raw(server.port) as late:
                        for _ in range(3):
                            late.add("LSE", "VOD")
                        await late.fence()
                        await eventually(lambda: room.count == 2)
                        # One of three goes: it is still there, and so is the other.
                        late.send(removal("VOD"))
                        early.send(removal("VOD"))
                        await late.fence()
                        await early.fence()
                        await within(bus.members("LSE/VOD"))
                        assert room.count == 2
                        late.reset()
                        await eventually(lambda: room.count == 1)
                        early.send(removal("VOD"))
                        await eventually(lambda: room.count == 0)
                        await eventually(lambda: not interest.interest)
                    kinds = [(await interest.get(5)).kind.value for _ in range(5)]
                    assert sorted(kinds) == ["joined", "joined", "left", "left", "synced"]
