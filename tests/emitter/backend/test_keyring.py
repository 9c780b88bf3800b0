"""Which key goes with which channel, and keys that are made on demand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from pubsub_emitter.backend.keyring import KeyRing, covers, target_for
from pubsub_emitter.keys import License, Permission, encode_target, target_allows
from pubsub_emitter.options import ChannelKeys
from tests.emitter.vectors import LICENSE, MASTER_KEY

OURS = License.parse(LICENSE)


class Issuer:
    """Makes keys as a broker would, and counts."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, target: str, letters: str, ttl: int) -> str:
        self.asked.append((target, letters, ttl))
        await self.gate.wait()
        return OURS.make_key(target, letters, ttl=ttl)


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def ring(**options: Any) -> KeyRing:
    keys = {
        pattern: Secret(value) if isinstance(value, str) else value
        for pattern, value in options.pop("keys", {}).items()
    }
    key = options.pop("key", None)
    return KeyRing(
        key=None if key is None else Secret(key), keys=keys.items(), clock=Clock(), **options
    )


def text(found: Any) -> str | None:
    return None if found is None else found.text


@pytest.mark.parametrize(
    ("pattern", "channel", "wanted"),
    [
        ("a/b", "a/b/", True),
        ("a/b", "a/b/c/", False),
        ("a/b", "a/", False),
        ("a/#", "a/", True),
        ("a/#", "a/b/c/", True),
        ("a/#", "a/#/", True),
        ("a/#", "a/+/x/", True),
        ("a/#", "b/", False),
        ("a/+", "a/b/", True),
        ("a/+", "a/+/", True),
        ("a/+", "a/#/", False),
        ("a/+", "a/b/c/", False),
        ("a/b", "a/+/", False),
        ("+/b", "a/b/", True),
        ("#", "$share/g/a/", True),
        ("$share/+/a/#", "$share/g/a/b/", True),
        ("a/#", "$share/g/a/", False),
    ],
)
def test_a_pattern_covers_what_all_matches_it(pattern: str, channel: str, wanted: bool) -> None:
    assert covers(pattern, channel) is wanted


def test_the_most_specific_pattern_wins() -> None:
    found = ring(
        key="k-all", keys={"a/#": "k-below", "a/+/c": "k-plus", "a/b/c": "k-exact", "+/b/#": "k-b"}
    )
    assert text(found.peek("w", "a/b/c/")) == "k-exact"
    assert text(found.peek("w", "a/x/c/")) == "k-plus"
    assert text(found.peek("w", "a/b/d/")) == "k-below"
    assert text(found.peek("w", "x/b/d/")) == "k-b"
    assert text(found.peek("w", "x/y/")) == "k-all"
    assert text(found.peek("r", "a/", "a/#/")) == "k-below"
    assert text(found.peek("r", "+/", "#/")) == "k-all"


def test_a_pattern_that_ends_is_more_specific_than_one_that_goes_on() -> None:
    found = ring(keys={"a/b": "k-exact", "a/b/#": "k-below", "+": "k-plus", "+/#": "k-all"})
    assert text(found.peek("w", "a/b/")) == "k-exact"
    assert text(found.peek("w", "a/b/c/")) == "k-below"
    assert text(found.peek("w", "x/")) == "k-plus"
    assert text(found.peek("w", "x/y/")) == "k-all"


def test_each_permission_has_its_own_most_specific_key() -> None:
    found = ring(
        keys={
            "a/#": ChannelKeys(key=Secret("k-any"), presence=Secret("k-presence")),
            "a/b": ChannelKeys(write=Secret("k-write")),
        }
    )
    assert text(found.peek("w", "a/b/")) == "k-write"
    assert text(found.peek("ws", "a/b/")) == "k-write"
    assert text(found.peek("r", "a/b/")) == "k-any"
    assert text(found.peek("l", "a/b/")) == "k-any"
    assert text(found.peek("p", "a/b/")) == "k-presence"
    assert text(found.peek("p", "b/")) is None
    assert found.may("l")
    assert not ring(keys={"a": ChannelKeys(write=Secret("k"))}).may("l")


def test_a_license_tells_what_given_keys_may() -> None:
    reader = OURS.make_key("a/#/", "r")
    writer = OURS.make_key("#/", "w")
    found = ring(key=writer, keys={"a/#": reader}, license=OURS)
    assert text(found.peek("r", "a/b/")) == reader
    assert text(found.peek("w", "a/b/")) == writer, "the more specific key may not publish"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": ""}, "empty"),
        ({"key": "a/b"}, "'/'"),
        ({"key": "short", "license": OURS}, "is none"),
        ({"key": MASTER_KEY, "license": OURS}, "master key"),
        ({"key": License.generate().make_key("#/", "r"), "license": OURS}, "not of this license"),
        ({"keys": {"a/#/b": "k"}}, "a/#/b"),
        ({"keys": {"a+": "k"}}, "a+"),
    ],
)
def test_what_is_no_key_or_pattern_is_refused_without_showing_it(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadOption) as caught:
        ring(**options)
    assert said in str(caught.value)
    key = options.get("key")
    assert not key or len(key) < 6 or key not in str(caught.value)


@pytest.mark.parametrize(
    ("channels", "target"),
    [
        (("a/b/",), "a/b/"),
        (("a/", "a/#/"), "a/"),
        (("a/+/",), "a/#/"),
        (("a/+/c/",), "a/+/c/"),
        (("+/b/",), "+/b/"),
        (("+/",), "+/"),
        (("+/", "#/"), "#/"),
        (("+/+/", "+/+/#/"), "+/+/"),
        (("$share/g/a/",), "$share/g/a/"),
        (("$share/g/a/+/",), "$share/g/a/#/"),
        (("/".join("a" * 30) + "/",), "/".join("a" * 23) + "/#/"),
    ],
)
def test_a_made_key_is_as_narrow_as_the_format_allows(
    channels: tuple[str, ...], target: str
) -> None:
    assert target_for(*channels) == target
    path, coded = encode_target(target)
    assert all(target_allows(path, coded, channel) for channel in channels)


async def test_a_key_is_made_once_with_no_more_than_is_needed() -> None:
    issuer = Issuer()
    issuer.gate.clear()
    found = ring(can_issue=True, ttl=1000)
    assert found.peek("w", "a/b/") is None
    waiting = [asyncio.create_task(found.obtain(issuer, "w", "a/b/")) for _ in range(10)]
    while not issuer.asked:
        await asyncio.sleep(0)
    issuer.gate.set()
    keys = await asyncio.gather(*waiting)
    assert len({text(key) for key in keys}) == 1
    assert issuer.asked == [("a/b/", "ws", 1000)]
    made = OURS.decrypt(text(keys[0]) or "")
    assert made.permissions == Permission.WRITE | Permission.STORE
    assert made.allows("a/b/")
    assert not made.allows("a/b/c/")
    assert text(await found.obtain(issuer, "ws", "a/b/")) == text(keys[0])
    assert text(await found.obtain(issuer, "r", "a/b/")) != text(keys[0])
    assert issuer.asked[1:] == [("a/b/", "rl", 1000)]


async def test_who_gives_up_does_not_take_the_key_from_the_others() -> None:
    issuer = Issuer()
    issuer.gate.clear()
    found = ring(can_issue=True)
    first = asyncio.create_task(found.obtain(issuer, "w", "a/"))
    second = asyncio.create_task(found.obtain(issuer, "w", "a/"))
    while not issuer.asked:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait([first])
    issuer.gate.set()
    async with asyncio.timeout(5):
        assert await second is not None
    assert len(issuer.asked) == 1


async def test_a_made_key_is_renewed_before_it_expires_or_after_it_was_refused() -> None:
    issuer = Issuer()
    clock = Clock()
    found = KeyRing(can_issue=True, ttl=1000, clock=clock)
    first = await found.obtain(issuer, "w", "a/")
    assert first is not None
    clock.now += 899
    assert found.peek("w", "a/") is first
    clock.now += 2
    assert found.peek("w", "a/") is None
    second = await found.obtain(issuer, "w", "a/")
    assert second is not None
    assert second is not first
    found.forget(second)
    assert found.peek("w", "a/") is None
    assert await found.obtain(issuer, "w", "a/") is not second


@pytest.mark.parametrize("ttl", [1, 2, 10, 1000])
async def test_a_made_key_is_never_used_when_it_has_expired(ttl: int) -> None:
    """A key knows whole seconds: one made late in a second has less time than its ttl."""
    clock = Clock()
    clock.now += 0.9
    found = KeyRing(license=OURS, ttl=ttl, clock=clock)
    key = await found.obtain(Issuer(), "w", "a/")
    assert key is not None
    assert key.expires < OURS.decrypt(key.text).expires
    clock.now = OURS.decrypt(key.text).expires
    assert found.peek("w", "a/") is None


async def test_a_license_makes_keys_without_a_broker() -> None:
    issuer = Issuer()
    found = ring(license=OURS)
    key = await found.obtain(issuer, "r", "a/", "a/#/")
    assert key is not None
    assert OURS.decrypt(key.text).permissions == Permission.READ | Permission.LOAD
    assert issuer.asked == []


async def test_a_failure_to_make_a_key_reaches_all_and_is_not_kept() -> None:
    found = ring(can_issue=True)

    async def fail(target: str, letters: str, ttl: int) -> str:
        raise ConnectionError(target)

    results = await asyncio.gather(
        *(found.obtain(fail, "w", "a/") for _ in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results] == [ConnectionError] * 3
    assert await found.obtain(Issuer(), "w", "a/") is not None


@pytest.mark.slow
async def test_made_keys_are_bounded() -> None:
    issuer = Issuer()
    found = ring(license=OURS)
    for number in range(4200):
        await found.obtain(issuer, "w", f"t{number}/")
    assert found.peek("w", "t0/") is None
    assert found.peek("w", "t4199/") is not None
    assert repr(found) == "<KeyRing of 0 given and 4096 made keys>"


def test_nothing_shows_a_key() -> None:
    secret = "A" * 31 + "z"
    found = ring(key=secret, keys={"a": ChannelKeys(read=Secret(secret))})
    shown = [repr(found), repr(found.peek("r", "a/")), repr(ChannelKeys(key=Secret(secret)))]
    assert not any(secret in each for each in shown)
