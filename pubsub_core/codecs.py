"""Values to payloads and back: bytes, text, JSON and MessagePack, typed by msgspec.

Nothing is guessed. ``bytes`` travel as they are, ``str`` travels as UTF-8, and every other
value goes through one codec: the one named in the call, else the first rule that matches
the topic, else the bus's default. Received bytes become the type that the subscription asked for,
or `DecodeFailed`; neither their content nor the content type that the publisher declared
changes which codec reads them. No codec here can run code that it receives.

Types that can be asked for are those of https://jcristharif.com/msgspec/supported-types.html
(builtins, dataclasses, ``msgspec.Struct``, ``TypedDict``, ``NamedTuple``, enums, dates …),
decoded in msgspec's strict mode, and pydantic 2 models. pydantic is imported only for a type
that is one of its models.
"""

from __future__ import annotations

import abc
import difflib
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeAlias, TypeVar, cast, get_args, runtime_checkable

import msgspec

from .errors import (
    BadOption,
    BadType,
    ConfigError,
    DecodeFailed,
    EncodeFailed,
    InvalidFilter,
    PubSubError,
)
from .keyed import BoundedCache
from .topics import TopicFilter, overlap, parse_filter

__all__ = [
    "BUILTIN_CODECS",
    "BytesCodec",
    "Codec",
    "CodecRule",
    "CodecSet",
    "Decoder",
    "JsonCodec",
    "MsgpackCodec",
    "TextCodec",
    "TypedCodec",
]

_log = logging.getLogger("pubsub_core")

T = TypeVar("T")

Decoder: TypeAlias = Callable[[str, bytes, "str | None"], T]
"""Called with topic, payload and declared content type; returns the value."""

_RULE_CACHE_SIZE: Final = 4096


@dataclass(frozen=True, slots=True)
class CodecRule:
    """Topics matching *match* use *codec*; the first rule that matches wins."""

    match: str
    codec: str


class Codec(Protocol):
    """The interface of a codec; a plugin announces instances of such a class.

    Attributes:
        name: Its name in ``codec=`` and ``pubsub.toml``; lower case.
        content_type: Media type declared with a payload it encoded, or None.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def content_type(self) -> str | None:
        """See above."""
        ...

    def encode(self, value: Any) -> bytes:
        """Return *value* as bytes. May raise anything; it becomes `EncodeFailed`."""
        ...

    def decode(self, data: bytes, type: Any) -> Any:
        """Return *data* as an instance of *type*. May raise anything: `DecodeFailed`."""
        ...


@runtime_checkable
class TypedCodec(Protocol):
    """A codec that prepares a decoder per type, which is faster and finds bad types early."""

    def decoder(self, type: Any) -> Callable[[bytes], Any]:
        """Return a function that decodes to *type*.

        Raises:
            TypeError: It cannot produce that type; the text names those it can.
        """
        ...


class _Builtin(abc.ABC):
    @abc.abstractmethod
    def encode(self, value: Any) -> bytes:
        """Return *value* as bytes."""

    @abc.abstractmethod
    def decoder(self, type: Any) -> Callable[[bytes], Any]:
        """Return a function that decodes to *type*; see `TypedCodec`."""

    def decode(self, data: bytes, type: Any) -> Any:
        """Return *data* as an instance of *type*; `decoder` is faster for many."""
        return self.decoder(type)(data)


class BytesCodec(_Builtin):
    """Bytes as they are; no other value."""

    name = "bytes"
    content_type = None

    def encode(self, value: Any) -> bytes:  # noqa: D102 - inherited
        if isinstance(value, (bytes, bytearray, memoryview)):
            return bytes(cast("bytes", value))
        raise TypeError("this codec takes bytes, bytearray and memoryview only")

    def decoder(self, type: Any) -> Callable[[bytes], Any]:  # noqa: D102 - inherited
        if type in (bytes, bytearray, memoryview):
            return cast("Callable[[bytes], Any]", type)
        raise TypeError("it gives bytes, bytearray or memoryview")


class TextCodec(_Builtin):
    """Text as UTF-8, checked; no other value."""

    name = "text"
    content_type = "text/plain; charset=utf-8"

    def encode(self, value: Any) -> bytes:  # noqa: D102 - inherited
        if isinstance(value, str):
            return value.encode()
        raise TypeError("this codec takes str only")

    def decoder(self, type: Any) -> Callable[[bytes], Any]:  # noqa: D102 - inherited
        if type in (str, Any, object):
            return bytes.decode
        raise TypeError("it gives str")


def _dump_json(value: Any) -> Any:
    return _dump_model(value, "json")


class JsonCodec(_Builtin):
    """JSON (RFC 8259) through msgspec: strict, so ``"1"`` is no number.

    NaN and the infinities are refused: JSON has no word for them, and msgspec writes ``null``,
    which a receiver that expects a number cannot take.
    """

    name = "json"
    content_type = "application/json"

    def __init__(self) -> None:
        self._encode = msgspec.json.Encoder(enc_hook=_dump_json).encode

    def encode(self, value: Any) -> bytes:  # noqa: D102 - inherited
        data = self._encode(value)
        # Looking for "null" first spares nearly every message the second pass.
        if b"null" in data and _has_no_number(msgspec.to_builtins(value, enc_hook=_dump_json)):
            raise OverflowError(
                "JSON has no NaN and no Infinity; None or codec='msgpack' can say it"
            )
        return data

    def decoder(self, type: Any) -> Callable[[bytes], Any]:  # noqa: D102 - inherited
        if _holds_model(type):
            return cast("Callable[[bytes], Any]", _adapter(type).validate_json)
        _check_type(type)
        return msgspec.json.Decoder(_plain(type), dec_hook=_validate_json).decode


class MsgpackCodec(_Builtin):
    """MessagePack through msgspec: as strict as `JsonCodec`."""

    name = "msgpack"
    content_type = "application/msgpack"

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder(
            enc_hook=lambda value: _dump_model(value, "python")
        ).encode

    def encode(self, value: Any) -> bytes:  # noqa: D102 - inherited
        return self._encode(value)

    def decoder(self, type: Any) -> Callable[[bytes], Any]:  # noqa: D102 - inherited
        if _holds_model(type):
            validate = _adapter(type).validate_python
            decode = msgspec.msgpack.Decoder().decode
            return lambda data: validate(decode(data))
        _check_type(type)
        return msgspec.msgpack.Decoder(_plain(type), dec_hook=_validate_python).decode


BUILTIN_CODECS: Final[tuple[Codec, ...]] = (
    BytesCodec(),
    TextCodec(),
    JsonCodec(),
    MsgpackCodec(),
)
"""The codecs that are always there. Their names cannot be given to another codec."""


def _filter_of(rule: CodecRule) -> TopicFilter:
    try:
        return parse_filter(rule.match)
    except InvalidFilter as exc:
        raise BadOption(
            f"codecs: match = {rule.match!r} is not a topic filter", option="codecs", hint=str(exc)
        ) from exc


class CodecSet:
    """The codecs of one bus, and the rules that choose among them.

    Args:
        default: Codec of values that are neither bytes nor text and match no rule.
        rules: Topic filters and codec names; the first filter that matches a topic wins.
        extra: Codecs of plugins. One whose name is taken already is ignored, with a warning.

    Raises:
        ConfigError: A name is unknown, or a codec lacks a method.
        BadOption: A rule's filter is none.
    """

    def __init__(
        self,
        default: str = "json",
        rules: Iterable[CodecRule] = (),
        extra: Iterable[Codec] = (),
    ) -> None:
        self._codecs: dict[str, Codec] = {codec.name: codec for codec in BUILTIN_CODECS}
        for codec in extra:
            self._add(codec)
        self._default = self._get(default)
        self._rules: list[tuple[TopicFilter, Codec]] = [
            (_filter_of(rule), self._get(rule.codec, option="codecs")) for rule in rules
        ]
        self._text = self._codecs["text"]
        self._ruled = BoundedCache[str, Codec | None](_RULE_CACHE_SIZE)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the codecs, sorted."""
        return tuple(sorted(self._codecs))

    def encode(
        self, value: Any, *, topic: str, codec: str | Codec | None = None
    ) -> tuple[bytes, str | None]:
        """Return *value* as a payload, and the content type it has.

        Bytes are returned as they are, whatever the codec, and without a content type: their
        content is unknown.

        Raises:
            EncodeFailed: The codec cannot encode the value.
            ConfigError: There is no such codec.
        """
        if isinstance(value, bytes):
            return value, None
        if isinstance(value, (bytearray, memoryview)):
            return bytes(cast("bytes", value)), None
        if codec is not None:
            chosen = self._get(codec)
        elif self._rules and (ruled := self._rule(topic)) is not None:
            chosen = ruled
        elif isinstance(value, str):
            chosen = self._text
        else:
            chosen = self._default
        try:
            return chosen.encode(value), chosen.content_type
        except PubSubError:
            raise
        except Exception as exc:
            raise EncodeFailed(
                f"codec {chosen.name!r} cannot encode the {type(value).__qualname__} "
                f"for {topic!r}: {_encode_reason(exc)}",
                hint="pass a value it can encode, bytes, or another codec=",
                topic=topic,
            ) from exc

    def decoder(
        self, type: type[T] | Any, *, filter: str, codec: str | Codec | None = None
    ) -> Decoder[T] | None:
        """Return the function that turns payloads of one subscription into *type*.

        Make it once per subscription. None stands for ``bytes``: nothing to decode.

        Raises:
            ConfigError: There is no such codec, or it cannot produce *type*.
        """
        if type is bytes:
            if codec is not None:
                self._get(codec)  # a name that is wrong is told, needed or not
            return None
        if codec is not None:
            return _guarded(self._get(codec), type, filter)
        if type in (bytearray, memoryview):
            return _guarded(self._codecs["bytes"], type, filter)
        usual = self._text if type is str else self._default
        relevant = list(self._relevant(filter))
        if not relevant:
            return _guarded(usual, type, filter)
        made = {each.name: _guarded(each, type, filter) for each in (usual, *relevant)}
        choose, fallback = self._rule, made[usual.name]

        def by_rule(topic: str, data: bytes, content_type: str | None) -> T:
            ruled = choose(topic)
            decode = fallback if ruled is None else made[ruled.name]
            value: T = decode(topic, data, content_type)
            return value

        return by_rule

    def _add(self, codec: Codec) -> None:
        name = getattr(codec, "name", None)
        lacking = [
            each for each in ("encode", "decode") if not callable(getattr(codec, each, None))
        ]
        if not isinstance(name, str) or not name or lacking:
            raise ConfigError(
                f"{codec!r} is not a codec: it lacks {', '.join(lacking) or 'a name'}",
                hint="a codec has name, content_type, encode(value) and decode(data, type)",
            )
        if name in self._codecs:
            # Not an error: a plugin must not be able to stop every bus of the program.
            _log.warning("a second codec called %r is ignored: %r", name, codec)
            return
        self._codecs[name] = codec

    def _get(self, codec: str | Codec, option: str = "codec") -> Codec:
        if not isinstance(codec, str):
            if not callable(getattr(codec, "encode", None)) or not callable(
                getattr(codec, "decode", None)
            ):
                raise BadType(
                    f"codec={codec!r:.40}", hint="pass a codec or its name", option=option
                )
            return codec
        found = self._codecs.get(codec)
        if found is not None:
            return found
        near = difflib.get_close_matches(codec.lower(), self._codecs, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise BadOption(
            f"there is no codec {codec!r}",
            option=option,
            hint=f"{meant}known codecs: {', '.join(self.names)}",
        )

    def _rule(self, topic: str) -> Codec | None:
        known = self._ruled.get(topic, ...)
        if known is not ...:
            return known
        return self._ruled.keep(
            topic, next((codec for rule, codec in self._rules if rule.matches(topic)), None)
        )

    def _relevant(self, filter: str) -> Iterator[Codec]:
        # A codec that only other topics use need not be able to produce the type.
        if not self._rules:
            return
        plain = parse_filter(filter).filter
        for rule, codec in self._rules:
            if overlap(rule.filter, plain):
                yield codec


def _guarded(codec: Codec, type: Any, filter: str) -> Decoder[Any]:
    """Return a decoder of *codec* for *type* whose every failure is `DecodeFailed`."""
    shown = _type_name(type)
    decode: Callable[[bytes], Any]
    if isinstance(codec, TypedCodec):
        try:
            decode = codec.decoder(type)
        except TypeError as exc:
            raise BadOption(
                f"codec {codec.name!r} cannot decode to {shown}, asked for by {filter!r}: {exc}",
                option="type",
                hint="use a dataclass, msgspec.Struct, TypedDict, pydantic model or builtin "
                "type, or bytes and decode yourself",
            ) from exc
    else:
        decode = partial(_untyped_decode, codec, type)

    def guarded(topic: str, data: bytes, content_type: str | None) -> Any:
        try:
            return decode(data)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it becomes DecodeFailed
            failure = DecodeFailed(
                f"payload of {len(data)} bytes on {topic!r} is no {shown} "
                f"for codec {codec.name!r}: {_decode_reason(exc)}",
                raw=data,
                content_type=content_type,
                hint="subscribe with the type or codec= that is published there, "
                "or set on_decode_error",
                topic=topic,
            )
            # Not "from exc": errors of msgspec and pydantic quote the payload, and a cause
            # is printed with every traceback. It stays reachable as __context__.
            raise failure from None

    return guarded


def _untyped_decode(codec: Codec, type: Any, data: bytes) -> Any:
    return codec.decode(data, type)


def _plain(type: Any) -> Any:
    # "object" and "Any" say the same of a value, and msgspec knows only the latter.
    return Any if type is object else type


def _type_name(type: Any) -> str:
    if get_args(type) or not hasattr(type, "__qualname__"):
        return str(type).replace("typing.", "")
    return cast("str", type.__qualname__)


# --- texts of errors ---------------------------------------------------------------------

# msgspec's messages that cannot hold any of the payload: they are made of the type, byte
# offsets and paths (in which it writes "[...]" for a key). Source: msgspec, _core.c.
_SAFE: Final = re.compile(
    r"^(Expected `|Object missing required field|JSON is malformed|MessagePack data is malformed"
    r"|Input data was truncated|it gives )"
)
_PATH: Final = re.compile(r"at `(\$[^`]*)`$")
_REASON_LIMIT: Final = 200


def _decode_reason(exc: Exception) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return f"no valid UTF-8 at byte {exc.start}"
    if isinstance(exc, RecursionError):
        return "nested too deeply"
    if isinstance(exc, (msgspec.MsgspecError, TypeError)):
        text = str(exc)
        if _SAFE.match(text):
            return text[:_REASON_LIMIT]
        path = _PATH.search(text)
        return f"a value is not allowed{' at ' + path[1] if path else ''}"
    errors = getattr(exc, "errors", None)
    if callable(errors):  # pydantic_core.ValidationError, without importing it
        return _pydantic_reason(errors)
    return type(exc).__qualname__


def _pydantic_reason(errors: Callable[..., Any]) -> str:
    try:
        found = errors(include_url=False, include_context=False, include_input=False)
        return f"the first of {len(found)} validation errors is {found[0]['type']!r}"
    except (TypeError, LookupError):
        return "validation failed"


def _encode_reason(exc: Exception) -> str:
    if isinstance(exc, UnicodeEncodeError):
        return "it holds a lone surrogate, which UTF-8 cannot carry"
    if isinstance(exc, RecursionError):
        return "nested too deeply, or holding itself"
    if isinstance(exc, (TypeError, OverflowError, msgspec.MsgspecError)):
        return str(exc)[:_REASON_LIMIT]
    return type(exc).__qualname__


# --- which types can be decoded to ------------------------------------------------------


def _check_type(type: Any) -> None:
    """Refuse a type that msgspec would only refuse when the first message arrives.

    Raises:
        TypeError: *type*, or something inside it, cannot be decoded to.
    """
    if type is object:
        return
    seen: set[Any] = set()
    waiting: list[Any] = [msgspec.inspect.type_info(type)]
    while waiting:
        info = waiting.pop()
        cls = getattr(info, "cls", None)
        if cls is not None:
            if cls in seen:
                continue
            seen.add(cls)
            if isinstance(info, msgspec.inspect.CustomType) and not _is_model(cls):
                raise TypeError(f"no decoder for {_type_name(cls)}")
            if isinstance(info, msgspec.inspect.DataclassType) and _validated(cls):
                raise TypeError(
                    f"the pydantic dataclass {_type_name(cls)} would not be validated "
                    "inside a type that is not pydantic's"
                )
        waiting.extend(_parts(info))


def _parts(info: Any) -> Iterator[Any]:
    for name in ("item_type", "item_types", "key_type", "value_type", "types", "type", "fields"):
        part: Any = getattr(info, name, None)
        if isinstance(part, tuple):
            yield from part
        elif part is not None:
            yield part


# --- pydantic ---------------------------------------------------------------------------


def _is_model(cls: Any) -> bool:
    return isinstance(cls, type) and hasattr(cls, "model_validate")


def _validated(cls: Any) -> bool:
    """Whether *cls* is a model or a dataclass of pydantic."""
    return _is_model(cls) or (isinstance(cls, type) and hasattr(cls, "__pydantic_validator__"))


def _holds_model(type: Any) -> bool:
    """Whether *type* is pydantic's, or a list, dict, union … of such."""
    return _validated(type) or any(_holds_model(each) for each in get_args(type))


def _adapter(type: Any) -> Any:
    from pydantic import TypeAdapter  # noqa: PLC0415 - optional, and only for its own models
    from pydantic.errors import PydanticUserError  # noqa: PLC0415 - as above

    try:
        return TypeAdapter(type)
    except PydanticUserError as exc:
        raise TypeError(exc.message.splitlines()[0]) from exc


def _dump_model(value: Any, mode: str) -> Any:
    """Encode a pydantic model for msgspec; by alias, since that is what validation reads."""
    if _is_model(type(value)):
        return value.model_dump(mode=mode, by_alias=True)
    raise TypeError(f"no encoder for {type(value).__qualname__}")


def _has_no_number(value: Any) -> bool:
    """Whether a float in *value* is NaN or infinite; a loop, since values may be deep."""
    waiting: list[Any] = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, float):
            if not math.isfinite(each):
                return True
        elif isinstance(each, dict):
            waiting += cast("Mapping[Any, Any]", each).values()
        elif isinstance(each, (list, tuple)):
            waiting += cast("Sequence[Any]", each)
    return False


def _validate_json(type: Any, value: Any) -> Any:
    # Through JSON once more: a strict model takes a date's text from JSON, not from Python.
    return type.model_validate_json(msgspec.json.encode(value))


def _validate_python(type: Any, value: Any) -> Any:
    return type.model_validate(value)
