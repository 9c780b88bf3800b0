"""The message that a handler of the native client gets."""

from __future__ import annotations

import logging
from typing import Any, TypeVar, cast, overload

import msgspec

__all__ = ["AttributeDict", "EmitterMessage"]

logger = logging.getLogger("pubsub_emitter")

T = TypeVar("T")


class AttributeDict(dict[str, Any]):
    """A dictionary whose entries are attributes, too, also in nested ones.

    >>> AttributeDict({"a": 1}).a
    1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the message has no field {name!r}") from None


class EmitterMessage:
    """One message.

    Attributes:
        channel: Where it was published, with its trailing slash, without key and options.
        binary: The payload.
    """

    __slots__ = ("binary", "channel")

    def __init__(self, channel: str, payload: bytes) -> None:
        self.channel = channel
        self.binary = payload

    def as_string(self) -> str:
        """Return the payload as text; bytes that are not UTF-8 become replacement characters."""
        return self.binary.decode(errors="replace")

    @overload
    def as_object(self) -> Any: ...
    @overload
    def as_object(self, type: type[T]) -> T: ...
    def as_object(self, type: Any = None) -> Any:
        """Decode the JSON of the payload.

        Without *type*, objects are dictionaries whose fields are attributes as well, and a
        payload that is not JSON is logged and gives None. With *type* (a dataclass, a
        `msgspec.Struct`, ``list[int]`` …) the value is checked against it.

        Raises:
            ValueError: *type* was given and the payload does not fit it.
        """
        if type is not None:
            return msgspec.json.decode(self.binary, type=type)
        try:
            return _with_attributes(msgspec.json.decode(self.binary))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            logger.warning("a message on %r is not JSON", self.channel)
            return None

    def as_binary(self) -> bytes:
        """Return the payload."""
        return self.binary

    # Names of emitter-io 1.x.
    def asString(self) -> str:  # noqa: N802  the SDK's name
        """Do as `as_string`."""
        return self.as_string()

    def asObject(self) -> Any:  # noqa: N802  the SDK's name
        """Do as `as_object`."""
        return self.as_object()

    def asBinary(self) -> bytes:  # noqa: N802  the SDK's name
        """Do as `as_binary`."""
        return self.as_binary()

    def __repr__(self) -> str:
        return f"EmitterMessage({self.channel!r}, {len(self.binary)} bytes)"


def _with_attributes(value: object) -> Any:
    if isinstance(value, dict):
        fields = cast("dict[str, object]", value)
        return AttributeDict({name: _with_attributes(each) for name, each in fields.items()})
    if isinstance(value, list):
        return [_with_attributes(each) for each in cast("list[object]", value)]
    return value
