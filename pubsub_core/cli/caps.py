"""``pubsub caps``: capabilities, as declared and as found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import typer

from pubsub_core.capabilities import Cap, Guarantees, Level, Limits, Support
from pubsub_core.interfaces import BackendInfo
from pubsub_core.plugins import registry

from .options import BusOption, JsonOption, Settings, complete_bus, settings
from .output import Output, mask, table
from .running import open_bus, run

__all__ = ["LEVEL_STYLE", "caps", "level_mark"]

LEVEL_STYLE: dict[Level, str] = {
    Level.NATIVE: "green",
    Level.EMULATED: "cyan",
    Level.NONE: "dim",
    Level.UNKNOWN: "yellow",
}


def level_mark(support: Support) -> str:
    """Return *support*'s level with rich markup."""
    return f"[{LEVEL_STYLE[support.level]}]{support.level.value}[/]"


def caps(
    context: typer.Context,
    bus: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUS]",
            help="Connect and ask this broker; without it, show the declarations.",
            autocompletion=complete_bus,
            show_default=False,
        ),
    ] = None,
    why: Annotated[
        bool, typer.Option("--why", help="Show the reasons of the declarations as well.")
    ] = False,
    json: JsonOption = False,
    option: BusOption = None,
) -> None:
    """Show the capabilities of brokers.

    Without BUS, a table of the declarations of the installed backends: the most they can
    do. With BUS, the capabilities of that broker with these credentials, with reasons,
    guarantees and limits.
    """
    with Output(json=json) as output:
        if bus is None:
            _declared(output, registry().infos, why=why)
        else:
            run(_probed(output, settings(context), bus, option))


def _declared(output: Output, infos: tuple[BackendInfo, ...], *, why: bool) -> None:
    for info in infos:
        for cap in Cap:
            output.record(_capability(info.name, cap, _declaration(info, cap)))
        output.record(_guarantees(info.name, info.guarantees))
        output.record(_limits(info.name, info.limits))
    if output.json:
        return
    drawn = table("", ["capability", *(info.name for info in infos)])
    for cap in Cap:
        drawn.add_row(cap.value, *(level_mark(_declaration(info, cap)) for info in infos))
    output.draw(drawn)
    if why:
        for info in infos:
            output.draw(_reasons(info.name, {cap: _declaration(info, cap) for cap in Cap}))
    else:
        output.draw("[dim]--why shows the reasons; `pubsub caps BUS` asks a broker.[/]")


async def _probed(output: Output, settings: Settings, where: str, option: list[str] | None) -> None:
    async with open_bus(settings, where, option, reconnect=False) as bus:
        found = {cap: bus.supports(cap) for cap in Cap}
        name = bus.info.name
        for cap, support in found.items():
            output.record({**_capability(name, cap, support), "bus": mask(bus.name)})
        output.record({**_guarantees(name, bus.guarantees), "bus": mask(bus.name)})
        output.record({**_limits(name, bus.limits), "bus": mask(bus.name)})
        if not output.json:
            output.draw(
                _reasons(f"{mask(bus.name)} ({name})", found),
                _facts("guarantees", msgspec.to_builtins(bus.guarantees)),
                _facts("limits", _limit_values(bus.limits)),
            )


def _declaration(info: BackendInfo, cap: Cap) -> Support:
    return info.capabilities.get(cap, Support.none("not declared by this backend"))


def _capability(backend: str, cap: Cap, support: Support) -> dict[str, Any]:
    return {
        "type": "capability",
        "backend": backend,
        "capability": cap.value,
        "level": support.level.value,
        "why": support.why,
        "remedy": support.remedy,
    }


def _guarantees(backend: str, guarantees: Guarantees) -> dict[str, Any]:
    return {"type": "guarantees", "backend": backend, **msgspec.to_builtins(guarantees)}


def _limits(backend: str, limits: Limits) -> dict[str, Any]:
    return {"type": "limits", "backend": backend, **_limit_values(limits)}


def _limit_values(limits: Limits) -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(limits)
    return values


def _reasons(title: str, found: Mapping[Cap, Support]) -> Any:
    from rich.markup import escape as plain  # noqa: PLC0415 - slow to import, rarely needed

    drawn = table(title, ["capability", "level", "why", "remedy"])
    for cap, support in found.items():
        drawn.add_row(cap.value, level_mark(support), plain(support.why), plain(support.remedy))
    return drawn


def _facts(title: str, values: Mapping[str, Any]) -> Any:
    from rich.markup import escape as plain  # noqa: PLC0415 - slow to import, rarely needed

    drawn = table(title, ["", ""])
    drawn.show_header = False
    for name, value in values.items():
        if value is None:
            text = "no limit known" if title == "limits" else ""
        elif isinstance(value, Mapping):
            text = "; ".join(f"{key}: {item}" for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]  # notes, by name
        else:
            text = str(value)
        if text:
            drawn.add_row(name, plain(text))
    return drawn
