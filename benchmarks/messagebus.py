"""The messagebus: our client beside the PyPI packages, and our distributor.

    python benchmarks/messagebus.py [--package PATH_TO_SITE_PACKAGES ...] [--count N]

The client is measured against a bare socket peer in the same process: how fast it receives and
publishes. ``--package`` loads a version of ``jetblack_messagebus`` from its site-packages and
measures it in the same way, in a process of its own. The distributor is measured beside a bare
asyncio echo of the same frames, with a stalled subscriber, fanning out, and with many
subscriptions. One JSON object is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import resource
import subprocess
import sys
import time
from typing import Any

SIZES = (100, 10_240)


def _frame(size: int) -> bytes:
    from pubsub_messagebus.protocol import DataPacket, encode_forwarded_multicast

    return encode_forwarded_multicast("u", "h", "F", "T", False, [DataPacket(None, bytes(size))])


async def _client(module: str, size: int, count: int) -> dict[str, float]:
    library: Any = importlib.import_module(module)
    frame = _frame(size)
    sent = asyncio.Event()
    wanted = count * (len(frame) - 10)  # a published frame has no user and host
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        await go.wait()
        batch = frame * max(1, 65536 // len(frame))
        for _ in range(count * len(frame) // len(batch) + 1):
            writer.write(batch)
            await writer.drain()
        # The packages leave their socket open, so that this ends with the loop only.
        with contextlib.suppress(asyncio.CancelledError):
            while data := await reader.read(65536):
                seen += len(data)
                if seen >= wanted:
                    sent.set()

    go = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = await library.CallbackClient.create("127.0.0.1", server.sockets[0].getsockname()[1])
    received = 0
    done = asyncio.Event()

    async def on_data(*_: Any) -> None:
        nonlocal received
        received += 1
        if received == count:
            done.set()

    client.data_handlers.append(on_data)
    running = asyncio.create_task(client.start())
    began = time.perf_counter()
    go.set()
    await done.wait()
    receive = count / (time.perf_counter() - began)
    packets = [library.DataPacket(None, bytes(size))]
    began = time.perf_counter()
    for _ in range(count):
        await client.publish("F", "T", False, packets)
    await sent.wait()
    publish = count / (time.perf_counter() - began)
    client.stop()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    server.close()
    return {"receive_per_second": round(receive), "publish_per_second": round(publish)}


class _Counter(asyncio.Protocol):
    """Counts the bytes that it receives."""

    def __init__(self) -> None:
        self.seen = 0
        self.wanted = 1 << 62
        self.done = asyncio.Event()
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.seen += len(data)
        if self.seen >= self.wanted:
            self.done.set()


class _Echo(asyncio.Protocol):
    """Sends back what it receives."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def _dial(port: int) -> _Counter:
    loop = asyncio.get_running_loop()
    _, protocol = await loop.create_connection(_Counter, "127.0.0.1", port)
    return protocol


async def _subscribed(server: Any, port: int, count: int) -> list[_Counter]:
    from pubsub_messagebus.protocol import encode_subscription_request

    found = [await _dial(port) for _ in range(count)]
    for each in found:
        each.transport.write(encode_subscription_request("F", "T", True))
    while len(server.broker.subscribers("F", "T")) < count:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    return found


async def _push(publisher: _Counter, wire: bytes, count: int, ahead: int, seen: Any) -> None:
    """Send *count* frames, no more than *ahead* of what the receiver has seen."""
    step = max(1, min(ahead // 4, count))
    sent = 0
    while sent < count:
        while sent - seen() > ahead:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
        publisher.transport.write(wire * step)
        sent += step
        await asyncio.sleep(0)


async def _distributor(count: int, *, fan: int = 1, stalled: bool = False) -> float:
    from pubsub_messagebus.protocol import DataPacket, encode_multicast
    from pubsub_messagebus.server import MessageBusServer

    wire = encode_multicast("F", "T", False, [DataPacket(None, bytes(100))])
    async with MessageBusServer() as server:
        subscribers = await _subscribed(server, server.port, fan + stalled)
        if stalled:
            subscribers[-1].transport.pause_reading()
        publisher = await _dial(server.port)
        host = len(server.host_name("127.0.0.1"))
        size = len(wire) + 4 + len("nobody") + 4 + host
        first = subscribers[0]
        for each in subscribers[:fan]:
            each.wanted = count * size
        began = time.perf_counter()
        await _push(publisher, wire, count, 2000, lambda: first.seen // size)
        for each in subscribers[:fan]:
            await each.done.wait()
        seconds = time.perf_counter() - began
        for each in (publisher, *subscribers):
            each.transport.abort()
    return count * fan / seconds


async def _echo(count: int) -> float:
    frame = _frame(100)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Echo, "127.0.0.1", 0)
    client = await _dial(server.sockets[0].getsockname()[1])
    client.wanted = count * len(frame)
    began = time.perf_counter()
    await _push(client, frame, count, 2000, lambda: client.seen // len(frame))
    await client.done.wait()
    seconds = time.perf_counter() - began
    client.transport.abort()
    server.close()
    return count / seconds


async def _subscriptions(count: int) -> dict[str, float]:
    from pubsub_messagebus.protocol import encode_subscription_request
    from pubsub_messagebus.server import MessageBusServer

    async with MessageBusServer() as server:
        client = await _dial(server.port)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        for number in range(count):
            client.transport.write(encode_subscription_request("F", str(number), True))
            if number % 1000 == 0:
                await asyncio.sleep(0)
        while server.broker.stats.subscriptions < count:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        seconds = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        client.transport.abort()
    return {
        "count": count,
        "seconds": round(seconds, 2),
        "bytes_each": round((after - before) * 1024 / count),
    }


async def _ours(count: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"client_{size}_bytes": await _client(
            "pubsub_messagebus", size, count if size == 100 else count // 5
        )
        for size in SIZES
    }
    echo = await _echo(count)
    one = await _distributor(count)
    result["echo_per_second"] = round(echo)
    result["one_to_one_per_second"] = round(one)
    result["one_to_one_of_echo"] = round(one / echo, 3)
    result["beside_a_stalled_one_per_second"] = round(await _distributor(count, stalled=True))
    result["one_to_100_deliveries_per_second"] = round(await _distributor(count // 50, fan=100))
    result["one_to_1000_deliveries_per_second"] = round(await _distributor(count // 500, fan=1000))
    result["subscriptions"] = await _subscriptions(100_000)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--package", action="append", default=[], metavar="SITE_PACKAGES")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        sys.path.insert(0, chosen.measure)
        found = {
            f"client_{size}_bytes": asyncio.run(_client("jetblack_messagebus", size, chosen.count))
            for size in SIZES
        }
        print(json.dumps(found))
        return
    result: dict[str, Any] = {"ours": asyncio.run(_ours(chosen.count))}
    for path in chosen.package:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", path, "--count", str(chosen.count // 10)],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        result[path] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
