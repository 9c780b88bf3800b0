"""Named buses from ``pubsub.toml``, profiles and the environment.

A value of a bus comes from the nearest of these layers that has it:

1. the argument of `pubsub_core.connect`;
2. a variable for one value, ``PUBSUB_BUS_MAIN_QOS=0``;
3. a variable for the bus, ``PUBSUB_BUS_MAIN='{url = "memory://"}'``;
4. the profile, ``[profile.test.bus.main]`` with ``PUBSUB_PROFILE=test``;
5. the file, ``[bus.main]``;
6. the default.

The options in a URL's query belong to the layer that gives the URL, below the keys that stand
beside it, and go with that URL when a nearer layer replaces it. A value is replaced whole:
tables are not mixed.

When a nearer layer's URL changes the backend, options of the replaced backend are set aside
rather than refused or carried over, so that one profile turns the same program to
``memory://`` and no password reaches a broker it was not meant for.
Secrets given by reference are fetched when the bus is built and not before, and those that
were set aside are never fetched.

Everything here is synchronous and may block: reading files, running a secret's command.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import tomllib
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, cast

from .errors import BadOption, ConfigError, PubSubError
from .interfaces import Address, BackendInfo
from .options import (
    accepts_text,
    build,
    field_types,
    inner_type,
    is_secret,
    json_schema,
    parse_url,
    reference_schema,
    split,
    structured,
    unknown_option,
)
from .plugins import Registry, registry
from .secrets import (
    Reference,
    Secret,
    looks_secret,
    mask_url,
    parse_reference,
    resolve_reference,
)
from .settings import BusOptions

__all__ = ["BusConfig", "Config", "Explained", "Finding", "Source", "SourceKind"]

FILE_NAME = "pubsub.toml"
_PREFIX = "PUBSUB_BUS_"
_VARIABLES = ("PUBSUB_CONFIG", "PUBSUB_PLUGINS", "PUBSUB_PROFILE", "PUBSUB_STRICT_PLUGINS")
_TOP = ("bus", "profile")
_MASK = "***"
_GIVEN_URL = "the URL"
_NAME = re.compile(r"[A-Za-z0-9_-]+")
# How an error begins that is about a key in the file.
_KEYS_IN_FILE = ("bus.", "bus ", "profile.", "profile ", "[")


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


@dataclass(slots=True)
class _Layer:
    kind: SourceKind
    values: Mapping[str, Any] = field(repr=False)
    prefix: str = ""
    """What stands before a key."""
    file: str = ""
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """Places of single keys, where there is no common prefix."""

    def source(self, key: str) -> Source:
        return Source(self.kind, self.variables.get(key, f"{self.prefix}{key}"), self.file)


@dataclass(slots=True)
class _Value:
    value: Any = field(repr=False)
    source: Source
    rank: int
    """Index of the layer, nearest first."""
    from_query: bool = False
    hidden: bool = True
    wanted: Any = None
    """Whether it stays masked, and its type; settled for what is set aside."""
    owner: str = ""
    """The backend that it is for; settled for what is set aside."""


@dataclass(slots=True)
class _Plan:
    """A bus before its values are converted and its secrets fetched."""

    name: str
    url: _Value
    address: Address
    info: BackendInfo
    values: dict[str, _Value]
    set_aside: dict[str, _Value]

    @property
    def places(self) -> dict[str, str]:
        return {key: value.source.place for key, value in self.values.items()}


@dataclass(slots=True)
class _Document:
    """A file that was read, or what came in its place."""

    path: Path | None
    data: Mapping[str, Any] = field(repr=False)

    @property
    def file(self) -> str:
        return str(self.path) if self.path else ""

    def table(self, *keys: str) -> Mapping[str, Any]:
        """Return a nested table; an empty one where there is none."""
        found: Any = self.data
        for key in keys:
            found = found.get(key) if _is_table(found) else None
        return found if _is_table(found) else {}


@dataclass(slots=True)
class _Environment:
    """What the variables ``PUBSUB_BUS_…`` say, by bus name."""

    tables: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    values: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]], repr=False)
    variables: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    stray: list[str] = field(default_factory=list[str])


class Config:
    """What is configured. Reads its file when something of it is first needed.

    A URL can be given wherever a name can; it needs no file and reads none.
    """

    __slots__ = ("_document", "_environ", "_looked", "_path", "profile")

    def __init__(
        self,
        data: Mapping[str, Any] | None = None,
        *,
        profile: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        """Make one from *data*, shaped like the file, instead of a file.

        Args:
            data: What the file would hold; nothing by default.
            profile: Name of the profile to lay over it; by default ``PUBSUB_PROFILE``.
            environ: The environment; by default this process's, as it is now.
        """
        self._environ = dict(os.environ if environ is None else environ)
        self.profile = profile or self._environ.get("PUBSUB_PROFILE") or None
        self._path: Path | None = None
        self._looked: tuple[Path, ...] = ()
        self._document: _Document | None = _Document(None, data or {})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        profile: str | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> Config:
        """Find ``pubsub.toml``: *path*, ``$PUBSUB_CONFIG``, or the first that exists.

        Looked at in this order: beside the program, the current directory,
        ``$XDG_CONFIG_HOME/pubsub`` (``~/.config/pubsub``). Without any, buses come from the
        environment alone. The file is read at first need.

        Raises:
            ConfigError: *path* is given and cannot be read, or is no TOML; the text names
                file, line and column.
        """
        config = cls(profile=profile, environ=environ)
        config._document = None
        if path is not None:
            config._path = Path(path).expanduser()
            config._document = _read(config._path)
        return config

    def __repr__(self) -> str:
        path = self._document.path if self._document else self._path
        return f"<Config {path or 'not read'} profile={self.profile!r}>"

    @property
    def path(self) -> Path | None:
        """The file that is used, or None."""
        return self._read().path

    def buses(self) -> tuple[str, ...]:
        """Return the names of all buses, those of the file first.

        Raises:
            ConfigError: The file cannot be read or is no TOML.
        """
        return self._names(self.profile)

    def bus(self, where: str, overrides: Mapping[str, Any] | None = None) -> BusConfig:
        """Resolve a bus name or URL to everything a bus needs; may block for secrets.

        Args:
            where: A name, or a URL.
            overrides: Options that win over every other layer.

        Raises:
            ConfigError: The name is unknown, a value is bad, or a secret is not there.
            UnknownBackend: No installed backend answers to the URL's scheme.
            PluginError: The plugin that would, failed to load.
        """
        plan, document = self._planned(where, overrides or {})
        with _located(document):
            return self._built(plan, document)

    def explain(self, where: str, overrides: Mapping[str, Any] | None = None) -> list[Explained]:
        """Tell each value of a bus and where it comes from; fetches no secret.

        Values are not checked, that is what `lint` does; a key that nobody knows is told
        with a note. A URL that is a reference is only followed into the environment.

        Raises:
            ConfigError: The bus is unknown, or its URL does not lead to a backend.
        """
        plan, _ = self._planned(where, overrides or {}, fetch=False)
        rows = [Explained("url", _shown_url(plan.url.value), plan.url.source)]
        known = {**field_types(BusOptions), **field_types(plan.info.options)}
        for key, wanted in known.items():
            owner = BusOptions if key in field_types(BusOptions) else plan.info.options
            if key in plan.values:
                found = plan.values[key]
                hidden = inner_type(owner, key)[1]
                text = _shown(found.value, wanted, hidden=hidden)
                rows.append(Explained(key, text, found.source))
            else:
                rows.append(Explained(key, _default(owner, key), Source(SourceKind.DEFAULT)))
        rows += [
            Explained(key, _MASK, found.source, f"unknown: no option of {plan.info.name} or a bus")
            for key, found in plan.values.items()
            if key not in known
        ]
        rows += [
            Explained(
                key,
                _shown(found.value, found.wanted, hidden=found.hidden),
                found.source,
                f"set aside: it is for {found.owner}, and the nearest url chose {plan.info.name}",
            )
            for key, found in plan.set_aside.items()
        ]
        return rows

    def lint(self) -> list[Finding]:
        """Check everything without connecting and without running a secret's command.

        Every bus is checked in every profile, with the environment as it is. A literal
        secret in a file that other users can read is a warning.
        """
        return list(dict.fromkeys(self._findings()))

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema (draft 2020-12) of ``pubsub.toml`` for what is installed."""
        return _schema(registry())

    # --- layers ------------------------------------------------------------------------

    def _read(self) -> _Document:
        if self._document is None:
            path = self._path
            if path is None:
                path, self._looked = _find(self._environ)
            self._document = _read(path) if path else _Document(None, {})
        return self._document

    def _names(self, profile: str | None) -> tuple[str, ...]:
        named = self._written_names(profile)
        environment = _environment(self._environ, named)
        return tuple(dict.fromkeys([*named, *environment.tables, *environment.values]))

    def _written_names(self, profile: str | None) -> list[str]:
        document = self._read()
        named = [*document.table("bus")]
        if profile:
            named += document.table("profile", profile, "bus")
        return list(dict.fromkeys(named))

    def _layers(self, name: str, overrides: Mapping[str, Any], profile: str | None) -> list[_Layer]:
        document = self._read()
        environment = _environment(self._environ, self._written_names(profile))
        layers = [_Layer(SourceKind.ARGUMENT, overrides, "argument ")]
        if name in environment.values:
            layers.append(
                _Layer(
                    SourceKind.ENVIRONMENT,
                    environment.values[name],
                    variables=environment.variables[name],
                )
            )
        if name in environment.tables:
            variable = _PREFIX + _variable_form(name)
            table = _inline_table(variable, environment.tables[name])
            layers.append(_Layer(SourceKind.ENVIRONMENT, table, f"{variable}."))
        if profile:
            place = f"profile.{profile}.bus.{name}"
            values = document.table("profile", profile, "bus", name)
            layers.append(_Layer(SourceKind.PROFILE, values, f"{place}.", document.file))
        values = document.table("bus", name)
        layers.append(_Layer(SourceKind.FILE, values, f"bus.{name}.", document.file))
        return layers

    # --- from layers to a plan ---------------------------------------------------------

    def _planned(
        self, where: str, overrides: Mapping[str, Any], *, fetch: bool = True
    ) -> tuple[_Plan, _Document]:
        if "://" in where:
            return self._planned_url(where, overrides, fetch=fetch)
        document = self._read()
        with _located(document):
            for scope, problem in _structure(document):
                if scope in _scopes(where, self.profile):
                    raise problem
            self._check_profile(document)
            if where not in self.buses():
                self._refuse_name(where)
            layers = self._layers(where, overrides, self.profile)
            return self._plan(where, layers, document, fetch=fetch), document

    def _planned_url(
        self, url: str, overrides: Mapping[str, Any], *, fetch: bool
    ) -> tuple[_Plan, _Document]:
        document = _Document(None, {})
        layers = [
            _Layer(SourceKind.ARGUMENT, overrides, "argument "),
            _Layer(SourceKind.ARGUMENT, {"url": url}, variables={"url": _GIVEN_URL}),
        ]
        plan = self._plan("", layers, document, fetch=fetch)
        plan.name = str(plan.address)
        return plan, document

    def _plan(self, name: str, layers: list[_Layer], document: _Document, *, fetch: bool) -> _Plan:
        urls = [rank for rank, layer in enumerate(layers) if "url" in layer.values]
        if not urls:
            place = f"bus.{name}.url"
            raise BadOption(
                f"{place} is missing",
                option=place,
                hint=f'write url = "mqtt://HOST", or set {_PREFIX}{_variable_form(name)}_URL',
            )
        rank = urls[0]
        url = _Value(layers[rank].values["url"], layers[rank].source("url"), rank)
        text = self._url_text(url, document, fetch=fetch)
        address, query = _address(text, url.source)
        info = registry().by_scheme(address.scheme, place=str(url.source) if name else "")
        values: dict[str, _Value] = {}
        for at, layer in reversed([*enumerate(layers)]):
            if at == rank:
                for key, value in query.items():
                    source = Source(
                        url.source.kind,
                        f"?{key}=" if not name else f"?{key}= in {url.source.place}",
                        url.source.file,
                    )
                    values[key] = _Value(value, source, at, from_query=True)
            for key, value in layer.values.items():
                if key != "url":
                    values[key] = _Value(value, layer.source(key), at)
        aside = self._set_aside(values, info, layers, urls, document)
        return _Plan(
            name,
            url,
            address,
            info,
            {key: value for key, value in values.items() if key not in aside},
            aside,
        )

    def _url_text(self, url: _Value, document: _Document, *, fetch: bool) -> str:
        value = url.value
        place = url.source.place
        if isinstance(value, str) and url.source.kind is SourceKind.ENVIRONMENT:
            value = _reference_in_text(value)
        if _is_table(value):
            reference = parse_reference(value, place=place)
            if not fetch and reference.kind != "env":
                raise ConfigError(
                    f"{place} is kept elsewhere ({reference}), so its backend is not known",
                    hint="only building the bus fetches it",
                )
            value = self._fetch(reference, place, document)
        if isinstance(value, Secret):
            value = value.reveal()
        if not isinstance(value, str) or not value:
            raise BadOption(f"{place}: expected a URL such as mqtt://localhost", option=place)
        return value

    def _set_aside(
        self,
        values: Mapping[str, _Value],
        info: BackendInfo,
        layers: list[_Layer],
        urls: list[int],
        document: _Document,
    ) -> dict[str, _Value]:
        """Pick what is for a backend whose URL a nearer layer replaced.

        A key beside or beyond the nearest URL is for the backend of the first URL from there
        on. Where that is another backend, its options are not carried over even if the new
        one has options of those names: a password for one broker is none for another.
        """
        general = field_types(BusOptions)
        replaced = {at: self._backend_of(layers[at], document) for at in urls[1:]}
        others = [other for other in replaced.values() if other is not None and other is not info]
        aside: dict[str, _Value] = {}
        for key, value in values.items():
            if key in general or value.from_query:
                continue
            owner: BackendInfo | None = info
            if value.rank > urls[0]:
                at = next((at for at in urls if at >= value.rank), None)
                owner = info if at is None else replaced[at]
            known = key in field_types(info.options)
            if owner is None:
                # Not installed, or its URL is kept elsewhere: perhaps the same backend.
                found, set_aside = None, not known
            elif owner is not info and key in field_types(owner.options):
                found, set_aside = owner, True
            else:
                found = next((other for other in others if key in field_types(other.options)), None)
                set_aside = not known and found is not None
            if set_aside:
                if found:
                    value.wanted, value.hidden = inner_type(found.options, key)
                value.owner = found.name if found else "the backend of an earlier url"
                aside[key] = value
        return aside

    def _backend_of(self, layer: _Layer, document: _Document) -> BackendInfo | None:
        """Return the backend of a replaced URL, or None where that is not known here."""
        url = _Value(layer.values["url"], layer.source("url"), 0)
        try:
            text = self._url_text(url, document, fetch=False)
            return registry().by_scheme(_address(text, url.source)[0].scheme)
        except ConfigError:
            return None

    def _built(self, plan: _Plan, document: _Document) -> BusConfig:
        info = plan.info
        given = {key: self._native(value, info.options, key) for key, value in plan.values.items()}
        places = plan.places
        bus_values, own_values = split(given, info.options, backend=info.name, places=places)

        def resolve(value: Mapping[str, Any], place: str) -> Secret:
            return self._fetch(parse_reference(value, place=place), place, document)

        where = f"bus.{plan.name}" if _NAME.fullmatch(plan.name) else ""
        bus = build(BusOptions, bus_values, where=where, places=places, resolve=resolve)
        options = build(
            info.options,
            own_values,
            where=where,
            backend=info.name,
            places=places,
            resolve=resolve,
        )
        sources = {
            key: plan.values[key].source if key in plan.values else Source(SourceKind.DEFAULT)
            for key in (*field_types(BusOptions), *field_types(info.options))
        }
        return BusConfig(
            plan.name,
            info,
            plan.address,
            options,
            bus,
            {"url": plan.url.source, **sources},
            {key: value.source for key, value in plan.set_aside.items()},
        )

    def _native(self, found: _Value, options: type[Any], key: str) -> Any:
        """Read a reference that an environment variable holds in place of a text."""
        if found.source.kind is not SourceKind.ENVIRONMENT or found.from_query:
            return found.value
        wanted = field_types(options).get(key) or field_types(BusOptions).get(key)
        if wanted is None or not isinstance(found.value, str) or not accepts_text(wanted):
            return found.value
        return _reference_in_text(found.value)

    def _fetch(self, reference: Reference, place: str, document: _Document) -> Secret:
        written = place.startswith(("bus.", "profile."))
        path = document.path if written else None
        if reference.kind == "command" and path and _mode(path) & 0o002:
            raise ConfigError(
                f"{place}: no command is run for a file that everybody can write",
                hint=f"chmod o-w {path}",
            )
        return resolve_reference(
            reference,
            place=place,
            environ=self._environ,
            folder=path.parent if path else None,
            others=registry().resolve_secret,
        )

    # --- errors ------------------------------------------------------------------------

    def _check_profile(self, document: _Document) -> None:
        profiles = [*document.table("profile")]
        if self.profile is None or self.profile in profiles:
            return
        near = difflib.get_close_matches(self.profile, profiles, 1)
        known = f"known: {', '.join(profiles)}" if profiles else "none is known"
        raise ConfigError(
            f"there is no profile {self.profile!r}{self._in_file(document)}",
            hint=(f"did you mean {near[0]!r}? " if near else "")
            + f"{known}; add [profile.{self.profile}.bus.NAME], or change PUBSUB_PROFILE",
        )

    def _refuse_name(self, where: str) -> NoReturn:
        if not _NAME.fullmatch(where):
            # It may be a URL without its slashes, with a password.
            raise ConfigError(
                "this is neither the name of a bus nor a URL",
                hint="write a name from pubsub.toml, or SCHEME://HOST",
            )
        names = self.buses()
        near = difflib.get_close_matches(where, names, 1)
        variable = f"{_PREFIX}{_variable_form(where)}_URL"
        hints = [f"did you mean {near[0]!r}?"] if near else []
        hints.append(f"known: {', '.join(names)}" if names else "no bus is known")
        hints.append(f"add [bus.{where}], set {variable}, or give a URL")
        schemes = [scheme for info in registry().infos for scheme in info.schemes]
        if where in schemes:
            hints.insert(0, f"for the backend write {where}://")
        raise ConfigError(
            f"there is no bus {where!r}{self._in_file(self._read())}",
            hint="; ".join(hints).replace("?; ", "? "),
        )

    def _in_file(self, document: _Document) -> str:
        if document.path:
            return f" in {document.path}"
        if self._looked:
            return f"; no {FILE_NAME} at {', '.join(map(str, self._looked))}"
        return ""

    # --- lint --------------------------------------------------------------------------

    def _findings(self) -> Iterator[Finding]:
        try:
            document = self._read()
        except ConfigError as exc:
            yield _finding(exc, "file")
            return
        broken: set[str] = set()
        for scope, problem in _structure(document):
            broken.add(scope)
            with contextlib.suppress(BadOption), _located(document):
                raise problem
            yield _finding(problem, problem.option)
        try:
            self._check_profile(document)
        except ConfigError as exc:
            yield _finding(exc, "PUBSUB_PROFILE")
        yield from self._lint_environment()
        for profile in (None, *document.table("profile")):
            for name in self._names(profile):
                if broken.isdisjoint(_scopes(name, profile) - {""}):
                    yield from self._lint_bus(name, profile, document)

    def _lint_environment(self) -> Iterator[Finding]:
        named = self._written_names(self.profile)
        for variable in _environment(self._environ, named).stray:
            yield Finding(
                "warning",
                variable,
                f"{variable} belongs to no known bus",
                f"known: {', '.join(self.buses()) or 'none'}",
            )
        for variable in self._environ:
            if variable.startswith("PUBSUB_") and not variable.startswith(_PREFIX):
                near = difflib.get_close_matches(variable, _VARIABLES, 1, 0.8)
                if near and variable not in _VARIABLES:
                    yield Finding(
                        "warning",
                        variable,
                        f"{variable} means nothing",
                        f"did you mean {near[0]}?",
                    )
        forms: dict[str, str] = {}
        for name in named:
            other = forms.setdefault(_variable_form(name), name)
            if other != name:
                yield Finding(
                    "warning",
                    f"bus.{name}",
                    f"buses {other!r} and {name!r} share the variables "
                    f"{_PREFIX}{_variable_form(name)}…",
                    "rename one",
                )

    def _lint_bus(self, name: str, profile: str | None, document: _Document) -> Iterator[Finding]:
        checked = Config(profile=profile, environ=self._environ)
        checked.profile = profile
        checked._document = document
        layers: list[_Layer] = []
        try:
            with _located(document):
                layers = checked._layers(name, {}, profile)
                plan = checked._plan(name, layers, document, fetch=False)
        except PubSubError as exc:
            if not any("url" in layer.values for layer in layers):
                # A bus may be completed by a profile alone.
                if profile is None and self._completed_elsewhere(name, document):
                    return
                yield _finding(exc, f"bus.{name}.url")
            else:
                fetched = any(_is_table(layer.values.get("url")) for layer in layers)
                missing = fetched and not isinstance(exc, BadOption)
                yield _finding(exc, f"bus.{name}.url", "warning" if missing else "error")
            return
        yield from _lint_literals(layers, plan, document)
        yield from checked._lint_values(plan, document)

    def _completed_elsewhere(self, name: str, document: _Document) -> bool:
        profiles = document.table("profile")
        return any("url" in document.table("profile", one, "bus", name) for one in profiles)

    def _lint_values(self, plan: _Plan, document: _Document) -> Iterator[Finding]:
        """Build the bus again and again, each time without the value that was refused."""
        missing: list[Finding] = []

        def resolve(value: Mapping[str, Any], place: str) -> Secret:
            reference = parse_reference(value, place=place)
            try:
                if reference.kind in ("env", "file"):
                    return self._fetch(reference, place, document)
            except ConfigError as exc:
                missing.append(_finding(exc, place, "warning"))
            return Secret("placeholder")

        info = plan.info
        for _ in range(len(plan.values) + 1):
            places = plan.places
            given = {
                key: self._native(value, info.options, key) for key, value in plan.values.items()
            }
            missing.clear()
            refused: BadOption | None = None
            where = f"bus.{plan.name}"
            try:
                with _located(document):
                    bus, own = split(given, info.options, backend=info.name, places=places)
                    build(BusOptions, bus, where=where, places=places, resolve=resolve)
                    build(
                        info.options,
                        own,
                        where=where,
                        backend=info.name,
                        places=places,
                        resolve=resolve,
                    )
            except BadOption as exc:
                refused = exc
            if refused is None:
                break
            yield _finding(refused, refused.option)
            key = next(
                (
                    key
                    for key, place in places.items()
                    if refused.option == place
                    or refused.option.startswith((f"{place}.", f"{place}["))
                ),
                None,
            )
            if key is None:
                break
            del plan.values[key]
        yield from missing


# --- reading ---------------------------------------------------------------------------


def _is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def _find(environ: Mapping[str, str]) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the file to use, and where was looked."""
    named = environ.get("PUBSUB_CONFIG")
    if named:
        return Path(named).expanduser(), ()
    folders: list[Path] = []
    program = sys.argv[0] if sys.argv else ""
    if program not in ("", "-c", "-m"):
        folders.append(Path(program).absolute().parent)
    with contextlib.suppress(FileNotFoundError):  # somebody removed it
        folders.append(Path.cwd())
    home = environ.get("HOME")
    settings = environ.get("XDG_CONFIG_HOME") or (f"{home}/.config" if home else "")
    if settings:
        folders.append(Path(settings) / "pubsub")
    looked = tuple(dict.fromkeys(folder / FILE_NAME for folder in folders))
    for path in looked:
        with contextlib.suppress(OSError):
            if path.is_file():
                return path, looked
    return None, looked


def _read(path: Path) -> _Document:
    problem = ""
    text = ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        problem = exc.strerror or type(exc).__name__
    except UnicodeDecodeError as exc:
        problem = f"byte {exc.start} is not UTF-8"
    if problem:
        raise ConfigError(
            f"cannot read {path}: {problem}",
            hint="give the path of a readable file to --config or PUBSUB_CONFIG",
        )
    data: dict[str, Any] = {}
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        problem = str(exc)
    except RecursionError:
        problem = "its tables are nested too deeply"
    if problem:
        # Raised here: the parser's frames hold the text with everything in it.
        where, problem = _position(problem, text)
        raise ConfigError(
            f"{path}{where}: not TOML: {problem}", hint="https://toml.io shows how it is written"
        )
    return _Document(path.absolute(), data)


def _position(problem: str, text: str) -> tuple[str, str]:
    """Turn tomllib's words for a place into ``:line:column`` and a sentence."""
    found = re.search(r" \(at line (\d+), column (\d+)\)$", problem)
    if found:
        line, column = int(found[1]), int(found[2])
    elif problem.endswith("(at end of document)"):
        lines = text.rstrip("\n").split("\n")
        line, column = len(lines), len(lines[-1]) + 1
    else:
        return "", problem
    what = problem.rpartition(" (at ")[0]
    return f":{line}:{column}", f"{what} (line {line}, column {column})"


def _inline_table(variable: str, text: str) -> Mapping[str, Any]:
    problem = ""
    value: Any = None
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError as exc:
        problem = str(exc).partition(" (at ")[0]
    except RecursionError:
        problem = "it is nested too deeply"
    if problem or not _is_table(value):
        because = f": {problem}" if problem else ""
        raise ConfigError(
            f"{variable} is no inline table{because}",
            hint=f"""write {variable}='{{url = "memory://"}}', or {variable}_URL=memory://""",
        )
    return value


def _reference_in_text(text: str) -> Any:
    """Return the reference that *text* writes as an inline table, or *text* itself."""
    if not text.lstrip().startswith("{"):
        return text
    value: Any = None
    with contextlib.suppress(tomllib.TOMLDecodeError, RecursionError):
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    # A password may begin with a brace; it is hardly a table with one of these keys.
    if _is_table(value) and any(kind in value for kind in ("env", "file", "command")):
        return value
    return text


def _variable_form(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name).upper()


def _environment(environ: Mapping[str, str], named: Iterable[str]) -> _Environment:
    """Sort the variables ``PUBSUB_BUS_…`` to buses.

    Names and keys may both hold ``_``, so the longest known name wins. A variable that ends
    in ``_URL``, or holds an inline table, makes a bus known that stands in no file.
    """
    rest = {
        variable.removeprefix(_PREFIX): value
        for variable, value in sorted(environ.items())
        if variable.startswith(_PREFIX) and len(variable) > len(_PREFIX)
    }
    forms = {_variable_form(name): name for name in reversed([*named])}
    for suffix, value in rest.items():
        base = suffix.removesuffix("_URL")
        if base != suffix and base:
            forms.setdefault(base, base.lower())
        elif value.lstrip().startswith("{") and not _owner(suffix, forms):
            forms.setdefault(suffix, suffix.lower())
    made = _Environment()
    for suffix, value in rest.items():
        if suffix in forms:
            made.tables[forms[suffix]] = value
            continue
        owner = _owner(suffix, forms)
        if owner is None:
            made.stray.append(_PREFIX + suffix)
            continue
        name = forms[owner]
        key = suffix[len(owner) + 1 :].lower()
        made.values.setdefault(name, {})[key] = value
        made.variables.setdefault(name, {})[key] = _PREFIX + suffix
    return made


def _owner(suffix: str, forms: Iterable[str]) -> str | None:
    owners = [
        form for form in forms if suffix.startswith(f"{form}_") and len(suffix) > len(form) + 1
    ]
    return max(owners, key=len, default=None)


def _address(url: str, source: Source) -> tuple[Address, dict[str, str]]:
    try:
        return parse_url(url)
    except BadOption as exc:
        # The class and its texts are ours and show nothing of the URL.
        if source.place != _GIVEN_URL:
            exc.message = f"{source.place}: {exc.message}"
            exc.args = (exc.message,)
            exc.option = source.place if exc.option == "url" else exc.option
        raise


# --- structure -------------------------------------------------------------------------


def _scopes(name: str, profile: str | None) -> set[str]:
    scopes = {"", "bus", f"bus.{name}"}
    if profile:
        scopes |= {f"profile.{profile}", f"profile.{profile}.bus.{name}"}
    return scopes


def _structure(document: _Document) -> Iterator[tuple[str, BadOption]]:
    """Yield what is wrong with the file's shape, and which part of it that spoils."""
    for key in document.data:
        if key not in _TOP:
            yield "", unknown_option(key, _TOP, place=f"[{key}]", what="table")
    yield from _buses_structure(document.data, "")
    profiles = document.data.get("profile", {})
    if not _is_table(profiles):
        yield "", _no_table("profile", "[profile.NAME.bus.NAME]")
        return
    for profile, table in profiles.items():
        place = f"profile.{profile}"
        if not _is_table(table):
            yield place, _no_table(place, f"[{place}.bus.NAME]")
            continue
        for key in table:
            if key != "bus":
                yield place, unknown_option(key, ["bus"], place=f"{place}.{key}", what="table")
        yield from _buses_structure(table, f"{place}.")


def _buses_structure(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, BadOption]]:
    buses = table.get("bus", {})
    if not _is_table(buses):
        scope = prefix.removesuffix(".") or "bus"
        yield scope, _no_table(f"{prefix}bus", f"[{prefix}bus.NAME]")
        return
    for name, bus in buses.items():
        place = f"{prefix}bus.{name}"
        if not _is_table(bus):
            yield place, _no_table(place, f"[{place}]")
        elif not _NAME.fullmatch(name):
            yield (
                place,
                BadOption(f"{place}: a bus is named with letters, digits, _ and -", option=place),
            )


def _no_table(place: str, remedy: str) -> BadOption:
    return BadOption(f"{place} must be a table", option=place, hint=f"write {remedy}")


@contextlib.contextmanager
def _located(document: _Document) -> Generator[None]:
    """Name the file in an error that names a key in it."""
    try:
        yield
    except ConfigError as exc:
        if document.file and exc.message.startswith(_KEYS_IN_FILE):
            exc.message = f"{document.file}: {exc.message}"
            exc.args = (exc.message,)
        raise


# --- showing ---------------------------------------------------------------------------


def _shown_url(value: Any) -> str:
    if isinstance(value, str):
        value = _reference_in_text(value)
    if isinstance(value, str):
        return mask_url(value)
    return _shown(value, str, hidden=True)


def _shown(value: Any, wanted: Any, *, hidden: bool) -> str:
    """Write a value as TOML would, its secrets masked and its references told."""
    reference = _reference_of(value, wanted)
    if reference is not None:
        return f"{_MASK} ({reference})"
    if wanted is not None and not accepts_text(wanted):
        value = structured(value)
    if hidden or isinstance(value, Secret) or _wants_secret(wanted):
        return _MASK
    if isinstance(value, str) and wanted is not None and is_secret(wanted):
        return _MASK  # no table, though it should be one with secrets in it
    if _is_table(value):
        parts: list[str] = []
        for key, item in value.items():
            inner, masked = inner_type(wanted, key)
            parts.append(f"{key} = {_shown(item, inner, hidden=masked)}")
        return "{" + ", ".join(parts) + "}"
    if _is_list(value):
        inner = inner_type(wanted)[0]
        return "[" + ", ".join(_shown(item, inner, hidden=False) for item in value) + "]"
    return _written(value)


def _reference_of(value: Any, wanted: Any) -> Reference | None:
    """Return the reference that stands where text is wanted, if one does."""
    if wanted is not None and not accepts_text(wanted):
        return None
    if isinstance(value, str):
        value = _reference_in_text(value)
    if not _is_table(value):
        return None
    try:
        return parse_reference(value, place="reference")
    except BadOption:
        return None


def _wants_secret(wanted: Any) -> bool:
    return wanted is not None and is_secret(wanted) and accepts_text(wanted)


def _written(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return mask_url(value)
        case _ if _is_table(value):
            parts = (
                f"{key} = {_MASK if looks_secret(str(key)) else _written(item)}"
                for key, item in value.items()
            )
            return "{" + ", ".join(parts) + "}"
        case list() | tuple():
            return "[" + ", ".join(_written(item) for item in cast("Iterable[Any]", value)) + "]"
        case int() | float():
            return str(value)
        case _:
            # Something given in code: its repr is its own affair, a mask of secrets included.
            return mask_url(repr(value))


def _default(cls: type[Any], key: str) -> str:
    for each in fields(cls):
        if each.name == key:
            value = each.default
            if value is MISSING and each.default_factory is not MISSING:
                value = each.default_factory()
            return "" if value is MISSING or value is None else _written(value)
    return ""


# --- lint's helpers --------------------------------------------------------------------


def _finding(
    error: PubSubError, place: str, severity: Literal["error", "warning"] = "error"
) -> Finding:
    return Finding(severity, place, error.message, error.hint)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _lint_literals(layers: Iterable[_Layer], plan: _Plan, document: _Document) -> Iterator[Finding]:
    if document.path is None or not _mode(document.path) & 0o044:
        return
    remedy = (
        'refer to it with {env = "NAME"}, {file = "PATH"} or {command = […]}, '
        f"or chmod 600 {document.path}"
    )
    for layer in layers:
        if layer.kind not in (SourceKind.FILE, SourceKind.PROFILE):
            continue
        for key, value in layer.values.items():
            place = layer.source(key).place
            if key == "url":
                found = isinstance(value, str) and mask_url(value) != value and _has_secret(value)
            else:
                inner, hidden = inner_type(plan.info.options, key)
                found = _literal(value, inner, hidden=hidden)
            if found:
                yield Finding(
                    "warning",
                    place,
                    f"{document.file}: {place} holds a secret that others can read",
                    remedy,
                )


def _has_secret(url: str) -> bool:
    try:
        address, query = parse_url(url)
    except BadOption:
        return True
    return bool(address.password) or any(looks_secret(key) for key in query)


def _literal(value: Any, wanted: Any, *, hidden: bool) -> bool:
    """Return whether a literal secret is in that value."""
    if isinstance(value, str):
        return bool(value) and (hidden or (wanted is not None and is_secret(wanted)))
    if _is_table(value):
        if _reference_of(value, wanted) is not None:
            return False
        for key, item in value.items():
            inner, masked = inner_type(wanted, key)
            if _literal(item, inner, hidden=hidden or masked):
                return True
    inner = inner_type(wanted)[0]
    return _is_list(value) and any(_literal(item, inner, hidden=hidden) for item in value)


# --- schema ----------------------------------------------------------------------------


def _schema(installed: Registry) -> dict[str, Any]:
    definitions: dict[str, Any] = {"reference": reference_schema()}
    general = json_schema(BusOptions)["properties"]
    by_url: list[dict[str, Any]] = []
    backends: list[dict[str, Any]] = []
    for info in installed.infos:
        name = f"backend-{info.name}"
        definitions[name] = {
            "title": info.about or info.name,
            "properties": json_schema(info.options)["properties"],
        }
        backends.append({"$ref": f"#/$defs/{name}"})
        pattern = "|".join(re.escape(scheme).replace(r"\-", "-") for scheme in info.schemes)
        by_url.append(
            {
                "if": {
                    "properties": {"url": {"type": "string", "pattern": f"^({pattern})://"}},
                    "required": ["url"],
                },
                "then": backends[-1],
            }
        )
    known = "|".join(
        re.escape(scheme).replace(r"\-", "-") for info in installed.infos for scheme in info.schemes
    )
    url: dict[str, Any] = {
        "description": "where the broker is, with options as ?name=value&…",
        "anyOf": [
            {"type": "string", "pattern": f"^({known})://"},
            {"$ref": "#/$defs/reference"},
        ],
    }
    bus: dict[str, Any] = {"type": "object", "properties": {"url": url, **general}}
    any_backend = {"anyOf": backends} if backends else {}
    by_url.append(
        {
            "if": {"properties": {"url": {"type": "string"}}, "required": ["url"]},
            "else": any_backend,
        }
    )
    definitions["bus"] = {**bus, "allOf": by_url, "unevaluatedProperties": False}
    # A file's bus may be completed or turned by a profile, and the other way round.
    table = {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
        "additionalProperties": {"$ref": "#/$defs/bus"},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FILE_NAME,
        "type": "object",
        "properties": {
            "bus": {"description": "buses by name", **table},
            "profile": {
                "description": "what to lay over the buses when PUBSUB_PROFILE names it",
                "type": "object",
                "additionalProperties": {
                    "type": "object",
                    "properties": {"bus": table},
                    "additionalProperties": False,
                },
            },
        },
        "additionalProperties": False,
        "$defs": definitions,
    }
