"""Topics and filters: the public vectors, captures, overlap, limits, and hostile input."""

from __future__ import annotations

import doctest
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pubsub_core import topics
from pubsub_core.capabilities import Limits
from pubsub_core.errors import InvalidFilter, InvalidTopic
from pubsub_core.keyed import BoundedCache
from pubsub_core.topics import (
    MAX_TOPIC_BYTES,
    check_limits,
    overlap,
    parse_filter,
    split_shared,
    validate_filter,
    validate_topic,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "mqtt_topics_vectors.json").read_text(encoding="utf-8")
)


def value_of(case: dict[str, Any]) -> str:
    if "repeat" in case:
        repeat = case["repeat"]
        return str(repeat["unit"] * repeat["count"] + repeat["suffix"])
    return str(case.get("value", ""))


def ids(case: dict[str, Any]) -> str:
    return ascii(value_of(case)[:30]) if "kind" in case else f"{case['filter']}~{case['topic']}"


# --- vectors -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", VECTORS["validity"], ids=ids)
def test_validity_vectors(case: dict[str, Any]) -> None:
    validate = validate_topic if case["kind"] == "topic" else validate_filter
    error = InvalidTopic if case["kind"] == "topic" else InvalidFilter
    text = value_of(case)
    if case["valid"]:
        validate(text)
        validate(text)  # and again, when it is known
        return
    for _ in range(2):
        with pytest.raises(error) as caught:
            validate(text)
        assert caught.value.reason == case["reason"]
        assert caught.value.topic == text


@pytest.mark.parametrize("case", VECTORS["match"], ids=ids)
def test_match_vectors(case: dict[str, Any]) -> None:
    _, plain = split_shared(case["filter"])
    assert parse_filter(plain).matches(case["topic"]) is case["match"]


@pytest.mark.parametrize("case", VECTORS["match"], ids=ids)
def test_an_exact_filter_overlaps_what_matches_it(case: dict[str, Any]) -> None:
    group, plain = split_shared(case["filter"])
    if case["topic"].startswith("$share/"):
        assert group is None  # as a filter this topic would be a shared one
        return
    assert overlap(plain, case["topic"]) is case["match"]
    assert overlap(case["topic"], plain) is case["match"]


@pytest.mark.parametrize(
    "case", [case for case in VECTORS["validity"] if case["kind"] == "filter"], ids=ids
)
def test_parse_filter_agrees_with_the_vectors(case: dict[str, Any]) -> None:
    text = value_of(case)
    if case["valid"] and not text.startswith("$share/"):
        assert parse_filter(text).filter == text
        return
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(text)
    # A share group is refused as such before its filter is looked at.
    assert caught.value.reason in (case["reason"], "share_in_filter")
    assert (caught.value.reason == "share_in_filter") <= text.startswith("$share/")


@pytest.mark.parametrize("case", VECTORS["discouraged"]["items"], ids=ids)
def test_discouraged_characters_are_legal(case: dict[str, Any]) -> None:
    validate_topic(value_of(case))


# --- errors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "level", "character", "reason"),
    [
        ("a/b+/c", 1, "+", "wildcard_in_topic"),
        ("a/b/#", 2, "#", "wildcard_in_topic"),
        ("a#/b/+", 0, "#", "wildcard_in_topic"),
        ("a/b\0", 1, "\0", "nul"),
        ("a/é/\udc80", 2, "\udc80", "not_utf8"),
        ("", None, "", "empty"),
        ("x" * 65536, None, "", "too_long"),
    ],
)
def test_topic_errors_name_level_and_character(
    text: str, level: int | None, character: str, reason: str
) -> None:
    with pytest.raises(InvalidTopic) as caught:
        validate_topic(text)
    error = caught.value
    assert (error.level, error.character, error.reason) == (level, character, reason)
    assert error.hint
    assert error.hint in str(error)
    assert not isinstance(error, InvalidFilter)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("text", "level", "character", "reason"),
    [
        ("a/#/c", 1, "#", "hash_not_last"),
        ("a/b#", 1, "#", "hash_not_alone"),
        ("a/b/c+", 2, "+", "plus_not_alone"),
        ("$share/g/a/b+", 3, "+", "plus_not_alone"),
        ("$share/g/#/b", 2, "#", "hash_not_last"),
        ("$share/g+/b", 1, "+", "share_wildcard_in_name"),
        ("$share//b", 1, "", "share_empty_name"),
        ("$share/g", 2, "", "share_missing_filter"),
        ("a/\0/b", 1, "\0", "nul"),
    ],
)
def test_filter_errors_name_level_and_character(
    text: str, level: int, character: str, reason: str
) -> None:
    with pytest.raises(InvalidFilter) as caught:
        validate_filter(text)
    error = caught.value
    assert (error.level, error.character, error.reason) == (level, character, reason)
    assert f"level {level}" in str(error)


def test_error_text_is_escaped_and_cut() -> None:
    with pytest.raises(InvalidTopic) as caught:
        validate_topic("evil\r\nINFO forged line\x1b[31m/" + "x" * 5000 + "/+")
    assert len(str(caught.value)) < 400
    assert not any(ord(character) < 32 for character in str(caught.value))


@pytest.mark.parametrize("value", [b"a/b", None, 7, ["a"], bytearray(b"a")])
def test_anything_but_text_is_a_type_error(value: Any) -> None:
    for function in (validate_topic, validate_filter, parse_filter):
        with pytest.raises(TypeError, match=f"not {type(value).__name__}"):
            function(value)


# --- captures ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain", "topic", "params"),
    [
        ("lab/{device}/temp", "lab/+/temp", "lab/oven/temp", {"device": "oven"}),
        ("{a}/{b}", "+/+", "x/y", {"a": "x", "b": "y"}),
        ("{a}/{b}", "+/+", "/", {"a": "", "b": ""}),
        ("lab/{rest:path}", "lab/#", "lab/a//b", {"rest": "a//b"}),
        ("lab/{rest:path}", "lab/#", "lab", {"rest": ""}),
        ("lab/{rest:path}", "lab/#", "lab/", {"rest": ""}),
        ("{all:path}", "#", "a/b", {"all": "a/b"}),
        ("{site}/+/{rest:path}", "+/+/#", "s/x/y/z", {"site": "s", "rest": "y/z"}),
        ("{größe}/温度", "+/温度", "2m/温度", {"größe": "2m"}),
        ("lab/+/temp", "lab/+/temp", "lab/oven/temp", {}),
        ("lab/oven", "lab/oven", "lab/oven", {}),
    ],
)
def test_captures(text: str, plain: str, topic: str, params: dict[str, str]) -> None:
    parsed = parse_filter(text)
    assert (parsed.text, parsed.filter, str(parsed)) == (text, plain, text)
    assert parsed.captures == tuple(params)
    assert parsed.matches(topic)
    assert parsed.params(topic) == params


@pytest.mark.parametrize(
    ("text", "level", "reason"),
    [
        ("lab/x{a}", 1, "capture_not_alone"),
        ("lab/{a}x/b", 1, "capture_not_alone"),
        ("lab/{a}{b}", 1, "capture_not_alone"),
        ("lab/{", 1, "capture_not_alone"),
        ("}/lab", 0, "capture_not_alone"),
        ("{{a}}", 0, "capture_not_alone"),
        ("lab/{}", 1, "capture_name"),
        ("lab/{:path}", 1, "capture_name"),
        ("lab/{a b}", 1, "capture_name"),
        ("lab/{1st}", 1, "capture_name"),
        ("lab/{class}", 1, "capture_name"),
        ("lab/{a:int}", 1, "capture_name"),
        ("lab/{a:}", 1, "capture_name"),
        ("{a}/x/{a}", 2, "capture_repeated"),
        ("{a}/{a:path}", 1, "capture_repeated"),
        ("lab/{a:path}/b", 1, "path_not_last"),
        ("lab/{a}/#/b", 2, "hash_not_last"),
        ("$share/g/{a}", 0, "share_in_filter"),
    ],
)
def test_bad_captures(text: str, level: int, reason: str) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(text)
    assert (caught.value.level, caught.value.reason) == (level, reason)
    assert caught.value.hint


def test_captures_are_hidden_from_dollar_topics_like_wildcards() -> None:
    assert not parse_filter("{a}/x").matches("$SYS/x")
    assert not parse_filter("{all:path}").matches("$SYS/x")
    assert parse_filter("$SYS/{a}").matches("$SYS/x")


def test_braces_are_ordinary_outside_the_filters_of_this_library() -> None:
    validate_topic("a/{b}/c{")
    validate_filter("a/{b}/c{")
    assert parse_filter("a/+/{c}").params("a/x/{y}") == {"c": "{y}"}


def test_params_of_a_topic_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not match"):
        parse_filter("a/b/{c}").params("a/b")


def test_exact_filters_know_it() -> None:
    assert parse_filter("a/b").is_exact
    assert not any(parse_filter(text).is_exact for text in ("a/+", "a/#", "{a}", "{a:path}"))


def test_parsed_filters_are_kept_and_equal_by_text() -> None:
    assert parse_filter("kept/{a}") is parse_filter("kept/{a}")
    assert parse_filter("kept/{a}") != parse_filter("kept/{b}")
    assert len({parse_filter("kept/{a}"), parse_filter("kept/{a}")}) == 1


# --- shared filters ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$share/g/a/b", ("g", "a/b")),
        ("$share/g//t", ("g", "/t")),
        ("$share/g/$share/h/t", ("g", "$share/h/t")),
        ("$share/g/{x}", ("g", "{x}")),
        ("$shared/g/t", (None, "$shared/g/t")),
        ("$SHARE/g/t", (None, "$SHARE/g/t")),
        ("a/$share/g/t", (None, "a/$share/g/t")),
    ],
)
def test_split_shared(text: str, expected: tuple[str | None, str]) -> None:
    assert split_shared(text) == expected


# --- overlap -----------------------------------------------------------------------------

_WORDS: tuple[str, ...] = ("a", "b", "", "$s")


def _naive_match(filter: str, topic: str) -> bool:
    """Return whether they match, by the words of MQTT 3.1.1 section 4.7; small and slow."""
    if topic[:1] == "$" and filter[:1] in ("+", "#"):
        return False

    def rest(wanted: list[str], given: list[str]) -> bool:
        if wanted == ["#"]:
            return True
        if not wanted or not given:
            return not wanted and not given
        return wanted[0] in ("+", given[0]) and rest(wanted[1:], given[1:])

    return rest(filter.split("/"), topic.split("/"))


# Two filters of at most three levels each share a topic of at most four levels made of the
# words below, or none at all: "c" stands for every level that neither filter names.
_ALL_TOPICS = [
    "/".join(levels)
    for count in range(1, 5)
    for levels in itertools.product((*_WORDS, "c"), repeat=count)
    if levels != ("",)
]


@st.composite
def filters(draw: st.DrawFn) -> str:
    levels = draw(st.lists(st.sampled_from((*_WORDS, "+", "+")), min_size=1, max_size=3))
    if draw(st.booleans()):
        levels[-1] = "#"
    return "/".join(levels) or "a"


@settings(max_examples=400, deadline=None)
@example(a="+", b="/#")
@example(a="a/#", b="a")
@example(a="+/#", b="/#")
@given(a=filters(), b=filters())
def test_overlap_agrees_with_trying_every_topic(a: str, b: str) -> None:
    expected = any(_naive_match(a, topic) and _naive_match(b, topic) for topic in _ALL_TOPICS)
    assert overlap(a, b) is expected
    assert overlap(b, a) is expected


@given(filter=filters(), topic=st.sampled_from(_ALL_TOPICS))
def test_matches_agrees_with_a_naive_matcher(filter: str, topic: str) -> None:
    assert parse_filter(filter).matches(topic) is _naive_match(filter, topic)


def test_overlap_understands_captures() -> None:
    assert overlap("lab/{a}/temp", "lab/oven/{b:path}")
    assert not overlap("lab/{a}", "lab")


# --- any text at all ---------------------------------------------------------------------


@given(st.text(alphabet=st.characters(), max_size=30))
def test_any_text_is_valid_or_a_typed_error(text: str) -> None:
    errors: list[InvalidTopic] = []
    for validate in (validate_topic, validate_filter, parse_filter):
        try:
            validate(text)
        except InvalidTopic as error:
            errors.append(error)
    for found in errors:
        assert found.reason
        assert found.character in text
        assert found.level is None or 0 <= found.level <= text.count("/") + 1


@given(st.text(alphabet="ab/+#$\0é", min_size=1, max_size=12))
def test_a_valid_topic_is_a_valid_filter_that_matches_itself(text: str) -> None:
    try:
        validate_topic(text)
    except InvalidTopic:
        return
    assert parse_filter(text).matches(text)


# --- limits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic", "limits", "reason", "level", "character"),
    [
        ("a/b/c", Limits(max_levels=2), "too_many_levels", None, ""),
        ("a/bäh", Limits(max_topic_bytes=5), "too_long", None, ""),
        ("x" * 70, Limits(max_topic_bytes=64), "too_long", None, ""),
        ("a/b c", Limits(forbidden_characters="? "), "forbidden_character", 1, " "),
        ("/a", Limits(allow_empty_levels=False), "empty_level", 0, ""),
        ("a//b", Limits(allow_empty_levels=False), "empty_level", 1, ""),
        ("a/b/", Limits(allow_empty_levels=False), "empty_level", 2, ""),
    ],
)
def test_limits_refuse(
    topic: str, limits: Limits, reason: str, level: int | None, character: str
) -> None:
    with pytest.raises(InvalidTopic) as caught:
        check_limits(topic, limits, "emitter")
    error = caught.value
    assert (error.reason, error.level, error.character) == (reason, level, character)
    assert error.backend == "emitter"
    assert "emitter" in str(error)
    assert not isinstance(error, InvalidFilter)
    with pytest.raises(InvalidFilter):
        check_limits(topic, limits, "emitter", is_filter=True)


@pytest.mark.parametrize(
    ("topic", "limits"),
    [
        ("a//b/", Limits()),
        ("a/b", Limits(max_levels=2)),
        ("a/bä", Limits(max_topic_bytes=5)),
        ("é" * 30000, Limits(max_topic_bytes=None)),
        ("a/b", Limits(allow_empty_levels=False, forbidden_characters="?")),
    ],
)
def test_limits_accept(topic: str, limits: Limits) -> None:
    check_limits(topic, limits, "emitter")


def test_limits_do_not_forbid_the_wildcards_of_a_filter() -> None:
    limits = Limits(forbidden_characters="+#")
    check_limits("a/+/#", limits, "emitter", is_filter=True)
    with pytest.raises(InvalidTopic, match="level 1"):
        check_limits("a/+", limits, "emitter")


# --- size and time -----------------------------------------------------------------------

_LONGEST = (
    "a" * MAX_TOPIC_BYTES,
    "/" * MAX_TOPIC_BYTES,
    "+/" * 32767 + "+",
    "a/" * 32767 + "#",
    "a/" * 32767 + "b",
    "{" * MAX_TOPIC_BYTES,
    "é" * 32767,
)


@pytest.mark.parametrize("text", _LONGEST, ids=lambda text: ascii(text[:6]))
def test_the_longest_inputs_take_linear_time(text: str) -> None:
    start = time.thread_time()  # of this thread alone: a busy machine does not count
    for function in (validate_topic, validate_filter, parse_filter):
        try:
            function(text)
        except InvalidTopic:
            continue
    if not text.startswith("{"):
        overlap(text, text)
        parse_filter(text).matches(text)
    # Some 30 ms in all; a quadratic step would take minutes.
    assert time.thread_time() - start < 5


def test_what_is_kept_is_bounded_in_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = BoundedCache[str, bool](topics._KEPT_TOPICS)
    monkeypatch.setattr(topics, "_valid_topics", kept)
    for number in range(20_000):
        validate_topic(f"invented/{number}")
    assert 0 < len(kept) <= 8192
    before = len(kept)
    validate_topic("x" * 60_000)
    assert len(kept) == before


def test_a_topic_seen_before_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    validate_topic("known/topic")

    def refuse(*_: object) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(topics, "_check_text", refuse)
    validate_topic("known/topic")


def test_docstring_examples() -> None:
    result = doctest.testmod(topics)
    assert result.attempted >= 15
    assert result.failed == 0
