"""``pubsub sub`` and ``pubsub history``: messages as they come, and those that are stored."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pubsub_core.codecs import CodecSet
from pubsub_core.errors import BadOption, DecodeFailed
from pubsub_core.events import Gap
from pubsub_core.message import Member, Message
from pubsub_core.plugins import registry

from .exits import ExitCode
from .options import (
    BusArgument,
    BusOption,
    CodecOption,
    CountOption,
    ExitAfterOption,
    FilterArgument,
    JsonOption,
    QosOption,
    QuietOption,
    Settings,
    moment,
    settings,
)
from .output import Output, encode, escape, payload_record, writing
from .running import deadline, open_bus, run, watching_status

__all__ = ["history", "sub"]

RawOption = Annotated[
    bool,
    typer.Option("--raw", help="Payloads only, as they arrived, each followed by a line feed."),
]
TextOption = Annotated[
    bool, typer.Option("--text", help="Payloads only, as text on one line each.")
]


class _Form:
    """How one message is printed."""

    def __init__(
        self, output: Output, filter: str, *, raw: bool, text: bool, codec: str | None
    ) -> None:
        if raw + text + output.json > 1:
            raise typer.BadParameter("choose one of --raw, --text and --json", param_hint="--raw")
        self._output = output
        self._raw = raw
        self._text = text
        self._codec = codec
        self._decode: Callable[[str, bytes, str | None], Any] | None = None
        if codec is not None:
            if raw:
                raise typer.BadParameter("--raw decodes nothing", param_hint="--codec")
            wanted: Any = {"bytes": bytes, "text": str}.get(codec, Any)
            codecs = CodecSet(extra=registry().codecs())
            self._decode = codecs.decoder(wanted, filter=filter, codec=codec)
        on = output.colours and sys.stdout.isatty()
        self._dim, self._bold, self._plain = (
            ("\x1b[2m", "\x1b[36m", "\x1b[0m") if on else ("", "", "")
        )

    def line(self, message: Message[Any]) -> bytes:
        """Return what to print for *message*."""
        if self._raw:
            return message.raw + b"\n"
        value, failed = self._value(message)
        if self._output.json:
            record = message_record(message)
            if failed is not None:
                record["decode_error"] = failed.message
            elif self._decode is not None:
                record["payload"], record["encoding"] = value, self._codec
            return encode(record).encode() + b"\n"
        if failed is not None:
            self._output.note(str(failed), kind="warning", topic=message.topic)
            shown = _text(message.raw)
        elif self._decode is None or isinstance(value, bytes):
            shown = _text(message.raw)
        else:
            shown = escape(value) if isinstance(value, str) else encode_value(value)
        if self._text:
            return f"{shown}\n".encode()
        clock = dt.datetime.fromtimestamp(message.time).astimezone().strftime("%H:%M:%S")
        origin = "" if message.origin.live else f" ({message.origin.value})"
        return (
            f"{self._dim}{clock}{self._plain} {self._bold}{escape(message.topic)}{self._plain}"
            f"{self._dim}{origin}{self._plain} {shown}\n"
        ).encode()

    def gap(self, gap: Gap) -> None:
        """Tell that messages may be missing here."""
        if self._output.json:
            # In the stream: only there does its place among the messages show.
            return
        lost = "messages" if gap.lost is None else f"{gap.lost} messages"
        ending = "and were recovered" if gap.recovered else "may be missing"
        self._output.note(f"gap ({gap.reason.value}): {lost} {ending}", kind="warning")

    def _value(self, message: Message[Any]) -> tuple[Any, DecodeFailed | None]:
        if self._decode is None:
            return message.raw, None
        try:
            return self._decode(message.topic, message.raw, message.content_type), None
        except DecodeFailed as exc:
            return None, exc


def _text(payload: bytes) -> str:
    try:
        return escape(payload.decode())
    except UnicodeDecodeError:
        return f"<{len(payload)} bytes> {payload.hex()}"


def encode_value(value: Any) -> str:
    """Return a decoded value as JSON."""
    return encode(value)


def message_record(message: Message[Any]) -> dict[str, Any]:
    """Return the documented JSON keys of a message."""
    return {
        "type": "message",
        "topic": message.topic,
        **payload_record(message.raw),
        "params": dict(message.params),
        "origin": message.origin.value,
        "qos": message.qos,
        "time": message.time,
        "headers": [list(pair) for pair in message.headers.pairs],
        "content_type": message.content_type,
        "id": message.id,
        "source": member_record(message.source),
        "redelivered": message.redelivered,
        "expires_in": message.expires_in,
    }


def member_record(member: Member | None) -> dict[str, Any] | None:
    """Return the documented JSON keys of a member."""
    if member is None:
        return None
    return {"id": member.id, "name": member.name, "host": member.host}


def gap_record(gap: Gap) -> dict[str, Any]:
    """Return the documented JSON keys of a gap."""
    return {
        "type": "gap",
        "reason": gap.reason.value,
        "lost": gap.lost,
        "recovered": gap.recovered,
        "since": gap.since,
        "until": gap.until,
    }


def sub(
    context: typer.Context,
    bus: BusArgument,
    filter: FilterArgument,
    count: CountOption = None,
    exit_after: ExitAfterOption = None,
    group: Annotated[
        str | None,
        typer.Option("--group", "-g", metavar="NAME", help="Share the messages with a group."),
    ] = None,
    replay: Annotated[
        int | None,
        typer.Option("--replay", metavar="N", min=1, help="Start with the N newest stored."),
    ] = None,
    qos: QosOption = None,
    codec: CodecOption = None,
    raw: RawOption = False,
    text: TextOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
    option: BusOption = None,
) -> None:
    """Subscribe to FILTER and print what arrives until Ctrl-C."""
    with Output(json=json, quiet=quiet) as output:
        form = _Form(output, filter, raw=raw, text=text, codec=codec)
        how = {"group": group, "replay": replay, "qos": qos}
        given = {key: value for key, value in how.items() if value is not None}
        reached = run(
            _sub(output, form, settings(context), bus, option, filter, given, count, exit_after)
        )
        if not reached:
            raise typer.Exit(ExitCode.TIMEOUT)


async def _sub(
    output: Output,
    form: _Form,
    settings: Settings,
    where: str,
    option: list[str] | None,
    filter: str,
    how: dict[str, Any],
    count: int | None,
    exit_after: float | None,
) -> bool:
    seen = 0
    async with (
        open_bus(settings, where, option) as bus,
        writing() as writer,
        watching_status(bus, output),
        bus.subscribe(filter, bytes, gaps=True, **how) as messages,
    ):
        output.note(f"subscribed to {filter}", kind="status", filter=filter, status="subscribed")
        async with deadline(exit_after) as timeout:
            async for message in messages:
                # gaps=True puts Gap objects into the stream, which its type does not say.
                item: Any = message
                if isinstance(item, Gap):
                    form.gap(item)
                    if output.json:
                        await writer.write(encode(gap_record(item)).encode() + b"\n")
                    continue
                await writer.write(form.line(message))
                seen += 1
                if count is not None and seen >= count:
                    return True
        return count is None and timeout.expired()


def history(
    context: typer.Context,
    bus: BusArgument,
    filter: FilterArgument,
    last: Annotated[
        int | None, typer.Option("--last", "-n", min=1, help="At most that many, the newest.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="Unix seconds, ISO 8601, or 15m for 15 minutes ago."
        ),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="As --since.")
    ] = None,
    codec: CodecOption = None,
    raw: RawOption = False,
    text: TextOption = False,
    json: JsonOption = False,
    option: BusOption = None,
) -> None:
    """Print stored messages, oldest first."""
    start, end = moment(since, option="--since"), moment(until, option="--until")
    if start is not None and end is not None and start > end:
        raise BadOption("--since is later than --until", option="--since", hint="exchange the two")
    with Output(json=json) as output:
        form = _Form(output, filter, raw=raw, text=text, codec=codec)
        run(_history(form, settings(context), bus, option, filter, last, start, end))


async def _history(
    form: _Form,
    settings: Settings,
    where: str,
    option: list[str] | None,
    filter: str,
    last: int | None,
    since: float | None,
    until: float | None,
) -> None:
    async with open_bus(settings, where, option) as bus, writing() as writer:
        async for message in bus.history(filter, bytes, last=last, since=since, until=until):
            await writer.write(form.line(message))
