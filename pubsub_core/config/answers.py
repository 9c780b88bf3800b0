"""The answers of a configuration: the values of a bus, their sources, and findings of lint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pubsub_core.interfaces import Address, BackendInfo

from .bus_options import BusOptions

__all__ = ["BusConfig", "Explained", "Finding", "Source", "SourceKind"]


class SourceKind(StrEnum):
    """Which layer a value comes from, nearest first."""

    ARGUMENT = "argument"
    ENVIRONMENT = "environment"
    PROFILE = "profile"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value comes from.

    Attributes:
        place: The key as it is written there, e.g. ``bus.main.qos``, ``PUBSUB_BUS_MAIN_QOS``,
            ``?qos= in bus.main.url``, ``argument qos``; ``""`` for a default.
        file: The file it stands in, or ``""``.
    """

    kind: SourceKind
    place: str = ""
    file: str = ""

    def __str__(self) -> str:
        if self.kind is SourceKind.DEFAULT:
            return "default"
        return f"{self.file}: {self.place}" if self.file else self.place


@dataclass(frozen=True, slots=True)
class BusConfig:
    """Everything a bus is made from, validated. Its repr holds no secret.

    Attributes:
        name: The name in the configuration; for a URL its scheme, host and port.
        options: An instance of ``info.options``.
        sources: Where each value comes from: ``url`` and every option by name.
        set_aside: Options of a backend that a nearer layer replaced, unused.
    """

    name: str
    info: BackendInfo
    address: Address
    options: Any
    bus: BusOptions
    sources: Mapping[str, Source]
    set_aside: Mapping[str, Source] = field(default_factory=dict[str, Source])


@dataclass(frozen=True, slots=True)
class Explained:
    """One value of a bus and where it comes from.

    Attributes:
        value: As it would be written; a secret is ``***``, a reference ``*** (env NAME)``.
        note: Why it is not used, or ``""``.
    """

    key: str
    value: str
    source: Source
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that `Config.lint` has to say.

    Attributes:
        severity: ``error`` when a bus cannot be built, else ``warning``.
        place: Key, variable or file.
    """

    severity: Literal["error", "warning"]
    place: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}" + (f"; {self.hint}" if self.hint else "")
