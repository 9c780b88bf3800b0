"""The messagebus: our client beside the PyPI packages, and our distributor.

    python benchmarks/messagebus.py [--quick] [--package PATH_TO_SITE_PACKAGES ...] [--count N]

The client is measured against a bare socket peer in the same process: how fast it receives and
publishes, and how long a message takes from the peer to the handler. ``--package`` loads a
version of ``jetblack_messagebus`` from its site-packages and measures it in the same way, in a
process of its own; one that cannot be measured is named with the reason, in ``left_out``.

The distributor is measured with bare sockets as clients, beside an asyncio server that only
cuts the same frames out of the stream and sends them back: as fast as it goes, and one at a
time. Then with a stalled subscriber, fanning out, and with many subscriptions. One JSON object
is printed. Everything shares one process, and so one core.
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
from pathlib import Path
from typing import Any

SIZES = (100, 10_240)
LATENCIES = 2000


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"p{part}": round(1e6 * ordered[min(len(ordered) - 1, len(ordered) * part // 100)], 1)
        for part in (50, 90, 99)
    }


def _frame(size: int) -> bytes:
    from pubsub_messagebus.protocol import DataPacket, encode_forwarded_multicast

    return encode_forwarded_multicast("u", "h", "F", "T", False, [DataPacket(None, bytes(size))])


async def _client(module: str, size: int, count: int) -> dict[str, Any]:
    library: Any = importlib.import_module(module)
    frame = _frame(size)
    left = 0.0
    took: list[float] = []
    sent = asyncio.Event()
    wanted = count * (len(frame) - 10)  # a published frame has no user and host
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen, left
        for _ in range(LATENCIES):
            left = time.perf_counter()
            writer.write(frame)
            arrived.clear()
            await arrived.wait()
        idle.set()
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

    go, idle, arrived = asyncio.Event(), asyncio.Event(), asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client = await library.CallbackClient.create("127.0.0.1", server.sockets[0].getsockname()[1])
    received = 0
    done = asyncio.Event()

    async def on_data(*_: Any) -> None:
        nonlocal received
        if not idle.is_set():
            took.append(time.perf_counter() - left)
            arrived.set()
            return
        received += 1
        if received == count:
            done.set()

    client.data_handlers.append(on_data)
    running = asyncio.create_task(client.start())
    await idle.wait()
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
    return {
        "receive_per_second": round(receive),
        "publish_per_second": round(publish),
        "latency_microseconds": _percentiles(took),
    }


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
    """Cuts frames of one size out of the stream and sends them back: the least to be done."""

    size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        size = self.size
        frames = [data[at : at + size] for at in range(0, len(data) - size + 1, size)]
        self.rest = data[len(frames) * size :]
        self.transport.write(b"".join(frames))


class _WritingEcho(_Echo):
    """Writes each frame by itself."""

    def data_received(self, data: bytes) -> None:
        data = self.rest + data
        size = self.size
        at = 0
        while at + size <= len(data):
            self.transport.write(data[at : at + size])
            at += size
        self.rest = data[at:]


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


async def _one_by_one(client: _Counter, wire: bytes, receiver: _Counter, size: int) -> list[float]:
    """Send one message after the other; return how long each took."""
    took: list[float] = []
    for _ in range(LATENCIES):
        receiver.wanted = receiver.seen + size
        receiver.done.clear()
        began = time.perf_counter()
        client.transport.write(wire)
        await receiver.done.wait()
        took.append(time.perf_counter() - began)
    return took


async def _distributor(
    count: int, *, fan: int = 1, stalled: bool = False, others: int = 0
) -> dict[str, Any]:
    from pubsub_messagebus.protocol import DataPacket, encode_multicast, encode_subscription_request
    from pubsub_messagebus.server import MessageBusServer

    wire = encode_multicast("F", "T", False, [DataPacket(None, bytes(100))])
    async with MessageBusServer() as server:
        subscribers = await _subscribed(server, server.port, fan + stalled)
        if stalled:
            subscribers[-1].transport.pause_reading()
        crowd = await _dial(server.port)
        grown = _resident()
        for number in range(others):
            crowd.transport.write(encode_subscription_request("F", f"topic/{number}", True))
            if number % 1000 == 0:
                await asyncio.sleep(0)
        while server.broker.stats.subscriptions < others:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        grown = _resident() - grown
        publisher = await _dial(server.port)
        host = len(server.peers.known("127.0.0.1"))
        size = len(wire) + 4 + len("nobody") + 4 + host
        first = subscribers[0]
        took = await _one_by_one(publisher, wire, first, size) if fan == 1 else []
        before = first.seen
        for each in subscribers[:fan]:
            each.wanted = each.seen + count * size
            each.done.clear()
        began = time.perf_counter()
        await _push(publisher, wire, count, 2000, lambda: (first.seen - before) // size)
        for each in subscribers[:fan]:
            await each.done.wait()
        seconds = time.perf_counter() - began
        for each in (publisher, crowd, *subscribers):
            each.transport.abort()
    found: dict[str, Any] = {"deliveries_per_second": round(count * fan / seconds)}
    if took:
        found["latency_microseconds"] = _percentiles(took)
    if others:
        found["subscriptions"] = others
        found["bytes_each"] = round(grown / others)
    return found


async def _echo(count: int, kind: type[_Echo]) -> dict[str, Any]:
    frame = _frame(100)
    kind.size = len(frame)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(kind, "127.0.0.1", 0)
    client = await _dial(server.sockets[0].getsockname()[1])
    took = await _one_by_one(client, frame, client, len(frame))
    before = client.seen
    client.wanted = before + count * len(frame)
    client.done.clear()
    began = time.perf_counter()
    await _push(client, frame, count, 2000, lambda: (client.seen - before) // len(frame))
    await client.done.wait()
    seconds = time.perf_counter() - began
    client.transport.abort()
    server.close()
    return {
        "deliveries_per_second": round(count / seconds),
        "latency_microseconds": _percentiles(took),
    }


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


async def _ours(count: int) -> dict[str, Any]:
    result: dict[str, Any] = {
        f"client_{size}_bytes": await _client(
            "pubsub_messagebus", size, count if size == 100 else count // 5
        )
        for size in SIZES
    }
    # Before anything else grows and shrinks the heap.
    crowded = await _distributor(count, others=100_000)
    result["echo_of_frames"] = echo = await _echo(count, _Echo)
    result["echo_writing_each_frame"] = writing = await _echo(count, _WritingEcho)
    result["one_to_one"] = one = await _distributor(count)
    result["one_to_one_of_echo"] = {
        "rate": _ratio(one, echo),
        "rate_writing_each_frame": _ratio(one, writing),
        "latency": round(
            one["latency_microseconds"]["p50"] / echo["latency_microseconds"]["p50"], 2
        ),
    }
    result["beside_a_stalled_one"] = await _distributor(count, stalled=True)
    result["one_to_100"] = await _distributor(count // 20, fan=100)
    result["one_to_1000"] = await _distributor(count // 100, fan=1000)
    result["beside_100_000_subscriptions"] = crowded
    return result


def _ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    return round(float(one["deliveries_per_second"] / other["deliveries_per_second"]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--package", action="append", default=[], metavar="SITE_PACKAGES")
    parser.add_argument("--quick", action="store_true", help="fewer messages")
    parser.add_argument("--count", type=int)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.count is None:
        chosen.count = 5_000 if chosen.quick else 50_000
    if chosen.measure:
        sys.path.insert(0, chosen.measure)
        found = {
            f"client_{size}_bytes": asyncio.run(_client("jetblack_messagebus", size, chosen.count))
            for size in SIZES
        }
        print(json.dumps(found))
        return
    result: dict[str, Any] = {"ours": asyncio.run(_ours(chosen.count))}
    left_out: dict[str, str] = {}
    if not chosen.package:
        left_out["jetblack_messagebus"] = "name its site-packages with --package"
    for path in chosen.package:
        command = [sys.executable, __file__, "--measure", path, "--count", str(chosen.count // 10)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        except subprocess.CalledProcessError as error:
            left_out[path] = (error.stderr.splitlines() or [str(error)])[-1]
            continue
        except subprocess.TimeoutExpired as error:
            left_out[path] = str(error)
            continue
        result[path] = json.loads(done.stdout.splitlines()[-1])
    if left_out:
        result["left_out"] = left_out
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
