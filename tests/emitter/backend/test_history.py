"""Pages of history, as brokers give them and as they should not."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pytest

from pubsub_core.interfaces import HistoryQuery
from pubsub_core.message import Origin
from pubsub_emitter.backend.history import fetch, history_channel
from pubsub_emitter.protocol import MessageId

NOW = 1_800_000_000.0


def entry(number: int, *, channel: str = "a/", second: int | None = None) -> dict[str, Any]:
    when = int(NOW) - 1000 + number if second is None else second
    payload = base64.b64encode(b"%d" % number).decode()
    return {"id": str(MessageId(7, when, number)), "channel": channel, "payload": payload}


class Broker:
    """Holds messages, oldest first, and gives pages of them."""

    def __init__(self, messages: list[dict[str, Any]], *, most: int = 1000) -> None:
        self.messages = messages
        self.most = most
        self.asked: list[str] = []

    async def __call__(self, body: Mapping[str, object]) -> Mapping[str, Any] | None:
        channel = str(body["channel"])
        self.asked.append(channel)
        last = int(channel.partition("last=")[2].partition("&")[0])
        if last > self.most:
            return None
        end = len(self.messages)
        if "startFromID" in body:
            end = next(
                n for n, each in enumerate(self.messages) if each["id"] == body["startFromID"]
            )
        page = self.messages[max(end - last, 0) : end]
        # The Go broker gives what it stored within one second the other way round.
        return {"messages": page[::-1]}


async def payloads(ask: Any, filter: str = "a", **more: Any) -> list[int]:
    scan = more.pop("scan", None)
    firsts: list[None] = []
    found = await fetch(
        ask,
        "KEY",
        history_channel(filter) or "",
        filter,
        HistoryQuery(**more),
        now=lambda: NOW,
        on_first=lambda: firsts.append(None),
        scan=scan,
    )
    assert len(firsts) == 1 or more.get("last") == 0
    assert {frame.origin for frame in found} <= {Origin.REPLAY}
    return [int(frame.payload) for frame in found]


@pytest.mark.parametrize(
    ("filter", "channel"),
    [
        ("a", "a/"),
        ("a/b", "a/b/"),
        ("a/#", "a/"),
        ("a/+", "a/+/"),
        ("a/+/#", "a/+/"),
        ("#", None),
        ("+", None),
        ("+/a", None),
    ],
)
def test_the_channel_that_is_asked_for(filter: str, channel: str | None) -> None:
    assert history_channel(filter) == channel


async def test_pages_grow_and_come_in_order() -> None:
    broker = Broker([entry(number) for number in range(1000)])
    assert await payloads(broker) == list(range(1000))
    sizes = [int(each.partition("last=")[2]) for each in broker.asked]
    assert sizes[:4] == [64, 128, 256, 512]
    assert await payloads(broker, last=10) == list(range(990, 1000))
    assert await payloads(broker, last=0) == []


async def test_an_answer_that_is_left_out_is_asked_for_in_smaller_pages() -> None:
    broker = Broker([entry(number) for number in range(50)], most=3)
    assert await payloads(broker) == list(range(50))


async def test_a_broker_that_does_not_go_on_ends_it() -> None:
    async def ask(body: Mapping[str, object]) -> Mapping[str, Any]:
        return {"messages": [entry(1), entry(2)]}

    assert await payloads(ask) == [1, 2]


async def test_what_never_fits_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    broker = Broker([entry(number) for number in range(3)], most=0)
    assert await payloads(broker) == []
    assert "too long for the broker's history" in caplog.text


async def test_only_what_fits_the_filter_counts() -> None:
    messages = [entry(n, channel="a/" if n % 10 == 0 else "a/b/") for n in range(300)]
    assert await payloads(Broker(messages), last=3) == [270, 280, 290]
    assert await payloads(Broker(messages), "a/+", last=2) == [298, 299]
    assert await payloads(Broker(messages), scan=64) == list(range(240, 300, 10))


async def test_a_window_is_of_whole_seconds() -> None:
    broker = Broker([entry(1)])
    await payloads(broker, since=NOW - 10.5, until=NOW + 0.9)
    assert broker.asked[0] == f"KEY/a/?last=64&from={int(NOW) - 11}&until={int(NOW)}"
    await payloads(broker, since=0.0, until=9e12)
    assert broker.asked[-1] == "KEY/a/?last=128"


async def test_times_are_the_end_of_their_second_and_never_to_come() -> None:
    broker = Broker([entry(1, second=int(NOW) - 5), entry(2, second=int(NOW))])
    found = await fetch(
        broker, "K", "a/", "a", HistoryQuery(), now=lambda: NOW + 0.2, on_first=lambda: None
    )
    assert [frame.time for frame in found] == [int(NOW) - 5 + 0.999, NOW + 0.2]
    assert [frame.topic for frame in found] == ["a", "a"]
    assert len({frame.id for frame in found}) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"messages": None},
        {"messages": [7]},
        {"messages": [{"id": "?", "channel": "a/", "payload": ""}]},
        {"messages": [{"id": 7, "channel": "a/"}]},
        {"messages": [{"id": str(MessageId(1, 2, 3)), "channel": "a/", "payload": "%"}]},
    ],
)
async def test_what_is_no_page_is_the_end(answer: Any) -> None:
    async def ask(body: Mapping[str, object]) -> Mapping[str, Any]:
        return answer  # type: ignore[no-any-return]  # whatever a broker says

    assert await payloads(ask) == []
