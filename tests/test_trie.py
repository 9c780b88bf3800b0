"""The handler trie against naive matchers, the public vectors, and hostile input."""

from __future__ import annotations

import doctest
import gc
import itertools
import json
import random
import re
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pubsub_core import trie as trie_module
from pubsub_core.errors import InvalidFilter
from pubsub_core.topics import parse_filter, split_shared
from pubsub_core.trie import HandlerTrie, Rule

DATA = Path(__file__).parent / "data"
RULES: tuple[Rule, ...] = get_args(Rule)


# --- naive matchers: the rules in words, one filter at a time ------------------------------


def _mqtt(text: str, topic: str) -> bool:
    wanted, given = text.split("/"), topic.split("/")
    if wanted[0] in ("+", "#") and given[0].startswith("$"):
        return False
    if wanted[-1] == "#":
        wanted.pop()
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(
        one in ("+", other) for one, other in zip(wanted, given, strict=True)
    )


def _channel(text: str) -> list[str]:
    return text.removesuffix("/").split("/") if text else []


def _emitter(text: str, topic: str) -> bool:
    wanted, given = _channel(text), _channel(topic)
    return len(wanted) <= len(given) and all(
        one in ("+", other) for one, other in zip(wanted, given, strict=False)
    )


def _emitter_mqtt(text: str, topic: str) -> bool:
    wanted, given = _channel(text), _channel(topic)
    if wanted and wanted[-1] == "#":
        wanted.pop()
        if len(given) <= len(wanted):
            return False
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(
        one in ("+", other) for one, other in zip(wanted, given, strict=True)
    )


NAIVE = {
    "mqtt": _mqtt,
    "exact": lambda text, topic: text == topic,
    "emitter": _emitter,
    "emitter-mqtt": _emitter_mqtt,
}


def nodes_of(trie: HandlerTrie[Any]) -> Iterator[Any]:
    """All nodes but the root."""
    stack: list[Any] = [trie._root]
    while stack:
        _, child, children, plus, _, _ = stack.pop()
        assert child is None or children is None
        below = [node for node in (child, plus, *(children or {}).values()) if node is not None]
        yield from below
        stack.extend(below)


def is_empty(node: Any) -> bool:
    return all(slot is None for slot in node[1:])


# --- vectors -----------------------------------------------------------------------------


def test_mqtt_vectors() -> None:
    cases = json.loads((DATA / "mqtt_topics_vectors.json").read_text(encoding="utf-8"))["match"]
    assert len(cases) > 150
    together = HandlerTrie[str]()
    for case in cases:
        text = split_shared(case["filter"])[1]
        alone = HandlerTrie[str]()
        alone.add(text, text)
        together.add(text, text)
        assert (alone.match(case["topic"]) == (text,)) is case["match"], case
    for case in cases:
        text = split_shared(case["filter"])[1]
        for _ in range(2):  # new, then seen before
            assert (text in together.match(case["topic"])) is case["match"], case


@pytest.mark.parametrize("matcher", ["emitter", "mqtt"])
def test_emitter_vectors(matcher: str) -> None:
    rows = json.loads((DATA / "emitter_match_vectors.json").read_text(encoding="utf-8"))["match"]
    rows = [row for row in rows if row[0] == matcher]
    assert len(rows) > 80
    together = HandlerTrie[str]("emitter" if matcher == "emitter" else "emitter-mqtt")
    for _, subscription, published, delivered in rows:
        text = subscription.removeprefix("$share/g/")
        alone = HandlerTrie[str](together.rule)
        alone.add(text, text)
        together.add(text, text)
        assert (alone.match(published) == (text,)) is delivered, subscription
    for _, subscription, published, delivered in rows:
        text = subscription.removeprefix("$share/g/")
        assert (text in together.match(published)) is delivered, subscription


# --- behaviour, by example -----------------------------------------------------------------


def test_values_come_in_the_order_of_adding_across_filters() -> None:
    trie = HandlerTrie[int]()
    for value, text in enumerate(["#", "a/b", "+/b", "a/#", "a/+", "a/b", "#", "a/b/#"]):
        trie.add(text, value)
    assert trie.match("a/b") == (0, 1, 2, 3, 4, 5, 6, 7)
    trie.remove("+/b", 2)
    trie.add("+/b", 2)
    assert trie.match("a/b") == (0, 1, 3, 4, 5, 6, 7, 2)


def test_a_pair_is_there_once_and_keeps_its_place() -> None:
    trie = HandlerTrie[str]()
    assert trie.add("a", "first")
    assert trie.add("a", "second")
    assert not trie.add("a", "first")
    assert not trie.add("a", "second")
    assert trie.match("a") == ("first", "second")
    assert trie.remove("a", "first")
    assert not trie.remove("a", "first")
    assert trie.match("a") == ("second",)


def test_a_value_comes_once_for_each_of_its_filters() -> None:
    trie = HandlerTrie[str]()
    trie.add("a/+", "same")
    trie.add("a/#", "same")
    assert trie.match("a/b") == ("same", "same")


def test_equal_values_are_one_and_unhashable_ones_are_told_apart_by_identity() -> None:
    @dataclass
    class Unhashable:
        number: int

    class Handlers:
        def handle(self) -> None: ...

    one, two, owner = Unhashable(1), Unhashable(1), Handlers()
    trie = HandlerTrie[Any]()
    assert trie.add("a", one)
    assert trie.add("a", two)
    assert not trie.add("a", one)
    assert trie.add("a", owner.handle)
    assert not trie.add("a", owner.handle)  # another bound method object, equal to the first
    assert [id(value) for value in trie.match("a")[:2]] == [id(one), id(two)]
    assert trie.remove("a", two)
    assert trie.remove("a", owner.handle)
    assert trie.match("a")[0] is one
    assert trie.remove("a", one)
    assert not trie.remove("a", one)
    assert len(trie) == 0


def test_filters_length_and_membership() -> None:
    trie = HandlerTrie[int]()
    trie.add("b/+", 1)
    trie.add("a", 2)
    trie.add("b/+", 3)
    trie.add("#", 4)
    assert trie.filters() == ("b/+", "a", "#")
    assert len(trie) == 3
    assert "b/+" in trie
    assert "a" in trie
    assert "b" not in trie
    assert 7 not in trie
    assert repr(trie) == "HandlerTrie('mqtt', 3 filters)"
    trie.clear()
    assert (len(trie), trie.filters(), trie.match("a")) == (0, (), ())


@pytest.mark.parametrize("name", ["emitter", "emitter-mqtt"])
def test_a_trailing_slash_says_nothing_to_emitter(name: Rule) -> None:
    trie = HandlerTrie[int](name)
    assert trie.add("a/b", 1)
    assert not trie.add("a/b/", 1)
    assert trie.add("a/+/", 2)
    assert trie.match("a/b") == trie.match("a/b/") == (1, 2)
    assert "a/b/" in trie
    assert "a/+" in trie
    assert trie.filters() == ("a/b/", "a/+/")
    assert trie.remove("a/+", 2)
    assert trie.remove("a/b/", 1)
    assert len(trie) == 0


def test_the_empty_channel_is_the_root() -> None:
    prefix, mqtt = HandlerTrie[int]("emitter"), HandlerTrie[int]("emitter-mqtt")
    for trie in (prefix, mqtt):
        trie.add("", 1)
        assert trie.filters() == ("",)
        assert trie.match("") == (1,)
    assert prefix.match("a/b/") == prefix.match("/") == (1,)
    assert mqtt.match("a/b/") == mqtt.match("/") == ()


def test_emitter_has_no_dollar_rule_and_exact_no_wildcards() -> None:
    emitter, exact = HandlerTrie[int]("emitter"), HandlerTrie[int]("exact")
    emitter.add("+/", 1)
    exact.add("+/#", 1)
    assert emitter.match("$SYS/") == (1,)
    assert exact.match("a/b") == ()
    assert exact.match("+/#") == (1,)


def test_the_whole_trie_can_hide_behind_a_dollar() -> None:
    trie = HandlerTrie[str]()
    for text in ("#", "+", "+/x", "$SYS/#", "$SYS/+", "$SYS", "a/$SYS"):
        trie.add(text, text)
    assert trie.match("$SYS/x") == ("$SYS/#", "$SYS/+")
    assert trie.match("$SYS") == ("$SYS/#", "$SYS")
    assert trie.match("$other/x") == ()
    assert trie.match("a/$SYS") == ("#", "a/$SYS")


@pytest.mark.parametrize("text", ["a/#/b", "#/", "a#", "a+/b", "+#"])
def test_a_filter_with_a_misplaced_wildcard_is_refused(text: str) -> None:
    trie = HandlerTrie[int]()
    with pytest.raises(InvalidFilter):
        trie.add(text, 1)
    assert not trie.remove(text, 1)
    assert text not in trie
    assert len(trie) == 0
    emitter = HandlerTrie[int]("emitter")
    assert emitter.add(text, 1)  # an ordinary word there


def test_wildcards_in_a_topic_are_ordinary_characters() -> None:
    trie = HandlerTrie[str]()
    for text in ("a/+", "a/#", "a/b"):
        trie.add(text, text)
    assert trie.match("a/+") == ("a/+", "a/#")
    assert trie.match("a/#") == ("a/+", "a/#")


def test_captures_are_taken_through_parse_filter() -> None:
    trie = HandlerTrie[str]()
    trie.add(parse_filter("lab/{device}/{rest:path}").filter, "handler")
    assert trie.match("lab/oven/a/b") == ("handler",)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="emitter-mqtt"):
        HandlerTrie("prefix")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(ValueError, match="cache_size"):
        HandlerTrie(cache_size=-1)


def test_changing_while_looping_over_a_result() -> None:
    trie = HandlerTrie[int]()
    for value in range(5):
        trie.add("a/+", value)
    seen: list[int] = []
    for value in trie.match("a/b"):
        seen.append(value)
        trie.remove("a/+", value)
        trie.add("a/#", value + 10)
    assert seen == [0, 1, 2, 3, 4]
    assert trie.match("a/b") == (10, 11, 12, 13, 14)


# --- properties ----------------------------------------------------------------------------

WORDS: tuple[str, ...] = ("a", "b", "", "$s", "+", "#")
_levels = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4)
topics = st.lists(st.sampled_from(("a", "b", "", "$s", "c")), min_size=1, max_size=5).map("/".join)


@st.composite
def filters(draw: st.DrawFn, name: Rule) -> str:
    levels = draw(_levels)
    if name == "mqtt":
        levels[:-1] = ["+" if level == "#" else level for level in levels[:-1]]
    return "/".join(levels)


class TrieMachine(RuleBasedStateMachine):
    """Random changes to a trie and to a list of pairs, which must stay the same thing."""

    @initialize(name=st.sampled_from(RULES), cache_size=st.sampled_from((0, 1, 3, 4096)))
    def start(self, name: Rule, cache_size: int) -> None:
        self.name: Rule = name
        self.trie = HandlerTrie[int](name, cache_size=cache_size)
        self.pairs: list[tuple[str, int]] = []

    def key(self, text: str) -> str:
        if self.name.startswith("emitter") and text and not text.endswith("/"):
            return f"{text}/"
        return text

    @rule(data=st.data(), value=st.integers(0, 3))
    def add(self, data: st.DataObject, value: int) -> None:
        text = data.draw(filters(self.name))
        pair = (self.key(text), value)
        assert self.trie.add(text, value) is (pair not in self.pairs)
        if pair not in self.pairs:
            self.pairs.append(pair)

    @rule(data=st.data(), value=st.integers(0, 3))
    def remove_any(self, data: st.DataObject, value: int) -> None:
        text = data.draw(filters(self.name))
        pair = (self.key(text), value)
        assert self.trie.remove(text, value) is (pair in self.pairs)
        if pair in self.pairs:
            self.pairs.remove(pair)

    @precondition(lambda self: bool(getattr(self, "pairs", ())))
    @rule(data=st.data())
    def remove_one(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        assert self.trie.remove(*pair)
        self.pairs.remove(pair)

    @rule(topic=topics)
    def match(self, topic: str) -> None:
        expected = tuple(value for text, value in self.pairs if NAIVE[self.name](text, topic))
        assert self.trie.match(topic) == expected
        assert self.trie.match(topic) == expected

    @rule()
    def clear(self) -> None:
        self.trie.clear()
        self.pairs.clear()

    @invariant()
    def same_filters(self) -> None:
        if hasattr(self, "trie"):
            expected = tuple(dict.fromkeys(text for text, _ in self.pairs))
            assert self.trie.filters() == expected
            assert len(self.trie) == len(expected)
            assert all(text in self.trie for text in expected)

    @invariant()
    def no_node_holds_nothing(self) -> None:
        if hasattr(self, "trie"):
            assert not any(is_empty(node) for node in nodes_of(self.trie))


TestTrieMachine = TrieMachine.TestCase
TestTrieMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(RULES))
def test_matching_agrees_with_the_naive_matcher(data: st.DataObject, name: Rule) -> None:
    trie = HandlerTrie[str](name)
    pairs = list(dict.fromkeys(data.draw(st.lists(filters(name), max_size=25))))
    for text in pairs:
        trie.add(text, text)
    for topic in data.draw(st.lists(topics, max_size=10)):
        expected = [text for text in pairs if NAIVE[name](text, topic)]
        assert list(trie.match(topic)) == expected
        assert list(trie.match(topic)) == expected


# --- what is kept --------------------------------------------------------------------------


def test_results_are_kept_and_dropped_on_change() -> None:
    trie = HandlerTrie[str]()
    trie.add("a/+", "one")
    first = trie.match("a/b")
    assert trie.match("a/b") is first
    trie.add("a/#", "two")
    assert trie.match("a/b") == ("one", "two")
    trie.remove("a/+", "one")
    assert trie.match("a/b") == ("two",)
    trie.clear()
    assert trie.match("a/b") == ()


def test_what_is_kept_is_bounded() -> None:
    trie = HandlerTrie[int](cache_size=100)
    trie.add("#", 0)
    for number in range(1000):
        trie.match(f"invented/{number}")
    assert 0 < len(trie._cache) <= 100
    trie.match("x" * 60_000)
    assert max(map(len, trie._cache)) < 1000
    for value in range(1000):
        trie.add("many/+", value)
    assert len(trie.match("many/a")) == 1001
    assert all(len(kept) < 1000 for kept in trie._cache.values())
    none = HandlerTrie[int](cache_size=0)
    none.add("a/+", 1)
    assert none.match("a/b") == none.match("a/b") == (1,)
    assert not none._cache


def test_the_shared_words_are_bounded() -> None:
    trie = HandlerTrie[int]()
    for number in range(70_000):
        trie.add(f"{number}/+", 0)
        trie.remove(f"{number}/+", 0)
    assert len(trie_module._words) <= 32768
    trie.add("x" * 1000 + "/+", 0)
    assert trie_module._words.get("x" * 1000) is None


def test_a_trie_gives_back_what_it_took() -> None:
    def fill_and_empty(trie: HandlerTrie[int]) -> None:
        names = [f"s{a}/{b}/d{c}/#" for a in range(5) for b in ("+", "x", "y") for c in range(20)]
        for value, text in enumerate(names):
            trie.add(text, value)
            trie.match(f"s1/x/d{value}/t")
        for value, text in enumerate(names):
            assert trie.remove(text, value)

    trie = HandlerTrie[int]()
    fill_and_empty(trie)
    assert next(nodes_of(trie), None) is None
    assert is_empty(trie._root)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(10):
            fill_and_empty(trie)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000


# --- size and time -------------------------------------------------------------------------

_SLASHES = "/" * 65535
_PLUSES = "+/" * 32767 + "+"
_DEEP = "a/" * 32767 + "a"


@pytest.mark.parametrize("name", RULES)
def test_the_longest_inputs_take_linear_time_and_no_recursion(name: Rule) -> None:
    trie = HandlerTrie[int](name)
    start = time.thread_time()  # of this thread alone: a busy machine does not count
    for value, text in enumerate((_PLUSES, _DEEP, "a/" * 32767 + "+", "a/" * 32767 + "#")):
        assert trie.add(text, value)
    trie.add("a/" * 16000 + "+/a", 5)
    hits = {
        "mqtt": (0, 1, 2, 3),
        "exact": (1,),
        "emitter": (0, 1, 2, 5),
        "emitter-mqtt": (0, 1, 2, 3),
    }
    assert trie.match(_DEEP) == hits[name]
    assert trie.match(_DEEP + "/a") == {"mqtt": (3,), "emitter": hits["emitter"]}.get(
        name, (3,) if name == "emitter-mqtt" else ()
    )
    trie.match(_SLASHES)
    for value, text in enumerate((_PLUSES, _DEEP, "a/" * 32767 + "+", "a/" * 32767 + "#")):
        assert trie.remove(text, value)
    assert trie.remove("a/" * 16000 + "+/a", 5)
    assert is_empty(trie._root)
    trie.add(_DEEP + "/+", 0)
    trie.clear()  # frees 32769 nodes, each held by the one before
    # Some 0.3 s; a quadratic step would take minutes.
    assert time.thread_time() - start < 10


def lines_of(call: Callable[[], object]) -> int:
    """Return how many lines of Python *call* executes: work, whatever else the machine does."""
    lines = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(previous)
    return lines


def test_filters_that_fork_at_every_level_do_not_multiply_the_work() -> None:
    # 2 ** 18 ways to walk these for one that does not share nodes; 18 filters with "+" at one
    # level each, and one with all.
    depth = 18
    trie = HandlerTrie[int](cache_size=0)
    for place in range(depth):
        levels = ["a"] * depth
        levels[place] = "+"
        trie.add("/".join(levels), place)
    trie.add("/".join("+" * depth), depth)
    topic = "/".join("a" * depth)
    assert trie.match(topic) == tuple(range(depth + 1))
    assert lines_of(lambda: trie.match(topic)) < 100 * depth * depth


def test_time_does_not_depend_on_filters_that_do_not_match() -> None:
    def visited(count: int) -> int:
        """Return what one match takes with *count* filters."""
        trie = HandlerTrie[int](cache_size=0)
        trie.add("site/+/temp", -1)
        trie.add("site/#", -2)
        for number in range(count):
            trie.add(f"other/{number}/+", number)
            trie.add(f"site/{number}/+/x", number)
            trie.add(f"exact/{number}", number)
        assert trie.match("site/none/temp") == (-1, -2)
        return lines_of(lambda: trie.match("site/none/temp"))

    assert visited(10) == visited(10_000)


# --- threads -------------------------------------------------------------------------------


def test_matching_while_other_threads_change_the_trie() -> None:
    trie = HandlerTrie[str](cache_size=16)
    trie.add("s/+/t", "fixed one")
    trie.add("s/#", "fixed two")
    trie.add("s/x/t", "fixed three")
    fixed = ("fixed one", "fixed two", "fixed three")
    stop = threading.Event()
    errors: list[BaseException] = []
    others = ("s/x/+", "s/x/t", "+/x/t", "s/x/t/#", "s/y/+", "s/x/+/u", "#", "s/+/t", "s/z/t")

    def change(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            while not stop.is_set():
                text, value = chooser.choice(others), f"{seed}-{chooser.randrange(3)}"
                trie.add(text, value)
                trie.remove(chooser.choice(others), value)
        except BaseException as error:
            errors.append(error)

    def check() -> None:
        try:
            while not stop.is_set():
                found = trie.match("s/x/t")
                assert tuple(value for value in found if value.startswith("fixed")) == fixed
                assert "fixed three" not in trie.match("s/w/t")
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
    threads += [threading.Thread(target=check) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline and not errors:
            trie.match("s/x/t")
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    # Nothing stale stays behind: what is kept is what a fresh look finds.
    for text, value in itertools.product(others, [f"{s}-{n}" for s in range(2) for n in range(3)]):
        trie.remove(text, value)
    assert trie.match("s/x/t") == fixed
    assert trie.filters() == ("s/+/t", "s/#", "s/x/t")


def test_a_result_found_before_a_change_is_not_kept_after_it() -> None:
    class Slow(str):
        """A topic that changes the trie while it is being matched."""

        __slots__ = ()

        def split(self, *_: Any, **__: Any) -> list[str]:
            trie.remove("a/+", "old")
            return ["a", "b"]

    trie = HandlerTrie[str]()
    trie.add("a/+", "old")
    trie.add("a/#", "stays")
    trie.match(Slow("a/b"))
    assert trie.match("a/b") == ("stays",)


def test_docstring_examples() -> None:
    result = doctest.testmod(trie_module)
    assert result.attempted >= 10
    assert result.failed == 0


DOCUMENT = (Path(__file__).parent.parent / "docs" / "trie.md").read_text(encoding="utf-8")


def test_the_examples_of_the_document_run() -> None:
    names: dict[str, Any] = {}
    claims = 0
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        if "def " in block:
            exec(block, names)
            continue
        for line in block.splitlines():
            statement, _, comment = line.partition("  # ")
            if not statement.startswith("handlers."):
                exec(statement, names)
                continue
            result = eval(statement, names)
            if comment:
                assert result == eval(re.split("[:;]", comment)[0])
                claims += 1
    assert claims == 5


def test_the_table_of_the_document_holds() -> None:
    rows = re.findall(
        r"^\| `(\S+)` \| `(\S+)` ((?:\| \**(?:yes|no)\** ){4})\|$", DOCUMENT, re.MULTILINE
    )
    assert len(rows) == 10
    for text, topic, answers in rows:
        for name, answer in zip(RULES, re.findall(r"yes|no", answers), strict=True):
            trie = HandlerTrie[str](name)
            trie.add(text, text)
            assert bool(trie.match(topic)) is (answer == "yes"), (text, topic, name)
