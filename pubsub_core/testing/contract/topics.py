"""Topics, filters, wildcards: cases 51 to 64."""

from __future__ import annotations

import string
import time
from typing import Any

from pubsub_core.capabilities import Cap
from pubsub_core.errors import InvalidFilter, InvalidTopic, SubscribeFailed
from pubsub_core.subscription import Subscription
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_core.testing.terms import Need
from pubsub_core.testing.trial import Trial
from pubsub_core.trie import HandlerTrie

__all__: list[str] = []

_PORTABLE = string.ascii_letters + string.digits + "._:-"


def naive_match(filter: str, topic: str) -> bool:
    """Return whether *topic* matches *filter*, by the words of MQTT 3.1.1 section 4.7."""
    if topic.startswith("$") and filter[0] in "+#":
        return False
    wanted, levels = filter.split("/"), topic.split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index == len(levels):
            return False
        if level not in ("+", levels[index]):
            return False
        if index == len(levels) - 1 and wanted[index + 1 :] == ["#"]:
            return True
    return len(wanted) == len(levels)


def _legal_topics(t: Trial, limits: Any, count: int) -> list[str]:
    alphabet = "".join(c for c in _PORTABLE if c not in limits.forbidden_characters)
    most = min(limits.max_levels or 8, 8)
    topics: list[str] = []
    for _ in range(count):
        levels = [
            "".join(t.random.choices(alphabet, k=t.random.randint(1, 12)))
            for _ in range(t.random.randint(1, most))
        ]
        topics.append("/".join(levels))
    return topics


@case(51)
async def topic_wire_bijection(t: Trial) -> None:
    """Every legal topic goes to the wire and comes back, and no two become one."""
    bus = await t.connect()
    backend = bus._engine.backend  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - as Recorder
    wires: dict[str, str] = {}
    for name in _legal_topics(t, bus.limits, 500):
        topic = t.topic(name)
        wire = backend.to_wire(topic)
        assert backend.from_wire(wire) == topic
        assert wires.setdefault(wire, topic) == topic
    picked = [t.topic(name) for name in _legal_topics(t, bus.limits, 10)]
    for topic in dict.fromkeys(picked):
        async with bus.subscribe(topic) as subscription:
            await t.within(bus.publish(topic, b"x"))
            assert (await t.get(subscription)).topic == topic


def _illegal_topics() -> list[tuple[str, int | None, str]]:
    """Topic, index of the wrong level, wrong character."""
    table: list[tuple[str, int | None, str]] = [("", None, "")]
    for character in ("+", "#", "\0", "\ud800", "\udfff"):
        for text, level in (
            (character, 0),
            (f"{character}/b", 0),
            (f"a/{character}", 1),
            (f"a{character}", 0),
            (f"{character}a/b", 0),
            (f"a/b{character}c/d", 1),
        ):
            table.append((text, level, character))
    return table


_ILLEGAL_FILTERS: tuple[tuple[str, int | None], ...] = (
    ("", None),
    ("a/#/b", 1),
    ("#/a", 0),
    ("a+", 0),
    ("+a/b", 0),
    ("a/b+", 1),
    ("a/b#", 1),
    ("#a", 0),
    ("a/##", 1),
    ("a/++", 1),
    ("a/\0", 1),
    ("a/{x", 1),
    ("a/{}", 1),
    ("a/{1x}", 1),
    ("{x:path}/b", 0),
    ("{a}/{a}", 1),
    ("a/{x:int}", 1),
)


@case(52)
async def illegal_topics_refused_locally(t: Trial) -> None:
    """An impossible topic is refused here; the error names level and character."""
    bus = await t.connect()
    table = _illegal_topics()
    assert len(table) + len(_ILLEGAL_FILTERS) >= 40
    for topic, level, character in table:
        with t.raises(InvalidTopic) as caught:
            await t.within(bus.publish(topic, b"x"))
        error = caught[0]
        assert error.reason, f"no reason for {topic!r}"
        assert error.level == level, f"level of {topic!r} is {error.level}, not {level}"
        assert error.character == character, f"character of {topic!r} is {error.character!r}"
    for wanted, level in _ILLEGAL_FILTERS:
        with t.raises(InvalidFilter) as refused:
            await t.subscribed(bus, wanted)
        assert refused[0].reason, f"no reason for {wanted!r}"
        if level is not None:
            assert refused[0].level == level, f"level of {wanted!r} is {refused[0].level}"
    long = "x" * ((bus.limits.max_topic_bytes or 65_535) + 1)
    with t.raises(InvalidTopic):
        await t.within(bus.publish(long, b"x"))
    with t.raises(InvalidFilter):
        await t.subscribed(bus, long)
    for character in bus.limits.forbidden_characters:
        with t.raises(InvalidTopic) as caught:
            await t.within(bus.publish(t.topic(f"a{character}b"), b"x"))
        assert caught[0].character == character
    if bus.limits.max_levels is not None:
        with t.raises(InvalidTopic):
            await t.within(bus.publish("/".join("a" * (bus.limits.max_levels + 1)), b"x"))


@case(53)
async def publish_to_wildcard_refused(t: Trial) -> None:
    """A filter is no topic."""
    bus = await t.connect()
    for topic in (t.topic("+"), t.topic("#"), t.topic("a/+/b"), "+", "#"):
        with t.raises(InvalidTopic) as caught:
            await t.within(bus.publish(topic, b"x"))
        assert caught[0].character in "+#"
        assert caught[0].character


async def _table(t: Trial, filter: str, matching: list[str], other: list[str]) -> None:
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic(filter) if filter else t.topic())
    for name in [*other, *matching]:
        await t.within(bus.publish(t.topic(name), name.encode()))
    got = await t.take(subscription, len(matching))
    assert sorted(message.payload.decode() for message in got) == sorted(matching)
    assert sorted(message.topic for message in got) == sorted(t.topic(name) for name in matching)
    # Confirmed in order, so nothing else can still be on its way after this one.
    await t.within(bus.publish(t.topic(matching[0]), b"last"))
    assert (await t.get(subscription)).payload == b"last"


@case(54)
@needs(Cap.WILDCARDS)
async def plus_matches_exactly_one_level(t: Trial) -> None:
    """``+`` stands for one level: not none, not two."""
    await _table(t, "a/+", ["a/b", "a/c", "a/b-c"], ["a", "a/b/c", "b/b"])
    await _table(t, "p/+/c", ["p/b/c", "p/x/c"], ["p/c", "p/b/b/c", "p/b", "p/b/d"])
    await _table(t, "q/+/+", ["q/b/c"], ["q/b", "q/b/c/d", "q"])


@case(55)
@needs(Cap.WILDCARDS)
async def hash_matches_parent_and_below(t: Trial) -> None:
    """``#`` stands for the level before it and everything below."""
    await _table(t, "a/#", ["a", "a/b", "a/b/c/d/e"], ["b", "ab", "ab/c"])
    await _table(t, "p/+/#", ["p/b", "p/b/c", "p/b/c/d"], ["p", "q/b"])


@case(56)
async def exact_filter_excludes_children(t: Trial) -> None:
    """A filter without wildcards means that topic alone."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic("a/b"))
    for name in ("a/b/c", "a", "a/bc", "a/b/c/d", "A/b"):
        await t.within(bus.publish(t.topic(name), name.encode()))
    await t.within(bus.publish(t.topic("a/b"), b"this"))
    assert (await t.get(subscription)).payload == b"this"
    assert subscription.stats.received == 1


@case(57)
@needs(Cap.WILDCARDS, Need.DOLLAR)
async def dollar_topics_hidden_from_wildcards(t: Trial) -> None:
    """A wildcard as the first level does not match a topic that begins with ``$``."""
    bus = await t.connect()
    everything = await t.subscribed(bus, "#", buffer=5000)
    one = await t.subscribed(bus, f"+/{t.word}")
    exact = await t.subscribed(bus, f"$conformance/{t.word}")
    below = await t.subscribed(bus, "$conformance/+")
    await t.within(bus.publish(f"$conformance/{t.word}", b"hidden"))
    assert (await t.get(exact)).payload == b"hidden"
    while (await t.get(below)).topic != f"$conformance/{t.word}":
        pass
    await t.within(bus.publish(f"plain/{t.word}", b"shown"))
    assert (await t.get(one)).payload == b"shown"
    while (message := await t.get(everything)).topic != f"plain/{t.word}":
        assert not message.topic.startswith("$")
    assert one.stats.received == 1


@case(58)
@needs(Cap.WILDCARDS)
async def overlapping_filters_deliver_once_per_subscription(t: Trial) -> None:
    """Each subscription gets a message once, however many filters match it."""
    bus = await t.connect()
    filters = ["a/b", "a/+", "a/#", "+/b", "#"]
    subscriptions = [await t.subscribed(bus, t.topic(wanted)) for wanted in filters]
    for number in range(20):
        await t.within(bus.publish(t.topic("a/b"), b"%d" % number))
    await t.within(bus.publish(t.topic("a/b"), b"last"))
    expected = [b"%d" % number for number in range(20)] + [b"last"]
    for wanted, subscription in zip(filters, subscriptions, strict=True):
        got = [message.payload for message in await t.take(subscription, 21)]
        assert got == expected, f"{wanted}: {got}"
        assert subscription.stats.received == 21


@case(59)
@needs(Cap.WILDCARDS)
async def real_topic_on_wildcard_match(t: Trial) -> None:
    """A message tells the topic it was published to, never the filter."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic("#"))
    names = ["a", "a/b", "a/b/c", "x-y/1"]
    for name in names:
        await t.within(bus.publish(t.topic(name), b"x"))
    got = await t.take(subscription, len(names))
    assert [message.topic for message in got] == [t.topic(name) for name in names]


@case(60)
@needs(Cap.WILDCARDS)
async def captures_filled(t: Trial) -> None:
    """Named levels are told with every message."""
    bus = await t.connect()
    # Filters that do not overlap: how often a message comes is the case before.
    single = await t.subscribed(bus, t.topic("single/{device}/temp"))
    deep = await t.subscribed(bus, t.topic("deep/{rest:path}"))
    both = await t.subscribed(bus, t.topic("both/{room}/{device}/{rest:path}"))
    for name in ("single/oven-1/temp", "deep/oven-1/temp", "both/lab/oven-1/a/b"):
        await t.within(bus.publish(t.topic(name), b"x"))
    assert dict((await t.get(single)).params) == {"device": "oven-1"}
    assert dict((await t.get(deep)).params) == {"rest": "oven-1/temp"}
    assert dict((await t.get(both)).params) == {
        "room": "lab",
        "device": "oven-1",
        "rest": "a/b",
    }
    await t.within(bus.publish(t.topic("deep"), b"x"))
    assert dict((await t.get(deep)).params) == {"rest": ""}
    assert single.filter == t.topic("single/{device}/temp")


@case(61)
@needs(Cap.WILDCARDS, Cap.GROUPS)
async def wildcard_plus_group(t: Trial) -> None:
    """A share group works with wildcards, and the real topic is told."""
    one, two = await t.connect(), await t.connect()
    members = [
        await t.subscribed(bus, t.topic("jobs/{kind}"), group="workers") for bus in (one, two)
    ]
    names = [t.topic(f"jobs/k{number}") for number in range(20)]
    for name in names:
        await t.within(one.publish(name, name.encode()))
    await t.eventually(lambda: sum(m.stats.received for m in members) >= 20, "20 messages")
    got = [await t.get(m) for m in members for _ in range(m.stats.received)]
    assert sorted(message.topic for message in got) == sorted(names)
    for message in got:
        assert message.payload == message.topic.encode()
        assert message.topic.endswith(message.params["kind"])


@case(62)
@needs(Cap.WILDCARDS)
async def matcher_against_reference(t: Trial) -> None:
    """Random filters receive the same messages as a naive matcher, and no others."""
    bus = await t.connect()
    levels = ["a", "b", "c"]

    def random_filter() -> str:
        parts = [t.random.choice([*levels, "+"]) for _ in range(t.random.randint(1, 4))]
        return "/".join([*parts, "#"] if t.random.random() < 0.3 else parts)

    filters = {random_filter() for _ in range(30)}
    subscriptions: dict[str, Subscription[bytes]] = {
        wanted: await t.subscribed(bus, t.topic(wanted)) for wanted in sorted(filters)
    }
    everything = await t.subscribed(bus, t.topic("#"))
    names = [
        "/".join(t.random.choices(levels, k=t.random.randint(1, 5)))
        for _ in range(t.count(60, 500))
    ]
    for name in names:
        await t.within(bus.publish(t.topic(name), name.encode()))
    await t.take(everything, len(names))
    for wanted, subscription in subscriptions.items():
        expected = [name.encode() for name in names if naive_match(wanted, name)]
        got = [message.payload for message in await t.take(subscription, len(expected))]
        assert got == expected, f"{wanted!r} got {got}, expected {expected}"
        assert subscription.stats.received == len(expected)


@case(63, alone=True)
@needs(Cap.WILDCARDS)
async def matching_time_linear(t: Trial) -> None:
    """Filters made to be slow are not."""

    def seconds(depth: int) -> float:
        trie: HandlerTrie[int] = HandlerTrie("mqtt", cache_size=0)
        for number in range(depth):
            parts = ["a"] * depth
            parts[number] = "+"
            trie.add("/".join([*parts, "b"]), number)
        trie.add("/".join(["+"] * depth + ["b"]), depth)
        topic = "/".join(["a"] * depth + ["c"])
        began = time.thread_time()
        for _ in range(20):
            assert trie.match(topic) == ()
        return time.thread_time() - began

    # Twice as many levels and filters make four times the work; trying every combination
    # of "+" and "a" would make a million times.
    small, large = min(seconds(16) for _ in range(3)), min(seconds(32) for _ in range(3))
    assert large < max(small * 16, 0.05), f"{small:.6f} s became {large:.6f} s"
    bus = await t.connect()
    filters = ["/".join(t.random.choices("a+", k=12)) for _ in range(100)]
    for wanted in dict.fromkeys(filters):
        await t.subscribed(bus, t.topic(f"{wanted}/never"))
    last = await t.subscribed(bus, t.topic("/".join("a" * 12)))
    watch = Stopwatch()
    for _ in range(20):
        await t.within(bus.publish(t.topic("/".join("a" * 12)), b"x"))
    await t.take(last, 20)
    assert watch.seconds < 5 * t.harness.slow


@case(64)
async def unicode_topics_carried_or_refused(t: Trial) -> None:
    """A topic in any script arrives as it is, or is refused; it is never altered."""
    bus = await t.connect()
    for name in (
        "café",
        "cafe\u0301",
        "高い/温度",
        "\U0001f600/x",
        "ЛАБ",
        "a b/c d",
        "ﬁ",
        "\ufeffbom",
        "İ",
        "ß",
        "%2F",
        "a%20b",
        "{",
        "a\\b",
        '"quoted"',
        "a?b=c&d",
    ):
        topic = t.topic(name)
        wanted = t.topic("probe") if "{" in name else topic
        try:
            subscription = await t.subscribed(bus, wanted)
        except (InvalidTopic, SubscribeFailed) as error:
            t.note(error)
            with t.raises(InvalidTopic):
                await t.within(bus.publish(topic, b"x"))
            continue
        if wanted != topic:
            try:
                await t.within(bus.publish(topic, b"x"))
            except InvalidTopic as error:
                t.note(error)
        else:
            await t.within(bus.publish(topic, b"x"))
            message = await t.get(subscription)
            assert message.topic == topic, f"{topic!r} became {message.topic!r}"
        await t.within(subscription.close())
