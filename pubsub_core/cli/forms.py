"""How ``pubsub sub`` and ``pubsub history`` print a message."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pubsub_core.codecs import CodecSet
from pubsub_core.errors import DecodeFailed
from pubsub_core.events import Gap
from pubsub_core.message import Message
from pubsub_core.plugins import registry

from .output import Output, encode, escape
from .records import message_record

__all__ = ["Form", "RawOption", "TextOption"]

RawOption = Annotated[
    bool,
    typer.Option("--raw", help="Payloads only, as they arrived, each followed by a line feed."),
]
TextOption = Annotated[
    bool, typer.Option("--text", help="Payloads only, as text on one line each.")
]


class Form:
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
        """Return *message* as it is printed."""
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
            shown = escape(value) if isinstance(value, str) else encode(value)
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
