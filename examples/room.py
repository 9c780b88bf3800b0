"""History, replay and presence, which memory and Emitter have.

    python room.py

On a broker without them the program ends before any traffic, with the reason::

    PUBSUB_BUS_ANN_URL=mqtt://localhost python room.py
"""

from __future__ import annotations

import asyncio
import sys

from pubsub_core import Cap, NotSupported, connect


async def main() -> None:
    needed = {Cap.HISTORY, Cap.REPLAY, Cap.PRESENCE}
    async with connect("ann", require=needed) as ann, connect("ben", require=needed) as ben:
        for text in ("one", "two", "three"):
            # Some brokers store only what is said to have a life.
            await ann.publish("chat/room1", text, ttl=3600)
        async for old in ann.history("chat/room1", str, last=2):
            print("history:", old.payload)

        async with ann.presence("chat/room1") as room:
            print("here now:", [member.name for member in room.members])
            async with ben.subscribe("chat/#", str, replay=1) as chat:
                event = await room.get(timeout=5)
                if event.member is not None:
                    print(event.kind, event.member.name)
                await ann.publish("chat/room1", "hello")
                for _ in range(2):
                    message = await chat.get(timeout=5)
                    print(f"{message.origin}: {message.payload}")
            event = await room.get(timeout=5)
            if event.member is not None:
                print(event.kind, event.member.name)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except NotSupported as error:
        sys.exit(f"not on this broker: {error}")
