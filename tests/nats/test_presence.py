"""Presence and notifications on a real server: who is there, who vanished, what it costs."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import nats
import pytest

from pubsub_core import Bus, Cap, connect
from pubsub_core.events import InterestEvent, InterestKind
from pubsub_nats.server import NatsServer
from tests.servers import eventually

from .test_versions import DEBIAN

CHILD = """
import asyncio, sys
from pubsub_core import connect

async def main():
    async with connect(sys.argv[1]) as bus, bus.subscribe("fleet/one"):
        print("there", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def at(url: str, name: str = "P", **options: Any) -> Bus:
    given = {"stream": name, "prefix": name.lower(), "create": True, "presence": True, **options}
    return connect(url, **given)


async def next_of(view: Any, kind: InterestKind) -> InterestEvent:
    async with asyncio.timeout(30):
        while (event := await anext(view)).kind is not kind:
            pass
    assert isinstance(event, InterestEvent)
    return event


async def test_a_killed_process_is_missed(server: NatsServer) -> None:
    url = f"{server.url}?stream=K&prefix=k&create=true&presence=true&presence_ttl=1"
    async with connect(url) as bus, bus.presence("fleet/+") as room:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD, url, stdout=asyncio.subprocess.PIPE
        )
        assert child.stdout is not None
        assert await child.stdout.readline() == b"there\n"
        joined = await next_of(room, InterestKind.JOINED)
        assert joined.member is not None
        # It stays for as long as it lives, which takes several signs of life to tell.
        async with bus.notifications("#") as interest:
            assert (await next_of(interest, InterestKind.JOINED)).topic == "fleet/one"
            child.kill()
            await child.wait()
            left = await next_of(room, InterestKind.LEFT)
            assert left.member == joined.member
            assert left.reason == "lost"
            assert (await next_of(interest, InterestKind.LEFT)).topic == "fleet/one"
        assert room.count == 0


async def test_a_member_that_lives_outlives_its_time_to_live(server: NatsServer) -> None:
    async with at(server.url, "L", presence_ttl=1.0) as bus, bus.presence("a") as room:
        async with at(server.url, "L", presence_ttl=1.0) as other, other.subscribe("a"):
            await next_of(room, InterestKind.JOINED)
            client = await nats.connect(server.url)
            try:
                beats = await client.subscribe("$KV.L_who.>")
                for _ in range(8):  # three in each time to live
                    assert json.loads((await beats.next_msg(timeout=10)).data)["filters"] == ["a"]
            finally:
                await client.close()
            assert room.count == 1
        assert (await next_of(room, InterestKind.LEFT)).reason in ("unsubscribed", "closed")


async def test_a_thousand_members(server: NatsServer) -> None:
    client = await nats.connect(server.url)
    try:
        async with at(server.url, "M", presence_ttl=60.0) as bus:
            # Others that are no buses of this process, which a thousand would fill.
            said = {"name": "n", "host": "h", "filters": ["a/#"]}
            for n in range(1000):
                await client.publish(f"$KV.M_who.member{n}", json.dumps(said).encode())
            # Stored somewhat later than published, and nobody tells when.
            while (
                await client.jetstream(timeout=30).stream_info("KV_M_who")
            ).state.messages < 1000:
                pass
            assert len(await bus.members("a/b")) == 1000
            async with bus.presence("a/b") as room:
                assert room.count == 1000
                for n in range(1000):
                    await client.publish(
                        f"$KV.M_who.member{n}", b"", headers={"KV-Operation": "PURGE"}
                    )
                await eventually(lambda: room.count == 0, within=20)
    finally:
        await client.close()


@pytest.mark.parametrize(
    "said",
    [b"", b"x", b"[]", b"{}", b'{"filters":1}', b'{"filters":[1,null]}', b'{"filters":["a/#/b"]}',
     b'{"filters":[""]}', b"[" * 10_000],
)  # fmt: skip
async def test_nonsense_of_others_is_nobody(server: NatsServer, said: bytes) -> None:
    client = await nats.connect(server.url)
    try:
        async with at(server.url, "N") as bus, bus.presence("a") as room:
            await client.publish("$KV.N_who.fool", said)
            await client.flush()
            async with bus.subscribe("a"):
                await next_of(room, InterestKind.JOINED)
                assert room.count == 1
                assert len(await bus.members("a")) == 1
    finally:
        await client.close()


@pytest.mark.slow
async def test_every_node_of_a_cluster_knows() -> None:
    async with NatsServer(cluster=3) as server:
        options: dict[str, Any] = {"replicas": 3, "presence_ttl": 3.0, "reconnect_first": 0.01}
        async with (
            at(server.urls[0], **options) as one,
            at(server.urls[2], **options) as two,
            one.presence("a/#") as room,
        ):
            async with two.subscribe("a/b"):
                await next_of(room, InterestKind.JOINED)
                assert len(await one.members("a/b")) == 1
            await next_of(room, InterestKind.LEFT)


@pytest.mark.skipif(not DEBIAN.exists(), reason="Debian's nats-server is not installed")
async def test_an_old_server_has_none_and_says_which_has() -> None:
    async with NatsServer(program=str(DEBIAN)) as server, at(server.url) as bus:
        support = bus.supports(Cap.PRESENCE)
        assert not support
        assert "2.11" in support.remedy


async def test_without_the_option_there_is_a_remedy(server: NatsServer) -> None:
    async with at(server.url, "O", presence=False) as bus:
        assert "presence=true" in bus.supports(Cap.NOTIFICATIONS).remedy
    async with connect(server.url) as bus:
        assert "presence=true" in bus.supports(Cap.PRESENCE).remedy
