"""From publish to handler in one process: `memory://` beside a bare ``asyncio.Queue``.

A task publishes (or puts), another handles (or gets); nothing else happens. Three ways of
handing over with the bare queue are shown, since "a hand-off" can mean any of them: an
unbounded queue, a queue with a bound of 1024 like a subscription's buffer, and a queue of
one, where each item is handed over before the next is put. The factor says how much of the
queue's rate the bus reaches. Every figure is the best of several rounds, with the
candidates taking turns.

    python benchmarks/memory.py [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from rich.console import Console
from rich.table import Table

from pubsub_core import Message, connect

PAYLOAD = b"x" * 100
Candidate = Callable[[int], Coroutine[Any, Any, float]]


def queue(size: int) -> Candidate:
    """Return the hand-off through one bare queue of that size; 0 is unbounded."""

    async def run(count: int) -> float:
        items: asyncio.Queue[bytes] = asyncio.Queue(size)

        async def get() -> None:
            for _ in range(count):
                await items.get()

        getting = asyncio.ensure_future(get())
        await asyncio.sleep(0)
        began = time.perf_counter()
        for _ in range(count):
            await items.put(PAYLOAD)
        await getting
        return time.perf_counter() - began

    return run


async def bus_handler(count: int) -> float:
    """Publish to a handler; the buffer makes the publisher wait when it is full."""
    async with connect("memory://", overflow="block") as bus:
        done = asyncio.Event()
        handled = 0

        async def handle(message: Message[bytes]) -> None:
            nonlocal handled
            handled += 1
            if handled == count:
                done.set()

        await bus.subscribe("bench/topic", handler=handle)
        began = time.perf_counter()
        for _ in range(count):
            await bus.publish("bench/topic", PAYLOAD)
        await done.wait()
        return time.perf_counter() - began


async def bus_iterator(count: int) -> float:
    """Publish to an ``async for``."""
    async with (
        connect("memory://", overflow="block") as bus,
        bus.subscribe("bench/topic") as messages,
    ):

        async def consume() -> None:
            for _ in range(count):
                await anext(messages)

        consuming = asyncio.ensure_future(consume())
        await asyncio.sleep(0)
        began = time.perf_counter()
        for _ in range(count):
            await bus.publish("bench/topic", PAYLOAD)
        await consuming
        return time.perf_counter() - began


CANDIDATES: dict[str, Candidate] = {
    "asyncio.Queue, unbounded": queue(0),
    "asyncio.Queue(1024)": queue(1024),
    "asyncio.Queue(1), one at a time": queue(1),
    "bus, to a handler": bus_handler,
    "bus, to an iterator": bus_iterator,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    arguments = parser.parse_args()
    count, rounds = (20_000, 3) if arguments.quick else (100_000, 7)
    best = dict.fromkeys(CANDIDATES, float("inf"))
    for _ in range(rounds):
        for name, candidate in CANDIDATES.items():
            best[name] = min(best[name], asyncio.run(candidate(count)))
    rates = {name: count / seconds for name, seconds in best.items()}
    queues = [name for name in CANDIDATES if name.startswith("asyncio")]
    table = Table(title=f"publish to handler, {count:,} messages of {len(PAYLOAD)} bytes")
    table.add_column("")
    table.add_column("messages/s", justify="right")
    table.add_column("µs each", justify="right")
    for name in queues:
        table.add_column(f"of {name.removeprefix('asyncio.')}", justify="right")
    for name, rate in rates.items():
        shares = [f"{rate / rates[each]:.2f}" for each in queues]
        table.add_row(name, f"{rate:,.0f}", f"{1e6 / rate:.2f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    main()
