"""``pubsub notifications``: subscriptions, as they come and go."""

from __future__ import annotations

import typer

from .exits import ExitCode
from .interest import follow
from .options import (
    BusArgument,
    BusOption,
    CountOption,
    ExitAfterOption,
    FilterArgument,
    JsonOption,
    QuietOption,
    Settings,
    settings,
)
from .output import Output, writing
from .running import open_bus, run, watching_status

__all__ = ["notifications"]


def notifications(
    context: typer.Context,
    bus: BusArgument,
    filter: FilterArgument,
    count: CountOption = None,
    exit_after: ExitAfterOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    option: BusOption = None,
) -> None:
    """Tell who subscribes to topics matching FILTER, until Ctrl-C."""
    with Output(json=json, quiet=quiet) as output:
        reached = run(
            _notifications(output, settings(context), bus, option, filter, count, exit_after)
        )
        if not reached:
            raise typer.Exit(ExitCode.TIMEOUT)


async def _notifications(
    output: Output,
    settings: Settings,
    where: str,
    option: list[str] | None,
    filter: str,
    count: int | None,
    exit_after: float | None,
) -> bool:
    async with (
        open_bus(settings, where, option) as bus,
        writing() as writer,
        watching_status(bus, output),
        bus.notifications(filter) as events,
    ):
        return await follow(output, writer, events, count, exit_after)
