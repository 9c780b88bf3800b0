"""``pubsub caps`` and ``pubsub plugins``: what is installed, and what it can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
import typer

from pubsub_core.capabilities import Cap, Guarantees, Level, Limits, Support
from pubsub_core.errors import PluginError
from pubsub_core.interfaces import BackendInfo
from pubsub_core.plugins import PluginRecord, registry

from .exits import ExitCode
from .options import BusOption, JsonOption, Settings, complete_bus, settings
from .output import Output, mask, table
from .running import open_bus, run

__all__ = ["LEVEL_STYLE", "caps", "level_mark", "plugins"]

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
            help="Connect and ask this broker; without it, what the backends declare.",
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
    """Show which broker can do what.

    Without BUS, a table of what the installed backends declare: the most they can do. With
    BUS, what the broker at hand and the credentials in use really allow, with reasons,
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

    drawn = table(title, ["capability", "level", "why", "what to do"])
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


def plugins(
    context: typer.Context,
    json: JsonOption = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a plugin could not be loaded.")
    ] = False,
) -> None:
    """List what is installed: backends with version, schemes, capabilities, and failures.

    A plugin that fails harms only itself; here its cause is shown.
    """
    with Output(json=json) as output:
        loaded = registry()
        for record in loaded.plugins:
            output.record(_plugin_record(record))
        if not output.json:
            _plugin_table(output, loaded.plugins)
        # Names and schemes that clash, and commands that could not be added, belong to
        # plugins that did load.
        shown = [record.error for record in loaded.plugins]
        others = [error for error in loaded.failures if error not in shown]
        others.extend(settings(context).plugin_failures)
        for error in others:
            output.record({"type": "failure", "plugin": error.plugin, **_error_record(error)})
            if not output.json:
                _draw_failure(output, error.plugin, error)
        if strict and (loaded.failures or others):
            raise typer.Exit(ExitCode.FAILED)


def _plugin_record(record: PluginRecord) -> dict[str, Any]:
    error = record.error
    return {
        "type": "plugin",
        "name": record.name,
        "distribution": record.distribution,
        "version": record.version,
        "status": "failed" if error else "loaded",
        "backends": [
            {
                "name": info.name,
                "about": info.about,
                "schemes": list(info.schemes),
                "capabilities": [cap.value for cap in Cap if info.capabilities.get(cap)],
                "dev_server": bool(info.dev_server),
                "api": list(info.api),
                "install": info.install,
            }
            for info in record.backends
        ],
        "error": None if error is None else _error_record(error),
    }


def _error_record(error: PluginError) -> dict[str, str]:
    return {
        "code": error.code,
        "message": mask(error.message),
        "hint": mask(error.hint),
        "cause": mask(_cause(error)),
    }


def _cause(error: BaseException) -> str:
    cause = error.__cause__
    return "" if cause is None else f"{type(cause).__name__}: {cause}"


def _plugin_table(output: Output, records: tuple[PluginRecord, ...]) -> None:
    from rich.markup import escape as plain  # noqa: PLC0415 - slow to import, rarely needed

    drawn = table("", ["plugin", "from", "backend", "schemes", "server", "capabilities"])
    for record in records:
        origin = " ".join(part for part in (record.distribution, record.version) if part)
        if record.error is not None:
            drawn.add_row(f"[red]{plain(record.name)}[/]", plain(origin), "[red]failed[/]")
        elif not record.backends:
            drawn.add_row(plain(record.name), plain(origin), "[dim]none[/]")
        for info in record.backends:
            drawn.add_row(
                plain(record.name),
                plain(origin),
                info.name,
                " ".join(info.schemes),
                "yes" if info.dev_server else "[dim]no[/]",
                " ".join(cap.value for cap in Cap if info.capabilities.get(cap)),
            )
    output.draw(drawn)
    for record in records:
        if record.error is not None:
            _draw_failure(output, record.name, record.error)


def _draw_failure(output: Output, name: str, error: PluginError) -> None:
    from rich.markup import escape as plain  # noqa: PLC0415 - slow to import, rarely needed

    output.draw(f"[red]{plain(name)}[/]: {plain(mask(str(error)))}")
    if cause := _cause(error):
        output.draw(f"  [dim]{plain(mask(cause))}[/]")
