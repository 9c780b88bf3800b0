"""Options from texts and native values, and errors that name their place."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.capabilities import Cap
from pubsub_core.codecs import CodecRule
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.config.options import (
    build,
    field_types,
    split,
)
from pubsub_core.errors import BadOption
from pubsub_core.plugins import BUS_OPTIONS, clashes
from pubsub_core.secrets import Secret
from tests.config.options.samples import Auth, Mode, Options
from tests.test_secrets import CANARY, told

# --- building ---------------------------------------------------------------------------


def made(**values: Any) -> Options:
    return build(Options, values, where="bus.main", backend="acme")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("keepalive", "5", 5),
        ("keepalive", 5, 5),
        ("ratio", "1e-3", 0.001),
        ("ratio", 1, 1.0),
        ("clean", "yes", True),
        ("clean", "On", True),
        ("clean", "1", True),
        ("clean", "no", False),
        ("clean", "OFF", False),
        ("clean", "false", False),
        ("clean", "0", False),
        ("clean", True, True),
        ("client_id", "none", "none"),
        ("client_id", "", ""),
        ("client_id", None, None),
        ("expiry", "none", None),
        ("expiry", "Null", None),
        ("expiry", "7", 7),
        ("level", "2", 2),
        ("mode", "fast", Mode.FAST),
        ("mode", Mode.FAST, Mode.FAST),
        ("kind", "b", "b"),
        ("patience", "true", True),
        ("patience", "no", False),
        ("patience", False, False),
        ("patience", "1", 1.0),
        ("patience", 1, 1.0),
        ("patience", "2.5", 2.5),
        ("number_or_word", "auto", "auto"),
        ("number_or_word", "3", 3),
        ("names", "a, b", ("a", "b")),
        ("names", "", ()),
        ("names", ["a", "b"], ("a", "b")),
        ("names", '["a,b", "c"]', ("a,b", "c")),
        ("names", ("a",), ("a",)),
        ("pair", "3,y", (3, "y")),
        ("ring", {"chat/#": "k"}, {"chat/#": Secret("k")}),
        ("ring", '{"chat/#" = "k"}', {"chat/#": Secret("k")}),
        ("headers", {"a": "b"}, {"a": "b"}),
        ("password", "pw", Secret("pw")),
        ("password", Secret("pw"), Secret("pw")),
        ("password", "none", Secret("none")),
        ("password", None, None),
        ("auth", {"user": "tom", "password": "pw"}, Auth("tom", Secret("pw"))),
        ("auth", '{user = "tom"}', Auth("tom")),
        ("auth", Auth("tom"), Auth("tom")),
        ("ca_file", "/etc/ca.pem", Path("/etc/ca.pem")),
        ("ca_file", Path("x"), Path("x")),
        ("data", "é", "é".encode()),
        ("data", b"\0", b"\0"),
        ("anything", "1", "1"),
    ],
)
def test_texts_and_native_values(key: str, value: Any, expected: Any) -> None:
    found = getattr(made(**{key: value}), key)
    assert found == expected
    assert type(found) is type(expected)


def test_what_is_not_given_keeps_its_default() -> None:
    assert made() == Options()


def test_a_thing_that_only_code_can_give() -> None:
    context = ssl.create_default_context()
    assert made(context=context).context is context
    with pytest.raises(BadOption, match=r"ssl.SSLContext, which only code can give"):
        made(context="x")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("keepalive", "soon", "expected a whole number, got 'soon'"),
        ("keepalive", 1.5, "expected a whole number, got 1.5"),
        ("keepalive", True, "expected a whole number, got True"),
        ("keepalive", None, "expected a whole number, got None"),
        ("keepalive", [1], "expected a whole number, got a list"),
        ("ratio", "nan", "expected a number, got 'nan'"),
        ("ratio", float("inf"), "expected a number, got inf"),
        ("clean", "maybe", "expected true or false, got 'maybe'"),
        ("client_id", 5, "expected text, got 5"),
        ("level", 3, "expected a whole number from 0 to 2, got 3"),
        ("mode", "fsat", "expected one of fast, safe, got 'fsat'; did you mean 'fast'?"),
        ("kind", "A", "expected one of a, b, got 'A'; did you mean 'a'?"),
        ("patience", "soon", "expected true or false or a number, got 'soon'"),
        ("number_or_word", "atuo", "expected a whole number or 'auto', got 'atuo'"),
        ("names", 5, "expected a list, each item text, got 5"),
        ("pair", [1], "expected a list of 2: a whole number, text, got a list"),
        ("headers", "x", "expected a table, each value text, got a text that is not shown"),
        ("auth", "tom", "expected a table with user, password, got a text that is not shown"),
        ("keepalive", "x" * 100, "got '" + "x" * 60 + "…'"),
    ],
)
def test_a_bad_value_names_place_and_what_is_expected(key: str, value: Any, expected: str) -> None:
    with pytest.raises(BadOption) as caught:
        made(**{key: value})
    assert str(caught.value).startswith(f"bus.main.{key}: ")
    assert expected in str(caught.value)
    assert caught.value.option == f"bus.main.{key}"
    assert caught.value.backend == "acme"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"names": ["a", 5]}, "bus.main.names[1]"),
        ({"auth": {"user": 5}}, "bus.main.auth.user"),
        ({"auth": {"user": "tom", "pasword": CANARY}}, "bus.main.auth.pasword"),
        ({"auth": {}}, "bus.main.auth.user"),
        ({"ring": {"chat/#": 5}}, 'bus.main.ring."chat/#"'),
    ],
)
def test_places_reach_into_tables(values: dict[str, Any], place: str) -> None:
    with pytest.raises(BadOption) as caught:
        made(**values)
    assert caught.value.option == place
    assert CANARY not in told(caught.value)


def test_an_unknown_key_gets_a_suggestion_and_the_legal_keys() -> None:
    with pytest.raises(BadOption) as caught:
        made(keepaliv=CANARY)
    text = str(caught.value)
    assert "bus.main.keepaliv is not an option of acme" in text
    assert "did you mean 'keepalive'?" in text
    assert "legal here: keepalive, ratio, clean" in text
    assert CANARY not in told(caught.value)


def test_places_replace_the_prefix() -> None:
    with pytest.raises(BadOption, match=r"^\?keepalive=: expected"):
        build(Options, {"keepalive": "x"}, where="bus.main", places={"keepalive": "?keepalive="})


@pytest.mark.parametrize(
    "values",
    [
        {"password": [CANARY]},
        {"password": {"env": CANARY}},
        {"ring": CANARY},
        {"ring": {"a": [CANARY]}},
        {"auth": CANARY},
        {"auth": {"user": [CANARY], "password": CANARY}},
        {"headers": {"authorization": [CANARY]}},
        {"headers": CANARY},
        {"keepalive": Secret(CANARY)},
        {"mode": Secret(CANARY)},
        {"patience": Secret(CANARY)},
        {"keepalive": f"mqtt://tom:{CANARY}@h"},
    ],
)
def test_errors_show_no_secret(values: dict[str, Any]) -> None:
    with pytest.raises(BadOption) as caught:
        made(**values)
    assert CANARY not in told(caught.value)


def test_the_options_themselves_show_no_secret() -> None:
    options = made(password=CANARY, ring={"a": CANARY}, auth={"user": "t", "password": CANARY})
    assert CANARY not in repr(options)
    assert CANARY not in str(options)


def test_references_are_resolved_where_text_is_wanted() -> None:
    asked: list[tuple[dict[str, Any], str]] = []

    def resolve(value: Mapping[str, Any], place: str) -> Secret:
        asked.append((dict(value), place))
        return Secret("42")

    options = build(
        Options,
        {
            "password": {"env": "A"},
            "client_id": {"env": "B"},
            "ring": {"x": {"file": "c"}},
            "auth": {"user": {"env": "D"}},
        },
        where="bus.main",
        resolve=resolve,
    )
    assert options.password == Secret("42")
    assert options.client_id == "42"
    assert options.ring == {"x": Secret("42")}
    assert options.auth == Auth("42")
    assert asked == [
        ({"env": "A"}, "bus.main.password"),
        ({"env": "B"}, "bus.main.client_id"),
        ({"file": "c"}, "bus.main.ring.x"),
        ({"env": "D"}, "bus.main.auth.user"),
    ]


@dataclass(frozen=True)
class Checked:
    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")
        if self.low < 0:
            raise BadOption("low=-1 does not fit", option="low", hint="use 0 or more")


def test_a_check_of_the_class_itself_is_placed() -> None:
    with pytest.raises(BadOption, match=r"^bus\.main: low is above high$"):
        build(Checked, {"low": 3}, where="bus.main")
    with pytest.raises(BadOption) as caught:
        build(Checked, {"low": -1}, where="bus.main")
    assert str(caught.value) == "bus.main.low: low=-1 does not fit; use 0 or more"
    assert caught.value.option == "bus.main.low"


@dataclass(frozen=True)
class Talkative:
    token: Secret = field(default_factory=lambda: Secret(""))

    def __post_init__(self) -> None:
        raise ValueError(f"bad token {self.token.reveal()}")


def test_a_class_that_tells_its_secret_is_redacted() -> None:
    with pytest.raises(BadOption, match=r"bad token \*\*\*") as caught:
        build(Talkative, {"token": CANARY}, where="bus.main")
    assert CANARY not in told(caught.value)


# --- splitting --------------------------------------------------------------------------


def test_values_are_split_between_bus_and_backend() -> None:
    bus, own = split({"qos": "0", "keepalive": 5}, Options)
    assert bus == {"qos": "0"}
    assert own == {"keepalive": 5}


def test_a_key_of_neither_is_refused_with_both_lists() -> None:
    with pytest.raises(BadOption) as caught:
        split({"ofline": CANARY}, Options, backend="acme", where="bus.main")
    text = str(caught.value)
    assert "bus.main.ofline is not an option of acme; did you mean 'offline'?" in text
    assert "keepalive" in text
    assert "buffer_bytes" in text
    assert CANARY not in told(caught.value)


@dataclass(frozen=True)
class Clashing:
    qos: int = 0
    url: str = ""
    fine: int = 0


def test_options_that_every_bus_has_clash() -> None:
    assert set(BUS_OPTIONS) == {"url", *field_types(BusOptions)}
    assert clashes(Options) == ()
    assert clashes(Clashing) == ("qos", "url")
    with pytest.raises(ValueError, match="Clashing repeats options of every bus: qos, url"):
        split({}, Clashing)


def test_bus_options_from_a_file() -> None:
    options = build(
        BusOptions,
        {
            "wait": 10,
            "codecs": [{"match": "cam/#", "codec": "bytes"}],
            "require": ["history", "presence"],
            "overflow": "latest",
        },
    )
    assert options == BusOptions(
        wait=10.0,
        codecs=(CodecRule("cam/#", "bytes"),),
        require=(Cap.HISTORY, Cap.PRESENCE),
        overflow="latest",
    )


@pytest.mark.parametrize(
    "values",
    [{"qos": 3}, {"qos": -1}, {"timeout": 0}, {"wait": -1}, {"buffer": 0}, {"overflow": "x"}],
)
def test_bus_options_have_bounds(values: dict[str, Any]) -> None:
    with pytest.raises(BadOption, match="expected"):
        build(BusOptions, values)
