"""The file that describes an application to the embedded broker, in TOML or JSON.

    strict = true
    throttle = false

    [devices.575ecf887ae143cd83dc4aa2]
    class = "gateway"
    tags = { floor = "2" }
    attributes = { temperature = "number", door = "boolean" }

    [devices.575ecf887ae143cd83dc4aa3]
    class = "peripheral"
    gateway_id = "575ecf887ae143cd83dc4aa2"

    [[keys]]
    key = "the access key"
    secret = { env = "LOSANT_SECRET" }        # or the text itself, or { file = "secret.txt" }
    device_tags = [["floor", "2"]]            # and device_ids; with neither: all devices
    filter_type = "whitelist"                 # none, all, whitelist, blacklist
    pub_topics = ["alerts/+"]
    sub_topics = ["alerts/#"]

A name that is not known is an error, and no error shows a secret.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import msgspec

from pubsub_core.errors import BadOption
from pubsub_core.secrets import parse_reference, resolve_reference
from pubsub_losant.topics import check_device_id

from .access import AccessKey, AttributeType, DeviceClass, DeviceSpec, FilterType

__all__ = ["ApplicationConfig"]

T = TypeVar("T", bound=msgspec.Struct)


class _Device(msgspec.Struct, forbid_unknown_fields=True):
    cls: DeviceClass = msgspec.field(name="class", default="standalone")
    gateway_id: str | None = None
    tags: dict[str, str | list[str]] = {}
    attributes: dict[str, AttributeType] | None = None


class _Key(msgspec.Struct, forbid_unknown_fields=True):
    key: str
    secret: str
    device_ids: list[str] | None = None
    device_tags: list[tuple[str, str]] | None = None
    filter_type: FilterType = "none"
    pub_topics: list[str] = []
    sub_topics: list[str] = []
    active: bool = True


_TOP: Final = ("devices", "keys", "one_connection", "strict", "throttle")


@dataclass(frozen=True, slots=True)
class ApplicationConfig:
    """The content of a file; None where it has no value."""

    devices: Mapping[str, DeviceSpec] = field(default_factory=dict[str, DeviceSpec])
    keys: Sequence[AccessKey] | None = None
    strict: bool | None = None
    throttle: bool | None = None
    one_connection: bool | None = None

    @classmethod
    def load(cls, path: str | Path) -> ApplicationConfig:
        """Read a file; JSON when its name ends so, TOML otherwise.

        Raises:
            BadOption: It cannot be read, or something in it does not fit.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            found: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        except (OSError, ValueError, RecursionError) as exc:
            # A parser's text can hold a line of the file; only its place is told.
            why = exc.strerror if isinstance(exc, OSError) else type(exc).__name__
            line = getattr(exc, "lineno", None)
            where = f" in line {line}" if line else ""
            raise BadOption(
                f"cannot read {path}: {why}{where}",
                option="config",
                hint="give a TOML or JSON file; see the README of the Losant backend",
                backend="losant",
            ) from None
        if not isinstance(found, dict):
            raise _bad("it is no table", path)
        return cls._parse(cast("dict[str, Any]", found), path)

    @classmethod
    def _parse(cls, found: dict[str, Any], path: Path) -> ApplicationConfig:
        _check_names(found, _TOP, "", path)
        devices: dict[str, DeviceSpec] = {}
        for device_id, value in _table(found.get("devices", {}), "devices", path).items():
            place = f"devices.{device_id}"
            try:
                check_device_id(device_id)
            except ValueError as exc:
                raise _bad(f"{place}: {exc}", path) from None
            device = _convert(value, _Device, place, path)
            devices[device_id] = DeviceSpec(
                device.cls, device.gateway_id, device.tags, device.attributes
            )
        return cls(
            devices,
            None if "keys" not in found else _keys(found["keys"], path),
            _flag(found, "strict", path),
            _flag(found, "throttle", path),
            _flag(found, "one_connection", path),
        )


def _keys(values: Any, path: Path) -> list[AccessKey]:
    if not isinstance(values, list):
        raise _bad("keys is no list", path, hint="begin each key with [[keys]]")
    keys: list[AccessKey] = []
    tables = cast("list[object]", values)
    for number, value in enumerate(tables):
        place = f"keys.{number}"
        table = dict(_table(value, place, path))
        secret: Any = table.get("secret")
        if isinstance(secret, dict):
            reference = parse_reference(cast("dict[str, Any]", secret), place=f"{place}.secret")
            table["secret"] = resolve_reference(
                reference, place=f"{place}.secret", environ=os.environ, folder=path.parent
            ).reveal()
        key = _convert(table, _Key, place, path)
        keys.append(
            AccessKey(
                key.key,
                key.secret,
                device_ids=None if key.device_ids is None else frozenset(key.device_ids),
                device_tags=key.device_tags,
                filter_type=key.filter_type,
                pub_topics=key.pub_topics,
                sub_topics=key.sub_topics,
                active=key.active,
            )
        )
    return keys


def _table(value: Any, place: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _bad(f"{place} is no table", path)
    return cast("dict[str, Any]", value)


def _flag(found: dict[str, Any], name: str, path: Path) -> bool | None:
    value = found.get(name)
    if value is not None and not isinstance(value, bool):
        raise _bad(f"{name} is neither true nor false", path)
    return value


def _convert(value: Any, kind: type[T], place: str, path: Path) -> T:
    known = [field.encode_name for field in msgspec.structs.fields(kind)]
    _check_names(_table(value, place, path), known, place, path)
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as exc:
        raise _bad(f"{place}: {exc}", path, hint=f"it may have {', '.join(known)}") from None


def _check_names(table: Mapping[str, Any], known: Sequence[str], place: str, path: Path) -> None:
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1)
            raise _bad(
                f"{place}{'.' if place else ''}{name} is not known",
                path,
                hint=f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(known)}",
            )


def _bad(problem: str, path: Path, *, hint: str = "") -> BadOption:
    return BadOption(f"{path}: {problem}", option="config", hint=hint, backend="losant")
