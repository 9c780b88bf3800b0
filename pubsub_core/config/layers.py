"""From layers to a plan, from a plan to a bus.

A plan says which value of which layer a bus uses, and which are set aside; nothing of it is
converted, and no secret of it is fetched, so that it can also be told and checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pubsub_core.errors import BadOption, ConfigError
from pubsub_core.interfaces import Address, BackendInfo
from pubsub_core.plugins import registry
from pubsub_core.secrets import Reference, Secret, parse_reference, resolve_reference

from .answers import BusConfig, Source, SourceKind
from .bus_options import BusOptions
from .document import (
    Document,
    file_mode,
    inline_table,
    is_name,
    is_table,
    located,
    reference_in_text,
    scopes,
    structure,
)
from .environment import PREFIX, sort_variables, variable_form
from .options import Resolve, accepts_text, build, field_types, inner_type, parse_url, split

__all__ = ["Layer", "Layers", "Plan", "Value"]

_GIVEN_URL = "the URL"


@dataclass(slots=True)
class Layer:
    """The values that one place gives for a bus."""

    kind: SourceKind
    values: Mapping[str, Any] = field(repr=False)
    prefix: str = ""
    """Prefix of its keys in errors."""
    file: str = ""
    variables: Mapping[str, str] = field(default_factory=dict[str, str])
    """Places of single keys, where there is no common prefix."""

    def source(self, key: str) -> Source:
        """Return where a key of it stands."""
        return Source(self.kind, self.variables.get(key, f"{self.prefix}{key}"), self.file)


@dataclass(slots=True)
class Value:
    """One value of a bus, as it was found."""

    value: Any = field(repr=False)
    source: Source
    rank: int
    """Index of the layer, nearest first."""
    from_query: bool = False
    hidden: bool = True
    wanted: Any = None
    """Whether it stays masked, and its type; set for values that are set aside."""
    owner: str = ""
    """The backend that it is for; set for values that are set aside."""


@dataclass(slots=True)
class Plan:
    """A bus before its values are converted and its secrets fetched."""

    name: str
    url: Value
    address: Address
    info: BackendInfo
    values: dict[str, Value]
    set_aside: dict[str, Value]

    @property
    def places(self) -> dict[str, str]:
        """Where each value stands."""
        return {key: value.source.place for key, value in self.values.items()}


class Layers:
    """A file, an environment and a profile, laid over each other."""

    def __init__(self, document: Document, environ: Mapping[str, str], profile: str | None) -> None:
        self.document = document
        self.environ = environ
        self.profile = profile

    def with_profile(self, profile: str | None) -> Layers:
        """Return the same file and environment under another profile."""
        return Layers(self.document, self.environ, profile)

    def names(self) -> tuple[str, ...]:
        """Return the names of all buses, those of the file first."""
        named = self.written_names()
        variables = sort_variables(self.environ, named)
        return tuple(dict.fromkeys([*named, *variables.tables, *variables.values]))

    def written_names(self) -> list[str]:
        """Return the names of the buses that the file has."""
        named = [*self.document.table("bus")]
        if self.profile:
            named += self.document.table("profile", self.profile, "bus")
        return list(dict.fromkeys(named))

    def of(self, name: str, overrides: Mapping[str, Any]) -> list[Layer]:
        """Return the layers of one bus, nearest first."""
        document = self.document
        variables = sort_variables(self.environ, self.written_names())
        layers = [Layer(SourceKind.ARGUMENT, overrides, "argument ")]
        if name in variables.values:
            layers.append(
                Layer(
                    SourceKind.ENVIRONMENT,
                    variables.values[name],
                    variables=variables.places[name],
                )
            )
        if name in variables.tables:
            variable = PREFIX + variable_form(name)
            table = inline_table(variable, variables.tables[name])
            layers.append(Layer(SourceKind.ENVIRONMENT, table, f"{variable}."))
        if self.profile:
            place = f"profile.{self.profile}.bus.{name}"
            values = document.table("profile", self.profile, "bus", name)
            layers.append(Layer(SourceKind.PROFILE, values, f"{place}.", document.file))
        values = document.table("bus", name)
        layers.append(Layer(SourceKind.FILE, values, f"bus.{name}.", document.file))
        return layers

    # --- from layers to a plan ---------------------------------------------------------

    def plan(self, where: str, overrides: Mapping[str, Any], *, fetch: bool = True) -> Plan:
        """Choose the backend and the values of a bus, by name or URL.

        Args:
            where: A name, or a URL.
            overrides: Values of the nearest layer.
            fetch: Whether to fetch a URL that is kept elsewhere than in the environment.

        Raises:
            ConfigError: The bus is unknown, or its URL does not lead to a backend.
        """
        if "://" in where:
            layers = [
                Layer(SourceKind.ARGUMENT, overrides, "argument "),
                Layer(SourceKind.ARGUMENT, {"url": where}, variables={"url": _GIVEN_URL}),
            ]
            plan = self.plan_of("", layers, fetch=fetch)
            plan.name = str(plan.address)
            return plan
        with located(self.document):
            for scope, problem in structure(self.document):
                if scope in scopes(where, self.profile):
                    raise problem
            self.check_profile()
            if where not in self.names():
                self._refuse_name(where)
            return self.plan_of(where, self.of(where, overrides), fetch=fetch)

    def plan_of(self, name: str, layers: list[Layer], *, fetch: bool) -> Plan:
        """Choose the backend and the values of a bus from its layers."""
        urls = [rank for rank, layer in enumerate(layers) if "url" in layer.values]
        if not urls:
            place = f"bus.{name}.url"
            raise BadOption(
                f"{place} is missing",
                option=place,
                hint=f'write url = "mqtt://HOST", or set {PREFIX}{variable_form(name)}_URL',
            )
        rank = urls[0]
        url = Value(layers[rank].values["url"], layers[rank].source("url"), rank)
        text = self._url_text(url, fetch=fetch)
        address, query = _address(text, url.source)
        info = registry().by_scheme(address.scheme, place=str(url.source) if name else "")
        values: dict[str, Value] = {}
        for at, layer in reversed([*enumerate(layers)]):
            if at == rank:
                for key, value in query.items():
                    source = Source(
                        url.source.kind,
                        f"?{key}=" if not name else f"?{key}= in {url.source.place}",
                        url.source.file,
                    )
                    values[key] = Value(value, source, at, from_query=True)
            for key, value in layer.values.items():
                if key != "url":
                    values[key] = Value(value, layer.source(key), at)
        aside = self._set_aside(values, info, layers, urls)
        return Plan(
            name,
            url,
            address,
            info,
            {key: value for key, value in values.items() if key not in aside},
            aside,
        )

    def _url_text(self, url: Value, *, fetch: bool) -> str:
        value = url.value
        place = url.source.place
        if isinstance(value, str) and url.source.kind is SourceKind.ENVIRONMENT:
            value = reference_in_text(value)
        if is_table(value):
            reference = parse_reference(value, place=place)
            if not fetch and reference.kind != "env":
                raise ConfigError(
                    f"{place} is kept elsewhere ({reference}), so its backend is not known",
                    hint="only building the bus fetches it",
                )
            value = self.fetch(reference, place)
        if isinstance(value, Secret):
            value = value.reveal()
        if not isinstance(value, str) or not value:
            raise BadOption(f"{place}: expected a URL such as mqtt://localhost", option=place)
        return value

    def _set_aside(
        self,
        values: Mapping[str, Value],
        info: BackendInfo,
        layers: list[Layer],
        urls: list[int],
    ) -> dict[str, Value]:
        """Pick the values for a backend whose URL a nearer layer replaced.

        A key beside or beyond the nearest URL is for the backend of the first URL from there
        on. Where that is another backend, its options are not carried over even if the new
        one has options of those names: a password for one broker is none for another.
        """
        general = field_types(BusOptions)
        replaced = {at: self._backend_of(layers[at]) for at in urls[1:]}
        others = [other for other in replaced.values() if other is not None and other is not info]
        aside: dict[str, Value] = {}
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

    def _backend_of(self, layer: Layer) -> BackendInfo | None:
        """Return the backend of a replaced URL, or None where that is not known here."""
        url = Value(layer.values["url"], layer.source("url"), 0)
        try:
            text = self._url_text(url, fetch=False)
            return registry().by_scheme(_address(text, url.source)[0].scheme)
        except ConfigError:
            return None

    # --- from a plan to a bus ----------------------------------------------------------

    def build(self, plan: Plan) -> BusConfig:
        """Convert the values of a plan and fetch its secrets.

        Raises:
            ConfigError: A value is bad, or a secret is not there.
        """
        info = plan.info

        def resolve(value: Mapping[str, Any], place: str) -> Secret:
            return self.fetch(parse_reference(value, place=place), place)

        bus, options = self.convert(plan, resolve)
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

    def convert(self, plan: Plan, resolve: Resolve) -> tuple[BusOptions, Any]:
        """Make the options of every bus and those of the backend from a plan's values.

        Raises:
            ConfigError: A value is bad, or *resolve* has no secret.
        """
        info = plan.info
        places = plan.places
        where = f"bus.{plan.name}" if is_name(plan.name) else ""
        with located(self.document):
            given = {
                key: self._native(value, info.options, key) for key, value in plan.values.items()
            }
            general, own = split(given, info.options, backend=info.name, places=places)
            return (
                build(BusOptions, general, where=where, places=places, resolve=resolve),
                build(
                    info.options,
                    own,
                    where=where,
                    backend=info.name,
                    places=places,
                    resolve=resolve,
                ),
            )

    def _native(self, found: Value, options: type[Any], key: str) -> Any:
        """Read a reference that an environment variable holds in place of a text."""
        if found.source.kind is not SourceKind.ENVIRONMENT or found.from_query:
            return found.value
        wanted = field_types(options).get(key) or field_types(BusOptions).get(key)
        if wanted is None or not isinstance(found.value, str) or not accepts_text(wanted):
            return found.value
        return reference_in_text(found.value)

    def fetch(self, reference: Reference, place: str) -> Secret:
        """Fetch the secret that a reference at *place* names.

        Raises:
            ConfigError: It is not there, or its command may not be run.
        """
        written = place.startswith(("bus.", "profile."))
        path = self.document.path if written else None
        if reference.kind == "command" and path and file_mode(path) & 0o002:
            raise ConfigError(
                f"{place}: no command is run for a file that everybody can write",
                hint=f"chmod o-w {path}",
            )
        return resolve_reference(
            reference,
            place=place,
            environ=self.environ,
            folder=path.parent if path else None,
            others=registry().resolve_secret,
        )

    # --- errors ------------------------------------------------------------------------

    def check_profile(self) -> None:
        """Refuse a profile that the file does not have.

        Raises:
            ConfigError: It has none of that name.
        """
        profiles = [*self.document.table("profile")]
        if self.profile is None or self.profile in profiles:
            return
        near = difflib.get_close_matches(self.profile, profiles, 1)
        known = f"known: {', '.join(profiles)}" if profiles else "none is known"
        raise ConfigError(
            f"there is no profile {self.profile!r}{self.document.told}",
            hint=(f"did you mean {near[0]!r}? " if near else "")
            + f"{known}; add [profile.{self.profile}.bus.NAME], or change PUBSUB_PROFILE",
        )

    def _refuse_name(self, where: str) -> NoReturn:
        if not is_name(where):
            # It may be a URL without its slashes, with a password.
            raise ConfigError(
                "this is neither the name of a bus nor a URL",
                hint="write a name from pubsub.toml, or SCHEME://HOST",
            )
        names = self.names()
        near = difflib.get_close_matches(where, names, 1)
        variable = f"{PREFIX}{variable_form(where)}_URL"
        hints = [f"did you mean {near[0]!r}?"] if near else []
        hints.append(f"known: {', '.join(names)}" if names else "no bus is known")
        hints.append(f"add [bus.{where}], set {variable}, or give a URL")
        schemes = [scheme for info in registry().infos for scheme in info.schemes]
        if where in schemes:
            hints.insert(0, f"for the backend write {where}://")
        raise ConfigError(
            f"there is no bus {where!r}{self.document.told}",
            hint="; ".join(hints).replace("?; ", "? "),
        )


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
