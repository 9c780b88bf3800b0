"""Guarded topics in memory: who is asked, who is shown what, and what nobody is shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import (
    EVERYTHING,
    App,
    AuthorizationRequest,
    Authorizer,
    BadOption,
    Bus,
    NotAuthorized,
    Part,
    PublishFailed,
    Subscription,
    connect,
)
from pubsub_core.config import Config
from pubsub_core.events import InterestKind, Notice
from pubsub_core.interfaces import Everything
from pubsub_core.memory import Space, rights
from pubsub_core.memory.backend import MemoryBackend
from tests.servers import eventually

NAME = "test_authorization"
GUARDED = ("AUTH/#",)
PARTS = [
    Part(b"open"),
    Part(b"one", entitlements=frozenset({1})),
    Part(b"both", entitlements=frozenset({1, 2})),
]


@pytest.fixture(autouse=True)
def space() -> Iterator[Space]:
    yield Space.named(NAME)
    Space.forget(NAME)


def bus_of(user: str, **options: Any) -> Bus:
    return connect(f"memory://{NAME}", username=user, guarded=GUARDED, **options)


@asynccontextmanager
async def warden(
    decide: Callable[[AuthorizationRequest], Any] = lambda request: {1},
) -> AsyncIterator[tuple[Bus, Authorizer, list[AuthorizationRequest]]]:
    """Yield a bus that answers with *decide*, and the questions it had."""
    asked: list[AuthorizationRequest] = []

    async def answer(request: AuthorizationRequest) -> Any:
        asked.append(request)
        return decide(request)

    async with bus_of("warden") as bus, bus.authorize("AUTH/#", answer) as authorizer:
        yield bus, authorizer, asked


@asynccontextmanager
async def notices(bus: Bus) -> AsyncIterator[list[tuple[str, str]]]:
    """Collect the notices of *bus*, as kind and topic."""
    found: list[tuple[str, str]] = []
    async with bus.events() as events:

        async def listen() -> None:
            async for event in events:
                if isinstance(event, Notice):
                    found.append((event.kind, event.topic))  # noqa: PERF401 - one by one

        task = asyncio.create_task(listen())
        try:
            yield found
        finally:
            task.cancel()
            await asyncio.wait([task])


def answered(authorizer: Authorizer, count: int = 1) -> Callable[[], bool]:
    stats = authorizer.stats
    return lambda: stats.granted + stats.refused == count


async def parts_of(subscription: Subscription[bytes]) -> list[bytes]:
    message = await subscription.get(5)
    assert message.payload == message.parts[0].data
    return [part.data for part in message.parts]


# --- an application ----------------------------------------------------------------------


async def test_an_application_that_authorizes_runs_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "pubsub.toml"
    file.write_text(
        f"""
        [bus.main]
        url = "messagebus://warden@bus.example"
        everyone = 0

        [profile.test.bus.main]
        url = "memory://{NAME}?username=warden"
        guarded = ["AUTH/#"]
        """
    )
    app = App()

    @app.authorizer("AUTH/{ticker}")
    async def entitle(request: AuthorizationRequest, ticker: str) -> set[int] | None:
        return {1} if ticker == "VOD" and request.user == "tom" else None

    config = Config.load(file, profile="test", environ={})
    async with bus_of("tom") as tom, notices(tom) as told:
        async with tom.subscribe("AUTH/VOD") as messages, tom.subscribe("AUTH/BT"):
            # Who waited before the application came is asked about as well.
            async with app.running(["main"], config=config) as running:
                await eventually(lambda: told == [("not_entitled", "AUTH/BT")])
                await running.bus().publish("AUTH/VOD", parts=PARTS)
                assert await parts_of(messages) == [b"open", b"one"]
            # Rights outlive who gave them.
            await tom.publish("AUTH/VOD", b"plain")
            assert (await messages.get(5)).payload == b"plain"


async def test_who_may_not_authorize_is_asked_nothing(space: Space) -> None:
    space.allow("guest", authorize=["AUTH/guest"])
    space.allow("warden")
    asked: list[str] = []

    async def answer(request: AuthorizationRequest) -> set[int]:
        asked.append(request.topic)
        return {1, 2}

    async with bus_of("guest") as guest, guest.authorize("AUTH/#", answer) as authorizer:
        async with guest.subscribe("AUTH/T") as messages, guest.subscribe("AUTH/guest"):
            await eventually(lambda: authorizer.stats.granted == 1)
            (member,) = await guest.members("AUTH/guest")
            request = AuthorizationRequest(member, "AUTH/T")
            with pytest.raises(NotAuthorized, match="may not authorize"):
                await guest.entitle(request, {1})
            await guest.publish("AUTH/T", parts=PARTS)
            async with warden() as (bus, granting, questions):
                await eventually(answered(granting))
                await bus.publish("AUTH/T", parts=PARTS[1:])
                assert await parts_of(messages) == [b"one"]
                assert [question.topic for question in questions] == ["AUTH/T"]
    assert asked == ["AUTH/guest"]


# --- what is shown -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "seen"),
    [
        (set(), [b"open"]),
        ({1}, [b"open", b"one"]),
        ({2}, [b"open"]),
        ({1, 2, 3}, [b"open", b"one", b"both"]),
        (EVERYTHING, [b"open", b"one", b"both"]),
    ],
)
async def test_parts_are_shown_to_who_holds_all_they_need(
    held: set[int] | Everything, seen: list[bytes]
) -> None:
    async with warden(lambda request: held) as (bus, authorizer, _), bus_of("tom") as tom:
        async with tom.subscribe("AUTH/T") as messages:
            await eventually(answered(authorizer))
            receipt = await bus.publish("AUTH/T", parts=PARTS)
            assert receipt.subscribers == 1
            assert await parts_of(messages) == seen


async def test_a_message_of_which_nothing_is_left_is_told() -> None:
    async with (
        warden() as (bus, authorizer, _),
        bus_of("tom") as tom,
        notices(tom) as told,
        tom.subscribe("AUTH/T") as messages,
    ):
        await eventually(answered(authorizer))
        await bus.publish("AUTH/T", parts=PARTS[2:])
        await bus.publish("AUTH/T", parts=PARTS)
        assert await parts_of(messages) == [b"open", b"one"]
        await eventually(lambda: told == [("not_entitled", "AUTH/T")])


async def test_what_is_not_guarded_is_shown_to_everybody() -> None:
    async with bus_of("tom") as tom, tom.subscribe("free/#") as messages:
        await tom.publish("free/T", parts=PARTS)
        assert await parts_of(messages) == [b"open", b"one", b"both"]


async def test_with_wildcards_each_topic_is_asked_about_when_something_is_published() -> None:
    async with (
        warden(lambda request: None if request.topic == "AUTH/no" else {1}) as (bus, stats, asked),
        bus_of("tom") as tom,
        tom.subscribe("#") as messages,
    ):
        assert (await bus.publish("AUTH/T", parts=PARTS)).subscribers == 0
        await bus.publish("AUTH/no", parts=PARTS)
        await eventually(answered(stats, 2))
        for topic in ("AUTH/no", "AUTH/T"):
            await bus.publish(topic, parts=PARTS)
        assert await parts_of(messages) == [b"open", b"one"]
        assert [request.topic for request in asked] == ["AUTH/T", "AUTH/no"]
        # A refusal is asked about again when the client subscribes again.
        async with tom.subscribe("AUTH/+"):
            await bus.publish("AUTH/no", parts=PARTS)
            await eventually(answered(stats, 3))


async def test_what_is_stored_is_shown_as_far_as_the_rights_go() -> None:
    async with warden() as (bus, authorizer, asked), bus_of("tom") as tom:
        await bus.publish("AUTH/T", parts=PARTS, retain=True)
        assert await tom.last("AUTH/T") is None
        assert [message async for message in tom.history("#")] == []
        async with tom.subscribe("AUTH/T") as messages:
            await eventually(answered(authorizer))
            # What was retained comes with the right.
            assert await parts_of(messages) == [b"open", b"one"]
            last = await tom.last("AUTH/T")
            assert last is not None
            assert [part.data for part in last.parts] == [b"open", b"one"]
            stored = [message async for message in tom.history("AUTH/#", last=1)]
            assert [part.data for part in stored[0].parts] == [b"open", b"one"]
            await bus.entitle(asked[0], None)
            assert await tom.last("AUTH/T") is None
        async with tom.subscribe("AUTH/+") as messages:
            await eventually(answered(authorizer, 2))
            assert await parts_of(messages) == [b"open", b"one"]


@pytest.mark.parametrize("more", ["tom", "dick"])
async def test_a_share_group_gives_each_member_what_it_may_see(more: str) -> None:
    held: dict[str, set[int] | None] = {"tom": {1}, "dick": {1}, "harry": None, more: {1, 2}}
    async with (
        warden(lambda request: held[request.user]) as (bus, authorizer, asked),
        bus_of("tom") as tom,
        bus_of("dick") as dick,
        bus_of("harry") as harry,
        tom.subscribe("AUTH/T", group="g", ack="manual") as toms,
        dick.subscribe("AUTH/T", group="g", ack="manual") as dicks,
        harry.subscribe("AUTH/T", group="g", ack="manual") as harrys,
    ):
        await eventually(answered(authorizer, 3))
        await bus.publish("AUTH/T", parts=PARTS)
        await eventually(lambda: toms.stats.received + dicks.stats.received == 1)
        first, second = (toms, dicks) if toms.stats.received else (dicks, toms)
        expected = {toms: [b"open", b"one"], dicks: [b"open", b"one"]}
        expected[toms if more == "tom" else dicks].append(b"both")
        # Given back, it goes to the other one, who may see less or more of it.
        message = await first.get(5)
        assert [part.data for part in message.parts] == expected[first]
        await message.nack()
        again = await second.get(5)
        assert again.redelivered
        assert [part.data for part in again.parts] == expected[second]
        await again.ack()
        for request in asked:
            await bus.entitle(request, None)
        assert (await bus.publish("AUTH/T", parts=PARTS)).subscribers == 0
        assert harrys.stats.received == 0


async def test_what_a_lost_session_missed_is_shown_as_far_as_the_rights_go(space: Space) -> None:
    async with warden() as (bus, authorizer, asked), bus_of("tom", persistent=True) as tom:
        async with tom.subscribe("AUTH/T") as messages, tom.subscribe("AUTH/U") as others:
            await eventually(answered(authorizer, 2))
            space.refuse(True)
            tom.native(MemoryBackend).cut(ConnectionResetError("cut"))
            await bus.publish("AUTH/T", parts=PARTS)
            await bus.publish("AUTH/U", parts=PARTS)
            await bus.entitle(next(each for each in asked if each.topic == "AUTH/T"), None)
            space.refuse(False)
            assert await parts_of(others) == [b"open", b"one"]
            assert messages.stats.received == 0


# --- who is there ------------------------------------------------------------------------


async def test_others_see_a_subscriber_from_its_first_right_to_its_last() -> None:
    release = asyncio.Event()
    asked: list[AuthorizationRequest] = []

    async def answer(request: AuthorizationRequest) -> set[int] | None:
        asked.append(request)
        await release.wait()
        return {1} if request.topic == "AUTH/T" else None

    async with (
        bus_of("warden") as bus,
        bus.authorize("AUTH/#", answer) as authorizer,
        bus.notifications("AUTH/#") as changes,
        bus.presence("AUTH/T") as presence,
        bus_of("tom") as tom,
        notices(tom) as told,
    ):
        async with asyncio.timeout(5):
            assert (await anext(changes)).kind is InterestKind.SYNCED
        async with tom.subscribe("AUTH/T") as messages, asyncio.timeout(5):
            await eventually(lambda: asked)
            assert await bus.members("AUTH/T") == []
            with pytest.raises(PublishFailed, match="not subscribed"):
                await bus.send_to(asked[0].member, "AUTH/T", b"too early")
            release.set()
            event = await anext(changes)
            assert (event.kind, event.member) == (InterestKind.JOINED, asked[0].member)
            await eventually(lambda: presence.count == 1)
            await bus.send_to(asked[0].member, "AUTH/T", parts=PARTS)
            assert await parts_of(messages) == [b"open", b"one"]
            await bus.entitle(asked[0], {1, 2})
            for _ in range(2):
                await bus.entitle(asked[0], None)
            assert (await anext(changes)).kind is InterestKind.LEFT
            await eventually(lambda: presence.count == 0)
            await bus.entitle(asked[0], {2})
            assert (await anext(changes)).kind is InterestKind.JOINED
            # The second refusal said nothing new; what is asked for next would come behind it.
            await tom.subscribe("AUTH/U")
            await eventually(lambda: len(told) > 1)
            assert told == [("not_entitled", "AUTH/T"), ("not_entitled", "AUTH/U")]
        async with asyncio.timeout(5):
            assert (await anext(changes)).kind is InterestKind.LEFT
        assert authorizer.stats.asked == 2


async def test_topics_that_are_guarded_later_are_hidden_from_who_is_there(space: Space) -> None:
    async with (
        connect(f"memory://{NAME}", username="tom") as tom,
        tom.subscribe("later/T") as messages,
        tom.presence("later/T") as presence,
    ):
        await tom.publish("later/T", b"seen")
        assert (await messages.get(5)).payload == b"seen"
        space.guard("later/{name}")
        await eventually(lambda: presence.count == 0)
        await tom.publish("later/T", b"hidden")
        async with tom.authorize("later/#", lambda request: {1}) as authorizer:
            await eventually(answered(authorizer))
        await eventually(lambda: presence.count == 1)
        await tom.publish("later/T", b"seen again")
        assert (await messages.get(5)).payload == b"seen again"


# --- questions ---------------------------------------------------------------------------


async def test_who_unsubscribes_is_not_asked_about_any_more() -> None:
    async with bus_of("tom") as tom:
        async with tom.subscribe("AUTH/T"):
            pass
        async with tom.subscribe("AUTH/U"), warden() as (_, authorizer, asked):
            await eventually(answered(authorizer))
            assert [request.topic for request in asked] == ["AUTH/U"]


@pytest.mark.parametrize("persistent", [False, True])
async def test_what_is_asked_once_is_not_asked_again_in_that_session(persistent: bool) -> None:
    release = asyncio.Event()

    async def answer(request: AuthorizationRequest) -> set[int]:
        await release.wait()
        return {1}

    async with bus_of("warden", persistent=persistent) as bus, bus_of("tom") as tom:
        async with bus.authorize("AUTH/#", answer) as authorizer, tom.subscribe("AUTH/T") as seen:
            await eventually(lambda: authorizer.stats.asked == 1)
            async with bus.authorize("AUTH/T", answer) as second, tom.subscribe("AUTH/U"):
                await eventually(lambda: authorizer.stats.asked == 2)
                assert second.stats.asked == 0
            # A lost session leaves its questions to the next one.
            bus.native(MemoryBackend).cut(ConnectionResetError("cut"))
            await eventually(lambda: authorizer.stats.asked == 3)
            release.set()
            await eventually(lambda: authorizer.stats.granted)
            await tom.publish("AUTH/T", parts=PARTS)
            assert await parts_of(seen) == [b"open", b"one"]


async def test_rights_end_with_the_session_they_were_given_in() -> None:
    async with warden() as (bus, authorizer, asked), bus_of("tom") as tom:
        async with tom.subscribe("AUTH/T") as messages:
            await eventually(answered(authorizer))
            tom.native(MemoryBackend).cut(ConnectionResetError("cut"))
            await eventually(answered(authorizer, 2))
            assert [request.topic for request in asked] == ["AUTH/T", "AUTH/T"]
            await bus.publish("AUTH/T", parts=PARTS)
            assert await parts_of(messages) == [b"open", b"one"]


async def test_what_a_closed_authorizer_left_is_asked_again() -> None:
    async def never(request: AuthorizationRequest) -> set[int]:
        await asyncio.sleep(3600)
        return {1, 2}

    async with bus_of("warden") as bus, bus_of("tom") as tom, tom.subscribe("AUTH/T") as messages:
        async with bus.authorize("AUTH/T", never) as first:
            await eventually(lambda: first.stats.asked == 1)
        async with bus.authorize("AUTH/T", lambda request: {1}) as second:
            await eventually(answered(second))
            await bus.publish("AUTH/T", parts=PARTS)
            assert await parts_of(messages) == [b"open", b"one"]


async def test_answers_about_those_who_are_gone_are_ignored() -> None:
    async with warden() as (bus, authorizer, asked):
        async with bus_of("tom") as tom, tom.subscribe("AUTH/T"):
            await eventually(answered(authorizer))
        await bus.entitle(asked[0], {1})
        async with bus_of("tom", client_id=asked[0].member.id) as tom:
            # The same name, but nobody asked about this one.
            await bus.entitle(asked[0], {1})
            await bus.publish("AUTH/T", b"x", retain=True)
            assert await tom.last("AUTH/T") is None


async def test_too_many_questions_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "_MOST_WAITING", 1)
    async with bus_of("tom") as tom, notices(tom) as told:
        async with tom.subscribe("AUTH/T"), tom.subscribe("AUTH/U"):
            await eventually(lambda: told == [("not_entitled", "AUTH/U")])
        # Those that were given up make room.
        async with tom.subscribe("AUTH/V"), warden() as (_, authorizer, _):
            await eventually(answered(authorizer))
            assert len(told) == 1


async def test_what_is_guarded_must_be_filters() -> None:
    with pytest.raises(BadOption) as caught:
        await connect("memory://", guarded=("a/#/b",)).open()
    assert caught.value.option == "guarded"
