"""The vectors in ``tests/data/losant_vectors.json``, and the Python values they stand for."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

VECTORS: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "losant_vectors.json").read_text()
)
NOW: Final[int] = VECTORS["clock_ms"]
DEVICE: Final = "575ecf887ae143cd83dc4aa2"


def by_id(name: str) -> pytest.MarkDecorator:
    """Parametrize over the cases of a section."""
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case["id"]) for case in VECTORS[name]]
    )


@contextmanager
def local_zone(name: str, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the C library have that local time zone."""
    with patch.context() as inner:
        inner.setenv("TZ", name)
        time.tzset()
        try:
            yield
        finally:
            inner.undo()
            time.tzset()


def python_time(spec: dict[str, Any]) -> Any:
    """Return the argument that a case of ``time_like`` describes."""
    match spec["type"]:
        case "none":
            return None
        case "int" | "float" | "str" | "bool" | "dict" | "list":
            return spec["value"]
        case "float_special":
            return float(spec["value"])
        case "tuple":
            return tuple(spec["value"])
        case "datetime":
            return dt.datetime.fromisoformat(spec["iso"])
        case "date":
            return dt.date.fromisoformat(spec["iso"])
        case "decimal":
            return decimal.Decimal(spec["value"])
        case "timedelta_s":
            return dt.timedelta(seconds=spec["value"])
        case "bytes_utf8":
            return spec["value"].encode()
        case "struct_time":
            return _struct(spec["from"], spec["arg"])
        case other:
            raise AssertionError(other)


def _struct(how: str, argument: Any) -> time.struct_time:
    match how:
        case "gmtime":
            return time.gmtime(argument)
        case "localtime":
            return time.localtime(argument)
        case "tuple9":
            return time.struct_time(argument)
        case "strptime":
            return time.strptime(*argument)
        case other:
            raise AssertionError(other)


def python_value(value: Any) -> Any:
    """Return what a value of the vectors stands for."""
    if isinstance(value, dict):
        if list(value) == ["__py__"]:
            return eval(value["__py__"], {"datetime": dt})
        if list(value) == ["$py_datetime"]:
            return dt.datetime.fromisoformat(value["$py_datetime"])
        return {name: python_value(each) for name, each in value.items()}
    if isinstance(value, list):
        return [python_value(each) for each in value]
    return value


def payload_of(case: dict[str, Any]) -> bytes:
    if "payload_hex" in case:
        return bytes.fromhex(case["payload_hex"])
    return str(case["payload_utf8"]).encode()


ERRORS: Final = {"TypeError": TypeError, "ValueError": ValueError}
