"""Arguments and options that several commands share, and their completion.

Each is one ``Annotated`` type, so that the same word means the same everywhere.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from pubsub_core.config import Config
from pubsub_core.errors import PluginError
from pubsub_core.plugins import registry

from .output import mask

__all__ = [
    "BackendArgument",
    "BusArgument",
    "BusOption",
    "CodecOption",
    "CountOption",
    "ExitAfterOption",
    "FilterArgument",
    "JsonOption",
    "QosOption",
    "QuietOption",
    "Settings",
    "TopicArgument",
    "complete_backend",
    "complete_bus",
    "moment",
    "pairs",
    "settings",
]


@dataclass(frozen=True, slots=True)
class Settings:
    """Options before the command: the configuration file, the profile.

    Attributes:
        plugin_failures: Plugins whose sub-commands could not be added.
    """

    path: Path | None = None
    profile: str | None = None
    plugin_failures: tuple[PluginError, ...] = ()

    def load(self) -> Config:
        """Read the configuration; cheap enough to do once per command."""
        return Config.load(self.path, profile=self.profile)


def settings(context: typer.Context) -> Settings:
    """Return the options before the command."""
    found = context.find_root().obj
    return found if isinstance(found, Settings) else Settings()


def complete_bus(incomplete: str) -> list[str]:
    """Complete names of buses in the configuration, and schemes."""
    with contextlib.suppress(Exception):
        names = [*Config.load().buses()]
        names += [f"{scheme}://" for info in registry().infos for scheme in info.schemes]
        return [name for name in names if name.startswith(incomplete)]
    return []


def complete_backend(incomplete: str) -> list[str]:
    """Complete names of backends that have an embedded server."""
    with contextlib.suppress(Exception):
        able = [info.name for info in registry().infos if info.dev_server]
        return [name for name in able if name.startswith(incomplete)]
    return []


BusArgument = Annotated[
    str,
    typer.Argument(
        metavar="BUS",
        help="A name in pubsub.toml, or a URL such as mqtt://localhost.",
        autocompletion=complete_bus,
        show_default=False,
    ),
]
TopicArgument = Annotated[
    str, typer.Argument(metavar="TOPIC", help="Levels joined by /.", show_default=False)
]
FilterArgument = Annotated[
    str,
    typer.Argument(
        metavar="FILTER",
        help="A topic that may hold + (one level), # (the rest), {name} and {name:path}.",
        show_default=False,
    ),
]
BackendArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Name of a backend; `pubsub plugins` lists them.",
        autocompletion=complete_backend,
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object per line.", show_default=False)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="No notes and no progress.", show_default=False)
]
BusOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="Override an option of the bus, e.g. -o keepalive=5. May be repeated.",
        show_default=False,
    ),
]
CodecOption = Annotated[
    str | None,
    typer.Option("--codec", metavar="NAME", help="json, msgpack, …", show_default=False),
]
CountOption = Annotated[
    int | None,
    typer.Option("--count", "-n", min=1, help="Stop after that many.", show_default=False),
]
ExitAfterOption = Annotated[
    float | None,
    typer.Option(
        "--exit-after",
        metavar="SECONDS",
        min=0.0,
        help="Stop after that long; exit code 5 if --count was not reached.",
        show_default=False,
    ),
]
QosOption = Annotated[
    int | None,
    typer.Option("--qos", min=0, max=2, help="Quality of service.", show_default=False),
]


def pairs(values: Iterable[str] | None, *, option: str) -> dict[str, str]:
    """Split ``KEY=VALUE`` texts.

    Raises:
        typer.BadParameter: One has no ``=`` or no key.
    """
    return dict(pair_list(values, option=option))


def pair_list(values: Iterable[str] | None, *, option: str) -> list[tuple[str, str]]:
    """As `pairs`, where a key may come twice."""
    found: list[tuple[str, str]] = []
    for text in values or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"{mask(text)!r} is not KEY=VALUE", param_hint=option)
        found.append((key.strip(), value))
    return found


_AGO = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[smhd])(?:\s+ago)?")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def moment(text: str | None, *, option: str) -> float | None:
    """Read a moment: Unix seconds, ISO 8601, or how long ago (``90s``, ``15m``, ``2h``, ``1d``).

    A date without a zone is local time.

    Raises:
        typer.BadParameter: It is none of these.
    """
    if text is None:
        return None
    text = text.strip()
    if ago := _AGO.fullmatch(text):
        return time.time() - float(ago["number"]) * _UNITS[ago["unit"]]
    with contextlib.suppress(ValueError):
        return float(text)
    with contextlib.suppress(ValueError):
        return dt.datetime.fromisoformat(text).timestamp()
    raise typer.BadParameter(
        f"{text!r} is not a time; write Unix seconds, 2026-01-31T12:00, or 15m for 15 minutes ago",
        param_hint=option,
    )
