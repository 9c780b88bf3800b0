"""Checking a configuration without connecting and without running a secret's command."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from pubsub_core.errors import BadOption, ConfigError, PubSubError
from pubsub_core.secrets import Secret, looks_secret, mask_url, parse_reference

from .answers import Finding, SourceKind
from .document import Document, file_mode, is_list, is_table, located, scopes, structure
from .environment import PREFIX, VARIABLES, sort_variables, variable_form
from .explain import reference_of
from .layers import Layer, Layers, Plan
from .options import inner_type, is_secret, parse_url

__all__ = ["finding", "findings"]


def findings(layers: Layers) -> Iterator[Finding]:
    """Yield the faults of a file, of the environment, and of each bus in each profile."""
    document = layers.document
    broken: set[str] = set()
    for scope, problem in structure(document):
        broken.add(scope)
        with contextlib.suppress(BadOption), located(document):
            raise problem
        yield finding(problem, problem.option)
    try:
        layers.check_profile()
    except ConfigError as exc:
        yield finding(exc, "PUBSUB_PROFILE")
    yield from _of_environment(layers)
    for profile in (None, *document.table("profile")):
        checked = layers.with_profile(profile)
        for name in checked.names():
            if broken.isdisjoint(scopes(name, profile) - {""}):
                yield from _of_bus(checked, name)


def finding(
    error: PubSubError, place: str, severity: Literal["error", "warning"] = "error"
) -> Finding:
    """Return an error as a finding."""
    return Finding(severity, place, error.message, error.hint)


def _of_environment(layers: Layers) -> Iterator[Finding]:
    named = layers.written_names()
    for variable in sort_variables(layers.environ, named).stray:
        yield Finding(
            "warning",
            variable,
            f"{variable} belongs to no known bus",
            f"known: {', '.join(layers.names()) or 'none'}",
        )
    for variable in layers.environ:
        if variable.startswith("PUBSUB_") and not variable.startswith(PREFIX):
            near = difflib.get_close_matches(variable, VARIABLES, 1, 0.8)
            if near and variable not in VARIABLES:
                yield Finding(
                    "warning", variable, f"{variable} means nothing", f"did you mean {near[0]}?"
                )
    forms: dict[str, str] = {}
    for name in named:
        other = forms.setdefault(variable_form(name), name)
        if other != name:
            yield Finding(
                "warning",
                f"bus.{name}",
                f"buses {other!r} and {name!r} share the variables {PREFIX}{variable_form(name)}…",
                "rename one",
            )


def _of_bus(layers: Layers, name: str) -> Iterator[Finding]:
    found: list[Layer] = []
    try:
        with located(layers.document):
            found = layers.of(name, {})
            plan = layers.plan_of(name, found, fetch=False)
    except PubSubError as exc:
        if not any("url" in layer.values for layer in found):
            # A bus may be completed by a profile alone.
            if layers.profile is None and _completed_elsewhere(name, layers.document):
                return
            yield finding(exc, f"bus.{name}.url")
        else:
            fetched = any(is_table(layer.values.get("url")) for layer in found)
            missing = fetched and not isinstance(exc, BadOption)
            yield finding(exc, f"bus.{name}.url", "warning" if missing else "error")
        return
    yield from _literals(found, plan, layers.document)
    yield from _values(layers, plan)


def _completed_elsewhere(name: str, document: Document) -> bool:
    profiles = document.table("profile")
    return any("url" in document.table("profile", one, "bus", name) for one in profiles)


def _values(layers: Layers, plan: Plan) -> Iterator[Finding]:
    """Build the bus again and again, each time without the value that was refused."""
    missing: list[Finding] = []

    def resolve(value: Mapping[str, Any], place: str) -> Secret:
        reference = parse_reference(value, place=place)
        try:
            if reference.kind in ("env", "file"):
                return layers.fetch(reference, place)
        except ConfigError as exc:
            missing.append(finding(exc, place, "warning"))
        return Secret("placeholder")

    for _ in range(len(plan.values) + 1):
        missing.clear()
        refused: BadOption | None = None
        try:
            layers.convert(plan, resolve)
        except BadOption as exc:
            refused = exc
        if refused is None:
            break
        yield finding(refused, refused.option)
        key = next(
            (
                key
                for key, place in plan.places.items()
                if refused.option == place or refused.option.startswith((f"{place}.", f"{place}["))
            ),
            None,
        )
        if key is None:
            break
        del plan.values[key]
    yield from missing


def _literals(layers: Iterable[Layer], plan: Plan, document: Document) -> Iterator[Finding]:
    if document.path is None or not file_mode(document.path) & 0o044:
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
    if is_table(value):
        if reference_of(value, wanted) is not None:
            return False
        for key, item in value.items():
            inner, masked = inner_type(wanted, key)
            if _literal(item, inner, hidden=hidden or masked):
                return True
    inner = inner_type(wanted)[0]
    return is_list(value) and any(_literal(item, inner, hidden=hidden) for item in value)
