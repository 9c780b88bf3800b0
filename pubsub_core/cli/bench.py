"""``pubsub bench``: throughput and latency of one bus, from publish to receive.

One session publishes to a topic of its own and receives it again, so the figures hold both
ways and whatever the broker does in between. Each message carries its number and the
moment it was published; missing, doubled and disordered ones are counted.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import struct
import time
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import typer

from pubsub_core.bus import Bus
from pubsub_core.errors import BadOption, PubSubError

from .exits import ExitCode
from .options import BusArgument, BusOption, JsonOption, QosOption, QuietOption, Settings, settings
from .output import Output, mask, table
from .running import open_bus, run

__all__ = ["Figures", "bench", "percentile"]

_HEAD: Final = struct.Struct("!QQ")
"""Number of the message, and nanoseconds of the performance counter when it was published."""


def bench(
    context: typer.Context,
    bus: BusArgument,
    messages: Annotated[int, typer.Option("--messages", "-n", min=1, help="How many.")] = 10_000,
    size: Annotated[
        int, typer.Option("--size", "-s", min=_HEAD.size, help="Bytes of each payload.")
    ] = 100,
    qos: QosOption = None,
    window: Annotated[
        int,
        typer.Option("--window", min=1, help="Most publishes that wait for their confirmation."),
    ] = 100,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            metavar="PER_SECOND",
            min=0.001,
            help="Publish no faster; latency then holds no queueing of our own making.",
            show_default=False,
        ),
    ] = None,
    topic: Annotated[
        str | None,
        typer.Option("--topic", metavar="TOPIC", help="Use this topic.", show_default=False),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.1, help="How long to wait for the last ones."
        ),
    ] = 10.0,
    json: JsonOption = False,
    quiet: QuietOption = False,
    option: BusOption = None,
) -> None:
    """Measure throughput and latency, publish to receive.

    Exit code 1 if a message was lost or out of order.
    """
    with Output(json=json, quiet=quiet) as output:
        where = topic or f"pubsub/bench/{secrets.token_hex(6)}"
        work = _Bench(output, where, messages, size, qos, window, rate, timeout)
        figures = run(work.run(settings(context), bus, option))
        _show(output, figures)
        if figures.lost or figures.inversions or figures.failed:
            raise typer.Exit(ExitCode.FAILED)


@dataclass(slots=True)
class Figures:
    """The measurements. Seconds, unless a name says otherwise."""

    bus: str
    backend: str
    topic: str
    size: int
    qos: int | None
    sent: int = 0
    failed: int = 0
    received: int = 0
    duplicates: int = 0
    inversions: int = 0
    publishing: float = 0.0
    elapsed: float = 0.0
    latencies: list[float] = field(default_factory=list[float])

    @property
    def lost(self) -> int:
        """Messages whose publish succeeded and that never came."""
        return max(0, self.sent - self.received)

    def record(self) -> dict[str, Any]:
        """Return the documented JSON keys."""
        ordered = sorted(self.latencies)
        milliseconds = {
            name: round(percentile(ordered, share) * 1000, 4)
            for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999))
        }
        return {
            "type": "bench",
            "bus": mask(self.bus),
            "backend": self.backend,
            "topic": self.topic,
            "size": self.size,
            "qos": self.qos,
            "sent": self.sent,
            "failed": self.failed,
            "received": self.received,
            "lost": self.lost,
            "duplicates": self.duplicates,
            "inversions": self.inversions,
            "seconds": round(self.elapsed, 6),
            "publish_per_second": _rate(self.sent, self.publishing),
            "receive_per_second": _rate(self.received, self.elapsed),
            "latency_ms": {
                "min": round(ordered[0] * 1000, 4) if ordered else 0.0,
                **milliseconds,
                "max": round(ordered[-1] * 1000, 4) if ordered else 0.0,
            },
        }


def percentile(ordered: list[float], share: float) -> float:
    """Return the smallest value that at least *share* of *ordered* do not exceed."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 1) if seconds > 0 else 0.0


class _Bench:
    def __init__(
        self,
        output: Output,
        topic: str,
        messages: int,
        size: int,
        qos: int | None,
        window: int,
        rate: float | None,
        timeout: float,
    ) -> None:
        self._output = output
        self._topic = topic
        self._messages = messages
        self._size = size
        self._qos = qos
        self._window = window
        self._rate = rate
        self._timeout = timeout

    async def run(self, settings: Settings, where: str, option: list[str] | None) -> Figures:
        async with open_bus(settings, where, option) as bus:
            figures = Figures(bus.name, bus.info.name, self._topic, self._size, self._qos)
            limit = bus.limits.max_payload
            if limit is not None and self._size > limit:
                raise BadOption(
                    f"{bus.info.name} takes payloads of at most {limit} bytes",
                    option="--size",
                    hint=f"choose --size {limit} or less",
                )
            # The buffer holds everything: a full one would measure its own overflow.
            room = self._messages + 1
            how: dict[str, Any] = {} if self._qos is None else {"qos": self._qos}
            async with bus.subscribe(
                self._topic,
                buffer=room,
                buffer_bytes=room * (self._size + 1),
                **how,
            ) as inbox:
                start = time.perf_counter()
                receiving = asyncio.create_task(self._receive(inbox, figures, start))
                try:
                    with self._output.progress("messages", self._messages) as advance:
                        await self._publish(bus, figures, how, advance)
                        figures.publishing = time.perf_counter() - start
                        await self._wait(receiving, figures)
                finally:
                    receiving.cancel()
                    await asyncio.gather(receiving, return_exceptions=True)
            return figures

    async def _publish(self, bus: Bus, figures: Figures, how: dict[str, Any], advance: Any) -> None:
        padding = bytes(self._size - _HEAD.size)
        numbers = iter(range(self._messages))
        # With a rate, workers that sleep would overtake one another.
        workers = 1 if self._rate is not None else min(self._window, self._messages)
        start = time.perf_counter()
        first_error: list[PubSubError] = []

        async def worker() -> None:
            # Every worker takes the next number and publishes it before it waits, so the
            # order of the calls is the order of the numbers.
            for number in numbers:
                if self._rate is not None:
                    await asyncio.sleep(max(0.0, start + number / self._rate - time.perf_counter()))
                payload = _HEAD.pack(number, time.perf_counter_ns()) + padding
                try:
                    await bus.publish(self._topic, payload, **how)
                except PubSubError as exc:
                    figures.failed += 1
                    first_error.append(exc)
                    if figures.failed > self._messages // 10 + 10:
                        return
                else:
                    figures.sent += 1
                if number % 256 == 0:
                    advance(figures.received)
                # Where a publish needs no waiting, nobody else would have a turn.
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())
        if first_error:
            if not figures.sent:
                raise first_error[0]
            self._output.note(f"{figures.failed} failed: {first_error[0]}", kind="warning")

    async def _receive(self, inbox: Any, figures: Figures, start: float) -> None:
        seen = bytearray(self._messages)
        newest = -1
        async for message in inbox:
            now = time.perf_counter_ns()
            payload = message.raw
            if len(payload) != self._size:
                continue  # another session's
            number, then = _HEAD.unpack_from(payload)
            if number >= self._messages:
                continue
            if seen[number]:
                figures.duplicates += 1
                continue
            seen[number] = 1
            if number < newest:
                figures.inversions += 1
            newest = max(newest, number)
            figures.received += 1
            figures.latencies.append((now - then) / 1e9)
            figures.elapsed = time.perf_counter() - start
            if figures.received == self._messages:
                return

    async def _wait(self, receiving: asyncio.Task[None], figures: Figures) -> None:
        # As long as something still comes, the rest may come as well.
        while not receiving.done():
            before = figures.received
            if before >= figures.sent:
                return
            await asyncio.wait({receiving}, timeout=self._timeout)
            if figures.received == before:
                break
        if receiving.done():
            receiving.result()


def _show(output: Output, figures: Figures) -> None:
    record = figures.record()
    output.record(record)
    if output.json:
        return
    quality = "default" if figures.qos is None else str(figures.qos)
    drawn = table(
        f"{record['bus']} ({figures.backend}), {figures.size} bytes, qos {quality}", ["", ""]
    )
    drawn.show_header = False
    latency = record["latency_ms"]
    rows = [
        ("published", f"{figures.sent:,} at {record['publish_per_second']:,.0f}/s"),
        ("received", f"{figures.received:,} at {record['receive_per_second']:,.0f}/s"),
        ("failed", f"{figures.failed:,}"),
        ("lost", f"{figures.lost:,}"),
        ("duplicates", f"{figures.duplicates:,}"),
        ("out of order", f"{figures.inversions:,}"),
        ("latency ms", "  ".join(f"{name} {value:g}" for name, value in latency.items())),
    ]
    for name, text in rows:
        bad = name in ("failed", "lost", "out of order") and text != "0"
        drawn.add_row(name, f"[red]{text}[/]" if bad else text)
    output.draw(drawn)
