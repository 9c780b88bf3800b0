"""Which subscriptions a frame is for, when the broker says so by number."""

from __future__ import annotations

import asyncio

from pubsub_core import connect
from pubsub_core.message import InFrame


async def test_number_that_an_earlier_process_gave_to_another_filter_is_not_believed() -> None:
    async with asyncio.timeout(10), connect("memory://") as bus:
        async with bus.subscribe("a/#") as one, bus.subscribe("b/#") as two:
            router = bus._engine.subscriptions.router
            number = next(each.want.id for each in router.routes if each.want.filter == "a/#")
            router.keep_orphans()  # the session was continued from an earlier run
            router.route(InFrame(topic="b/x", payload=b"theirs", subscriptions=(number,)))
            router.route(InFrame(topic="a/x", payload=b"ours", subscriptions=(number,)))
            assert (await two.get(timeout=5)).payload == b"theirs"
            assert (await one.get(timeout=5)).payload == b"ours"
            assert one.stats.received == two.stats.received == 1
