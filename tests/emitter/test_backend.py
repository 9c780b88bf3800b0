"""What the contract cannot ask of Emitter: keys, refusals, both rules, what is stored, links."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from pubsub_core.bus import Bus, connect
from pubsub_core.capabilities import Cap, ConfirmedBy
from pubsub_core.errors import (
    BadOption,
    ConnectError,
    InvalidFilter,
    InvalidTopic,
    NotAuthorized,
    NotConnected,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PubSubError,
    SubscribeFailed,
)
from pubsub_core.events import AccessRefused, Gap, InterestKind, Notice, Status
from pubsub_core.message import InFrame, Origin
from pubsub_core.testing.proxy import FaultProxy
from pubsub_emitter import EmitterError, EmitterServer, License
from pubsub_emitter.backend import EmitterBackend
from pubsub_emitter.backend.live_log import LiveLog
from pubsub_mqtt.server import MosquittoServer, find_mosquitto
from tests.emitter.places import Place, real
from tests.emitter.vectors import LICENSE, MASTER_KEY
from tests.servers import Authority, eventually

OURS = License.parse(LICENSE)
SOON: dict[str, Any] = {"reconnect_first": 0.01, "reconnect_max": 0.05}


@pytest.fixture
async def server() -> AsyncIterator[EmitterServer]:
    async with EmitterServer(license=LICENSE) as running:
        yield running


@pytest.fixture
async def mqtt_server() -> AsyncIterator[EmitterServer]:
    async with EmitterServer(license=LICENSE, matcher="mqtt") as running:
        yield running


class Embedded(Place):
    """A broker in the loop of the test, which must not wait for it to make keys."""

    def made(self, channel: str, permissions: str) -> str:
        return OURS.make_key(channel, permissions)


@contextlib.asynccontextmanager
async def somewhere(which: str) -> AsyncIterator[Place]:
    """The embedded broker with that matching rule, or the real one of the environment."""
    if which == "real":
        found = real()
        assert isinstance(found, Place)
        yield found
        return
    async with EmitterServer(license=LICENSE, matcher=cast("Any", which)) as server:
        yield Embedded(server.url, MASTER_KEY)


REAL = ["real"] if isinstance(real(), Place) else []


@pytest.fixture(params=["emitter", *REAL])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Brokers, with either rule."""
    async with somewhere(request.param) as found:
        yield found


@pytest.fixture(params=["emitter", "mqtt", *REAL])
async def each_rule(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    """Brokers, once with each rule."""
    async with somewhere(request.param) as found:
        yield found


def bus_of(where: EmitterServer | Place, *, key: str | None = None, **options: Any) -> Bus:
    """Return a bus that may do everything with one key, unless other keys are given."""
    url = (
        where.bus_url("me") if isinstance(where, Place) else f"emitter://me@127.0.0.1:{where.port}"
    )
    if key is None and not {"keys", "master_key", "license"} & set(options):
        key = where.wide if isinstance(where, Place) else OURS.make_key("#/", "rwslp")
    return connect(url, key=key, **options)


async def refused_soon(place: Place, call: Callable[[], Awaitable[object]]) -> None:
    """Return once *call* is refused: the Go broker looks at its bans once a minute."""
    deadline = time.monotonic() + place.patience
    while time.monotonic() < deadline:
        try:
            await call()
        except NotAuthorized:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("never refused")


def lose_session(bus: Bus) -> None:
    backend = bus.native(EmitterBackend)
    backend.driver._lost(ConnectError("the test cut the session"))  # pyright: ignore[reportPrivateUsage]
    backend.driver.abort()


def test_a_real_server_is_one_of_the_places() -> None:
    found = real()
    if isinstance(found, str):
        pytest.skip(found)
    assert REAL == ["real"]


async def within(work: Any, seconds: float = 5) -> Any:
    async with asyncio.timeout(seconds):
        return await work


async def stored(bus: Bus, wanted: str, **query: Any) -> list[bytes]:
    return [message.payload async for message in bus.history(wanted, **query)]


def notices(bus: Bus, into: list[Notice]) -> asyncio.Task[None]:
    async def collect() -> None:
        async for event in bus.events():
            if isinstance(event, Notice):
                into.append(event)  # noqa: PERF401  it must grow one by one

    return asyncio.create_task(collect())


# --- topics and options --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topic", "level", "character"),
    [
        ("a b/c", 0, " "),
        ("a/é", 1, "é"),
        ("a/{x}", 1, "{"),
        ("a/b\x01", 1, "\x01"),
        ("a//b", 1, ""),
        ("emitter/keygen", 0, ""),
        ("$share/g/a", 0, ""),
    ],
)
async def test_what_channels_cannot_carry_is_refused_here(
    server: EmitterServer, topic: str, level: int, character: str
) -> None:
    async with bus_of(server) as bus:
        with pytest.raises(InvalidTopic) as caught:
            await bus.publish(topic, b"x")
        assert (caught.value.level, caught.value.character) == (level, character)
        if "{" not in topic:
            with pytest.raises(InvalidFilter):
                await bus.subscribe(topic)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("emitter://", {}),
        ("emitter://h/path", {}),
        ("emitter://h", {"key_ttl": -1}),
        ("emitter://h", {"store": 0}),
        ("emitter://h", {"license": "nonsense"}),
        ("emitter://h", {"keys": {"a": {}}}),
        ("emitter://h", {"keepalive": 70_000}),
        ("emitter://h", {"matcher": "other"}),
    ],
)
async def test_options_that_mean_nothing(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        await connect(url, **options).open()


async def test_tls_and_websocket_inside_it(authority: Authority) -> None:
    certificate = authority.issue("emitter")
    async with EmitterServer(
        license=LICENSE, certfile=certificate.certfile, keyfile=certificate.keyfile
    ) as server:
        for scheme in ("emitters", "emitter+tls", "emitter+wss"):
            async with (
                connect(
                    f"{scheme}://127.0.0.1:{server.port}", license=LICENSE, ca_file=authority.cafile
                ) as bus,
                bus.subscribe("a/#") as inbox,
            ):
                await bus.publish("a/b", b"x")
                assert (await inbox.get(5)).payload == b"x"


@pytest.mark.mosquitto
@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed")
async def test_a_plain_mqtt_broker_is_told_from_emitter() -> None:
    async with MosquittoServer() as server:
        with pytest.raises(ConnectError, match="does not answer as an Emitter broker"):
            await within(connect(f"emitter://127.0.0.1:{server.port}", key="k").open())


# --- keys and refusals -----------------------------------------------------------------------


async def test_each_topic_is_published_to_with_its_own_key(place: Place) -> None:
    at = place.at
    keys = {
        at("a/#"): {"write": place.made(at("a/#/"), "w"), "read": place.made(at("a/#/"), "r")},
        at("a/private"): place.made(at("a/private/"), "rw"),
    }
    async with bus_of(place, keys=keys) as bus:
        async with bus.subscribe(at("a/+")) as inbox:
            assert (await bus.publish(at("a/x"), b"1")).confirmed_by is ConfirmedBy.BROKER
            await bus.publish(at("a/private"), b"2")
            assert [(await inbox.get(5)).payload for _ in range(2)] == [b"1", b"2"]
        with pytest.raises(
            NotAuthorized, match=f"no key is given to publish '{at('b')}'"
        ) as caught:
            await bus.publish(at("b"), b"x")
        assert isinstance(caught.value, PublishFailed)
        assert caught.value.outcome is Outcome.NOT_SENT
        with pytest.raises(NotAuthorized, match="no key is given to subscribe"):
            await bus.subscribe(at("#"))
        with pytest.raises(NotAuthorized, match="see who is there"):
            await bus.members(at("a/x"))


async def test_what_no_key_allows_is_not_claimed(place: Place) -> None:
    at = place.at
    keys = {at("a/#"): {"write": place.made(at("a/#/"), "w"), "read": place.made(at("a/#/"), "r")}}
    async with bus_of(place, keys=keys) as bus:
        for cap in (Cap.HISTORY, Cap.REPLAY, Cap.RETAINED, Cap.PRESENCE, Cap.NOTIFICATIONS):
            assert not bus.supports(cap)
            assert "there is no key" in bus.supports(cap).why
        with pytest.raises(NotSupported, match="history"):
            bus.history(at("a/b"))
    # Here the license tells that the key cannot load, although nobody said so.
    async with bus_of(place, key=place.made(at("#/"), "rwsp"), license=None) as bus:
        assert bus.supports(Cap.HISTORY)
        with pytest.raises(NotAuthorized):
            await stored(bus, at("a/b"))


async def test_a_refusal_reaches_the_publish_that_it_is_about(place: Place) -> None:
    at = place.at
    key = place.made(at("good/#/"), "rw")
    async with bus_of(place, key=key) as bus:
        topics = [at(f"{'good' if number % 3 else 'bad'}/{number}") for number in range(60)]
        results = await within(
            asyncio.gather(*(bus.publish(topic, b"x") for topic in topics), return_exceptions=True)
        )
        for topic, result in zip(topics, results, strict=True):
            if topic.startswith(at("good")):
                assert not isinstance(result, BaseException)
            else:
                assert isinstance(result, NotAuthorized)
                assert isinstance(result, PublishFailed)
                assert result.outcome is Outcome.REJECTED
                assert result.topic == topic
                assert result.reason == 401
        with pytest.raises(NotAuthorized) as caught:
            await bus.subscribe(at("bad/x"))
        assert isinstance(caught.value, SubscribeFailed)
        assert caught.value.topic == at("bad/x")
        with pytest.raises(NotAuthorized):
            await stored(bus, at("good/x"))
        with pytest.raises(NotAuthorized):
            await bus.members(at("good/x"))


async def test_a_refusal_without_confirmation_is_told(place: Place) -> None:
    at = place.at
    told: list[Notice] = []
    async with bus_of(place, key=place.made(at("good/"), "w")) as bus:
        task = notices(bus, told)
        receipt = await bus.publish(at("bad"), b"x", qos=0)
        assert receipt.confirmed_by is ConfirmedBy.TRANSPORT
        await eventually(lambda: bool(told))
        assert told[0].kind == "publish_refused"
        assert "not authorized" in told[0].text
        with pytest.raises(NotSupported, match="quality of service 2"):
            await bus.publish(at("good"), b"x", qos=2)
    task.cancel()


async def test_a_key_that_is_banned_is_an_event(place: Place) -> None:
    at = place.at
    key = place.made(at("a/#/"), "rw")
    told: list[Notice] = []
    async with bus_of(place, key=key, master_key=place.master) as bus:
        task = notices(bus, told)
        await bus.publish(at("a/b"), b"x")
        await bus.native(EmitterBackend).keyban(key)
        await refused_soon(place, lambda: bus.publish(at("a/b"), b"x"))
        with pytest.raises(NotAuthorized):
            await bus.subscribe(at("a/c"))
        with pytest.raises(NotAuthorized):
            await bus.publish(at("b"), b"x")
        await eventually(lambda: bool(told))
        event = told[0]
        assert isinstance(event, AccessRefused)
        assert (event.kind, event.topic, event.operation) == ("key_refused", at("a/b"), "publish")
        assert len(told) == 1, "only what worked before is told, and once"
        await bus.native(EmitterBackend).keyban(key, banned=False)
        if place.prompt:
            await bus.publish(at("a/b"), b"x")
    task.cancel()


async def test_a_key_that_has_expired_is_named_so_where_that_is_known(
    server: EmitterServer,
) -> None:
    key = OURS.make_key("a/#/", "rw", ttl=60, now=time.time() - 3600)
    told: list[Notice] = []
    async with bus_of(server, key=key, license=LICENSE) as bus:
        task = notices(bus, told)
        for _ in range(3):
            with pytest.raises(NotAuthorized):
                await bus.publish("a/b", b"x")
        await eventually(lambda: bool(told))
        assert isinstance(told[0], AccessRefused)
        assert told[0].kind == "key_expired"
        assert len(told) == 1
    task.cancel()


async def test_narrow_keys_are_made_by_the_broker_once(place: Place) -> None:
    at = place.at
    async with bus_of(place, master_key=place.master, key_ttl=600) as bus:
        backend = bus.native(EmitterBackend)
        made: list[tuple[str, str, int]] = []
        keygen = backend.keygen

        async def counting(target: str, permissions: str, *, ttl: int = 0) -> str:
            made.append((target, permissions, ttl))
            return await keygen(target, permissions, ttl=ttl)

        backend.keygen = counting  # type: ignore[method-assign,assignment]  # it counts
        async with bus.subscribe(at("a/b")) as inbox:
            for number in range(10):
                await bus.publish(at("a/b"), b"%d" % number)
            assert [(await inbox.get(5)).payload for _ in range(10)] == [
                b"%d" % number for number in range(10)
            ]
        assert made == [(at("a/b/"), "rl", 600), (at("a/b/"), "ws", 600)]
    with pytest.raises(NotAuthorized, match="no key could be made"):
        async with bus_of(place, master_key=place.made("#/", "rw")) as bus:
            await bus.publish(at("a/b"), b"x")


async def test_order_is_kept_while_a_key_is_made(place: Place) -> None:
    at = place.at
    async with (
        bus_of(place, master_key=place.master) as bus,
        bus_of(place) as other,
        other.subscribe(at("a/#")) as inbox,
    ):
        await bus.publish(at("a/known"), b"-1")
        topics = [at("a/new"), at("a/known"), at("a/other")]
        await within(asyncio.gather(*(bus.publish(topics[n % 3], b"%d" % n) for n in range(60))))
        got = [int((await inbox.get(5)).payload) for _ in range(61)]
        assert got == list(range(-1, 60))


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record) + repr(record.args))


async def test_keys_appear_nowhere() -> None:
    """In no topic, message, log line, repr, event or error, whatever happens."""
    lines = _Lines()
    root = logging.getLogger()
    level = root.level
    root.addHandler(lines)
    root.setLevel(logging.DEBUG)
    shown: list[str] = []
    told: list[Notice] = []

    async def refused(work: Any) -> None:
        with pytest.raises(PubSubError) as caught:
            await within(work)
        error: BaseException | None = caught.value
        while error is not None:
            shown.extend([str(error), repr(error), repr(error.args), repr(vars(error))])
            error = error.__cause__ or error.__context__

    try:
        async with EmitterServer(license=LICENSE) as server:
            port = server.port
            good, weak = server.make_key("a/#/", "rwslp"), server.make_key("b/", "p")
            bus = bus_of(
                server,
                keys={"a/#": good, "b": weak},
                master_key=MASTER_KEY,
                will={"topic": "a/will", "payload": "bye"},
                reconnect_first=0.01,
            )
            shown.append(repr(bus))
            async with bus:
                task = notices(bus, told)
                backend = bus.native(EmitterBackend)
                async with bus.subscribe("a/#") as inbox, bus.presence("a/b") as room:
                    await bus.publish("a/b", b"x", ttl=60)
                    await bus.publish("c/d", b"x", ttl=60)
                    message = await inbox.get(5)
                    shown += [message.topic, repr(message), repr(message.native), str(room.members)]
                    async for old in bus.history("a/b", last=5):
                        shown += [repr(old), repr(old.frame)]
                    await backend.link("x1", "a/b")
                    await backend.publish_link("x1", b"y")
                    shown += [repr(await backend.me())]
                    await refused(bus.publish("b", b"x"))
                    await refused(bus.publish("b", b"x", retain=True))
                    await refused(bus.subscribe("b").__aenter__())
                    await refused(bus.publish("b", bytes(70_000)))
                    await refused(bus.publish("b", bytes(50_000), ttl=5))
                    await refused(stored(bus, "b"))
                    await refused(backend.publish_link("zz", b"x"))
                    await backend.keyban(good)
                    await refused(bus.publish("a/b", b"x"))
                    await backend.keyban(good, banned=False)
                    sent = backend.driver.submit(f"{good}/a/b/", b"x", qos=1)
                    sent.topic = "a/b"
                    shown += [repr(sent), repr(bus.stats), repr(bus.capabilities)]
                    await server.stop()
                    await eventually(lambda: bus.status is Status.RECONNECTING)
                    await refused(bus.publish("a/b", b"x"))
                    await server.start()
                    await eventually(lambda: bus.status is Status.ONLINE)
                    await bus.publish("a/b", b"x")
                made = list(backend._ring._made.values())  # pyright: ignore[reportPrivateUsage]
                shown += [repr(value) for value in vars(backend).values()]
                shown += [repr(backend.context), repr(bus.info), repr(backend.connection.settings)]
            task.cancel()
            await refused(connect(f"emitter://127.0.0.1:{port}?key={good}&no_such=1").open())
            await refused(connect(f"emitter://127.0.0.1:{port}", keys={"a": "no/key"}).open())
    finally:
        root.removeHandler(lines)
        root.setLevel(level)
    assert told
    shown += [repr(each) for each in told]
    secrets = [good, weak, MASTER_KEY, LICENSE, *(key.text for key in made)]
    assert len(secrets) > 4
    for text in shown + lines.lines:
        for secret in secrets:
            assert secret not in text, f"a key was shown: {text.replace(secret, '<KEY>')[:400]}"


# --- matching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "how"),
    [
        (rule, how)
        for rule in ("emitter", "mqtt", *REAL)
        for how in ("one key", "master key", "license", "told")
        if (rule, how) != ("real", "license")  # which nobody gives away
    ],
)
async def test_filters_mean_the_same_under_both_rules(rule: str, how: str) -> None:
    async with somewhere(rule) as place:
        at = place.at
        async with bus_of(place, master_key=place.master) as bus:
            await bus.subscribe(at("x/#"))
            found = bus.native(EmitterBackend).matcher
            assert rule in (found, "real")
        ways: dict[str, dict[str, Any]] = {
            "one key": {},
            "master key": {"master_key": place.master},
            "license": {"license": LICENSE},
            "told": {"matcher": found},
        }
        async with bus_of(place, **ways[how]) as bus:
            filters = ["a", "a/+", "a/#", "a/+/#", "+/b", "#"]
            # Others may use a real broker at the same time.
            inboxes = {
                each: await bus.subscribe(each if each == "#" and rule != "real" else at(each))
                for each in filters
            }
            assert bus.native(EmitterBackend).matcher == ("auto" if how == "one key" else found)
            topics = ["a", "a/b", "a/b/c", "x/b", "a/b/c/d", "y"]
            for topic in topics:
                await bus.publish(at(topic), topic.encode())
            for each in filters:
                await bus.publish(at({"a": "a", "+/b": "z/b"}.get(each, "a/z")), b"end")
            wanted = {
                "a": ["a"],
                "a/+": ["a/b"],
                "a/#": ["a", "a/b", "a/b/c", "a/b/c/d"],
                "a/+/#": ["a/b", "a/b/c", "a/b/c/d"],
                "+/b": ["a/b", "x/b"],
                "#": topics,
            }
            for each, inbox in inboxes.items():
                got: list[str] = []
                while (message := await inbox.get(5)).payload != b"end":
                    got.append(message.payload.decode())
                assert got == wanted[each], each


async def test_filters_that_share_a_channel_live_and_die_apart(place: Place) -> None:
    at = place.at
    async with bus_of(place) as bus:
        exact, below = await bus.subscribe(at("a")), await bus.subscribe(at("a/#"))
        await within(below.close())
        await bus.publish(at("a"), b"1")
        assert (await exact.get(5)).payload == b"1"
        again = await bus.subscribe(at("a/#"))
        await within(exact.close())
        await bus.publish(at("a/b"), b"2")
        assert (await again.get(5)).payload == b"2"
        await within(again.close())
        received = bus.stats.received
        await bus.publish(at("a"), b"3")
        await bus.publish(at("a/b"), b"3")
        assert bus.stats.received == received, "the broker still sends what nobody wants"


async def test_nothing_is_kept_of_subscriptions_that_have_gone(place: Place) -> None:
    async with bus_of(place, matcher="emitter") as bus:
        inboxes = [await bus.subscribe(place.at(f"a/{number}/#")) for number in range(20)]
        inboxes += [await bus.subscribe(place.at(f"b/{n}"), group="workers") for n in range(5)]
        backend = bus.native(EmitterBackend)
        sizes = {name: len(getattr(backend, name)) for name in ("_current", "_groups", "_held")}
        assert sizes == {"_current": 25, "_groups": 2, "_held": 25}
        with pytest.raises(SubscribeFailed, match="told apart"):
            await bus.subscribe(place.at("b/3/c"))
        await within(asyncio.gather(*(inbox.close() for inbox in inboxes)))
        for name in ("_current", "_groups", "_held", "_holders", "turns"):
            assert not len(getattr(backend, name)), name
        async with bus.subscribe(place.at("b/3/c")) as inbox:
            await bus.publish(place.at("b/3/c"), b"x")
            assert (await inbox.get(5)).payload == b"x"


async def test_a_group_and_a_plain_subscription_must_not_meet(place: Place) -> None:
    at = place.at
    async with bus_of(place) as bus:
        await bus.subscribe(at("a/b"), group="workers")
        with pytest.raises(SubscribeFailed, match="told apart"):
            await bus.subscribe(at("a/#"))
        await bus.subscribe(at("b"))
    # With the broker's own rule an exact subscription gets what is below it, too.
    async with bus_of(place) as bus:
        await bus.subscribe(at("a"))
        with pytest.raises(SubscribeFailed, match="told apart"):
            await bus.subscribe(at("a/b"), group="workers")


async def test_what_is_not_wanted_back_does_not_come(place: Place) -> None:
    at = place.at
    async with (
        bus_of(place, echo=False) as bus,
        bus_of(place) as other,
        bus.subscribe(at("a")) as inbox,
        other.subscribe(at("a")) as theirs,
    ):
        await bus.publish(at("a"), b"mine")
        assert (await theirs.get(5)).payload == b"mine"
        await other.publish(at("a"), b"theirs")
        assert (await inbox.get(5)).payload == b"theirs"


async def test_a_will_is_published_with_its_key(server: EmitterServer) -> None:
    will = {"topic": "a/gone", "payload": "bye"}
    async with bus_of(server) as bus, bus.subscribe("a/gone") as inbox:
        for options in ({"license": LICENSE}, {"key": server.make_key("a/gone/", "w")}):
            async with bus_of(server, will=will, **options):
                pass
            assert (await inbox.get(5)).payload == b"bye"
    with pytest.raises(ConnectError, match="no key is given"):
        await within(bus_of(server, will=will, master_key=MASTER_KEY).open())


# --- what is stored --------------------------------------------------------------------------


async def test_only_what_has_a_ttl_is_stored_unless_told_otherwise(place: Place) -> None:
    at = place.at
    async with bus_of(place) as bus:
        await bus.publish(at("a"), b"passing")
        await bus.publish(at("a"), b"kept", ttl=60)
        assert await stored(bus, at("a")) == [b"kept"]
        assert not bus.native(EmitterBackend).keeps_history
    async with bus_of(place, store=60) as bus:
        await bus.publish(at("b"), b"kept")
        assert await stored(bus, at("b")) == [b"kept"]
        assert bus.native(EmitterBackend).keeps_history


async def test_history_means_its_filter(each_rule: Place) -> None:
    at = each_rule.at
    async with bus_of(each_rule) as bus:
        for topic in ("a", "a/b", "a/b/c", "a/d", "b"):
            await bus.publish(at(topic), topic.encode(), ttl=60)
        assert await stored(bus, at("a")) == [b"a"]
        assert await stored(bus, at("a/+")) == [b"a/b", b"a/d"]
        assert await stored(bus, at("a/#")) == [b"a", b"a/b", b"a/b/c", b"a/d"]
        assert await stored(bus, at("a/+/#")) == [b"a/b", b"a/b/c", b"a/d"]
        assert await stored(bus, at("a/#"), last=2) == [b"a/b/c", b"a/d"]
        assert await stored(bus, at("a"), last=1) == [b"a"], "newer ones below do not count"
        assert await stored(bus, at("a"), last=0) == []
        assert await stored(bus, at("a/#"), until=time.time() - 3600) == []
        for wanted in ("#", "+/b"):
            with pytest.raises(InvalidFilter, match="first level"):
                await stored(bus, wanted)
            with pytest.raises(InvalidFilter):
                await bus.subscribe(wanted, replay=5)


async def test_history_of_long_messages_is_complete(place: Place) -> None:
    """Only two or three of them fit into one answer of the broker."""
    at = place.at
    async with bus_of(place) as bus:
        payloads = [bytes([number]) * 20_000 for number in range(20)]
        for payload in payloads:
            await bus.publish(at("a"), payload, ttl=60)
        assert await stored(bus, at("a")) == payloads
        assert await stored(bus, at("a"), last=5) == payloads[-5:]
        longest = bytes(47_000)
        await bus.publish(at("a"), longest, ttl=60)
        assert await stored(bus, at("a"), last=1) == [longest]
        with pytest.raises(PayloadTooLarge):
            await bus.publish(at("a"), bytes(47_001), ttl=60)
        await bus.publish(at("a"), bytes(64_000))


async def test_the_newest_stored_message_counts_as_retained(place: Place) -> None:
    at = place.at
    async with bus_of(place) as bus, bus_of(place) as late:
        assert await bus.last(at("a/b")) is None
        await bus.publish(at("a/b"), b"one", retain=True)
        await bus.publish(at("a/b"), b"two", retain=True)
        await bus.publish(at("a/b/c"), b"below", retain=True)
        last = await bus.last(at("a/b"))
        assert last is not None
        assert (last.payload, last.origin, last.topic) == (b"two", Origin.RETAINED, at("a/b"))
        exact, below = await late.subscribe(at("a/b")), await late.subscribe(at("a/#"))
        assert (await exact.get(5)).payload == b"two"
        assert sorted([(await below.get(5)).payload for _ in range(2)]) == [b"below", b"two"]
        await bus.clear(at("a/b"))
        assert await bus.last(at("a/b")) is None
        everything = await late.subscribe(at("#"))
        await bus.publish(at("a/b"), b"live")
        for wanted in ((b"below", Origin.RETAINED), (b"live", Origin.LIVE)):
            message = await everything.get(5)
            assert (message.payload, message.origin) == wanted
    async with bus_of(place, store=60) as bus:
        with pytest.raises(NotSupported, match="every message is stored"):
            await bus.last(at("a/b"))


async def test_nothing_stored_comes_where_no_first_level_is_named(server: EmitterServer) -> None:
    async with bus_of(server) as bus:
        await bus.publish("a", b"stored", retain=True)
        everything = await bus.subscribe("#")
        await bus.publish("a", b"live")
        message = await everything.get(5)
        assert (message.payload, message.origin) == (b"live", Origin.LIVE)


async def test_a_broker_without_history_can_be_subscribed_to(server: EmitterServer) -> None:
    """Emitter brokers before the request exist still."""
    async with bus_of(server) as bus:
        backend = bus.native(EmitterBackend)
        ask = backend._ask  # pyright: ignore[reportPrivateUsage]

        async def older(topic: str, payload: bytes) -> Any:
            return await ask(topic.replace("/history/", "/histories/"), payload)

        backend._ask = older  # type: ignore[method-assign]  # pyright: ignore[reportPrivateUsage]
        async with bus.subscribe("a") as inbox:
            await bus.publish("a", b"x")
            assert (await inbox.get(5)).payload == b"x"
            with pytest.raises(EmitterError, match="does not exist"):
                await stored(bus, "a")


async def test_a_hole_is_filled_where_its_history_can_be_had(place: Place) -> None:
    """One filter's history that is refused takes nothing from the others, nor the session."""
    at = place.at
    keys = {
        at("a/#"): place.made(at("a/#/"), "rwsl"),
        at("b/#"): place.made(at("b/#/"), "rws"),
    }
    async with (
        bus_of(place, keys=keys, store=600, **SOON) as bus,
        bus_of(place, store=600) as other,
    ):
        full = await bus.subscribe(at("a/#"), gaps=True)
        none = await bus.subscribe(at("b"), gaps=True)
        for topic in ("a/x", "b"):
            await other.publish(at(topic), b"before")
        assert (await full.get(5)).payload == b"before"
        assert (await none.get(5)).payload == b"before"
        lose_session(bus)
        for number in range(3):
            await other.publish(at("a/x"), b"same")
            await other.publish(at("b"), b"%d" % number)
        await eventually(lambda: bus.stats.sessions == 2 and bus.status is Status.ONLINE)
        for topic in ("a/x", "b"):
            await other.publish(at(topic), b"after")
        gap: Any = await full.get(5)
        assert isinstance(gap, Gap)
        assert gap.recovered
        got = [(await full.get(5)).payload for _ in range(4)]
        assert got == [b"same", b"same", b"same", b"after"]
        lost: Any = await none.get(5)
        assert isinstance(lost, Gap)
        assert not lost.recovered
        # It was back before or after what was published meanwhile.
        while (message := await none.get(5)).payload != b"after":
            assert message.payload in (b"0", b"1", b"2")


def frames(*payloads: bytes, topic: str = "a", at: float = 100.0) -> list[InFrame]:
    return [
        InFrame(topic=topic, payload=payload, time=at, id=f"stored-{number}")
        for number, payload in enumerate(payloads)
    ]


def ids(found: list[InFrame]) -> list[str | None]:
    return [frame.id for frame in found]


def test_the_newest_live_messages_are_the_newest_stored_ones() -> None:
    log = LiveLog()
    log.begin()
    for payload in (b"x", b"x"):
        log.note("a", payload, 100.0)
    log.note("b", b"x", 100.0)
    found = log.recognise(frames(b"x", b"y", b"x", b"x"), log.seen())
    assert ids(found) == ["stored-0", "stored-1", "live-1", "live-2"]
    assert log.topics_since(2) == {"b"}
    assert log.topics_since(0) == {"a", "b"}


def test_what_came_before_an_outage_is_the_oldest_that_is_stored() -> None:
    log = LiveLog()
    log.begin()
    for payload in (b"1", b"x", b"x"):
        log.note("a", payload, 100.0)
    log.begin()
    log.note("a", b"x", 103.0)
    found = log.recognise(frames(b"1", b"x", b"x", b"x", b"y", b"x"), log.seen())
    assert ids(found) == ["live-1", "live-2", "live-3", "stored-3", "stored-4", "live-4"]


def test_what_came_long_before_is_not_taken_for_what_is_stored() -> None:
    log = LiveLog()
    log.begin()
    log.note("a", b"x", 10.0)
    log.begin()
    assert ids(log.recognise(frames(b"x"), log.seen())) == ["stored-0"]
    assert ids(log.recognise(frames(b"x", topic="c"), log.seen())) == ["stored-0"]


# --- interest --------------------------------------------------------------------------------


async def test_who_still_gets_messages_another_way_has_not_left(place: Place) -> None:
    at = place.at
    async with bus_of(place) as bus, bus_of(place) as other:
        async with bus.presence(at("a/b")) as room:
            exact = await other.subscribe(at("a/b"))
            above = await other.subscribe(at("a/#"))
            assert (await room.get(5)).kind is InterestKind.JOINED
            await within(exact.close())
            third = await other.subscribe(at("a/b"))
            await within(third.close())
            assert [member.name for member in await bus.members(at("a/b"))] == ["me"]
            assert room.count == 1
            await within(above.close())
            assert list(await bus.members(at("a/b"))) == []


async def test_a_member_that_leaves_unnoticed_is_missed_in_time(place: Place) -> None:
    at = place.at
    async with bus_of(place, presence_refresh=0.02) as bus, bus_of(place) as other:
        above = await other.subscribe(at("a/#"))
        async with bus.presence(at("a/b")) as room:
            assert room.count == 1
            await within(above.close())
            event = await room.get(5)
            assert (event.kind, event.reason) == (InterestKind.LEFT, "resync")
            assert room.count == 0


async def test_more_members_than_can_be_listed_are_not_taken_for_none(
    place: Place,
) -> None:
    """The broker leaves an answer out that is longer than a packet."""
    at = place.at
    async with (
        bus_of(place, presence_refresh=0.02) as bus,
        bus_of(place, username="n" * 40_000) as first,
        bus_of(place, username="m" * 40_000) as second,
    ):
        await first.subscribe(at("a"))
        async with bus.presence(at("a")) as room:
            assert room.count == 1
            inbox = await second.subscribe(at("a"))
            assert (await room.get(5)).kind is InterestKind.JOINED
            for look in (bus.members(at("a")), bus.presence(at("a")).__aenter__()):
                with pytest.raises(EmitterError, match="more than one packet can list"):
                    await within(look)
            await first.close()
            event = await room.get(5)
            assert event.member is not None
            assert (event.kind, event.member.name[:1]) == (InterestKind.LEFT, "n")
            assert [member.name[:1] for member in room.members] == ["m"]
            await within(inbox.close())
            assert (await room.get(5)).kind is InterestKind.LEFT


async def test_a_watch_that_comes_to_nothing_leaves_nothing(place: Place) -> None:
    at = place.at
    async with bus_of(place) as bus, bus_of(place) as other:
        backend = bus.native(EmitterBackend)
        asked = backend.request
        events: list[str] = []
        backend._interest.event = (  # type: ignore[method-assign]  # pyright: ignore[reportPrivateUsage]
            lambda body: events.append(body["channel"])
        )
        # Each is given up when its request has been sent, or a moment before or after that.
        for steps in range(12):
            for view in (bus.presence(at("a")), bus.notifications(at("a/#"))):
                entering = asyncio.ensure_future(view.__aenter__())
                for _ in range(steps):
                    await asyncio.sleep(0)
                entering.cancel()
                (result,) = await asyncio.gather(entering, return_exceptions=True)
                if not isinstance(result, BaseException):
                    await within(view.close())
        await within(asked("me", {}))
        sub = await other.subscribe(at("a"))
        await within(sub.close())
        await within(asked("me", {}))
        assert events == []


async def test_notifications_tell_changes_and_what_is_known_of_before(each_rule: Place) -> None:
    at = each_rule.at
    async with bus_of(each_rule) as bus, bus_of(each_rule) as other:
        await other.subscribe(at("a/b"))
        async with bus.notifications(at("a/b")) as exact, bus.notifications(at("a/#")) as below:
            event = await exact.get(5)
            assert (event.kind, event.topic) == (InterestKind.JOINED, at("a/b"))
            assert (await exact.get(5)).kind is InterestKind.SYNCED
            assert (await below.get(5)).kind is InterestKind.SYNCED
            deeper = await other.subscribe(at("a/c/d"))
            event = await below.get(5)
            assert (event.kind, event.topic) == (InterestKind.JOINED, at("a/c/d"))
            await within(deeper.close())
            assert (await below.get(5)).kind is InterestKind.LEFT


# --- the broker's own requests ---------------------------------------------------------------


async def test_links_are_there_again_after_a_reconnect(place: Place) -> None:
    at = place.at
    async with (
        bus_of(place, master_key=place.master, **SOON) as bus,
        bus_of(place) as other,
        other.subscribe(at("a/b")) as inbox,
    ):
        backend = bus.native(EmitterBackend)
        await backend.link("x", at("a/b"), ttl=60, echo=False)
        receipt = await backend.publish_link("x", b"1")
        assert (receipt.topic, receipt.confirmed_by) == (at("a/b"), ConfirmedBy.BROKER)
        assert (await inbox.get(5)).payload == b"1"
        assert (await backend.me())["links"] == {"x": f"{at('a/b')}/?ttl=60&me=0"}
        lose_session(bus)
        await eventually(lambda: bus.stats.sessions == 2 and bus.status is Status.ONLINE)
        await backend.publish_link("x", b"2")
        assert (await inbox.get(5)).payload == b"2"
        assert await stored(other, at("a/b")) == [b"1", b"2"]
        with pytest.raises(PublishFailed, match="400"):
            await backend.publish_link("zz", b"3")
        for name in ("", "abc", f"{place.key}/a/"):
            with pytest.raises(BadOption, match="name of a link"):
                await backend.publish_link(name, b"3")
        with pytest.raises(BadOption, match="key is empty"):
            await backend.keygen("a/", "r", key="")
        with pytest.raises(BadOption, match="name of a link"):
            await backend.link("too-long", at("a/b"))


async def test_what_became_of_a_message_through_a_link_is_said(server: EmitterServer) -> None:
    async with FaultProxy("127.0.0.1", server.port) as proxy:
        url = f"emitter://127.0.0.1:{proxy.port}"
        async with connect(url, key=OURS.make_key("#/", "rw"), reconnect=False) as bus:
            backend = bus.native(EmitterBackend)
            await backend.link("x", "a/b")
            proxy.blackhole()
            publishing = asyncio.create_task(backend.publish_link("x", b"1"))
            await asyncio.sleep(0)
            await proxy.cut()
            with pytest.raises(PublishFailed) as caught:
                await within(publishing)
            assert (caught.value.outcome, caught.value.topic) == (Outcome.UNKNOWN, "a/b")
            with pytest.raises(NotConnected):
                await backend.publish_link("x", b"2")


async def test_requests_of_the_broker_and_their_refusals(place: Place) -> None:
    at = place.at
    async with bus_of(place, master_key=place.master) as bus:
        backend = bus.native(EmitterBackend)
        key = await backend.keygen(at("x/#/"), "rw", ttl=60)
        async with bus_of(place, key=key) as narrow:
            await narrow.publish(at("x/y"), b"x")
            with pytest.raises(NotAuthorized):
                await narrow.publish(at("y"), b"x")
        with pytest.raises(EmitterError, match="should end with"):
            await backend.keygen(at("x"), "rw")
        with pytest.raises(EmitterError, match="does not exist"):
            await backend.request("nothing", {})
        assert backend.client_id == (await backend.me())["id"]
        async with bus.subscribe(at("a")):
            assert [member.id for member in await bus.members(at("a"))] == [backend.client_id]
    async with bus_of(place) as bus:
        with pytest.raises(EmitterError, match="no master key"):
            await bus.native(EmitterBackend).keygen("x/", "r")


async def test_what_looks_like_an_answer_harms_nothing(server: EmitterServer) -> None:
    """Somebody with a key for everything can publish on channels below emitter/."""
    everything = server.make_key("#/", "rw")
    async with bus_of(server) as bus, bus_of(server) as other, bus.subscribe("#") as inbox:
        driver = other.native(EmitterBackend).driver
        for channel, payload in (
            ("emitter/error/", b'{"req":1,"status":401,"message":"x"}'),
            ("emitter/error/", b"\xff"),
            ("emitter/presence/", b'{"event":"subscribe","channel":"a/","who":7}'),
            ("emitter/presence/", b"[]"),
            ("emitter/history/", b'{"req":2,"messages":[{"id":"?"}]}'),
            ("emitter/", b"{}"),
        ):
            await driver.publish(f"{everything}/{channel}", payload, qos=1)
        await other.publish("a", b"x")
        assert (await inbox.get(5)).payload == b"x"
        await bus.publish("a", b"y")
        assert await stored(bus, "a") == []


# --- giving up -------------------------------------------------------------------------------


async def test_who_gives_up_leaves_nothing_at_the_broker(place: Place) -> None:
    at = place.at
    async with bus_of(place, master_key=place.master) as bus, bus_of(place) as other:
        backend = bus.native(EmitterBackend)
        gate = asyncio.Event()
        keygen = backend.keygen

        async def slow(target: str, permissions: str, *, ttl: int = 0) -> str:
            await gate.wait()
            return await keygen(target, permissions, ttl=ttl)

        inbox = await other.subscribe(at("a/x"))
        async with bus.presence(at("b")) as room:
            backend.keygen = slow  # type: ignore[method-assign,assignment]  # it waits
            given_up = asyncio.create_task(bus.publish(at("a/x"), b"given up"))
            kept = asyncio.create_task(bus.publish(at("a/x"), b"kept"))
            subscribing = asyncio.ensure_future(bus.subscribe(at("b")).__aenter__())
            for _ in range(5):
                await asyncio.sleep(0)
            given_up.cancel()
            subscribing.cancel()
            await asyncio.wait([given_up, subscribing])
            gate.set()
            await within(kept)
            assert (await inbox.get(5)).payload == b"kept"
            assert room.count == 0
            assert list(await other.members(at("b"))) == []


async def test_what_waits_for_a_key_fails_with_the_session(server: EmitterServer) -> None:
    bus = bus_of(server, master_key=MASTER_KEY, reconnect=False)
    await bus.open()
    backend = bus.native(EmitterBackend)
    asked = asyncio.Event()

    async def never(target: str, permissions: str, *, ttl: int = 0) -> str:
        asked.set()
        await backend.request("history", {"channel": "x"})
        await asyncio.Event().wait()
        return ""

    backend.keygen = never  # type: ignore[method-assign,assignment]  # it never answers
    publishing = [asyncio.create_task(bus.publish("a/x", b"%d" % n)) for n in range(3)]
    await within(asked.wait())
    await server.stop()
    results = await within(asyncio.gather(*publishing, return_exceptions=True))
    assert all(isinstance(result, PubSubError) for result in results)
    await within(bus.close())
