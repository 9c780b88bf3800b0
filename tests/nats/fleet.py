"""One application file, which runs on memory, on a server of NATS and on a cluster of it.

A fleet whose dispatcher sees who is there, jobs that a group shares and acknowledges, and a chat
that newcomers read from the beginning.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pubsub_core import Bus, Message


@dataclass
class Job:
    """What one truck has to do."""

    number: int


class Fleet:
    """The whole application on some buses, one for each participant."""

    def __init__(self, dispatcher: Bus, trucks: list[Bus]) -> None:
        self.dispatcher = dispatcher
        self.trucks = trucks
        self.done: list[int] = []
        self.all_done = asyncio.Event()
        self.wanted = 0

    async def run(self, jobs: int, half_way: asyncio.Event, go_on: asyncio.Event) -> list[str]:
        """Do *jobs* jobs, stop in the middle until *go_on*; return what the chat says at last."""
        self.wanted = jobs
        working = [asyncio.create_task(self.work(truck)) for truck in self.trucks]
        async with self.dispatcher.presence("jobs/+") as room:
            while room.count < len(self.trucks):
                await anext(room)
            await self.dispatcher.publish("chat/dispatch", f"{room.count} trucks")
            for number in range(jobs):
                if number == jobs // 2:
                    half_way.set()
                    await go_on.wait()
                await self.dispatcher.publish(f"jobs/{number % 3}", Job(number))
            await self.all_done.wait()
            await self.dispatcher.publish("chat/dispatch", "all done")
        for each in working:
            each.cancel()
        await asyncio.wait(working)
        newcomer = self.trucks[0]
        return [message.payload async for message in newcomer.history("chat/#", str)]

    async def work(self, bus: Bus) -> None:
        """Be one truck."""
        first = True
        async with bus.subscribe("jobs/+", Job, group="trucks", ack="manual") as jobs:
            async for message in jobs:
                await self.one(message, give_back=first)
                first = False

    async def one(self, message: Message[Job], *, give_back: bool) -> None:
        """Do one job, or leave it to another truck."""
        if give_back and not message.redelivered:
            await message.nack()
            return
        self.done.append(message.payload.number)
        await message.ack()
        if len(set(self.done)) == self.wanted:
            self.all_done.set()
