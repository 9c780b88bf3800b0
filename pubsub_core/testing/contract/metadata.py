"""Headers, content types, codecs, time to live: cases 65 to 71, without 67."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from pubsub_core.capabilities import Cap
from pubsub_core.errors import DecodeFailed
from pubsub_core.message import Headers
from pubsub_core.testing.case import case, needs
from pubsub_core.testing.trial import Trial

__all__: list[str] = []


@dataclass
class _Point:
    x: int
    y: int


@case(65)
@needs(Cap.HEADERS)
async def headers_roundtrip_hostile(t: Trial) -> None:
    """Names and values beside the payload arrive as they were, in order."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    hostile: list[list[tuple[str, str]]] = [
        [("empty", "")],
        [("long", "x" * 10_000)],
        [("ünï", "grüße \U0001f600")],
        [("Case", "upper"), ("case", "lower")],
        [("twice", "1"), ("twice", "2"), ("other", "o"), ("twice", "3")],
        [("a:b=c;d", "e f,g\"h'")],
        [(f"n{number}", str(number)) for number in range(50)],
        [("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")],
    ]
    for pairs in hostile:
        await t.within(bus.publish(t.topic(), b"x", headers=Headers(pairs)))
        message = await t.get(subscription)
        assert list(message.headers.pairs) == pairs
        assert message.headers == Headers(pairs)
    await t.within(bus.publish(t.topic(), b"x"))
    assert len((await t.get(subscription)).headers) == 0
    await t.within(bus.publish(t.topic(), b"x", headers={"plain": "mapping"}))
    assert (await t.get(subscription)).headers["plain"] == "mapping"


@case(66)
@needs(Cap.HEADERS)
async def headers_refused_without_capability_or_envelope(t: Trial) -> None:
    """Headers are carried or refused, never dropped in silence."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    await t.within(bus.publish(t.topic(), b"x", headers={"name": "value"}))
    assert dict((await t.get(subscription)).headers) == {"name": "value"}


@case(68)
@needs(Cap.CONTENT_TYPE)
async def content_type_roundtrip(t: Trial) -> None:
    """The media type travels beside the payload, set by hand or by the codec."""
    bus = await t.connect()
    subscription = await t.subscribed(bus, t.topic())
    for content_type in ("text/plain; charset=utf-8", "application/x-custom+json"):
        await t.within(bus.publish(t.topic(), b"x", content_type=content_type))
        assert (await t.get(subscription)).content_type == content_type
    await t.within(bus.publish(t.topic(), {"a": 1}))
    assert (await t.get(subscription)).content_type == "application/json"
    await t.within(bus.publish(t.topic(), b"raw"))
    assert (await t.get(subscription)).content_type is None


@case(69)
async def decode_failure_keeps_raw_and_follows_policy(t: Trial) -> None:
    """A payload that does not fit is raised, skipped or put aside, and never lost."""
    bus = await t.connect()
    raising = await t.subscribed(bus, t.topic(), _Point)
    skipping = await t.subscribed(bus, t.topic(), _Point, on_decode_error="skip")
    dead = await t.subscribed(bus, t.topic("dead"))
    burying = await t.subscribed(
        bus, t.topic(), _Point, on_decode_error="dead_letter", dead_letter=t.topic("dead")
    )
    bad = b'{"x": "one", "y": \xff'
    await t.within(bus.publish(t.topic(), bad))
    await t.within(bus.publish(t.topic(), _Point(1, 2)))
    with t.raises(DecodeFailed) as caught:
        await t.get(raising)
    assert caught[0].raw == bad
    assert caught[0].topic == t.topic()
    assert "one" not in str(caught[0]), "an error text holds the payload"
    assert (await t.get(raising)).payload == _Point(1, 2)
    assert (await t.get(skipping)).payload == _Point(1, 2)
    assert skipping.stats.failed == 1
    assert (await t.get(burying)).payload == _Point(1, 2)
    assert (await t.get(dead)).payload == bad


@case(70)
async def codec_never_guesses(t: Trial) -> None:
    """Without a type a payload is bytes, whatever it looks like."""
    bus = await t.connect()
    untyped = await t.subscribed(bus, t.topic())
    text = await t.subscribed(bus, t.topic(), str)
    for payload in (b"123", b'"text"', b"{}", b"true"):
        await t.within(bus.publish(t.topic(), payload))
        assert (await t.get(untyped)).payload == payload
        assert (await t.get(text)).payload == payload.decode()
    value: Any = "123"
    await t.within(bus.publish(t.topic(), value))
    assert (await t.get(untyped)).payload == b"123"
    assert (await t.get(text)).payload == "123"
    with t.raises(DecodeFailed):
        numbers = await t.subscribed(bus, t.topic("number"), int)
        await t.within(bus.publish(t.topic("number"), b'"123"'))
        await t.get(numbers)


@case(71)
@needs(Cap.TTL)
async def ttl_expires_stored_message(t: Trial) -> None:
    """A stored message is gone after its time, and tells the rest of it before."""
    bus = await t.connect()
    if not (bus.supports(Cap.RETAINED) or bus.supports(Cap.HISTORY)):
        live = await t.subscribed(bus, t.topic())
        await t.within(bus.publish(t.topic(), b"x", ttl=60))
        assert (await t.get(live)).payload == b"x"
        return

    async def stored() -> list[bytes]:
        if bus.supports(Cap.RETAINED):
            found = await t.within(bus.last(t.topic()))
            return [] if found is None else [found.payload]
        return [message.payload async for message in bus.history(t.topic(), last=10)]

    retain = bool(bus.supports(Cap.RETAINED))
    while True:
        began = time.monotonic()
        await t.within(bus.publish(t.topic(), b"brief", ttl=1, retain=retain))
        found = await stored()
        if time.monotonic() - began < 1:  # else it may have expired before it was asked for
            break
    assert found[-1:] == [b"brief"]
    end = time.monotonic() + max(4.0, t.deadline)
    while await stored():
        assert time.monotonic() < end, "it did not expire"
        await asyncio.sleep(0.05)
    await t.within(bus.publish(t.topic(), b"long", ttl=600, retain=retain))
    assert await stored() == [b"long"]
