"""``pubsub presence`` and ``pubsub notifications``: who is subscribed to what."""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Any

import typer

from pubsub_core.events import InterestEvent
from pubsub_core.message import Member

from .exits import ExitCode
from .options import (
    BusArgument,
    BusOption,
    CountOption,
    ExitAfterOption,
    FilterArgument,
    JsonOption,
    QuietOption,
    Settings,
    TopicArgument,
    settings,
)
from .output import Output, encode, escape, writing
from .sub import member_record
from .running import deadline, open_bus, run, watching_status

__all__ = ["describe_event", "event_record", "notifications", "presence"]


def _name(member: Member | None) -> str:
    if member is None:
        return ""
    beside = ", ".join(part for part in (member.name, member.host) if part)
    return f"{member.id} ({beside})" if beside else member.id


def event_record(event: InterestEvent) -> dict[str, Any]:
    """Return the documented JSON keys of an event of interest."""
    return {
        "type": "interest",
        "kind": event.kind.value,
        "topic": event.topic,
        "member": member_record(event.member),
        "reason": event.reason,
    }


def describe_event(event: InterestEvent) -> str:
    """Return one line for people."""
    why = f" ({event.reason})" if event.reason else ""
    return (
        " ".join(part for part in (event.kind.value, _name(event.member), event.topic) if part)
        + why
    )


def _line(output: Output, event: InterestEvent) -> bytes:
    if output.json:
        return encode(event_record(event)).encode() + b"\n"
    clock = dt.datetime.now().astimezone().strftime("%H:%M:%S")
    return f"{clock} {escape(describe_event(event))}\n".encode()


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
            return await _follow(output, writer, room, count, exit_after)


def _snapshot(output: Output, topic: str, members: Any) -> None:
    for member in members:
        output.record({"type": "member", "topic": topic, **(member_record(member) or {})})
    output.record({"type": "snapshot", "topic": topic, "count": len(members)})
    for member in members:
        output.line(f"{topic} {_name(member)}")
    if not members:
        output.note(f"nobody is subscribed to {topic}")


async def _follow(
    output: Output, writer: Any, events: Any, count: int | None, exit_after: float | None
) -> bool:
    seen = 0
    async with deadline(exit_after) as timeout:
        async for event in events:
            await writer.write(_line(output, event))
            seen += 1
            if count is not None and seen >= count:
                return True
    return count is None and timeout.expired()


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
        return await _follow(output, writer, events, count, exit_after)
