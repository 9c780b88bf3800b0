"""The plugins of this process, with their backends and failures by name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import pluggy

from pubsub_core.capabilities import Cap
from pubsub_core.errors import (
    ConfigError,
    MissingDependency,
    NotSupported,
    PluginError,
    UnknownBackend,
)
from pubsub_core.interfaces import Backend, BackendInfo, DevServer

from .inspection import (
    Candidate,
    PluginRefused,
    inspect_plugin,
    installed_plugins,
    problem_of,
)

__all__ = [
    "PluginRecord",
    "Registry",
    "load_object",
    "registry",
    "reset_registry",
    "use_registry",
]

# Schemes of backends that exist in a package of their own, with the command that installs
# it: an unknown scheme found here is answered with that command.
_AVAILABLE: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """One installed plugin, whether it loaded or not.

    Attributes:
        name: Name of the entry point.
        distribution: Name of the package that brought it, or ``""``.
        version: Version of that package, or ``""``.
        backends: Its announcements that were accepted.
        error: Why it, or the first refused part of it, is not there; else None.
    """

    name: str
    distribution: str = ""
    version: str = ""
    backends: tuple[BackendInfo, ...] = ()
    error: PluginError | None = None

    @property
    def origin(self) -> str:
        """Distribution and version, for people."""
        return f"{self.distribution} {self.version}".strip()


class Registry:
    """The installed plugins. Made once by `registry`; tests make their own.

    Attributes:
        infos: Every accepted backend, those of this distribution first.
        failures: Every plugin, or part of one, that was refused, with its cause.
        plugins: Every plugin that was looked at.
    """

    def __init__(
        self,
        candidates: Iterable[Candidate] = (),
        *,
        left_out: Iterable[str] = (),
        wanted_but_missing: Iterable[str] = (),
        available: Mapping[str, str] = _AVAILABLE,
    ) -> None:
        self._available = dict(available)
        self._left_out = tuple(left_out)
        self._managers: dict[str, pluggy.PluginManager] = {}
        self._by_name: dict[str, BackendInfo] = {}
        self._by_scheme: dict[str, BackendInfo] = {}
        self._owners: dict[str, Candidate] = {}
        self._codecs: list[Any] = []
        self._middleware: dict[str, tuple[Callable[..., Any], Candidate]] = {}
        self._failures: list[PluginError] = []
        self._failed_names: dict[str, PluginError] = {}
        self._failed_schemes: dict[str, PluginError] = {}
        records = [self._admit(candidate) for candidate in candidates]
        for name in wanted_but_missing:
            self._fail_missing(name, [record.name for record in records])
        self.infos: tuple[BackendInfo, ...] = tuple(self._by_name.values())
        self.failures: tuple[PluginError, ...] = tuple(self._failures)
        self.plugins: tuple[PluginRecord, ...] = tuple(records)

    @classmethod
    def from_plugins(
        cls, plugins: Mapping[str, object], *, available: Mapping[str, str] = _AVAILABLE
    ) -> Registry:
        """Make a registry from plugin objects (modules, or anything with hooks) by name."""
        return cls(
            [
                Candidate(name, "", "", functools.partial(_given, plugin))
                for name, plugin in plugins.items()
            ],
            available=available,
        )

    @classmethod
    def load_installed(cls, environ: Mapping[str, str] | None = None) -> Registry:
        """Look at the entry points of every installed package.

        Raises:
            PluginError: Something failed and ``PUBSUB_STRICT_PLUGINS`` is set.
        """
        environ = os.environ if environ is None else environ
        wanted = [name.strip() for name in environ.get("PUBSUB_PLUGINS", "").split(",")]
        wanted = [name for name in wanted if name]
        found = installed_plugins()
        names = {candidate.name for candidate in found}
        made = cls(
            [candidate for candidate in found if not wanted or candidate.name in wanted],
            left_out=sorted(names - set(wanted)) if wanted else (),
            wanted_but_missing=[name for name in wanted if name not in names],
        )
        strict = environ.get("PUBSUB_STRICT_PLUGINS", "").strip().lower()
        if strict not in ("", "0", "false", "no", "off"):
            made.raise_failures()
        return made

    # --- lookup ------------------------------------------------------------------------

    def by_scheme(self, scheme: str, *, place: str = "") -> BackendInfo:
        """Return the backend that answers to a URL scheme.

        Args:
            scheme: Without ``://``; case does not matter.
            place: Where the URL stands, for the error.

        Raises:
            UnknownBackend: None does; the text lists installed and failed ones.
            PluginError: The plugin that would, failed to load.
        """
        scheme = scheme.lower()
        info = self._by_scheme.get(scheme)
        if info is not None:
            return info
        # A plugin that could not be imported never told its schemes: its name is a guess.
        base = scheme.partition("+")[0]
        error = (
            self._failed_schemes.get(scheme)
            or self._failed_names.get(scheme)
            or self._failed_names.get(base)
            or self._failed_names.get(base.removesuffix("s"))
        )
        if error is not None:
            raise _again(error)
        what = f"no installed backend answers to {scheme}://"
        raise self._unknown(f"{place}: {what}" if place else what, scheme, self._by_scheme)

    def by_name(self, name: str) -> BackendInfo:
        """Return the backend of that name; errors as `by_scheme`."""
        info = self._by_name.get(name)
        if info is not None:
            return info
        error = self._failed_names.get(name)
        if error is not None:
            raise _again(error)
        raise self._unknown(f"no installed backend is called {name!r}", name, self._by_name)

    def alternatives(self, cap: Cap) -> tuple[str, ...]:
        """Return the names of the installed backends that declare a capability."""
        return tuple(info.name for info in self.infos if info.capabilities.get(cap))

    def codecs(self) -> tuple[Any, ...]:
        """Return the codecs that plugins bring, in the order of the plugins."""
        return tuple(self._codecs)

    def middleware(self) -> dict[str, Callable[..., Any]]:
        """Return the middleware factories that plugins bring, by name."""
        return {name: factory for name, (factory, _) in self._middleware.items()}

    def resolve_secret(self, kind: str, ref: str) -> str | None:
        """Ask the plugins for a secret; None when none knows the kind.

        Raises:
            ConfigError: The plugin failed. Its own text is withheld: it may hold the secret.
        """
        for name, manager in self._managers.items():
            failure = ""
            value: Any = None
            try:
                value = manager.hook.pubsub_secret(kind=kind, ref=ref)
            except Exception as exc:  # noqa: BLE001 - plugin code may raise anything
                failure = f"failed with {type(exc).__name__}"
            if value is not None and not isinstance(value, str):
                failure = f"answered with {type(value).__name__}, not text"
            if failure:
                raise ConfigError(
                    f"plugin {name!r} was asked for a secret of kind {kind!r} and {failure}",
                    hint="see that plugin's documentation for its requirements",
                )
            if value is not None:
                return cast("str", value)
        return None

    def add_commands(self, cli: Any) -> tuple[PluginError, ...]:
        """Let each plugin add its sub-commands; return the failures, which harm no other plugin."""
        errors: list[PluginError] = []
        for record in self.plugins:
            manager = self._managers.get(record.name)
            if manager is None:
                continue
            try:
                manager.hook.pubsub_commands(cli=cli)
            except Exception as exc:  # noqa: BLE001 - plugin code may raise anything
                error = PluginError(
                    f"plugin {record.name!r} ({record.origin}) failed to add its commands: "
                    f"{_told(exc)}",
                    plugin=record.name,
                    distribution=record.origin,
                )
                error.__cause__ = exc
                errors.append(error)
        return tuple(errors)

    def load(self, info: BackendInfo) -> type[Backend]:
        """Import a backend's factory.

        Raises:
            MissingDependency: Its client library is not installed; the hint installs it.
            PluginError: The module is broken, or the factory is no `Backend`.
        """
        factory = self._import(info, info.factory)
        if not (isinstance(factory, type) and issubclass(factory, Backend)):
            raise self._broken(info, f"{info.factory} is not a subclass of Backend")
        return factory

    def load_dev_server(self, info: BackendInfo) -> type[DevServer]:
        """Import a backend's embedded server; errors as `load`.

        Raises:
            NotSupported: The backend has none.
        """
        if not info.dev_server:
            able = [other.name for other in self.infos if other.dev_server]
            raise NotSupported(
                "dev_server",
                why="it brings no embedded server",
                backend=info.name,
                alternatives=able,
            )
        server = self._import(info, info.dev_server)
        if not isinstance(server, type):
            raise self._broken(info, f"{info.dev_server} is not a class")
        return cast("type[DevServer]", server)

    def raise_failures(self) -> None:
        """Raise the failures of loading, if there are any.

        Raises:
            PluginError: The failure, or one that lists them all.
        """
        if len(self.failures) == 1:
            raise _again(self.failures[0])
        if self.failures:
            text = "; ".join(error.message for error in self.failures)
            raise PluginError(f"{len(self.failures)} plugins failed: {text}") from ExceptionGroup(
                "plugins that failed", list(self.failures)
            )

    # --- loading -----------------------------------------------------------------------

    def _admit(self, candidate: Candidate) -> PluginRecord:
        if candidate.name in self._managers:
            other = self._owners[f"plugin {candidate.name}"]
            error = self._fail(
                candidate,
                f"has the name of {other.label}, which came first",
                hint="uninstall one of the two",
                names=(),
            )
            return self._record(candidate, error=error)
        try:
            loaded = inspect_plugin(candidate)
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - plugin code may raise anything
            refused = isinstance(exc, PluginRefused)
            error = self._fail(
                candidate,
                str(exc) if refused else f"failed to load: {_told(exc)}",
                cause=exc.__cause__ if refused else exc,
            )
            return self._record(candidate, error=error)
        self._owners[f"plugin {candidate.name}"] = candidate
        self._managers[candidate.name] = loaded.manager
        before = len(self._failures)
        accepted = tuple(info for info in loaded.backends if self._accept(candidate, info))
        self._codecs.extend(loaded.codecs)
        for name, factory in loaded.middleware.items():
            if name in self._middleware:
                other = self._middleware[name][1]
                self._fail(
                    candidate,
                    f"brings middleware {name!r}, which {other.label} brings already",
                    names=(),
                )
                continue
            self._middleware[name] = (factory, candidate)
        return self._record(
            candidate, backends=accepted, error=next(iter(self._failures[before:]), None)
        )

    def _accept(self, candidate: Candidate, info: BackendInfo) -> bool:
        problem = problem_of(info)
        hint = ""
        if not problem and info.name in self._by_name:
            other = self._owners[f"backend {info.name}"]
            problem = f"the name is taken by {other.label}"
            hint = "uninstall one of the two, or choose with PUBSUB_PLUGINS"
        for scheme in info.schemes if not problem else ():
            if scheme in self._by_scheme:
                other = self._owners[f"backend {self._by_scheme[scheme].name}"]
                problem = f"{scheme}:// is taken by {other.label}"
                hint = "uninstall one of the two, or choose with PUBSUB_PLUGINS"
                break
        if problem:
            # A contract that is not ours may have other fields: read them with care.
            name = getattr(info, "name", "")
            schemes: Any = getattr(info, "schemes", ())
            self._fail(
                candidate,
                f"announces backend {name!r}, which is refused: {problem}",
                hint=hint,
                schemes=cast("tuple[str, ...]", schemes) if isinstance(schemes, tuple) else (),
                names=(name,),
            )
            return False
        self._by_name[info.name] = info
        self._owners[f"backend {info.name}"] = candidate
        for scheme in info.schemes:
            self._by_scheme[scheme] = info
        return True

    def _fail(
        self,
        candidate: Candidate,
        problem: str,
        *,
        cause: BaseException | None = None,
        hint: str = "",
        schemes: Iterable[str] = (),
        names: Iterable[str] | None = None,
    ) -> PluginError:
        error = PluginError(
            f"{candidate.label} {problem}",
            plugin=candidate.name,
            distribution=f"{candidate.distribution} {candidate.version}".strip(),
            hint=hint,
        )
        error.__cause__ = cause
        self._failures.append(error)
        for name in (candidate.name,) if names is None else names:
            self._failed_names.setdefault(name, error)
        for scheme in schemes:
            self._failed_schemes.setdefault(str(scheme).lower(), error)
        return error

    def _fail_missing(self, name: str, loaded: Iterable[str]) -> None:
        near = difflib.get_close_matches(name, [*loaded, *self._left_out], 1)
        error = PluginError(
            f"PUBSUB_PLUGINS names {name!r}, which no installed package provides",
            plugin=name,
            hint=f"did you mean {near[0]!r}?" if near else "install it, or leave it out",
        )
        self._failures.append(error)
        self._failed_names.setdefault(name, error)

    def _record(
        self,
        candidate: Candidate,
        *,
        backends: tuple[BackendInfo, ...] = (),
        error: PluginError | None = None,
    ) -> PluginRecord:
        return PluginRecord(
            candidate.name, candidate.distribution, candidate.version, backends, error
        )

    # --- errors ------------------------------------------------------------------------

    def _unknown(self, message: str, asked: str, legal: Iterable[str]) -> UnknownBackend:
        hints: list[str] = []
        if asked in self._available:
            message += ", but there is one to install"
            hints.append(self._available[asked])
        near = difflib.get_close_matches(asked, [*legal, *self._available], 1)
        if near and near[0] != asked:
            hints.append(f"did you mean {near[0]!r}?")
        installed = ", ".join(
            f"{info.name} ({', '.join(info.schemes)})" for info in self._by_name.values()
        )
        hints.append(f"installed: {installed or 'none'}")
        if self._left_out:
            hints.append(f"left out by PUBSUB_PLUGINS: {', '.join(self._left_out)}")
        if self.failures:
            failed = "; ".join(error.message for error in self.failures)
            hints.append(f"plugins that failed: {failed}")
        return UnknownBackend(message, hint="; ".join(hints).replace("?; ", "? "))

    def _broken(
        self, info: BackendInfo, problem: str, cause: BaseException | None = None
    ) -> PluginError:
        owner = self._owners.get(f"backend {info.name}")
        label = owner.label if owner else f"backend {info.name!r}"
        error = PluginError(
            f"{label}: {problem}",
            plugin=owner.name if owner else info.name,
            distribution=f"{owner.distribution} {owner.version}".strip() if owner else "",
        )
        error.__cause__ = cause
        return error

    def _import(self, info: BackendInfo, target: str) -> Any:
        try:
            return load_object(target)
        except ImportError as exc:
            # A module of the backend's own package that is missing is its bug. Anything else,
            # including a name that an old release lacks, is cured by installing.
            own = target.partition(":")[0].partition(".")[0]
            if exc.name is None or exc.name.partition(".")[0] != own:
                missing = f"{exc.name!r}" if exc.name else "a library"
                raise MissingDependency(
                    f"backend {info.name!r} cannot import {missing}: {exc}",
                    hint=info.install or f"install the dependencies of {info.name!r}",
                    backend=info.name,
                ) from exc
            raise self._broken(info, f"{target} failed to load: {_told(exc)}") from exc
        except Exception as exc:
            raise self._broken(info, f"{target} failed to load: {_told(exc)}") from exc


def _given(plugin: object) -> object:
    return plugin


def _again(error: PluginError) -> PluginError:
    # A kept exception that is raised twice would collect tracebacks of both.
    copy = PluginError(
        error.message, plugin=error.plugin, distribution=error.distribution, hint=error.hint
    )
    copy.__cause__ = error.__cause__
    return copy


def _told(exc: BaseException) -> str:
    text = str(exc)
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__


def load_object(target: str) -> Any:
    """Import ``module:name`` (``module:Class.attribute`` works too) and return it.

    Raises:
        ValueError: *target* has another form.
        ImportError: The module cannot be imported.
        AttributeError: The module has no such name.
    """
    module, colon, path = target.partition(":")
    if not (module and colon and path):
        raise ValueError(f"{target!r} is not of the form module:name")
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


# --- the one of this process -----------------------------------------------------------

_lock = threading.RLock()
_current: Registry | None = None


def registry() -> Registry:
    """Return the registry of this process; loaded at the first call, from any thread.

    Raises:
        PluginError: Something failed and ``PUBSUB_STRICT_PLUGINS`` is set.
    """
    global _current
    with _lock:
        if _current is None:
            _current = Registry.load_installed()
        return _current


def reset_registry() -> None:
    """Forget the loaded plugins; the next `registry` looks again."""
    global _current
    with _lock:
        _current = None


@contextlib.contextmanager
def use_registry(replacement: Registry) -> Generator[Registry]:
    """Let `registry` return *replacement* within the block; for tests."""
    global _current
    with _lock:
        before, _current = _current, replacement
    try:
        yield replacement
    finally:
        with _lock:
            _current = before
