"""``pubsub plugins``: installed plugins, and those that failed to load."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pubsub_core.capabilities import Cap
from pubsub_core.errors import PluginError
from pubsub_core.plugins import PluginRecord, registry

from .exits import ExitCode
from .options import JsonOption, settings
from .output import Output, mask, table

__all__ = ["plugins"]


def plugins(
    context: typer.Context,
    json: JsonOption = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a plugin could not be loaded.")
    ] = False,
) -> None:
    """List installed plugins: backends with version, schemes, capabilities, and failures.

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
