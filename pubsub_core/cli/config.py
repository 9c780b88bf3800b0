"""``pubsub config``: sources of values, faults, and the schema."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated, Any

import typer

from pubsub_core.config import SourceKind

from .exits import ExitCode
from .options import BusOption, JsonOption, complete_bus, pairs, settings
from .output import Output, mask, table

__all__ = ["config"]

config = typer.Typer(help="Explain, check and describe the configuration.", no_args_is_help=True)


@config.command()
def explain(
    context: typer.Context,
    bus: Annotated[
        str | None,
        typer.Argument(
            metavar="[BUS]",
            help="A name or a URL; every bus of the configuration by default.",
            autocompletion=complete_bus,
            show_default=False,
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Show values that are defaults as well.")
    ] = False,
    json: JsonOption = False,
    option: BusOption = None,
) -> None:
    """Show each value of a bus and the place it comes from; secrets are masked.

    With --json defaults are always there.
    """
    with Output(json=json) as output:
        loaded = settings(context).load()
        names = [bus] if bus is not None else list(loaded.buses())
        if not names:
            output.note("no bus is configured; pubsub.toml or PUBSUB_BUS_… can name some")
        for name in names:
            rows = loaded.explain(name, pairs(option, option="--option"))
            drawn = table(mask(name), ["option", "value", "from", ""])
            for row in rows:
                output.record(
                    {
                        "type": "option",
                        "bus": mask(name),
                        "option": row.key,
                        "value": mask(row.value),
                        "source": str(row.source),
                        "kind": row.source.kind.value,
                        "note": row.note,
                    }
                )
                if every or row.source.kind is not SourceKind.DEFAULT:
                    drawn.add_row(*_plain(row.key, mask(row.value), str(row.source), row.note))
            output.draw(drawn)


@config.command()
def lint(context: typer.Context, json: JsonOption = False) -> None:
    """Check the whole configuration and tell everything that is wrong with it.

    The exit code is 2 when a bus cannot be built, and 0 when there are warnings only.
    """
    with Output(json=json) as output:
        loaded = settings(context).load()
        found = loaded.lint()
        errors = sum(finding.severity == "error" for finding in found)
        for finding in found:
            output.record(
                {
                    "type": "problem",
                    "severity": finding.severity,
                    "place": finding.place,
                    "message": mask(finding.message),
                    "hint": mask(finding.hint),
                }
            )
            output.line(mask(str(finding)))
        warnings = len(found) - errors
        output.record(
            {
                "type": "verdict",
                "status": "failed" if errors else "ok",
                "errors": errors,
                "warnings": warnings,
            }
        )
        if not found:
            output.line(f"{loaded.path or 'no pubsub.toml'}: nothing to complain about")
        if errors:
            raise typer.Exit(ExitCode.USAGE)


@config.command()
def schema(context: typer.Context, json: JsonOption = False) -> None:
    """Print the JSON Schema of pubsub.toml, for editors; with --json on one line."""
    with Output(json=json):
        described = settings(context).load().schema()
        print(jsonlib.dumps(described, indent=None if json else 2, ensure_ascii=False))


def _plain(*cells: str) -> tuple[Any, ...]:
    from rich.markup import escape  # noqa: PLC0415 - slow to import, rarely needed

    return tuple(escape(cell) for cell in cells)
