"""``pubsub sub``: messages as they come."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pubsub_core.events import Gap

from .exits import ExitCode
from .forms import Form, RawOption, TextOption
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
    settings,
)
from .output import Output, encode, writing
from .records import gap_record
from .running import deadline, open_bus, run, watching_status

__all__ = ["sub"]


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
    """Subscribe to FILTER and print messages until Ctrl-C."""
    with Output(json=json, quiet=quiet) as output:
        form = Form(output, filter, raw=raw, text=text, codec=codec)
        how = {"group": group, "replay": replay, "qos": qos}
        given = {key: value for key, value in how.items() if value is not None}
        reached = run(
            _sub(output, form, settings(context), bus, option, filter, given, count, exit_after)
        )
        if not reached:
            raise typer.Exit(ExitCode.TIMEOUT)


async def _sub(
    output: Output,
    form: Form,
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
