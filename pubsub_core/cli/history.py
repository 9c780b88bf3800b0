"""``pubsub history``: messages that are stored."""

from __future__ import annotations

from typing import Annotated

import typer

from pubsub_core.errors import BadOption

from .forms import Form, RawOption, TextOption
from .options import (
    BusArgument,
    BusOption,
    CodecOption,
    FilterArgument,
    JsonOption,
    Settings,
    moment,
    settings,
)
from .output import Output, writing
from .running import open_bus, run

__all__ = ["history"]


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
        form = Form(output, filter, raw=raw, text=text, codec=codec)
        run(_history(form, settings(context), bus, option, filter, last, start, end))


async def _history(
    form: Form,
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
