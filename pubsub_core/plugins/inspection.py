"""Loading one plugin, and judging its announcements before any of them counts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

import pluggy

from pubsub_core.hookspecs import PROJECT, Hooks
from pubsub_core.interfaces import API_VERSION, BackendInfo

__all__ = [
    "BUS_OPTIONS",
    "GROUP",
    "Candidate",
    "LoadedPlugin",
    "PluginRefused",
    "clashes",
    "inspect_plugin",
    "installed_plugins",
    "problem_of",
]

GROUP = "pubsub_core"
"""The entry point group."""

BUS_OPTIONS: Final = (
    "url",
    "wait",
    "connect_timeout",
    "timeout",
    "drain",
    "qos",
    "echo",
    "codec",
    "codecs",
    "offline",
    "offline_messages",
    "offline_bytes",
    "offline_age",
    "offline_overflow",
    "buffer",
    "buffer_bytes",
    "overflow",
    "reconnect",
    "reconnect_first",
    "reconnect_max",
    "require",
    "middleware",
)
"""Names that a backend's options cannot have: those of every bus.

They are written out here, below the configuration that reads them; a test compares them
with the fields of `pubsub_core.config.bus_options.BusOptions`.
"""

_HOME = "pubsub-core"

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HOOK_NAMES = tuple(name for name in vars(Hooks) if name.startswith("pubsub_"))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that may be loaded, and the distribution it is from."""

    name: str
    distribution: str
    version: str
    load: Callable[[], object]

    @property
    def label(self) -> str:
        """Its name in errors."""
        origin = f"{self.distribution} {self.version}".strip()
        return f"plugin {self.name!r} ({origin})" if origin else f"plugin {self.name!r}"


@dataclass(slots=True)
class LoadedPlugin:
    """A plugin under inspection: nothing of it counts until every hook has answered."""

    manager: pluggy.PluginManager
    backends: list[BackendInfo] = field(default_factory=list[BackendInfo])
    codecs: list[Any] = field(default_factory=list[Any])
    middleware: dict[str, Callable[..., Any]] = field(default_factory=dict[str, Callable[..., Any]])


class PluginRefused(Exception):
    """A plugin that imported, and still breaks the contract."""


def installed_plugins() -> list[Candidate]:
    """Return the plugins of every installed distribution, those of this one first."""
    candidates = [
        Candidate(
            point.name,
            # None where a package's metadata is damaged.
            (point.dist.name or "") if point.dist else "",
            (point.dist.version or "") if point.dist else "",
            point.load,
        )
        for point in importlib.metadata.entry_points(group=GROUP)
    ]
    # Ours come first, so that nobody takes over a scheme of ours; the rest by name, so that
    # who wins a clash does not depend on the order of directories.
    return sorted(
        candidates,
        key=lambda one: (_canonical(one.distribution) != _HOME, one.distribution, one.name),
    )


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def inspect_plugin(candidate: Candidate) -> LoadedPlugin:
    """Load a plugin in a manager of its own, so that it cannot disturb the others.

    Raises:
        PluginRefused: It breaks the contract. Its own code may raise anything.
    """
    plugin = candidate.load()
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(plugin, candidate.name)
        manager.check_pending()
    except pluggy.PluginValidationError as exc:
        raise PluginRefused(f"breaks the contract: {exc}; {_hooks()}") from exc
    callers = manager.get_hookcallers(plugin) or []
    marked = {caller.name for caller in callers}
    forgotten = [
        name
        for name in _HOOK_NAMES
        if name not in marked and inspect.isroutine(getattr(plugin, name, None))
    ]
    if forgotten:
        raise PluginRefused(f"has {', '.join(forgotten)} without @hookimpl")
    if not callers:
        raise PluginRefused(f"implements no hook; {_hooks()}")
    loaded = LoadedPlugin(manager)
    for answer in manager.hook.pubsub_backends():
        loaded.backends.extend(_checked(answer, list, "pubsub_backends"))
    for info in loaded.backends:
        if not isinstance(info, BackendInfo):  # pyright: ignore[reportUnnecessaryIsInstance] - answer of foreign code
            raise PluginRefused(f"pubsub_backends gave {type(info).__name__}, not BackendInfo")
    for answer in manager.hook.pubsub_codecs():
        loaded.codecs.extend(_checked(answer, list, "pubsub_codecs"))
    for codec in loaded.codecs:
        lacks = [part for part in ("name", "encode", "decode") if not hasattr(codec, part)]
        if lacks:
            raise PluginRefused(f"brings codec {type(codec).__name__} without {', '.join(lacks)}")
    for answer in manager.hook.pubsub_middleware():
        loaded.middleware.update(_checked(answer, dict, "pubsub_middleware"))
    for name, factory in loaded.middleware.items():
        if not callable(factory):
            raise PluginRefused(f"brings middleware {name!r}, which cannot be called")
    return loaded


def _hooks() -> str:
    return f"hooks are {', '.join(_HOOK_NAMES)}"


def _checked(answer: Any, expected: type[Any], hook: str) -> Any:
    if expected is list and isinstance(answer, tuple):
        return cast("Any", answer)
    if not isinstance(answer, expected):
        raise PluginRefused(f"{hook} gave {type(answer).__name__}, not {expected.__name__}")
    return answer


def problem_of(info: BackendInfo) -> str:
    """Return the fault of an announcement, or ``""``."""
    if info.api[0] != API_VERSION[0]:
        wanted = ".".join(map(str, info.api))
        ours = ".".join(map(str, API_VERSION))
        return (
            f"it was written for contract {wanted}, this is {ours}; install releases of "
            "pubsub-core and of the plugin that agree"
        )
    if info.api[1] > API_VERSION[1]:
        return (
            f"it needs contract {info.api[0]}.{info.api[1]}, this is "
            f"{API_VERSION[0]}.{API_VERSION[1]}; upgrade pubsub-core"
        )
    if not _NAME.fullmatch(info.name):
        return "a name is lower case letters, digits, - and _"
    if not info.schemes:
        return "it answers to no scheme"
    for scheme in info.schemes:
        if not _SCHEME.fullmatch(scheme):
            return f"scheme {scheme!r} is not lower case letters, digits, +, - and ."
    for what in (info.factory, info.dev_server):
        if what and not _TARGET.fullmatch(what):
            return f"{what!r} is not module:Class"
    if not info.factory:
        return "it has no factory"
    options: Any = info.options
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        return "options must be a dataclass"
    taken = clashes(info.options)
    if taken:
        return f"its options {', '.join(taken)} are names of every bus's own options"
    return ""


def clashes(options: type[Any]) -> tuple[str, ...]:
    """Return the options of a backend that every bus has too, which would be ambiguous.

    Raises:
        TypeError: *options* is no dataclass.
    """
    declared = (each.name for each in dataclasses.fields(options) if each.init)
    return tuple(name for name in declared if name in BUS_OPTIONS)
