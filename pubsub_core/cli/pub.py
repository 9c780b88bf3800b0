"""``pubsub pub``: publish an argument, a file, or lines from standard input."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, TextIO

import msgspec
import typer

from pubsub_core.bus import Bus
from pubsub_core.capabilities import ConfirmedBy
from pubsub_core.errors import BadOption, EncodeFailed, PubSubError
from pubsub_core.message import Headers, Receipt

from .exits import ExitCode
from .options import (
    BusArgument,
    BusOption,
    CodecOption,
    CountOption,
    JsonOption,
    QosOption,
    QuietOption,
    Settings,
    TopicArgument,
    pair_list,
    settings,
)
from .output import Output, explain_error, show_error, show_traceback
from .running import open_bus, run

__all__ = ["pub"]

_BATCH: Final = 256
_READ: Final = 64 * 1024
_LINES: Final = 1000
_LINES_OF_STDIN: Final = object()


def pub(
    context: typer.Context,
    bus: BusArgument,
    topic: TopicArgument,
    payload: Annotated[
        str | None,
        typer.Argument(
            metavar="[PAYLOAD]",
            help="Text, or - for one message per line of standard input.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            metavar="FILE",
            help="Send the file's content as one message; - reads standard input.",
            show_default=False,
        ),
    ] = None,
    count: CountOption = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--rate",
            metavar="PER_SECOND",
            min=0.001,
            help="At most that many messages per second.",
            show_default=False,
        ),
    ] = None,
    retain: Annotated[
        bool, typer.Option("--retain", "-r", help="Let the broker keep it as the last value.")
    ] = False,
    qos: QosOption = None,
    ttl: Annotated[
        float | None,
        typer.Option(
            "--ttl",
            metavar="SECONDS",
            min=0.001,
            help="How long the broker may keep it.",
            show_default=False,
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option("--header", "-H", metavar="KEY=VALUE", help="May be repeated."),
    ] = None,
    content_type: Annotated[
        str | None, typer.Option("--content-type", metavar="TYPE", help="Media type.")
    ] = None,
    codec: CodecOption = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", metavar="SECONDS", min=0.0, help="Deadline for each confirmation."
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    option: BusOption = None,
) -> None:
    """Publish to TOPIC.

    The payload is sent as it is. With --codec it is read as JSON (as text for --codec text)
    and encoded by that codec. --count repeats it; with - it is the most lines to send.
    """
    sources = [payload is not None, file is not None]
    if sum(sources) > 1:
        raise typer.BadParameter("give a payload or --file, not both", param_hint="PAYLOAD")
    headers = Headers(pair_list(header, option="--header"))
    how: dict[str, Any] = {
        "retain": True if retain else None,
        "qos": qos,
        "ttl": ttl,
        "headers": headers or None,
        "content_type": content_type,
        "timeout": timeout,
    }
    if codec is not None:
        how["codec"] = codec
    with Output(json=json, quiet=quiet) as output:
        lines = payload == "-"
        once = _LINES_OF_STDIN if lines else _value(_payload(payload, file), codec)
        work = _Publishing(
            output, topic, codec, rate, {k: v for k, v in how.items() if v is not None}
        )
        code = run(work.run(settings(context), bus, option, once, count))
        if code:
            raise typer.Exit(code)


def _payload(payload: str | None, file: Path | None) -> bytes:
    if file is None:
        return os.fsencode(payload or "")
    try:
        return _stdin().buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as exc:
        raise typer.BadParameter(f"{file}: {exc.strerror}", param_hint="--file") from exc


def _value(payload: bytes, codec: str | None) -> Any:
    if codec is None or codec == "bytes":
        return payload
    try:
        return payload.decode() if codec == "text" else msgspec.json.decode(payload)
    except UnicodeDecodeError as exc:
        raise BadOption(
            "the payload is not UTF-8", option="--codec", hint="leave --codec away to send bytes"
        ) from exc
    except msgspec.DecodeError as exc:
        raise BadOption(
            f"with --codec {codec} the payload must be JSON: {exc}",
            option="--codec",
            hint="quote texts twice, '\"like this\"', or leave --codec away to send it as it is",
        ) from exc


class _Publishing:
    """One run of the command; counts messages sent."""

    def __init__(
        self, output: Output, topic: str, codec: str | None, rate: float | None, how: dict[str, Any]
    ) -> None:
        self._output = output
        self._topic = topic
        self._codec = codec
        self._rate = rate
        self._how = how
        self._sent = 0
        self._confirmed: ConfirmedBy | None = None

    async def run(
        self,
        settings: Settings,
        where: str,
        option: list[str] | None,
        once: Any,
        count: int | None,
    ) -> ExitCode:
        async with open_bus(settings, where, option) as bus:
            total = count if once is _LINES_OF_STDIN else count or 1
            # Short work shows no bar.
            shown = total is None or total > _BATCH or self._rate is not None
            text = f"publishing to {self._topic}"
            with self._output.progress(text, total, wanted=shown) as advance:
                try:
                    async for batch in self._batches(once, total):
                        await self._send(bus, batch)
                        advance(self._sent)
                except PubSubError as exc:
                    return self._give_up(exc)
        self._summary()
        return ExitCode.OK

    async def _batches(self, once: Any, total: int | None) -> AsyncIterator[list[Any]]:
        lines = once is _LINES_OF_STDIN
        source = _stdin_lines(total) if lines else _repeat(once, total or 1)
        size = 1 if self._rate is not None else _BATCH
        start, taken = time.monotonic(), 0
        async for values in source:
            for at in range(0, len(values), size):
                batch: list[Any] = values[at : at + size]
                if self._rate is not None:
                    await asyncio.sleep(max(0.0, start + taken / self._rate - time.monotonic()))
                if lines:
                    # Lines before a bad one are sent, as they would be one at a time.
                    good, problem = self._decoded(batch, taken)
                    if good:
                        yield good
                    if problem is not None:
                        raise problem
                else:
                    yield batch
                taken += len(batch)

    def _decoded(self, lines: list[bytes], before: int) -> tuple[list[Any], PubSubError | None]:
        values: list[Any] = []
        for number, line in enumerate(lines, before + 1):
            try:
                values.append(_value(line, self._codec))
            except BadOption as exc:
                return values, EncodeFailed(f"line {number}: {exc.message}", hint=exc.hint)
        return values, None

    async def _send(self, bus: Bus, batch: list[Any]) -> None:
        results: list[Receipt | PubSubError]
        if len(batch) == 1:
            results = [await bus.publish(self._topic, batch[0], **self._how)]
        else:
            items = [(self._topic, value) for value in batch]
            results = await bus.publish_many(items, **self._how)
        failed: PubSubError | None = None
        for result in results:
            if isinstance(result, PubSubError):
                failed = failed or result
                continue
            self._sent += 1
            self._confirmed = result.confirmed_by
            self._output.record(
                {
                    "type": "receipt",
                    "topic": result.topic,
                    "confirmed_by": result.confirmed_by.value,
                    "id": result.id,
                    "subscribers": result.subscribers,
                }
            )
        if failed is not None:
            raise failed

    def _give_up(self, error: PubSubError) -> ExitCode:
        show_traceback(error)
        record = explain_error(error)
        if self._sent:
            record["message"] += f" ({self._sent} were sent)"
            if record["exit_code"] == ExitCode.USAGE:  # which says that nothing was
                record["exit_code"] = int(ExitCode.FAILED)
        show_error(record, as_json=self._output.json)
        return ExitCode(record["exit_code"])

    def _summary(self) -> None:
        if self._output.quiet:
            return
        messages = "1 message" if self._sent == 1 else f"{self._sent} messages"
        by = f", confirmed by {self._confirmed.value}" if self._confirmed else ""
        self._output.line(f"sent {messages} to {self._topic}{by}")


async def _repeat(value: Any, times: int) -> AsyncIterator[list[Any]]:
    for done in range(0, times, _BATCH):
        yield [value] * min(_BATCH, times - done)


async def _stdin_lines(limit: int | None) -> AsyncIterator[list[bytes]]:
    """Yield lines of standard input, without their ends, as many as are there at a time.

    A thread reads, so that a silent terminal does not stop the keepalives; a bound holds a
    fast writer back. It is a daemon and reads the descriptor itself: a thread blocked in
    a buffered stream would abort the interpreter after a Ctrl-C.

    Raises:
        BadOption: It cannot be read; lines before that were yielded.
    """
    loop = asyncio.get_running_loop()
    waiting: deque[bytes | OSError | ValueError | None] = deque()
    room = threading.Semaphore(_LINES)
    there = asyncio.Event()

    def hand_over(line: bytes | OSError | ValueError | None) -> None:
        waiting.append(line)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(there.set)

    def read() -> None:
        end: OSError | ValueError | None = None
        try:
            for line in _raw_lines():
                room.acquire()
                hand_over(line)
        except (OSError, ValueError) as exc:  # ValueError: closed while we read
            end = exc
        hand_over(end)

    threading.Thread(target=read, name="pubsub-input", daemon=True).start()
    taken = 0
    while limit is None or taken < limit:
        await there.wait()
        there.clear()
        lines: list[bytes] = []
        end: OSError | ValueError | None = None
        ended = False
        while waiting and not ended and (limit is None or taken < limit):
            line = waiting.popleft()
            if isinstance(line, bytes):
                room.release()
                lines.append(line)
                taken += 1
            else:
                ended, end = True, line
        if lines:
            yield lines
        if end is not None:
            # An end of the input would look like success.
            raise BadOption(
                f"standard input cannot be read: {getattr(end, 'strerror', None) or end}",
                option="-",
                hint="give it a pipe or a file, or a payload instead of -",
            ) from end
        if ended:
            return


def _raw_lines() -> Iterator[bytes]:
    stdin = _stdin()
    try:
        descriptor = stdin.fileno()
    except (OSError, ValueError):  # not a real file: a test's
        yield from (line.rstrip(b"\r\n") for line in stdin.buffer)
        return
    rest = b""
    while data := os.read(descriptor, _READ):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)
    if rest:
        yield rest.removesuffix(b"\r")


def _stdin() -> TextIO:
    # None where the program was started with descriptor 0 closed.
    stdin: TextIO | None = sys.stdin
    if stdin is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return stdin
