"""Matching a topic against many filters: `HandlerTrie` and the matchers of its neighbours.

Prints two tables. The first times one look-up among 100, 10,000 and 200,000 filters, for
topics that the matcher has not seen and for topics that it has, and counts the memory
per filter. Six filters in ten are exact, three have a ``+``, one ends with ``#``; topics
are made from the filters, so that each matches one at least. They have four levels
(``site3/line4/dev77/temp``) or seven. The second keeps the filters that match and adds
others that do not.

All matchers get the same filters and topics, and are checked to agree before they are
timed. Each figure is the best of several rounds, with the matchers taking turns; the
factors say how many times faster than paho's matcher, or for Emitter's rule than
emitter-io's, a row is. A peer that is not installed is left out, and named.

    python benchmarks/trie.py [--quick]
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pubsub_core.trie import HandlerTrie, Rule

HERE = Path(__file__).resolve().parent
METRICS = ("temp", "humidity", "state", "volt")
Find = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Matcher:
    """One thing to measure.

    Attributes:
        rule: Only matchers of one rule can be compared.
        make: Makes a matcher that holds these filters, and returns its look-up.
        forget: Makes the matcher forget the topics it has seen, if it keeps any.
        scans: It looks at every filter, so it gets fewer topics.
    """

    name: str
    rule: str
    make: Callable[[Iterable[str]], tuple[Find, Callable[[], object]]]
    scans: bool = False


def ours(rule: Rule) -> Matcher:
    def make(filters: Iterable[str]) -> tuple[Find, Callable[[], object]]:
        trie = HandlerTrie[str](rule)
        for text in filters:
            trie.add(text, text)

        def forget() -> None:
            # Any change drops what is kept.
            trie.add("nothing/matches/this", "")
            trie.remove("nothing/matches/this", "")

        return trie.match, forget

    return Matcher(f"pubsub_core {rule}", rule.partition("-")[0], make)


def paho() -> Matcher:
    # The peers are loaded by name: none of them has types.
    module: Any = import_module("paho.mqtt.matcher")

    def make(filters: Iterable[str]) -> tuple[Find, Callable[[], object]]:
        matcher = module.MQTTMatcher()
        for text in filters:
            matcher[text] = text
        return lambda topic: list(matcher.iter_match(topic)), int

    return Matcher(f"paho-mqtt {version('paho-mqtt')}", "mqtt", make)


def emitter_io() -> Matcher:
    # The script beside this one has the name of that package.
    sys.path[:] = [each for each in sys.path if Path(each or ".").resolve() != HERE]
    subtrie: Any = import_module("emitter.subtrie")

    def make(filters: Iterable[str]) -> tuple[Find, Callable[[], object]]:
        trie = subtrie.SubTrie()
        for text in filters:
            trie.insert(text, text)
        return trie.lookup, int

    return Matcher(f"emitter-io {version('emitter-io')}", "emitter", make)


def amqtt() -> Matcher:
    # What its broker does for each message: ask for every filter. The method needs no state.
    broker_class: Any = import_module("amqtt.broker").Broker

    def make(filters: Iterable[str]) -> tuple[Find, Callable[[], object]]:
        kept = dict.fromkeys(filters)
        matches = object.__new__(broker_class)._matches
        return lambda topic: [one for one in kept if matches(topic, one)], int

    return Matcher(f"amqtt {version('amqtt')}", "mqtt", make, scans=True)


def matchers() -> list[Matcher]:
    found = [ours("mqtt"), ours("emitter")]
    for peer in (paho, amqtt, emitter_io):
        try:
            found.append(peer())
        except (ImportError, PackageNotFoundError) as error:
            print(f"left out {peer.__name__}: {error}", file=sys.stderr)
    return sorted(found, key=lambda matcher: matcher.rule, reverse=True)


# --- filters and topics --------------------------------------------------------------------


def random_levels(long: bool, count: int, chance: random.Random) -> list[str]:
    site = f"site{chance.randrange(max(2, count // 50))}"
    device = f"dev{chance.randrange(100)}"
    line = f"line{chance.randrange(10)}"
    metric = chance.choice(METRICS)
    if not long:
        return [site, line, device, metric]
    building, floor, room = (f"{name}{chance.randrange(5)}" for name in ("b", "f", "r"))
    return [site, building, floor, room, line, device, metric]


def make_filters(count: int, long: bool, chance: random.Random) -> list[str]:
    filters: dict[str, None] = {}
    while len(filters) < count:
        levels = random_levels(long, count, chance)
        draw = chance.random()
        if draw >= 0.9:
            levels[-2:] = ["#"]
        elif draw >= 0.75:
            levels[-2] = "+"
        elif draw >= 0.6:
            levels[-3] = "+"
        filters["/".join(levels)] = None
    return list(filters)


def make_topics(filters: Sequence[str], number: int, chance: random.Random) -> list[str]:
    topics: dict[str, None] = {}
    for _ in range(number * 20):
        levels = chance.choice(filters).split("/")
        if levels[-1] == "#":
            levels[-1:] = ["+", chance.choice(METRICS)]
        for index, level in enumerate(levels):
            if level == "+":
                name, limit = ("dev", 100) if index == len(levels) - 2 else ("line", 10)
                levels[index] = f"{name}{chance.randrange(limit)}"
        topics["/".join(levels)] = None
        if len(topics) == number:
            break
    return list(topics)


def as_channel(text: str) -> str:
    """Return the filter or topic in Emitter's form, where a filter is open below by itself."""
    return text.removesuffix("#").removesuffix("/") + "/"


# --- measuring -----------------------------------------------------------------------------


def copies(topics: Iterable[str]) -> list[str]:
    """Return equal topics in new objects, as they come from the network: never hashed."""
    return [topic[:1] + topic[1:] for topic in topics]


def per_topic(find: Find, topics: Sequence[str]) -> float:
    # Time of this thread on a processor: other programs on the machine do not count.
    start = time.thread_time()
    for topic in topics:
        find(topic)
    return (time.thread_time() - start) / len(topics) * 1e9


def memory(matcher: Matcher, filters: Sequence[str]) -> float:
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = matcher.make(filters)
        gc.collect()
        used = tracemalloc.get_traced_memory()[0] - before
        del kept
    finally:
        tracemalloc.stop()
    return used / len(filters)


@dataclass
class Row:
    """A matcher that holds its filters, and its best times so far in nanoseconds."""

    matcher: Matcher
    topics: Sequence[str]
    find: Find
    forget: Callable[[], object]
    new: float = float("inf")
    seen: float = float("inf")


def measure(
    group: Sequence[Matcher], filters: list[str], topics: list[str], rounds: int
) -> list[Row]:
    rows: list[Row] = []
    for matcher in group:
        some = topics[: max(3, 200_000 // len(filters))] if matcher.scans else topics
        rows.append(Row(matcher, some, *matcher.make(filters)))
    for topic in topics[:300]:
        answers = {
            row.matcher.name: sorted(row.find(topic))
            for row in rows
            if not row.matcher.scans or topic in row.topics[:3]
        }
        if len({tuple(answer) for answer in answers.values()}) != 1:
            raise SystemExit(f"the matchers disagree on {topic}: {answers}")
    gc.collect()
    for turn in range(rounds):
        for row in rows:
            if row.matcher.scans and turn:
                continue
            row.forget()
            row.new = min(row.new, per_topic(row.find, copies(row.topics)))
            row.seen = min(row.seen, per_topic(row.find, copies(row.topics)))
    return rows


def times(factor: float) -> str:
    return f"{factor:.1f}x" if factor >= 0.1 else f"{factor:.4f}x"


def speed(sizes: Sequence[int], number: int, rounds: int) -> None:
    print(
        f"{'filters':>8} {'levels':>6}  {'matcher':<20} {'new':>12} {'':>8} "
        f"{'seen before':>12} {'':>8} {'memory':>10}"
    )
    found = matchers()
    for size in sizes:
        for long in (False, True):
            chance = random.Random(size)
            filters = make_filters(size, long, chance)
            topics = make_topics(filters, number, chance)
            for rule in ("mqtt", "emitter"):
                group = [matcher for matcher in found if matcher.rule == rule]
                texts, given = filters, topics
                if rule == "emitter":
                    texts = list(dict.fromkeys(map(as_channel, filters)))
                    given = list(map(as_channel, topics))
                rows = measure(group, texts, given, rounds)
                base = next(
                    (row for row in rows if row.matcher.name.startswith(("paho", "emitter-io"))),
                    rows[0],
                )
                for row in rows:
                    print(
                        f"{len(texts):>8,} {7 if long else 4:>6}  {row.matcher.name:<20} "
                        f"{row.new:>9,.0f} ns {times(base.new / row.new):>8} "
                        f"{row.seen:>9,.0f} ns {times(base.seen / row.seen):>8} "
                        f"{memory(row.matcher, texts):>8,.0f} B",
                        flush=True,
                    )
        print()


def flatness(sizes: Sequence[int], number: int, rounds: int) -> None:
    print("The same 100 filters that match, among others that do not; new topics, 4 levels:\n")
    print(f"{'others':>8}  {'matcher':<20} {'new':>12}")
    chance = random.Random(1)
    matching = make_filters(100, False, chance)
    topics = make_topics(matching, number, chance)
    for size in sizes:
        others = [f"other{text}" for text in make_filters(size, False, chance)]
        group = [matcher for matcher in matchers() if matcher.rule == "mqtt" and not matcher.scans]
        for row in measure(group, matching + others, topics, rounds):
            print(f"{size:>8,}  {row.matcher.name:<20} {row.new:>9,.0f} ns", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time topic matching.")
    parser.add_argument("--quick", action="store_true", help="small sets, few rounds: seconds")
    quick = parser.parse_args().quick
    sizes = (100, 10_000) if quick else (100, 10_000, 200_000)
    number, rounds = (500, 3) if quick else (4000, 11)
    print(f"Python {sys.version.split()[0]}; times per look-up\n")
    speed(sizes, number, rounds)
    flatness(sizes, min(number, 300), rounds)


if __name__ == "__main__":
    main()
