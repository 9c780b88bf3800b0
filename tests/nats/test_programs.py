"""One application file on memory, on one node, and on a cluster that loses a node meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from pubsub_core import connect
from pubsub_nats.server import NatsServer

from .fleet import Fleet

JOBS = 60


async def played(urls: list[str], options: dict[str, Any], kill: Any = None) -> None:
    async with contextlib.AsyncExitStack() as stack:
        buses = [
            await stack.enter_async_context(connect(url, offline="buffer", **options))
            for url in urls
        ]
        fleet = Fleet(buses[0], buses[1:])
        half_way, go_on = asyncio.Event(), asyncio.Event()
        running = asyncio.create_task(fleet.run(JOBS, half_way, go_on))
        async with asyncio.timeout(100):
            await half_way.wait()
            if kill is not None:
                await kill()
            go_on.set()
            chat = await running
    assert sorted(set(fleet.done)) == list(range(JOBS))
    assert chat == ["3 trucks", "all done"]


def stream(**more: Any) -> dict[str, Any]:
    return {
        "stream": "FLEET",
        "prefix": "fleet",
        "create": True,
        "presence": True,
        "ack_wait": 2.0,
        "reconnect_first": 0.01,
        **more,
    }


async def test_on_memory() -> None:
    await played(["memory://fleet"] * 4, {"history": 1000})


async def test_on_one_node() -> None:
    async with NatsServer() as server:
        await played([server.url] * 4, stream())


@pytest.mark.slow
@pytest.mark.timeout(150)
async def test_on_a_cluster_that_loses_a_node() -> None:
    async with NatsServer(cluster=3) as server:
        urls = [server.urls[n % 3] for n in range(4)]
        servers = [url.removeprefix("nats://") for url in server.urls]
        await played(urls, stream(replicas=3, servers=servers), lambda: server.kill(1))
