"""Help, words for types, and JSON Schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from pubsub_core.config.bus_options import BusOptions
from pubsub_core.config.options import (
    describe_type,
    field_help,
    json_schema,
)
from pubsub_core.secrets import Secret
from tests.config.options.samples import Auth, Options


def test_help_comes_from_the_fields() -> None:
    rows = {row.name: row for row in field_help(Options)}
    assert [*rows][:2] == ["keepalive", "ratio"]
    assert rows["keepalive"] == (
        "keepalive",
        "a whole number",
        "60",
        "seconds between pings",
        False,
        False,
    )
    assert rows["clean"].default == "true"
    assert rows["mode"].type == "one of fast, safe"
    assert rows["password"].secret
    assert rows["ring"].secret
    assert {row.name: row.required for row in field_help(Auth)} == {"user": True, "password": False}


def test_every_bus_option_has_help() -> None:
    assert [row.name for row in field_help(BusOptions) if not row.help] == []


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    proxy: str = ""
    cert: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnThatWay(Way):
    name: str = ""
    cert: str = field(default="", metadata={"help": "here it is something else"})


def test_what_options_inherit_is_told_last() -> None:
    rows = field_help(OnThatWay)
    assert [row.name for row in rows] == ["name", "proxy", "cert"]
    assert rows[-1].help == "here it is something else"


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (Annotated[float, Meta(gt=0)], "a number above 0"),
        (
            Annotated[str, Meta(min_length=1, max_length=9)],
            "text of at least 1 characters of at most 9 characters",
        ),
        (Literal["x"], "'x'"),
        (dict[str, int], "a table, each value a whole number"),
        (Secret | None, 'text or a reference such as {env = "NAME"}'),
    ],
)
def test_types_in_words(wanted: Any, text: str) -> None:
    assert describe_type(wanted) == text


def test_schema() -> None:
    schema = json_schema(Options)
    properties = schema["properties"]
    assert schema["additionalProperties"] is False
    assert properties["keepalive"] == {
        "description": "seconds between pings",
        "type": "integer",
        "default": 60,
    }
    assert properties["level"] == {"type": "integer", "minimum": 0, "maximum": 2, "default": 1}
    assert properties["mode"] == {"enum": ["fast", "safe"], "default": "safe"}
    assert properties["kind"] == {"enum": ["a", "b"], "default": "a"}
    assert properties["names"] == {
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/reference"}]},
        "default": [],
    }
    assert properties["password"] == {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/reference"}]}
    assert properties["auth"]["required"] == ["user"]
    assert properties["auth"]["additionalProperties"] is False
    assert "context" not in properties
    assert "hook" not in properties
    assert schema["$defs"]["reference"]["type"] == "object"
