"""``pubsub presence``: who is subscribed to a topic."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .exits import ExitCode
from .interest import follow, member_name
from .options import (
    BusArgument,
    BusOption,
    CountOption,
    ExitAfterOption,
    JsonOption,
    QuietOption,
    Settings,
    TopicArgument,
    settings,
)
from .output import Output, writing
from .records import member_record
from .running import open_bus, run, watching_status

__all__ = ["presence"]


def presence(
    context: typer.Context,
    bus: BusArgument,
    topic: TopicArgument,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on with who comes and goes.")
    ] = False,
    count: CountOption = None,
    exit_after: ExitAfterOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    option: BusOption = None,
) -> None:
    """Show who is subscribed to TOPIC.

    --count and --exit-after belong to --watch.
    """
    with Output(json=json, quiet=quiet) as output:
        reached = run(
            _presence(output, settings(context), bus, option, topic, watch, count, exit_after)
        )
        if not reached:
            raise typer.Exit(ExitCode.TIMEOUT)


async def _presence(
    output: Output,
    settings: Settings,
    where: str,
    option: list[str] | None,
    topic: str,
    watch: bool,
    count: int | None,
    exit_after: float | None,
) -> bool:
    async with open_bus(settings, where, option) as bus:
        if not watch:
            _snapshot(output, topic, await bus.members(topic))
            return True
        async with (
            writing() as writer,
            watching_status(bus, output),
            bus.presence(topic) as room,
        ):
            _snapshot(output, topic, room.members)
            return await follow(output, writer, room, count, exit_after)


def _snapshot(output: Output, topic: str, members: Any) -> None:
    for member in members:
        output.record({"type": "member", "topic": topic, **(member_record(member) or {})})
    output.record({"type": "snapshot", "topic": topic, "count": len(members)})
    for member in members:
        output.line(f"{topic} {member_name(member)}")
    if not members:
        output.note(f"nobody is subscribed to {topic}")
