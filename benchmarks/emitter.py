"""Our Emitter broker beside amqtt's and Mosquitto, and our client beside ``emitter-io``.

Every broker is a process of its own. They are driven by bare sockets that send prepared bytes
and count what comes back, so that no client is measured; the publisher is never more than a
window ahead of the slowest receiver, so that no broker has a reason to drop. Messages have 100
bytes at QoS 0. The brokers take turns, the best of several rounds counts, and with each rate
stands the processor time that the broker took for one delivery, which other programs on the
machine disturb less than the rate.

The clients are processes of their own as well, against one of our brokers, with such a socket at
the other end.

    python benchmarks/emitter.py [--quick] [--only brokers subscriptions keys clients] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import importlib
import importlib.metadata
import io
import json
import logging
import os
import pstats
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pubsub_emitter import EmitterServer, License
from pubsub_emitter.keys import Permission
from pubsub_emitter.server.broker import EmitterDialect
from pubsub_emitter.server.storage import Storage
from pubsub_mqtt.server import AmqttServer, MosquittoServer, find_mosquitto
from pubsub_mqtt.server.endpoint.packets import (
    ConnAck,
    Connect,
    Decoder,
    Packet,
    SubAck,
    Subscribe,
    encode,
    encode_publish,
)

PAYLOAD = b"x" * 100
CHANNEL = "bench/a/"
DEADLINE = 120.0
STEP = 500
WINDOW = 4


# --- brokers as processes --------------------------------------------------------------


@dataclass
class Broker:
    """A broker that runs; *prefix* stands before the channel of what is sent to it."""

    port: int
    pid: int
    prefix: str = ""

    def seconds(self) -> float:
        """Return the processor time that its process has taken."""
        return cpu_seconds(self.pid)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def serve(kind: str, profiled: bool) -> None:
    """Run a broker, say where it is, and end with the standard input."""
    server = EmitterServer() if kind == "ours" else AmqttServer()
    logging.getLogger("pubsub_mqtt").setLevel(logging.ERROR)  # amqtt's limits are known
    profiler = cProfile.Profile()
    async with server:
        key = server.make_key("#/", "rw") if isinstance(server, EmitterServer) else ""
        print(json.dumps({"port": server.port, "key": key}), flush=True)
        if profiled:
            profiler.enable()
        await asyncio.to_thread(sys.stdin.read)
        profiler.disable()
    if profiled:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(30)


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        # -P: this file's folder is no place to import from; `emitter` is the SDK's name.
        [sys.executable, "-P", __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
        process.stdin.close()  # type: ignore[union-attr]  # there is a pipe
        process.wait(20)
    finally:
        process.kill()
        process.wait()


def line(process: subprocess.Popen[str]) -> Any:
    """Return what the child says next."""
    text = process.stdout.readline()  # type: ignore[union-attr]  # there is a pipe
    if not text:
        raise RuntimeError("the child ended")
    return json.loads(text)


@contextlib.contextmanager
def python_broker(kind: str, *, profiled: bool = False) -> Iterator[Broker]:
    with child("--serve", kind, *(["--profile"] if profiled else [])) as process:
        told = line(process)
        yield Broker(told["port"], process.pid, f"{told['key']}/" if told["key"] else "")


@contextlib.contextmanager
def mosquitto() -> Iterator[Broker]:
    server = MosquittoServer(extra_config="max_queued_messages 0\n")
    asyncio.run(server.start())
    try:
        yield Broker(server.port, server.pid or 0)
    finally:
        asyncio.run(server.stop())


BROKERS: dict[str, Callable[[], contextlib.AbstractContextManager[Broker]]] = {
    "pubsub_emitter": lambda: python_broker("ours"),
    "amqtt": lambda: python_broker("amqtt"),
    "Mosquitto": mosquitto,
}


# --- bare sockets ----------------------------------------------------------------------


class Link:
    """One connection; *seen* counts the bytes that came after `listen`."""

    def __init__(self, port: int, name: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.seen = 0
        self._decoder = Decoder()
        self.ask(Connect(name), ConnAck())

    def ask(self, packet: Packet, answer: Packet) -> None:
        """Send *packet*, and wait for *answer*."""
        self.sock.sendall(encode(packet))
        while (found := self._decoder.next_packet()) is None:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionError("the broker closed the connection")
            self._decoder.receive(data)
        if found != answer:
            raise RuntimeError(f"{found} instead of {answer}")

    def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribe at QoS 0, and wait until that is confirmed."""
        for start in range(0, len(topics), STEP):
            part = topics[start : start + STEP]
            filters = tuple((topic, 0) for topic in part)
            self.ask(Subscribe(1, filters), SubAck(1, (0,) * len(part)))


BUFFER = bytearray(1 << 18)


def drive(publisher: Link, receivers: list[Link], parts: list[bytes], size: int) -> float:
    """Send *parts* and return the seconds until every receiver has all of it.

    A part is *size* bytes long as it is received. The publisher is at most `WINDOW` parts ahead
    of the slowest receiver.
    """
    total = len(parts) * size
    ahead = WINDOW * size
    selector = selectors.DefaultSelector()
    for each in (publisher, *receivers):
        each.sock.setblocking(False)
    for each in receivers:
        each.seen = 0
        selector.register(each.sock, selectors.EVENT_READ, each)
    selector.register(publisher.sock, selectors.EVENT_WRITE, None)
    writing = True
    waiting = memoryview(b"")
    sent = 0
    began = time.perf_counter()
    while True:
        slowest = min(each.seen for each in receivers)
        if slowest >= total:
            break
        if not waiting and sent < len(parts) and sent * size - slowest < ahead:
            waiting = memoryview(parts[sent])
            sent += 1
        if bool(waiting) != writing:
            writing = bool(waiting)
            if writing:
                selector.register(publisher.sock, selectors.EVENT_WRITE, None)
            else:
                selector.unregister(publisher.sock)
        ready = selector.select(10)
        if not ready:
            raise TimeoutError(f"{total - slowest} bytes of {total} never came")
        for key, _ in ready:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    waiting = waiting[publisher.sock.send(waiting) :]
            else:
                got = key.data.sock.recv_into(BUFFER)
                if not got:
                    raise ConnectionError("the broker closed a receiver")
                key.data.seen += got
    seconds = time.perf_counter() - began
    selector.close()
    return seconds


@dataclass
class Figure:
    """The best rate of several rounds, and the least processor time."""

    rate: float = 0.0
    micros: float = float("inf")

    def add(self, deliveries: int, seconds: float, cpu: float) -> None:
        """Take one round into account."""
        self.rate = max(self.rate, deliveries / seconds)
        self.micros = min(self.micros, 1e6 * cpu / deliveries)


def fan(broker: Broker, count: int, receivers: int, figure: Figure) -> None:
    """Send *count* messages to each of *receivers*."""
    links = [Link(broker.port, f"r{number}") for number in range(receivers)]
    publisher = Link(broker.port, "publisher")
    try:
        for each in links:
            each.subscribe([broker.prefix + CHANNEL])
        batch = 500 if receivers == 1 else 50
        message = encode_publish(broker.prefix + CHANNEL, PAYLOAD)
        size = batch * len(encode_publish(CHANNEL, PAYLOAD))
        before = broker.seconds()
        seconds = drive(publisher, links, [message * batch] * (count // batch), size)
        figure.add(count * receivers, seconds, broker.seconds() - before)
    finally:
        for each in (*links, publisher):
            each.sock.close()


# --- what is measured ------------------------------------------------------------------


def measure_brokers(quick: bool, console: Console) -> None:
    rounds = 2 if quick else 4
    names = list(BROKERS)
    if find_spec("amqtt") is None:
        names.remove("amqtt")
        console.print("left out: amqtt (install pubsub-core[mqtt-server])")
    if find_mosquitto() is None:
        names.remove("Mosquitto")
        console.print("left out: Mosquitto (apt-get install mosquitto)")
    for receivers in (1, 100):
        count = (40_000 if receivers == 1 else 1_000) // (4 if quick else 1)
        figures = {name: Figure() for name in names}
        with contextlib.ExitStack() as stack:
            running = {name: stack.enter_context(BROKERS[name]()) for name in names}
            for _ in range(rounds):
                for name in names:
                    slower = 4 if name == "amqtt" else 1
                    fan(running[name], count // slower, receivers, figures[name])
        table = Table(title=f"one to {receivers}, QoS 0, 100 bytes")
        for column in ("", "deliveries/s", "of amqtt", "us of processor", "of amqtt"):
            table.add_column(column, justify="left" if not column else "right")
        reference = figures.get("amqtt")
        for name, figure in figures.items():
            table.add_row(
                name,
                f"{figure.rate:,.0f}",
                f"{figure.rate / reference.rate:.1f}" if reference else "",
                f"{figure.micros:.1f}",
                f"{reference.micros / figure.micros:.1f}" if reference else "",
            )
        console.print(table)


def measure_subscriptions(quick: bool, console: Console) -> None:
    """One receiver, and so many other subscriptions beside its own."""
    count = 10_000 if quick else 40_000
    rounds = 2 if quick else 4
    table = Table(title="one to one beside other subscriptions of our broker")
    for column in ("subscriptions", "one channel/s", "us", "5,000 channels/s", "us", "MB"):
        table.add_column(column, justify="right")
    for subscriptions in (1, 1_000, 100_000):
        with python_broker("ours") as broker:
            # They stand beside what is published to, in the same node of the trie.
            crowd = Link(broker.port, "crowd")
            crowd.sock.settimeout(60)
            others = [f"{broker.prefix}bench/x{each}/own/" for each in range(subscriptions - 1)]
            crowd.subscribe(others)
            receiver = Link(broker.port, "receiver")
            receiver.subscribe([f"{broker.prefix}bench/+/own/"])
            publisher = Link(broker.port, "publisher")
            one, many = Figure(), Figure()
            channels = [f"bench/{number:05}/own/" for number in range(5_000)]
            size = 500 * len(encode_publish(channels[0], PAYLOAD))
            for figure, names in ((one, channels[:1] * 5_000), (many, channels)):
                messages = [encode_publish(broker.prefix + name, PAYLOAD) for name in names]
                parts = [b"".join(messages[at : at + 500]) for at in range(0, 5_000, 500)]
                for _ in range(rounds):
                    before = broker.seconds()
                    seconds = drive(publisher, [receiver], parts * (count // 5_000), size)
                    figure.add(count, seconds, broker.seconds() - before)
            pages = int(Path(f"/proc/{broker.pid}/statm").read_text().split()[1])
            megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
            for each in (crowd, receiver, publisher):
                each.sock.close()
        table.add_row(
            f"{subscriptions:,}",
            f"{one.rate:,.0f}",
            f"{one.micros:.1f}",
            f"{many.rate:,.0f}",
            f"{many.micros:.1f}",
            f"{megabytes:.0f}",
        )
    console.print(table)


def measure_keys(quick: bool, console: Console) -> None:
    """What a right costs the broker: known to it, and met for the first time."""
    count = 500 if quick else 2_000
    contract, signature = 0x1234ABCD, 0x5678EF01
    licenses = (
        License(1, contract, signature, os.urandom(16)),
        License(2, contract, signature, os.urandom(32), os.urandom(24)),
        License.generate(),
    )
    table = Table(title="checking a key, topic and rights included")
    for column in ("license", "known, us", "new, us"):
        table.add_column(column, justify="right")
    for license_ in licenses:
        dialect = EmitterDialect(license_, Storage())
        topics = [f"{license_.make_key('bench/#/', 'rw')}/{CHANNEL}" for _ in range(count)]

        def check(topics: list[str], dialect: EmitterDialect = dialect) -> float:
            began = time.perf_counter()
            for topic in topics:
                dialect._authorize(dialect._parse(topic), Permission.WRITE)
            return 1e6 * (time.perf_counter() - began) / len(topics)

        new = check(topics)
        known = min(check([topics[0]] * count) for _ in range(5))
        table.add_row(f"version {license_.version}", f"{known:.2f}", f"{new:.0f}")
    console.print(table)


# --- clients ---------------------------------------------------------------------------

CLIENTS = {"emitter-io 2.3.0": "emitter", "pubsub_emitter": "pubsub_emitter"}


def run_client(module: str, port: int, key: str, count: int, way: str, profiled: bool) -> None:
    """Be a client: receive *count* messages, or publish them at a word from the parent."""
    client = importlib.import_module(module).Client()
    profiler = cProfile.Profile()
    connected, done = threading.Event(), threading.Event()
    seen = 0
    began = ended = 0.0

    def on_message(_: Any) -> None:
        nonlocal seen, began, ended
        if not seen:
            began = time.perf_counter()
        seen += 1
        if seen == count:
            ended = time.perf_counter()
            done.set()

    client.on_connect = connected.set
    client.connect("127.0.0.1", port, False)
    if profiled and way == "receive":
        threading.setprofile(lambda *_: profiler.enable())
    client.loop_start()
    connected.wait(10)
    if way == "receive":
        client.subscribe(key, CHANNEL, on_message)
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    before = time.process_time()
    if way == "publish":
        if profiled:
            profiler.enable()
        for _ in range(count):
            client.publish(key, CHANNEL, PAYLOAD)
        profiler.disable()
        sys.stdin.readline()  # the parent has all of them
    else:
        done.wait(DEADLINE)
    print(json.dumps([time.process_time() - before, ended - began, seen]), flush=True)
    if profiled:
        stream = io.StringIO()
        pstats.Stats(profiler, stream=stream).sort_stats("tottime").print_stats(30)
        print(stream.getvalue(), file=sys.stderr)
    client.disconnect()
    client.loop_stop()


def measure_client(
    broker: Broker, module: str, count: int, way: str, figure: Figure, *, profiled: bool = False
) -> None:
    arguments = [module, str(broker.port), broker.prefix[:-1], str(count), way]
    size = len(encode_publish(CHANNEL, PAYLOAD))
    peer = Link(broker.port, "peer")
    if way == "publish":
        peer.subscribe([broker.prefix + CHANNEL])
    with child("--client", *arguments, *(["--profile"] if profiled else [])) as process:
        assert line(process) == "ready"
        assert process.stdin is not None
        if way == "publish":
            peer.sock.settimeout(DEADLINE)
            left = count * size
            began = time.perf_counter()
            process.stdin.write("go\n")
            process.stdin.flush()
            while left > 0:
                got = peer.sock.recv_into(BUFFER)
                if not got:
                    raise ConnectionError("the broker closed the receiver")
                left -= got
            seconds = time.perf_counter() - began
            process.stdin.write("done\n")
            process.stdin.flush()
            cpu, _, _ = line(process)
        else:
            process.stdin.write("go\n")
            process.stdin.flush()
            settled(broker)
            peer.sock.sendall(encode_publish(broker.prefix + CHANNEL, PAYLOAD) * count)
            cpu, seconds, seen = line(process)
            if seen != count:
                raise TimeoutError(f"{module} received {seen} of {count} messages")
        figure.add(count, seconds, cpu)
    peer.sock.close()


def settled(broker: Broker) -> None:
    """Wait until a subscription that was just sent has been taken: the broker rests then."""
    while True:
        before = broker.seconds()
        time.sleep(0.1)
        if broker.seconds() == before:
            return


def measure_clients(quick: bool, console: Console) -> None:
    count = 5_000 if quick else 20_000
    rounds = 2 if quick else 4
    modules = dict(CLIENTS)
    try:
        version = importlib.metadata.version("emitter-io")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    if version != "2.3.0":
        del modules["emitter-io 2.3.0"]
        console.print("left out: emitter-io 2.3.0 (install pubsub-core[bench])")
    figures = {(name, way): Figure() for name in modules for way in ("publish", "receive")}
    with python_broker("ours") as broker:
        for _ in range(rounds):
            for (name, way), figure in figures.items():
                measure_client(broker, modules[name], count, way, figure)
    table = Table(title="clients at our broker, QoS 0, 100 bytes")
    for column in ("", "", "messages/s", "of emitter-io", "us of processor", "of emitter-io"):
        table.add_column(column, justify="left" if not column else "right")
    for (name, way), figure in figures.items():
        reference = figures.get(("emitter-io 2.3.0", way))
        table.add_row(
            name,
            way,
            f"{figure.rate:,.0f}",
            f"{figure.rate / reference.rate:.2f}" if reference else "",
            f"{figure.micros:.1f}",
            f"{reference.micros / figure.micros:.2f}" if reference else "",
        )
    console.print(table)


def profile(only: Sequence[str]) -> None:
    """Show where our broker and our client spend their time."""
    with python_broker("ours", profiled="brokers" in only) as broker:
        if "brokers" in only:
            fan(broker, 20_000, 1, Figure())
            fan(broker, 500, 100, Figure())
        if "clients" in only:
            for way in ("publish", "receive"):
                measure_client(broker, "pubsub_emitter", 20_000, way, Figure(), profiled=True)


PARTS = {
    "brokers": measure_brokers,
    "subscriptions": measure_subscriptions,
    "keys": measure_keys,
    "clients": measure_clients,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer messages and rounds")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--profile", action="store_true", help="where the time is spent")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--client", nargs=5, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        asyncio.run(serve(chosen.serve, chosen.profile))
    elif chosen.client:
        module, port, key, count, way = chosen.client
        run_client(module, int(port), key, int(count), way, chosen.profile)
    elif chosen.profile:
        profile(chosen.only)
    else:
        for part in chosen.only:
            PARTS[part](chosen.quick, Console(width=100))


if __name__ == "__main__":
    main()
