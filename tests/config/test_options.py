"""URLs, conversion to a dataclass of options, and its help and schema."""

from __future__ import annotations

import enum
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from pubsub_core.capabilities import Cap
from pubsub_core.codecs import CodecRule
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.config.options import (
    build,
    describe_type,
    field_help,
    field_types,
    json_schema,
    parse_url,
    split,
)
from pubsub_core.errors import BadOption
from pubsub_core.plugins import BUS_OPTIONS, clashes
from pubsub_core.secrets import Secret
from tests.test_secrets import CANARY, told

# --- URLs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "path"),
    [
        ("mqtt://broker.example:1883", "mqtt", "broker.example", 1883, ""),
        ("MQTTS://Broker.Example", "mqtts", "Broker.Example", None, ""),
        ("losant://5f0C1aDeviceID", "losant", "5f0C1aDeviceID", None, ""),
        ("mqtt://[::1]:1883", "mqtt", "::1", 1883, ""),
        ("mqtt://[fe80::1%25eth0]", "mqtt", "fe80::1%eth0", None, ""),
        ("ws://h:80/mqtt%20path", "ws", "h", 80, "/mqtt path"),
        ("mqtt+unix:///run/a@b.sock", "mqtt+unix", "", None, "/run/a@b.sock"),
        ("memory://", "memory", "", None, ""),
        ("memory://lab", "memory", "lab", None, ""),
        ("mqtt://h:", "mqtt", "h", None, ""),
        ("mqtt://h/", "mqtt", "h", None, "/"),
    ],
)
def test_where_the_broker_is(url: str, scheme: str, host: str, port: int | None, path: str) -> None:
    address, options = parse_url(url)
    assert (address.scheme, address.host, address.port, address.path) == (scheme, host, port, path)
    assert (address.username, address.password) == (None, None)
    assert options == {}


@pytest.mark.parametrize(
    ("userinfo", "username", "password"),
    [
        ("tom:secret", "tom", "secret"),
        ("tom", "tom", None),
        ("tom:", "tom", ""),
        (":secret", None, "secret"),
        ("t%40m:p%2Fw%3A%25", "t@m", "p/w:%"),
        ("tom:a:b@c", "tom", "a:b@c"),
        ("caf%C3%A9:x", "café", "x"),
    ],
)
def test_credentials(userinfo: str, username: str | None, password: str | None) -> None:
    address, _ = parse_url(f"mqtt://{userinfo}@h:1")
    assert address.host == "h"
    assert address.username == username
    assert address.password == (None if password is None else Secret(password))


@given(user=st.text(min_size=1), password=st.text())
def test_quoted_credentials_come_back_and_stay_hidden(user: str, password: str) -> None:
    safe = not any(ord(c) < 32 or ord(c) == 127 for c in user)
    url = f"mqtt://{quote(user, safe='')}:{quote(password, safe='')}@h"
    if not safe:
        with pytest.raises(BadOption):
            parse_url(url)
        return
    address, _ = parse_url(url)
    assert (address.username, address.password) == (user, Secret(password))
    assert str(address) == "mqtt://h"


def test_query() -> None:
    _, options = parse_url("mqtt://h?keepalive=5&client_id=a%26b&topic=a/+/b&empty=")
    assert options == {"keepalive": "5", "client_id": "a&b", "topic": "a/+/b", "empty": ""}


BAD_URLS = [
    ("localhost", "no URL"),
    ("mqtt:h", "no URL"),
    ("://h", "no URL"),
    ("", "no URL"),
    (f"tom:{CANARY}@h", "no URL"),
    (f"mqtt://tom:{CANARY}@h:port", "@ after the first /"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:port", "port that is no number"),
    (f"mqtt://tom:{CANARY}", "port"),
    (f"mqtt://tom:12/{CANARY}@h", "@ after the first /"),
    (f"mqtt://tom:1?{CANARY}@h", "option 1 of the mqtt:// URL has no value"),
    (f"mqtt://tom:a#{CANARY}@h", "fragment"),
    (f"mqtt://tom:{CANARY}%@h", "%"),
    (f"mqtt://tom:{quote(CANARY, safe='')}%FF@h", "UTF-8"),
    (f"mqtt://tom:{CANARY} x@h", "space"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:0", "port 0"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:65536", "port 65536"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:99999999999999", "port that is no number"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@:1883", "no host"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@[::1", r"\["),
    (f"mqtt://tom:{quote(CANARY, safe='')}@[::1]x", r"\]"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@::1", "more than one :"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?a=1&a=2", "'a' twice"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?=1", "no name"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?a", "no value"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?a=1&", "option 2"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h%00", "control character"),
]


@pytest.mark.parametrize(("url", "problem"), BAD_URLS)
def test_bad_urls_are_refused_without_their_credentials(url: str, problem: str) -> None:
    with pytest.raises(BadOption, match=problem) as caught:
        parse_url(url)
    assert caught.value.hint
    # A formatted traceback shows this file's source line, never the value.
    assert CANARY not in told(caught.value)
    assert quote(CANARY, safe="") not in told(caught.value)


# --- building --------------------------------------------------------------------------


class Mode(enum.StrEnum):
    FAST = "fast"
    SAFE = "safe"


@dataclass(frozen=True)
class Auth:
    user: str
    password: Secret | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    keepalive: int = field(default=60, metadata={"help": "seconds between pings"})
    ratio: float = 0.5
    clean: bool = True
    client_id: str | None = None
    expiry: int | None = None
    level: Annotated[int, Meta(ge=0, le=2)] = 1
    mode: Mode = Mode.SAFE
    kind: Literal["a", "b"] = "a"
    patience: bool | float = True
    number_or_word: int | Literal["auto"] = "auto"
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (1, "x")
    ring: Mapping[str, Secret] = field(default_factory=dict[str, Secret])
    headers: dict[str, str] = field(default_factory=dict[str, str], repr=False)
    password: Secret | None = None
    auth: Auth | None = None
    ca_file: Path | None = None
    data: bytes = b""
    anything: Any = None
    context: ssl.SSLContext | None = None
    hook: Any = field(default=None, metadata={"code_only": True})


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
    assert "bus.main.keepaliv is no option of acme" in text
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


# --- splitting -------------------------------------------------------------------------


def test_values_are_split_between_bus_and_backend() -> None:
    bus, own = split({"qos": "0", "keepalive": 5}, Options)
    assert bus == {"qos": "0"}
    assert own == {"keepalive": 5}


def test_a_key_of_neither_is_refused_with_both_lists() -> None:
    with pytest.raises(BadOption) as caught:
        split({"ofline": CANARY}, Options, backend="acme", where="bus.main")
    text = str(caught.value)
    assert "bus.main.ofline is no option of acme; did you mean 'offline'?" in text
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


# --- help and schema -------------------------------------------------------------------


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
