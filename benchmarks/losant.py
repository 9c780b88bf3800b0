"""Our Losant broker beside Mosquitto and amqtt: states per second, and the latency of commands.

Every broker is a process of its own, driven by bare sockets that send prepared bytes and count
what comes back, so that no client is measured. States are JSON of 80 bytes with times that
differ; one subscriber gets all of them, and the senders are never more than a window ahead of it,
so that no broker has a reason to drop. Ours parses, checks and stores each state besides, with
its throttle off; the other two only pass it on. The brokers take turns, and the best of the
rounds counts; with each rate stands the processor time that the broker took for one state.

A command goes to a device that waits for it, one at a time. What is not installed is left out,
and named.

``Device.send_state`` stands beside losant-mqtt 1.2.1 on paho-mqtt 1.6, which gets an environment
of its own (pip fills it; its `setuptools` still has ``pkg_resources``). Both run one program, each
in a process, and send into the same sink, which says when it has seen the last state.

    python benchmarks/losant.py [--quick] [--only one many latency client] [--profile]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import logging
import os
import pstats
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from pubsub_losant import AccessKey, DeviceSpec, LosantServer
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

DEVICES = [f"{number:024x}" for number in range(1000)]
KEY, SECRET = "key", "secret"
STEP = 500
WINDOW = 4
BUFFER = bytearray(1 << 18)


# --- brokers as processes --------------------------------------------------------------


@dataclass
class Broker:
    """A broker that runs; the password is that of whoever may see everything."""

    port: int
    pid: int
    password: str = ""

    def seconds(self) -> float:
        """Return the processor time that its process has taken."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def device(self, number: int) -> Link:
        """Connect a device."""
        return Link(self.port, Connect(DEVICES[number], KEY, SECRET.encode()))

    def observer(self, name: str = "observer") -> Link:
        """Connect somebody who may subscribe to every device, and send commands."""
        return Link(self.port, Connect(name, "operator", self.password.encode()))


async def serve(kind: str, profiled: bool) -> None:
    """Run a broker, say where it is, and end with the standard input."""
    logging.getLogger("pubsub_mqtt").setLevel(logging.ERROR)  # amqtt's limits are known
    profiler = cProfile.Profile()
    password = ""
    with tempfile.TemporaryDirectory() as folder:
        if kind == "amqtt":
            server: Any = AmqttServer()
        else:
            server = LosantServer(
                devices=dict.fromkeys(DEVICES, DeviceSpec()),
                keys=[AccessKey(KEY, SECRET)],
                store=Path(folder) / "store" if kind == "file" else None,
            )
        async with server:
            if isinstance(server, LosantServer):
                password = urlsplit(server.operator_url).password or ""
            print(json.dumps({"port": server.port, "password": password}), flush=True)
            if profiled:
                profiler.enable()
            await asyncio.to_thread(sys.stdin.read)
            profiler.disable()
    if profiled:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)


@contextlib.contextmanager
def python_broker(kind: str, *, profiled: bool = False) -> Iterator[Broker]:
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, "--serve", kind, *(["--profile"] if profiled else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield Broker(told["port"], process.pid, told["password"])
        process.stdin.close()
        process.wait(20)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def mosquitto() -> Iterator[Broker]:
    server = MosquittoServer(extra_config="max_queued_messages 0\n")
    asyncio.run(server.start())
    try:
        yield Broker(server.port, server.pid or 0)
    finally:
        asyncio.run(server.stop())


BROKERS: dict[str, Callable[[], contextlib.AbstractContextManager[Broker]]] = {
    "pubsub_losant": lambda: python_broker("memory"),
    "pubsub_losant, with a file": lambda: python_broker("file"),
    "Mosquitto": mosquitto,
    "amqtt": lambda: python_broker("amqtt"),
}


# --- bare sockets ----------------------------------------------------------------------


class Link:
    """One connection."""

    def __init__(self, port: int, connect: Connect) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), 10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._decoder = Decoder()
        self.ask(connect, ConnAck())

    def ask(self, packet: Packet, answer: Packet) -> None:
        """Send *packet*, and wait for *answer*."""
        self.sock.sendall(encode(packet))
        found = self.next()
        if found != answer:
            raise RuntimeError(f"{found} instead of {answer}")

    def next(self) -> Packet:
        """Return the next packet."""
        while (found := self._decoder.next_packet()) is None:
            data = self.sock.recv(65536)
            if not data:
                raise ConnectionError("the broker closed the connection")
            self._decoder.receive(data)
        return found

    def subscribe(self, topic: str) -> None:
        """Subscribe at QoS 0, and wait until that is confirmed."""
        self.ask(Subscribe(1, ((topic, 0),)), SubAck(1, (0,)))

    def close(self) -> None:
        """Close it."""
        self.sock.close()


def states(number: int, first: int, count: int) -> bytes:
    """Return *count* states of a device, all of one length, a millisecond apart."""
    topic = f"losant/{DEVICES[number]}/state"
    return b"".join(
        encode_publish(
            topic,
            b'{"data": {"temperature": 21.5, "door": true, "n": %07d}, "time": %d}'
            % (1_000_000 + each, first + each),
        )
        for each in range(count)
    )


def drive(observer: Link, parts: Sequence[tuple[Link, bytes]]) -> float:
    """Send each part by its device; return the seconds until the observer has all of them."""
    total = sum(len(data) for _, data in parts)
    ahead = WINDOW * STEP * (total // sum(data.count(b"losant/") for _, data in parts))
    seen = sent = at = 0
    waiting: memoryview = memoryview(b"")
    observer.sock.setblocking(False)
    for link, _ in parts:
        link.sock.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(observer.sock, selectors.EVENT_READ)
        began = time.perf_counter()
        while seen < total:
            while sent - seen < ahead:
                if not waiting:
                    if at >= len(parts):
                        break
                    waiting = memoryview(parts[at][1])
                    at += 1
                try:
                    done = parts[at - 1][0].sock.send(waiting)
                except BlockingIOError:
                    break
                sent += done
                waiting = waiting[done:]
            if not selector.select(0.001 if sent < total else 20):
                if sent >= total:
                    raise TimeoutError(f"{total - seen} bytes of {total} never came")
                continue
            got = observer.sock.recv_into(BUFFER)
            if not got:
                raise ConnectionError("the broker closed the observer")
            seen += got
        seconds = time.perf_counter() - began
    for link, _ in parts:
        link.sock.setblocking(True)
    return seconds


# --- what is measured ------------------------------------------------------------------


@dataclass
class Figure:
    """The best of several rounds."""

    rate: float = 0.0
    micros: float = float("inf")
    latencies: list[float] = field(default_factory=list[float])

    def add(self, count: int, seconds: float, cpu: float) -> None:
        """Take one round into account."""
        self.rate = max(self.rate, count / seconds)
        self.micros = min(self.micros, 1e6 * cpu / count)


def one(broker: Broker, count: int, figure: Figure) -> None:
    """States of one device."""
    with contextlib.closing(broker.observer()) as observer:
        observer.subscribe("losant/+/state")
        with contextlib.closing(broker.device(0)) as device:
            first = int(time.time() * 1000) - count
            parts = [
                (device, states(0, first + at, min(STEP, count - at)))
                for at in range(0, count, STEP)
            ]
            before = broker.seconds()
            figure.add(count, drive(observer, parts), broker.seconds() - before)


def many(broker: Broker, count: int, figure: Figure) -> None:
    """States of 1,000 devices, ten of each in turn."""
    with contextlib.closing(broker.observer()) as observer:
        observer.subscribe("losant/+/state")
        devices = [broker.device(number) for number in range(len(DEVICES))]
        try:
            each = max(1, count // len(DEVICES) // 10)
            first = int(time.time() * 1000) - each * 10
            parts = [
                (device, states(number, first + turn * each, each))
                for turn in range(10)
                for number, device in enumerate(devices)
            ]
            count = each * 10 * len(devices)
            before = broker.seconds()
            figure.add(count, drive(observer, parts), broker.seconds() - before)
        finally:
            for device in devices:
                device.close()


def latency(broker: Broker, count: int, figure: Figure) -> None:
    """Commands to one device, one at a time."""
    topic = f"losant/{DEVICES[0]}/command"
    packet = encode_publish(topic, b'{"name":"start","payload":{"one":[2,3]}}')
    with (
        contextlib.closing(broker.observer("sender")) as sender,
        contextlib.closing(broker.device(0)) as device,
    ):
        device.subscribe(topic)
        for number in range(count + 50):
            began = time.perf_counter()
            sender.sock.sendall(packet)
            device.next()
            if number >= 50:
                figure.latencies.append(1e6 * (time.perf_counter() - began))


SECTIONS: dict[str, tuple[str, Callable[[Broker, int, Figure], None], int]] = {
    "one": ("States of one device", one, 60_000),
    "many": ("States of 1,000 devices", many, 60_000),
    "latency": ("Commands to one device", latency, 3_000),
}


# --- the client ------------------------------------------------------------------------

ORIGINAL = ("losant-mqtt==1.2.1", "paho-mqtt<2", "setuptools<81")
LAST = 9_999_999

PROGRAM = """
import json, sys, threading, time
package, way = sys.argv[1:3]
port, count, last = map(int, sys.argv[3:])
if package == "losantmqtt":
    from losantmqtt import Device
    from paho.mqtt import client as mqtt
    original = mqtt.Client.connect
    mqtt.Client.connect = lambda self, host, _, keepalive: original(self, host, port, keepalive)
    Device.mqtt_endpoint = "127.0.0.1"
    device = Device("bench", "key", "secret", secure=False)
else:
    from pubsub_losant import Device
    device = Device("bench", "key", "secret", secure=False, host="127.0.0.1", port=port)
connected, done = threading.Event(), threading.Event()
device.add_event_observer("connect", lambda device: connected.set())
device.add_event_observer("command", lambda device, command: done.set())
threaded = way == "blocking"
if threaded:
    thread = threading.Thread(target=device.connect)
    thread.start()
else:
    device.connect(blocking=False)

def until(event):
    end = time.monotonic() + 60
    while not event.is_set():
        if time.monotonic() > end:
            raise SystemExit("the sink never answered")
        if threaded:
            event.wait(1)
        else:
            device.loop(0.1)

until(connected)
state = {"temperature": 21.5, "door": True, "n": 0}
send = device.send_state
began, cpu = time.perf_counter(), time.process_time()
for number in range(count):
    state["n"] = 1000000 + number if number < count - 1 else last
    send(state)
    if not threaded and number % 100 == 0:
        device.loop(0)
until(done)
print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]))
device.close()
if threaded:
    thread.join()
"""


def sink() -> None:
    """Take one client after the other; send a command when the last state was seen."""
    command = encode_publish("losant/bench/command", b'{"name":"done"}')
    answers = {0x10: encode(ConnAck()), 0x82: encode(SubAck(1, (0,)))}
    marker = b'"n": %d' % LAST
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        while True:
            peer, _ = listener.accept()
            with peer:
                tail = b""
                while data := peer.recv(1 << 18):
                    if data[0] in answers:
                        # Whoever sends behind SUBSCRIBE at once is not in this benchmark.
                        peer.sendall(answers[data[0]])
                    if marker in tail + data:
                        peer.sendall(command)
                        data = b""
                    tail = data[-len(marker) :]


@contextlib.contextmanager
def sink_process() -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, "--serve", "sink"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield int(json.loads(process.stdout.readline())["port"])
    finally:
        process.kill()
        process.communicate()


def original(folder: str) -> str:
    """Make an environment with losant-mqtt; return its Python."""
    venv.create(folder, with_pip=True)
    python = str(Path(folder) / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", *ORIGINAL], check=True)
    return python


def client(rounds: int, scale: float, console: Console) -> None:
    """`Device.send_state` beside the original's."""
    count = int(60_000 * scale)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder, sink_process() as port:
        pythons = {"pubsub_losant": sys.executable}
        try:
            pythons["losantmqtt"] = original(folder)
        except subprocess.CalledProcessError:
            console.print(f"left out: losantmqtt (pip cannot install {' '.join(ORIGINAL)})")
        for _ in range(rounds):
            for way in ("loop", "blocking"):
                for package, python in pythons.items():
                    numbers = [str(each) for each in (port, count, LAST)]
                    done = subprocess.run(
                        [python, "-W", "ignore", "-c", PROGRAM, package, way, *numbers],
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    seconds, cpu = json.loads(done.stdout)
                    name = f"{package}, {way}"
                    figures.setdefault(name, Figure()).add(count, seconds, cpu)
    console.print(_table("Device.send_state", figures, "client"))


def run(names: Sequence[str], rounds: int, scale: float, console: Console) -> None:
    missing: set[str] = set()
    for name, there, how in (
        ("Mosquitto", find_mosquitto(), "apt-get install mosquitto"),
        ("amqtt", find_spec("amqtt"), "install pubsub-core[mqtt-server]"),
    ):
        if there is None:
            missing.add(name)
            console.print(f"left out: {name} ({how})", markup=False)
    for name in names:
        if name == "client":
            client(rounds, scale, console)
            continue
        title, measure, count = SECTIONS[name]
        figures: dict[str, Figure] = {}
        for _ in range(rounds):
            for broker_name, start in BROKERS.items():
                if broker_name in missing:
                    continue
                figure = figures.setdefault(broker_name, Figure())
                # amqtt takes ten times as long.
                wanted = int(count * scale * (0.1 if broker_name == "amqtt" else 1))
                with start() as broker:
                    measure(broker, wanted, figure)
        console.print(_table(title, figures))


def _table(title: str, figures: dict[str, Figure], what: str = "broker") -> Table:
    timed = any(figure.latencies for figure in figures.values())
    table = Table(title=title)
    table.add_column(what)
    heads = ("median", "95 %", "99 %", "99.9 %") if timed else ("states/s", "CPU for one")
    for head in heads:
        table.add_column(head, justify="right")
    for name, figure in figures.items():
        if timed:
            cuts = statistics.quantiles(figure.latencies, n=1000)
            cells = [f"{cuts[at]:.0f} µs" for at in (499, 949, 989, 998)]
        else:
            cells = [f"{figure.rate:,.0f}", f"{figure.micros:.1f} µs"]
        table.add_row(name, *cells)
    return table


PARTS = (*SECTIONS, "client")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--profile", action="store_true", help="where ours spends its time")
    kinds = ("memory", "file", "amqtt", "sink")
    parser.add_argument("--serve", choices=kinds, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve == "sink":
        sink()
        return
    if given.serve:
        asyncio.run(serve(given.serve, given.profile))
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    if given.profile:
        for name in (each for each in given.only if each in SECTIONS):
            with python_broker("memory", profiled=True) as broker:
                SECTIONS[name][1](broker, SECTIONS[name][2], Figure())
        return
    run(given.only, 1 if given.quick else 3, 0.2 if given.quick else 1.0, Console())


if __name__ == "__main__":
    main()
