"""Filling the parameters of handlers, authorizers and hooks.

Parameters are matched once, when a function is declared or the application starts; a call
fills a list and a dictionary. A parameter that nothing fits is an error at the match.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Union, cast, get_args, get_origin

import msgspec

from pubsub_core.bus import Bus
from pubsub_core.errors import ConfigError
from pubsub_core.events import Gap
from pubsub_core.interfaces import AuthorizationRequest
from pubsub_core.message import Message
from pubsub_core.sync import SyncBus, wrap
from pubsub_core.topics import TopicFilter

__all__ = ["MAIN", "Arguments", "Filler", "OpenBuses", "fillers_of", "name_of"]

MAIN: Final = "main"
"""Name of the bus where none is named."""

_Kind = Literal["message", "payload", "capture", "bus", "request"]


class OpenBuses(dict[str, Bus]):
    """The open buses of an application, by name."""

    def named(self, name: str) -> Bus:
        """Return one of them.

        Raises:
            ConfigError: There is none of that name.
        """
        try:
            return self[name]
        except KeyError:
            raise ConfigError(
                f"the application has no bus {name!r}",
                hint=f"it has: {', '.join(sorted(self)) or 'none yet'}; name others in "
                "run(buses=…)",
            ) from None


@dataclass(frozen=True, slots=True)
class Filler:
    """The source of one parameter.

    Attributes:
        keyword: Whether it can only be passed by name.
        source: Name of the capture or of the bus; ``""`` for the handler's own bus.
        annotation: Type to convert or decode to; None for none.
    """

    name: str
    kind: _Kind
    keyword: bool
    source: str = ""
    annotation: Any = None
    sync: bool = False


class Arguments:
    """Fills parameters; all but the message are known before the first call."""

    def __init__(self, fillers: tuple[Filler, ...], buses: OpenBuses, own: str) -> None:
        made = [(each, _value(each, buses, own)) for each in fillers]
        self._positional = [value for each, value in made if not each.keyword]
        self._keyword = {each.name: value for each, value in made if each.keyword}

    def call(self, function: Callable[..., Any], message: Any) -> Any:
        """Call *function* for *message*."""
        return function(
            *[value(message) for value in self._positional],
            **{name: value(message) for name, value in self._keyword.items()},
        )


def _value(filler: Filler, buses: OpenBuses, own: str) -> Callable[[Any], Any]:
    match filler.kind:
        case "message":
            return lambda message: message
        case "payload":
            return lambda message: message.payload
        case "request":
            return lambda asked: asked.request
        case "bus":
            bus = buses.named(filler.source or _own_bus(buses, own))
            given = wrap(bus) if filler.sync else bus
            return lambda _: given
        case "capture":
            name, wanted = filler.source, filler.annotation
            if wanted is None:
                return lambda message: message.params[name]
            return functools.partial(_converted, name, wanted)


def _own_bus(buses: OpenBuses, own: str) -> str:
    # A hook belongs to no bus; where there is only one, that is the one it means.
    if own not in buses and len(buses) == 1:
        return next(iter(buses))
    return own


def _converted(name: str, wanted: Any, message: Message[Any]) -> Any:
    try:
        return msgspec.convert(message.params[name], wanted, strict=False)
    except msgspec.ValidationError:
        raise ValueError(
            f"{{{name}}} of {message.topic!r} is no {getattr(wanted, '__name__', wanted)}"
        ) from None


# --- deciding ------------------------------------------------------------------------------


def fillers_of(
    function: Callable[..., Any],
    filter: TopicFilter | None,
    *,
    plain: bool,
    namespace: Mapping[str, Any] | None,
    gaps: bool = False,
    given_type: Any = None,
    role: str = "handler",
) -> tuple[tuple[Filler, ...], Any]:
    """Return a source for each parameter of *function*, and the payload type they ask for.

    A *filter* of None is that of a hook, which can take buses only; an authorizer takes a
    request, and neither message nor payload.
    """
    hints = _hints(function, namespace)
    captures = () if filter is None else tuple(filter.captures)
    found: list[Filler] = []
    types_found: list[Any] = []
    for place, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = hints.get(name, parameter.empty)
        has_default = parameter.default is not parameter.empty
        filler = _filler(
            name, annotation, captures, hook=filter is None, asked=role == "authorizer"
        )
        if filler is None:
            if has_default:
                continue
            raise _unfillable(function, name, filter, role)
        # A parameter after one that keeps its default can only be passed by name.
        keyword = parameter.kind is parameter.KEYWORD_ONLY or place != len(found)
        if keyword and parameter.kind is parameter.POSITIONAL_ONLY:
            continue
        filler = Filler(name, filler.kind, keyword, filler.source, filler.annotation, sync=plain)
        if filler.kind == "bus":
            _check_bus(function, name, annotation, plain=plain)
        if filler.kind == "capture" and filler.annotation is not None:
            _check_capture(function, filler)
        if filler.kind in ("message", "payload") and filler.annotation is not None:
            types_found.append(filler.annotation)
        found.append(filler)
    if gaps and any(each.kind in ("payload", "capture") for each in found):
        raise ConfigError(
            f"handler {name_of(function)} is called with a Gap as well (gaps=True), which has no "
            "payload and no captures",
            hint="take one parameter `message: Message[...] | Gap` and read message.params",
        )
    if given_type is None and any(each != types_found[0] for each in types_found[1:]):
        raise ConfigError(
            f"handler {name_of(function)} asks for payloads of different types: "
            f"{', '.join(map(str, types_found))}",
            hint="annotate one of them, or pass type=",
        )
    return tuple(found), types_found[0] if types_found else bytes


def _filler(
    name: str, annotation: Any, captures: tuple[str, ...], *, hook: bool, asked: bool
) -> Filler | None:
    bare = annotation is inspect.Parameter.empty
    if not bare and _is_bus(annotation):
        return Filler(name, "bus", False, "" if name == "bus" else name)
    if name == "bus" and bare and "bus" not in captures:
        return Filler(name, "bus", False)
    if hook:
        return None
    if asked and (annotation is AuthorizationRequest or (name == "request" and bare)):
        return Filler(name, "request", False)
    if not bare and not asked:
        is_message, payload_type = _message_type(annotation)
        if is_message:
            return Filler(name, "message", False, annotation=payload_type)
    if name in captures:
        wanted = None if bare or annotation in (str, Any, object) else annotation
        return Filler(name, "capture", False, name, wanted)
    if asked:
        return None
    if name in ("message", "msg") and bare:
        return Filler(name, "message", False)
    if name == "payload":
        return Filler(name, "payload", False, annotation=None if bare else annotation)
    return None


def _is_bus(annotation: Any) -> bool:
    return annotation is Bus or annotation is SyncBus


def _message_type(annotation: Any) -> tuple[bool, Any]:
    """Return whether *annotation* is a message (or a gap), and of what payload type."""
    origin = get_origin(annotation)
    if annotation is Message:
        return True, None
    if origin is Message:
        return True, get_args(annotation)[0]
    if origin in (Union, types.UnionType):
        parts = [each for each in get_args(annotation) if each is not Gap]
        if len(parts) == 1:
            return _message_type(parts[0])
    return False, None


def _hints(function: Callable[..., Any], namespace: Mapping[str, Any] | None) -> dict[str, Any]:
    target: Any = inspect.unwrap(function)
    while isinstance(target, functools.partial):
        target = inspect.unwrap(cast("Any", target).func)
    if not inspect.isroutine(target):
        target = type(target).__call__
    return typing.get_type_hints(
        target, localns=dict(namespace) if namespace else None, include_extras=True
    )


def _check_bus(function: Callable[..., Any], name: str, annotation: Any, *, plain: bool) -> None:
    wanted = SyncBus if plain else Bus
    if annotation is not inspect.Parameter.empty and annotation is not wanted:
        kind = "plain, so it runs in a thread and" if plain else "async and"
        raise ConfigError(
            f"parameter {name!r} of {name_of(function)} is a {annotation.__name__}; the function "
            f"is {kind} gets a {wanted.__name__}",
            hint=f"annotate it with {wanted.__name__}, or make the function "
            f"{'async' if plain else 'plain'}",
        )


def _check_capture(function: Callable[..., Any], filler: Filler) -> None:
    try:
        info = msgspec.inspect.type_info(filler.annotation)
        fits = not isinstance(info, msgspec.inspect.CustomType)
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"parameter {filler.name!r} of handler {name_of(function)} is a capture, and text "
            f"cannot be converted to {filler.annotation}",
            hint="annotate it with str, int, an enum, UUID … and convert it yourself otherwise",
        )


def _unfillable(
    function: Callable[..., Any], name: str, filter: TopicFilter | None, role: str
) -> ConfigError:
    if filter is None:
        return ConfigError(
            f"nothing fits parameter {name!r} of hook {name_of(function)}",
            hint="hooks take nothing, `bus`, or parameters annotated Bus or SyncBus",
        )
    captures = ", ".join(filter.captures) or "none"
    return ConfigError(
        f"nothing fits parameter {name!r} of {role} {name_of(function)}; "
        f"{filter.text!r} captures: {captures}",
        hint="name it after a capture, `request` or `bus`, annotate it with AuthorizationRequest, "
        "or give it a default"
        if role == "authorizer"
        else "name it after a capture, `payload`, `message` or `bus`, annotate it with "
        "Message[...], or give it a default",
    )


def name_of(function: Any) -> str:
    """Return the name of a function for errors."""
    while isinstance(function, functools.partial):
        function = cast("Any", function).func
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name.rsplit("<locals>.", maxsplit=1)[-1]
