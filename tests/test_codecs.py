"""Payload codecs: what travels, what comes back, and what is refused."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import math
import re
import subprocess
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import msgspec
import pydantic
import pydantic.dataclasses
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.codecs import BUILTIN_CODECS, Codec, CodecRule, CodecSet, Decoder
from pubsub_core.errors import BadOption, ConfigError, DecodeFailed, EncodeFailed, InvalidFilter


@dataclasses.dataclass
class Reading:
    celsius: float
    unit: str = "C"


class Point(msgspec.Struct):
    x: int
    y: int


class Lamp(TypedDict):
    on: bool


class Pair(NamedTuple):
    first: int
    second: str


class Color(enum.Enum):
    RED = "red"


class Oven(pydantic.BaseModel):
    name: str
    since: dt.datetime
    limit: int = pydantic.Field(default=5, alias="theLimit", gt=0)


class StrictOven(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    since: dt.datetime


class OtherOven(pydantic.BaseModel):
    volts: int


@pydantic.dataclasses.dataclass
class Checked:
    count: int = pydantic.Field(gt=0)


class Box(msgspec.Struct):
    oven: Oven


@dataclasses.dataclass
class HoldsChecked:
    checked: Checked


class Alien:
    """No codec knows it."""


@dataclasses.dataclass
class Node:
    children: list[Node] = dataclasses.field(default_factory=list)


SINCE = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)


def decode(data: bytes, type: Any, *, codecs: CodecSet | None = None, **options: Any) -> Any:
    decoder = (codecs or CodecSet()).decoder(type, filter="t/#", **options)
    return data if decoder is None else decoder("t/x", data, None)


def refuse(data: bytes, type: Any, **options: Any) -> DecodeFailed:
    with pytest.raises(DecodeFailed) as caught:
        decode(data, type, **options)
    return caught.value


# --- what travels -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [b"123", bytearray(b"123"), memoryview(b"123")])
@pytest.mark.parametrize("codec", [None, "json", "msgpack", "text", "bytes"])
def test_bytes_travel_as_they_are_whatever_the_codec(value: Any, codec: str | None) -> None:
    assert CodecSet().encode(value, topic="t", codec=codec) == (b"123", None)


def test_text_travels_as_utf8_and_says_so() -> None:
    assert CodecSet().encode("café", topic="t") == (b"caf\xc3\xa9", "text/plain; charset=utf-8")


def test_other_values_travel_in_the_default_codec() -> None:
    assert CodecSet().encode({"a": [1, None]}, topic="t") == (
        b'{"a":[1,null]}',
        "application/json",
    )
    assert CodecSet("msgpack").encode({"a": 1}, topic="t") == (
        b"\x81\xa1a\x01",
        "application/msgpack",
    )


def test_a_named_codec_applies_to_text_as_well() -> None:
    assert CodecSet().encode("hi", topic="t", codec="json") == (b'"hi"', "application/json")


def test_the_first_matching_rule_chooses_the_codec() -> None:
    codecs = CodecSet(rules=[CodecRule("raw/#", "text"), CodecRule("+/m", "msgpack")])
    assert codecs.encode("x", topic="raw/m")[0] == b"x"
    assert codecs.encode("x", topic="a/m")[0] == b"\xa1x"
    assert codecs.encode("x", topic="a/b")[0] == b"x"
    assert codecs.encode([1], topic="a/b")[0] == b"[1]"
    with pytest.raises(EncodeFailed, match="takes str only"):
        codecs.encode(5, topic="raw/m")


def test_a_call_overrides_a_rule() -> None:
    codecs = CodecSet(rules=[CodecRule("#", "msgpack")])
    assert codecs.encode("x", topic="a", codec="json")[0] == b'"x"'


@pytest.mark.parametrize(
    ("value", "golden"),
    [
        (Reading(81.5), b'{"celsius":81.5,"unit":"C"}'),
        (Point(1, 2), b'{"x":1,"y":2}'),
        (Lamp(on=True), b'{"on":true}'),
        (Pair(1, "b"), b'[1,"b"]'),
        (Color.RED, b'"red"'),
        (None, b"null"),
        (SINCE, b'"2026-01-02T03:04:05Z"'),
        (
            Oven(name="o", since=SINCE, theLimit=3),
            b'{"name":"o","since":"2026-01-02T03:04:05Z","theLimit":3}',
        ),
        ([OtherOven(volts=1)], b'[{"volts":1}]'),
        (Checked(count=2), b'{"count":2}'),
    ],
)
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_typed_values_survive_a_round_trip(value: Any, golden: bytes, codec: str) -> None:
    codecs = CodecSet(codec)
    data, _ = codecs.encode(value, topic="t")
    if codec == "json":
        assert data == golden
    asked = list[OtherOven] if isinstance(value, list) else type(value)
    assert decode(data, asked, codecs=codecs) == value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=json_values, codec=st.sampled_from(["json", "msgpack"]))
def test_any_plain_value_survives_a_round_trip(value: Any, codec: str) -> None:
    data, _ = CodecSet().encode(value, topic="t", codec=codec)
    assert decode(data, Any, codec=codec) == value


@given(value=json_values)
def test_json_is_what_the_standard_library_reads(value: Any) -> None:
    data, _ = CodecSet().encode(value, topic="t", codec="json")
    assert json.loads(data) == value


# --- nothing is guessed -----------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"123", b'{"a":1}', b"", b"\x00\xff", b"true"])
def test_an_untyped_subscription_has_nothing_to_decode(payload: bytes) -> None:
    assert CodecSet().decoder(bytes, filter="#") is None
    assert CodecSet(rules=[CodecRule("#", "json")]).decoder(bytes, filter="#") is None
    assert decode(payload, bytes) is payload


def test_text_is_not_read_as_json() -> None:
    assert decode(b'"123"', str) == '"123"'
    assert decode(b'"123"', str, codec="json") == "123"


def test_a_number_in_quotes_is_no_number() -> None:
    assert decode(b"123", int) == 123
    assert "Expected `int`, got `str`" in str(refuse(b'"123"', int))


def test_the_declared_content_type_does_not_choose_the_codec() -> None:
    decoder: Decoder[Point] | None = CodecSet().decoder(Point, filter="t")
    assert decoder is not None
    assert decoder("t", b'{"x":1,"y":2}', "application/msgpack") == Point(1, 2)
    with pytest.raises(DecodeFailed) as caught:
        decoder("t", b"\x82\xa1x\x01\xa1y\x02", "application/msgpack")
    assert caught.value.content_type == "application/msgpack"


def test_raw_types_are_copied_not_decoded() -> None:
    assert decode(b"aGk=", bytearray) == bytearray(b"aGk=")
    assert decode(b"aGk=", memoryview) == memoryview(b"aGk=")


@pytest.mark.parametrize("type", [Any, object])
def test_any_gives_plain_values(type: Any) -> None:
    assert decode(b'{"a":[1]}', type) == {"a": [1]}


# --- failures ---------------------------------------------------------------------------

CANARY = "k3y-51c8e0"


@pytest.mark.parametrize(
    ("payload", "type", "says"),
    [
        (f'{{"celsius":"{CANARY}"}}', Reading, "Expected `float`, got `str` - at `$.celsius`"),
        (f'{{"unit":"{CANARY}"}}', Reading, "missing required field `celsius`"),
        (f'"{CANARY}"', Literal["a"], "a value is not allowed"),
        (f'"{CANARY}"', Color, "a value is not allowed"),
        (f'"{CANARY}"', dt.datetime, "a value is not allowed"),
        (f'{{"{CANARY}":"x"}}', dict[str, int], "Expected `int`, got `str` - at `$[...]`"),
        (f'{{"{CANARY}"', Reading, "truncated"),
        (f'{{"{CANARY}" 1}}', Reading, "JSON is malformed"),
        (f'{{"name":"{CANARY}"}}', Oven, "the first of 1 validation errors is 'missing'"),
        (
            f'{{"name":"n","since":"2026-01-02T03:04:05Z","theLimit":"{CANARY}"}}',
            Oven,
            "validation errors is 'int_parsing'",
        ),
        (f'{{"oven":{{"name":"{CANARY}"}}}}', Box, "not allowed"),
        (f'{{"count":0,"x":"{CANARY}"}}', Checked, "'greater_than'"),
        ("[" * 100_000 + CANARY, Any, "nested too deeply"),
    ],
)
def test_a_decode_failure_keeps_the_bytes_and_prints_none_of_them(
    payload: str, type: Any, says: str
) -> None:
    failure = refuse(payload.encode(), type)
    assert failure.raw == payload.encode()
    assert failure.topic == "t/x"
    text = str(failure)
    assert "'t/x'" in text
    if says != "nested too deeply":
        assert says in text
    printed = "".join(traceback.format_exception(failure))
    assert CANARY not in text
    assert CANARY not in printed


def test_invalid_utf8_is_named_by_its_place() -> None:
    failure = refuse(b"ab\xff", str)
    assert "no valid UTF-8 at byte 2" in str(failure)
    assert failure.raw == b"ab\xff"


def test_a_failure_names_type_and_codec() -> None:
    assert "is no Reading for codec 'json'" in str(refuse(b"[]", Reading))
    assert "is no list[test_codecs.Point]" in str(refuse(b"{}", list[Point])).replace("tests.", "")


@given(data=st.binary(max_size=64), codec=st.sampled_from(["json", "msgpack", "text"]))
def test_any_bytes_decode_or_fail_with_the_typed_error(data: bytes, codec: str) -> None:
    kept = data
    try:
        decode(data, str if codec == "text" else Any, codec=codec)
    except DecodeFailed as failure:
        kept = failure.raw
    assert kept == data


def _cyclic() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    ("value", "codec", "says"),
    [
        (Alien(), None, "no encoder for Alien"),
        ("\ud800", None, "lone surrogate"),
        (2**70, "msgpack", "can't serialize ints"),
        (_cyclic(), None, "holding itself"),
        (5, "text", "takes str only"),
        ("five", "bytes", "takes bytes"),
    ],
)
def test_a_value_that_cannot_be_encoded_is_a_typed_error(
    value: Any, codec: str | None, says: str
) -> None:
    with pytest.raises(EncodeFailed, match=says) as caught:
        CodecSet().encode(value, topic="lab/x", codec=codec)
    assert caught.value.topic == "lab/x"
    assert type(value).__name__ in str(caught.value)


@pytest.mark.parametrize(
    "type",
    [
        Alien,
        list[Alien],
        complex,
        "int",
        5,
        typing.Union[Reading, Node],  # noqa: UP007 - two dataclasses cannot be told apart
        HoldsChecked,
        Callable,
    ],
)
@pytest.mark.parametrize("codec", ["json", "msgpack"])
def test_an_unsupported_type_is_refused_when_subscribing(type: Any, codec: str) -> None:
    with pytest.raises(BadOption, match="cannot decode to") as caught:
        CodecSet(codec).decoder(type, filter="lab/#")
    assert "'lab/#'" in str(caught.value)
    assert caught.value.option == "type"


def test_text_and_bytes_give_nothing_else() -> None:
    with pytest.raises(BadOption, match="it gives str"):
        CodecSet().decoder(int, filter="a", codec="text")
    with pytest.raises(BadOption, match="it gives bytes"):
        CodecSet().decoder(str, filter="a", codec="bytes")


def test_a_type_that_holds_itself_is_fine() -> None:
    assert decode(b'{"children":[{"children":[]}]}', Node) == Node([Node([])])


def test_an_unknown_codec_comes_with_a_suggestion() -> None:
    attempts: list[Callable[[], object]] = [
        lambda: CodecSet("jsn"),
        lambda: CodecSet(rules=[CodecRule("a", "jsn")]),
        lambda: CodecSet().encode(1, topic="a", codec="jsn"),
        lambda: CodecSet().decoder(int, filter="a", codec="jsn"),
    ]
    for attempt in attempts:
        with pytest.raises(ConfigError, match="no codec 'jsn'; did you mean 'json'"):
            attempt()


def test_a_rule_with_a_bad_filter_is_refused() -> None:
    with pytest.raises(BadOption, match="'a/#/b' is not a topic filter") as caught:
        CodecSet(rules=[CodecRule("a/#/b", "json")])
    assert caught.value.option == "codecs"
    assert isinstance(caught.value.__cause__, InvalidFilter)
    with pytest.raises(BadOption, match="no codec 'jsn'") as caught:
        CodecSet(rules=[CodecRule("a", "jsn")])
    assert caught.value.option == "codecs"


# --- rules on receiving -----------------------------------------------------------------


def test_rules_apply_topic_by_topic() -> None:
    codecs = CodecSet(rules=[CodecRule("t/m", "msgpack")])
    decoder: Decoder[int] | None = codecs.decoder(int, filter="t/+")
    assert decoder is not None
    assert decoder("t/m", b"\xcd\x01\x00", None) == 256
    assert decoder("t/j", b"256", None) == 256
    with pytest.raises(DecodeFailed):
        decoder("t/m", b"\xa3256", None)


def test_a_rule_for_other_topics_does_not_limit_the_type() -> None:
    codecs = CodecSet(rules=[CodecRule("names/#", "text")])
    assert codecs.decoder(int, filter="numbers/+") is not None
    with pytest.raises(BadOption, match="it gives str"):
        codecs.decoder(int, filter="+/{which}")


def test_a_rule_applies_to_text_on_receiving() -> None:
    codecs = CodecSet(rules=[CodecRule("#", "json")])
    assert decode(b'"x"', str, codecs=codecs) == "x"


def test_the_memory_of_rules_is_bounded() -> None:
    codecs = CodecSet(rules=[CodecRule("a/#", "msgpack")])
    for number in range(10_000):
        assert codecs.encode(1, topic=f"a/{number}")[0] == b"\x01"
        assert codecs.encode(1, topic=f"b/{number}")[0] == b"1"
    assert len(codecs._ruled) <= 4096


# --- codecs of plugins ------------------------------------------------------------------


class Reversed:
    name = "reversed"
    content_type = "text/x-reversed"

    def encode(self, value: Any) -> bytes:
        return str(value).encode()[::-1]

    def decode(self, data: bytes, type: Any) -> Any:
        if data == b"!":
            raise LookupError(CANARY)
        return type(data[::-1].decode())


def test_a_plugins_codec_is_used_by_name_by_rule_and_as_an_object() -> None:
    codecs = CodecSet(extra=[Reversed()], rules=[CodecRule("r/#", "reversed")])
    for options in ({"topic": "r/x"}, {"topic": "x", "codec": "reversed"}):
        assert codecs.encode(12, **options) == (b"21", "text/x-reversed")
    assert CodecSet().encode(12, topic="x", codec=Reversed()) == (b"21", "text/x-reversed")
    assert decode(b"21", int, codecs=codecs, codec="reversed") == 12
    assert "reversed" in codecs.names
    failure = refuse(b"!", int, codec=Reversed())
    assert "LookupError" in str(failure)
    assert CANARY not in str(failure)


def test_a_codec_without_the_methods_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks encode, decode"):
        CodecSet(extra=[typing.cast("Codec", Alien())])


class FalseJson(Reversed):
    name = "json"


def test_a_codec_whose_name_is_taken_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    codecs = CodecSet(extra=[FalseJson()])
    assert codecs.encode([1], topic="a") == (b"[1]", "application/json")
    assert "a second codec called 'json' is ignored" in caplog.text


@pytest.mark.parametrize("codec", BUILTIN_CODECS, ids=lambda codec: codec.name)
def test_built_in_codecs_work_on_their_own(codec: Codec) -> None:
    value: Any = b"x" if codec.name == "bytes" else "x"
    assert codec.decode(codec.encode(value), type(value)) == value


# --- pydantic ---------------------------------------------------------------------------


def test_a_models_own_strictness_holds() -> None:
    data = b'{"since":"2026-01-02T03:04:05Z"}'
    assert decode(data, StrictOven) == StrictOven(since=SINCE)
    refuse(b'{"since":0}', StrictOven)


def test_models_decode_inside_other_types() -> None:
    oven = b'{"name":"o","since":"2026-01-02T03:04:05Z"}'
    expected = Oven(name="o", since=SINCE)
    assert decode(b'{"oven":' + oven + b"}", Box) == Box(expected)
    assert decode(b"[" + oven + b"]", list[Oven]) == [expected]
    assert decode(oven, Oven | OtherOven) == expected
    assert decode(b'{"volts":1}', Oven | OtherOven) == OtherOven(volts=1)


def test_pydantic_is_imported_for_its_own_models_only() -> None:
    program = (
        "import sys, dataclasses\n"
        "from pubsub_core.codecs import CodecSet\n"
        "@dataclasses.dataclass\n"
        "class R:\n"
        "    a: int\n"
        "codecs = CodecSet()\n"
        "decode = codecs.decoder(R, filter='a')\n"
        "assert decode('a', codecs.encode(R(1), topic='a')[0], None).a == 1\n"
        "assert 'pydantic' not in sys.modules\n"
        "assert 'paho' not in sys.modules and 'amqtt' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_the_examples_of_the_documentation_run() -> None:
    text = (Path(__file__).parent.parent / "docs" / "payloads.md").read_text("utf-8")
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        code = compile(example, "docs/payloads.md", "exec", dont_inherit=True)
        exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_json_has_no_word_for_a_number_that_is_none(number: float) -> None:
    codecs = CodecSet("json", [])
    for value in (number, [1.0, {"a": (number,)}], {"a": None, "b": [number]}):
        with pytest.raises(EncodeFailed, match="no NaN and no Infinity") as caught:
            codecs.encode(value, topic="a")
        assert "msgpack" in str(caught.value)
    data, _ = codecs.encode({"null": "null", "a": None}, topic="a")
    assert data == b'{"null":"null","a":null}'
    data, _ = codecs.encode(number, topic="a", codec="msgpack")
    assert data


def test_something_that_is_no_codec_is_refused() -> None:
    codecs = CodecSet("json", [])
    for wrong in (object(), b"json", ["json"]):
        with pytest.raises(TypeError, match="pass a codec or its name"):
            codecs.encode(1, topic="a", codec=wrong)  # type: ignore[arg-type]  # on purpose
