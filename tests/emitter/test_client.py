"""The native client against the embedded broker, and what it sends, byte for byte."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, cast

import msgspec
import pytest

from pubsub_core.errors import BadOption, ConnectError, NotConnected, PayloadTooLarge
from pubsub_core.interfaces import Address, BackendContext
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_emitter import (
    BadRequestError,
    Client,
    Emitter,
    EmitterError,
    EmitterMessage,
    EmitterServer,
    ForbiddenError,
    NotFoundError,
    Reply,
    UnauthorizedError,
    connect,
)
from pubsub_emitter.backend import EmitterBackend
from pubsub_emitter.client.handlers import Handlers
from pubsub_emitter.options import EmitterOptions
from pubsub_emitter.plugin import INFO
from pubsub_emitter.protocol import OLDEST_TIME, YOUNGEST_TIME, MessageId, parse_channel
from pubsub_mqtt.connection import Will
from pubsub_mqtt.connection.keepalive import Quiet, standard_keepalive
from pubsub_mqtt.server.endpoint import Client as Peer
from pubsub_mqtt.server.endpoint import EndpointServer
from pubsub_mqtt.server.endpoint.packets import (
    Connect,
    Publish,
    Subscribe,
    Unsubscribe,
    encode_publish,
)
from tests.emitter.places import Place, Running, real
from tests.emitter.vectors import KEYS, LICENSE, MASTER_KEY, VECTORS
from tests.mqtt.server.endpoint.wire import SmallDialect
from tests.servers import Authority, LeakCheck

DEMO = KEYS["demo/#/ rwslp"]
EVERYTHING = KEYS["#/ rwslp"]


@pytest.fixture
def leaks() -> Iterator[None]:
    check = LeakCheck()
    yield
    deadline = time.monotonic() + 20
    while (found := check.leaks()) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not found


@pytest.fixture
def running(leaks: None) -> Iterator[Running]:
    with Running(EmitterServer(license=LICENSE)) as found:
        yield found


@pytest.fixture(params=["embedded", "real"] if isinstance(real(), Place) else ["embedded"])
def place(request: pytest.FixtureRequest, leaks: None) -> Iterator[Place]:
    """The embedded broker, and the real one that the environment names, if it does."""
    found = real()
    if request.param == "real" and isinstance(found, Place):
        yield found
        return
    with Running(EmitterServer(license=LICENSE)) as running:
        yield Place(running.url, MASTER_KEY)


def hurry(client: Client) -> None:
    """Connect again soon; paho would wait for a second."""
    cast("Any", client._required().paho).reconnect_delay_set(0.05, 1)


@contextlib.contextmanager
def linked(where: Running | Place, *, start: bool = True, **options: Any) -> Iterator[Client]:
    """A connected client with its loop in a thread."""
    client = Client()
    client.connect(where.url, **options)
    hurry(client)
    if start:
        told = threading.Event()
        client.on_connect = told.set
        client.loop_start()
        assert told.wait(5)
        client.on_connect = None
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def wait(condition: Callable[[], object], what: str = "", *, within: float = 20.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_real_server_makes_keys_for_the_tests_that_ask_for_a_place() -> None:
    found = real()
    if isinstance(found, str):
        pytest.skip(found)
    assert len(found.key) == 32


# --- what is sent ----------------------------------------------------------------------


class Recorder(SmallDialect):
    """Keeps every packet and answers nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.packets: list[Any] = []
        self.keepalives: list[int] = []

    def connect(self, client: Peer, packet: Connect) -> int:
        self.keepalives.append(packet.keepalive)
        client.state = set[str]()
        return 0

    def publish(self, client: Peer, packet: Publish) -> bool:
        self.packets.append(packet)
        return True

    def subscribe(self, client: Peer, packet: Subscribe) -> Sequence[int]:
        self.packets.append(packet)
        return [0] * len(packet.filters)

    def unsubscribe(self, client: Peer, packet: Unsubscribe) -> None:
        self.packets.append(packet)


CALLS: dict[str, Callable[[Client], Any]] = {
    "subscribe K a with_from(1514764800), with_until(1514764900)": lambda c: c.subscribe(
        "K", "a", options=[c.with_from(1514764800), c.with_until(1514764900)]
    ),
    "subscribe K a/#/ (hash filter, via paho)": lambda c: c.subscribe("K", "a/#/"),
    "unsubscribe_with_group K a g1": lambda c: c.unsubscribe_with_group("K", "a", "g1"),
}


@pytest.mark.parametrize("vector", VECTORS["client_calls"], ids=lambda v: v["call"])
def test_every_call_sends_what_the_sdk_sends(vector: dict[str, Any], leaks: None) -> None:
    recorder = Recorder()
    with Running(EndpointServer(recorder)) as running, linked(running) as client:
        helpers = {name: getattr(client, name) for name in dir(client) if name.startswith("with")}
        call = CALLS.get(vector["call"])
        if call is not None:
            call(client)
        else:
            # The call stands in the vector as Python.
            eval("client." + vector["call"], {"client": client, **helpers})
        wait(lambda: recorder.packets)
        (packet,) = recorder.packets
        # An empty "?" and a trailing "&" are not sent.
        topic = re.sub(r"[?&]$", "", vector["topic"])
        if vector["op"] == "publish":
            assert packet.topic == topic
            assert packet.retain is vector["retain"]
            if topic.startswith("emitter/"):
                # Requests go out at QoS 1, so that their answers can be told apart.
                assert packet.qos == 1
                if vector["payload"]:
                    wanted = json.loads(vector["payload"])
                    if vector["call"] == 'presence("K","a")':
                        del wanted["changes"]  # it would stop changes that are wanted
                    assert json.loads(packet.payload) == wanted
                else:
                    assert packet.payload == b""
            else:
                assert packet.qos == vector["qos"]
                assert packet.payload.decode() == vector["payload"]
        elif vector["op"] == "subscribe":
            assert packet.filters == ((topic, 0),)
        else:
            assert packet.filters == (topic,)


def test_every_name_and_argument_of_the_sdk_is_there() -> None:
    sdk = pytest.importorskip("emitter", reason="emitter-io is not installed").Client
    for name, theirs in inspect.getmembers(sdk):
        if name.startswith("_"):
            continue
        ours = inspect.getattr_static(Client, name)
        if isinstance(theirs, property):
            assert isinstance(ours, property), name
            assert ours.fset is not None
        elif callable(theirs):
            wanted = inspect.signature(theirs).parameters
            found = inspect.signature(getattr(Client, name)).parameters
            assert list(found)[: len(wanted)] == list(wanted), name
            for parameter in wanted.values():
                if parameter.default in (inspect.Parameter.empty, {}) or name == "presence":
                    continue
                assert found[parameter.name].default == parameter.default, name
        else:
            assert getattr(Client, name) == theirs


# --- handlers --------------------------------------------------------------------------


def _note(called: list[str], channel: str, _: Any) -> None:
    called.append(channel)


def test_handlers_are_found_in_the_order_of_the_sdk() -> None:
    trie = VECTORS["client_trie"]
    handlers: Handlers[Any] = Handlers()
    called: list[str] = []
    for channel in trie["insert"]:
        handlers.add(channel, partial(_note, called, channel))
    for lookup in trie["lookups"]:
        called.clear()
        for call in handlers.find(lookup["channel"]):
            call(None)
        assert called == lookup["handlers_in_order"], lookup["channel"]


def test_several_handlers_under_one_channel_and_removing_them() -> None:
    handlers: Handlers[str] = Handlers()
    first, second = (lambda _: None), (lambda _: None)
    handlers.add("a/", first)
    handlers.add("/a//", second)
    handlers.add("a", first, "g")
    handlers.add("a", first)  # it is there
    assert handlers.find("a/b/") == [first, second, first]
    assert handlers.remove("a/", first, "") == 1
    assert handlers.find("a/") == [second, first]
    assert handlers.remove("a") == 2
    assert handlers.find("a/") == []
    assert handlers.remove("never/") == 0


# --- what it does ----------------------------------------------------------------------


def test_a_program_written_for_the_sdk(place: Place) -> None:
    """The SDK's own example, with the import changed."""
    found: list[Any] = []
    client = Client()
    client.on_connect = lambda: found.append("connected")
    client.on_disconnect = lambda: found.append("disconnected")
    client.on_message = lambda m: found.append(("default", m.channel, m.as_string()))
    client.on_keygen = found.append
    client.loop_start()
    client.connect(host=place.host, port=place.port, secure=place.secure)
    client.keygen(place.master, place.at("a") + "/", "rw")
    wait(lambda: len(found) == 2)
    assert found[0] == "connected"
    assert set(found[1]) == {"status", "key", "channel"}
    key = found[1]["key"]
    client.subscribe(key, place.at("a"), lambda m: found.append(("handler", m.as_object().x)))
    client.publish(key, place.at("a"), '{"x": 5}', {client.with_at_least_once()})
    wait(lambda: ("handler", 5) in found)
    client.unsubscribe(key, place.at("a")).result()
    client.subscribe(key, place.at("a")).result()
    client.publish(key, place.at("a"), "plain")
    wait(lambda: ("default", place.at("a") + "/", "plain") in found)
    client.loop_stop()
    client.disconnect()
    assert found[-1] == "disconnected"


@pytest.mark.parametrize("loop", ["start", "forever", "once", "waiting"])
def test_on_connect_may_be_set_after_connecting(loop: str, running: Running) -> None:
    """As in the samples of the SDK, whose loop reads what the broker says to CONNECT."""
    client = Client()
    client.connect(running.url)
    called: list[int] = []
    client.on_connect = lambda: called.append(threading.get_ident())
    thread = threading.Thread(target=client.loop_forever)
    watch = Stopwatch()
    match loop:
        case "start":
            client.loop_start()
        case "forever":
            thread.start()
        case "once":
            client.loop(0.01)
        case _:
            client.me().result()
    wait(lambda: called)
    assert watch.seconds < 0.8  # paho's loop looks for what is due once a second
    client.disconnect()
    client.loop_stop()
    if thread.is_alive():
        thread.join(5)
    assert len(called) == 1
    assert (called == [threading.get_ident()]) is (loop in {"once", "waiting"})


def test_other_threads_need_not_wait_for_loop_forever(running: Running) -> None:
    client = Client()
    client.connect(running.url)
    thread = threading.Thread(target=client.loop_forever)
    thread.start()
    watch = Stopwatch()
    for _ in range(8):
        client.me().result()
    assert watch.seconds < 4  # paho's loop looks for what is due once a second
    client.disconnect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_connection_that_no_loop_saw_is_told_when_it_ends(running: Running) -> None:
    client = Client()
    called: list[str] = []
    client.connect(running.url)
    client.on_connect = lambda: called.append("connect")
    client.on_disconnect = lambda: called.append("disconnect")
    assert not called
    client.disconnect()
    assert called == ["connect", "disconnect"]


def test_messages_are_what_paho_takes_for_a_payload(place: Place) -> None:
    with linked(place) as client:
        found: list[bytes] = []
        client.on_message = lambda m: found.append(m.binary)
        client.subscribe(place.key, place.at("a")).result()
        for message in ("é", b"\xff", bytearray(b"array"), 42, -1.5, None):
            client.publish(place.key, place.at("a"), message, ["+1"]).result()
        wait(lambda: len(found) == 6)
        assert found == ["é".encode(), b"\xff", b"array", b"42", b"-1.5", b""]
        with pytest.raises(TypeError, match="not dict"):
            client.publish(place.key, place.at("a"), cast("Any", {}))


def test_a_program_that_subscribes_whenever_it_is_connected(running: Running) -> None:
    found: list[str] = []
    connects: list[int] = []
    client = Client()

    def connected() -> None:
        client.subscribe(DEMO, "demo/a", lambda m: found.append(m.as_string()))
        client.subscribe(DEMO, "demo/b", more)
        client.subscribe("no key", "demo/b", more)
        connects.append(1)

    def more(message: EmitterMessage) -> None:
        found.append(message.channel)

    client.connect(running.url)
    hurry(client)
    client.on_connect = connected
    client.loop_start()
    wait(lambda: len(connects) == 1)
    running.do(running.server.restart())
    wait(lambda: len(connects) == 2)
    client.publish(DEMO, "demo/a", "x", [client.with_at_least_once()]).result()
    client.publish(DEMO, "demo/b", "x", [client.with_at_least_once()]).result()
    assert found == ["x", "demo/b/"]
    client.disconnect()
    client.loop_stop()


def test_a_handler_is_changed_without_waiting(place: Place) -> None:
    with linked(place) as client:
        found: list[tuple[str, str]] = []
        client.on_message = lambda m: found.append(("none", m.as_string()))

        def first(message: EmitterMessage) -> None:
            found.append(("first", message.as_string()))

        def second(message: EmitterMessage) -> None:
            found.append(("second", message.as_string()))

        channel = place.at("a")
        client.subscribe(place.key, channel, first)
        for handler in (second, first, first):
            client.unsubscribe(place.key, channel)
            client.subscribe(place.key, channel, handler).result()
            client.publish(place.key, channel, "x", [client.with_at_least_once()]).result()
        client.unsubscribe(place.key, channel)
        client.subscribe(place.key, channel).result()
        client.publish(place.key, channel, "x", [client.with_at_least_once()]).result()
        wait(lambda: len(found) == 4)
        assert [name for name, _ in found] == ["second", "first", "first", "none"]


def test_what_no_broker_takes_is_not_sent(place: Place) -> None:
    """The broker would close the connection, and again after each reconnect."""
    with linked(place) as client:
        lost: list[int] = []
        client.on_disconnect = lambda: lost.append(1)
        channel = place.at("a")
        head = len(f"{place.key}/{channel}".rstrip("/")) + 1 + 4
        flags = [client.with_at_least_once()]
        client.publish(place.key, channel, bytes(65536 - head), flags).result()
        with pytest.raises(PayloadTooLarge) as caught:
            client.publish(place.key, channel, bytes(65536 - head + 1), flags).result()
        assert caught.value.limit == 65536 - head
        with pytest.raises(PayloadTooLarge):
            client.keygen(place.master, "a/" * 40_000, "r").result()
        with pytest.raises(PayloadTooLarge):
            client.publish(place.key, "ä" * 40_000, "x").result()
        client.me().result()
        assert not lost


@pytest.mark.parametrize(
    ("given", "sent"), [(0, 90), (1, 1), (60, 60), (90, 90), (91, 90), (120, 90), (65_535, 90)]
)
def test_a_keepalive_keeps_an_idle_link_at_a_broker_that_waits_for_120_seconds(
    given: int, sent: int, leaks: None
) -> None:
    recorder = Recorder()
    with Running(EndpointServer(recorder)) as running, linked(running, keepalive=given):
        assert recorder.keepalives == [sent]
    # As a bus says it in CONNECT, and looks after it.
    options = EmitterOptions(keepalive=given)
    backend = EmitterBackend(BackendContext(INFO, Address("emitter", "127.0.0.1"), options))
    assert backend.connection.settings.keepalive == sent
    quiet = Quiet(sent, 0.0, 0.0, None, reading=True)
    due = standard_keepalive(quiet).due
    assert due <= 70
    assert standard_keepalive(quiet._replace(inbound=due, outbound=due)).ping


def test_a_negative_keepalive_is_refused() -> None:
    with pytest.raises(BadOption, match="keepalive=-1"):
        Client().connect("127.0.0.1", keepalive=-1)


WIDER: dict[str, Callable[[Client], Any]] = {
    "a group that is empty": lambda c: c.subscribe_with_group("K", "jobs", ""),
    "a group of slashes": lambda c: c.subscribe_with_group("K", "jobs", "//"),
    "a group of two segments": lambda c: c.subscribe_with_group("K", "jobs", "g/x"),
    "a group that is a wildcard": lambda c: c.subscribe_with_group("K", "jobs", "+"),
    "leaving an empty group": lambda c: c.unsubscribe_with_group("K", "jobs", ""),
    "a group in the channel": lambda c: c.subscribe("K", "$share//jobs"),
    "a group without a channel": lambda c: c.subscribe("K", "$share/jobs"),
    "no channel in a group": lambda c: c.subscribe_with_group("K", "", "g"),
    "no channel": lambda c: c.subscribe("K", "/"),
    "an empty segment": lambda c: c.subscribe("K", "rooms//private"),
    "an empty key": lambda c: c.subscribe("", "a"),
    "a key with a channel": lambda c: c.subscribe("K/a", "b"),
    "publishing, an empty key": lambda c: c.publish("", "a", "x"),
    "publishing with options, an empty key": lambda c: c.publish("/", "a", "x", {"ttl": 5}),
    "publishing, no channel": lambda c: c.publish("K", "", "x"),
    "leaving, an empty key": lambda c: c.unsubscribe("", "a"),
    "presence, an empty key": lambda c: c.presence("", "a", True),
    "presence, no channel": lambda c: c.presence("K", "", True, True, lambda e: None),
    "history, an empty key": lambda c: c.history("", "a"),
    "keygen, an empty key": lambda c: c.keygen("", "a/", "r"),
    "a ban with an empty secret": lambda c: c.keyban("", "T", True),
    "a ban of nothing": lambda c: c.keyban("M", "", True),
    "a link with an empty key": lambda c: c.link("", "a", "a0", True),
    "a link without a name": lambda c: c.link("K", "a", "", True),
    "a link with a long name": lambda c: c.link("K", "a", "a00", True),
    "publishing through no link": lambda c: c.publish_with_link("", "x"),
    "publishing through a topic": lambda c: c.publish_with_link("K/a/", "x"),
    "an empty option": lambda c: c.publish("K", "a", "x", [""]),
    "an empty option alone": lambda c: c.subscribe("K", "a", options=""),
    "an option without a value": lambda c: c.subscribe("K", "a", options=["last="]),
    "a value with another option": lambda c: c.history("K", "a", {"last": "1&from=0"}),
    "a negative time to live": lambda c: c.link("K", "a", "a0", True, [c.with_ttl(-1)]),
    "an unknown flag": lambda c: c.publish("K", "a", "x", ["+2"]),
}


@pytest.mark.parametrize("call", WIDER.values(), ids=WIDER)
def test_what_would_mean_more_or_other_than_was_asked_is_refused(
    call: Callable[[Client], Any], leaks: None
) -> None:
    recorder = Recorder()
    with Running(EndpointServer(recorder)) as running, linked(running) as client:
        with pytest.raises(BadOption, match=r"empty|no |not |has ") as caught:
            call(client)
        assert isinstance(caught.value, ValueError)
        client.publish("K", "after", "x")
        wait(lambda: recorder.packets)
        assert [each.topic for each in recorder.packets] == ["K/after/"]
        assert not client.remove_presence_handler("")


def test_requests_return_their_answers(place: Place) -> None:
    with linked(place, username="alice") as client:
        room = place.at("room")
        key = client.keygen(place.master, f"{place.root}/#/", "rwslp").result()
        assert len(key) == 32
        client.subscribe(key, room).result()
        status = client.presence(key, room, status=True).result()
        assert [each["username"] for each in status["who"]] == ["alice"]
        assert client.link(key, room, "a0", subscribe=False).result()["name"] == "a0"
        assert client.me().result()["links"] == {"a0": f"{room}/"}
        for number in range(3):
            client.publish(
                key, room, b"%d" % number, [client.with_ttl(60), client.with_at_least_once()]
            ).result()
        # The Go broker gives those of one second in another order.
        page = client.history(key, room, [client.with_last(9)]).result()
        assert sorted(each.payload for each in page) == [b"0", b"1", b"2"]
        assert {each.channel for each in page} == {f"{room}/"}
        assert client.keyban(place.master, key, False).result() is False


def test_history_pages_backwards(running: Running) -> None:
    with linked(running) as client:
        for number in range(3):
            client.publish(
                DEMO, "demo/h", b"%d" % number, [client.with_ttl(60), client.with_at_least_once()]
            ).result()
        page = client.history(DEMO, "demo/h", [client.with_last(2)]).result()
        assert [each.payload for each in page] == [b"1", b"2"]
        rest = client.history(DEMO, "demo/h", {"last": 9}, before=page[0].id).result()
        assert [each.payload for each in rest] == [b"0"]


class GoHistory(Recorder):
    """Answers as the Go broker: newest first, and not at all what exceeds one packet."""

    def __init__(self, count: int, most: int) -> None:
        super().__init__()
        self.ids = [str(MessageId(7, OLDEST_TIME, number)) for number in range(count)]
        self.most = most
        self.asked: list[int] = []

    def publish(self, client: Peer, packet: Publish) -> bool:
        body = json.loads(packet.payload)
        last = parse_channel(body["channel"]).last
        assert last is not None
        self.asked.append(last)
        end = self.ids.index(body["startFromID"]) if "startFromID" in body else len(self.ids)
        page = [
            {"id": self.ids[n], "channel": "a/", "payload": base64.b64encode(b"%d" % n).decode()}
            for n in reversed(range(max(end - last, 0), end))
        ]
        if len(page) <= self.most:
            answer = {"req": packet.packet_id, "messages": page}
            client.send(encode_publish(packet.topic, json.dumps(answer).encode()))
        return True


@pytest.mark.parametrize(
    ("most", "last", "asked"),
    [(99, 4, [4]), (99, 20, [20, 10]), (3, 9, [9, 2, 2, 2, 2, 1]), (1, 2, [2, 1, 1]), (3, 0, [0])],
)
def test_history_is_in_order_and_whole_whatever_a_page_holds(
    most: int, last: int, asked: list[int], leaks: None
) -> None:
    broker = GoHistory(10, most)
    with Running(EndpointServer(broker)) as running, linked(running) as client:
        found = client.history("K", "a", [client.with_last(last)]).result()
        assert [int(each.payload) for each in found] == list(range(max(10 - last, 0), 10))
        assert broker.asked == asked
        if last:
            rest = client.history("K", "a", [client.with_last(99)], before=found[0].id).result()
            assert [int(each.payload) for each in rest + found] == list(range(10))


def test_history_says_so_where_one_message_fits_into_no_answer(leaks: None) -> None:
    with Running(EndpointServer(GoHistory(10, 0))) as running, linked(running) as client:
        with pytest.raises(EmitterError, match="too long for an answer") as caught:
            client.history("K", "a", [client.with_last(9)]).result()
        assert not caught.value.retryable


@pytest.mark.parametrize("loop", [True, False])
def test_history_of_large_messages_comes_in_several_answers(loop: bool, running: Running) -> None:
    with linked(running, start=loop) as client:
        once = [client.with_ttl(60), client.with_at_least_once()]
        sent = [b"%d" % number + bytes(15_000) for number in range(9)]
        for payload in sent:
            client.publish(DEMO, "demo/h", payload, once).result()
        page = client.history(DEMO, "demo/h", [client.with_last(7)]).result()
        assert [each.payload for each in page] == sent[2:]


@pytest.mark.parametrize(("matcher", "live"), [("emitter", ["own", "below"]), ("mqtt", ["own"])])
def test_a_key_for_one_channel_writes_there_alone_and_reads_below(
    matcher: Literal["emitter", "mqtt"], live: list[str], leaks: None
) -> None:
    server = EmitterServer(license=LICENSE, matcher=matcher)
    with Running(server) as running, linked(running) as client:
        key = server.make_key("demo/one/", "rwsl")
        once = [client.with_ttl(60), client.with_at_least_once()]
        found: list[str] = []
        client.subscribe(key, "demo/one", lambda m: found.append(m.as_string())).result()
        with pytest.raises(UnauthorizedError):
            client.publish(key, "demo/one/deep", "no", once).result()
        with pytest.raises(UnauthorizedError):
            client.subscribe(key, "demo/one/deep").result()
        for channel, text in (("one", "own"), ("one/deep", "below"), ("two", "beside")):
            client.publish(DEMO, f"demo/{channel}", text, once).result()
        assert found == live
        page = client.history(key, "demo/one", [client.with_last(9)]).result()
        assert [each.payload for each in page] == [b"own", b"below"]


@pytest.mark.timeout(120)
def test_a_banned_key_is_refused(place: Place) -> None:
    with linked(place) as client:
        key = client.keygen(place.master, f"{place.root}/#/", "rw").result()

        def refused() -> bool:
            try:
                client.publish(key, place.at("a"), "x", [client.with_at_least_once()]).result()
            except UnauthorizedError:
                return True
            return False

        assert not refused()
        assert client.keyban(place.master, key, True).result() is True
        wait(refused, within=place.patience)


def test_refusals_are_typed_and_hold_no_key(place: Place) -> None:
    with linked(place) as client:
        errors: list[dict[str, Any]] = []
        client.on_error = errors.append
        once = [client.with_at_least_once()]
        for call, kind, status in (
            (lambda: client.keygen(place.key, "a/", "r"), UnauthorizedError, 401),
            (lambda: client.keygen(place.master, "a", "r"), BadRequestError, 400),
            (lambda: client.publish(place.key, "other", "x", once), UnauthorizedError, 401),
            (lambda: client.publish(place.key, place.at("a b"), "x", once), BadRequestError, 400),
            (lambda: client.publish_with_link("zz", "x", once), BadRequestError, 400),
            (lambda: client.subscribe(place.key, "other"), UnauthorizedError, 401),
            (lambda: client.unsubscribe(place.key, "other"), UnauthorizedError, 401),
            (lambda: client.presence(place.key, "other", True), UnauthorizedError, 401),
            (lambda: client.history(place.key, "other"), UnauthorizedError, 401),
            (lambda: client.link(place.key, "a b", "a", False), BadRequestError, 400),
        ):
            reply: Any = call()
            with pytest.raises(kind) as caught:
                reply.result()
            assert caught.value.status == status
            assert place.key not in str(caught.value) + repr(caught.value)
            assert caught.value.__cause__ is None
        assert len(errors) == 10
        assert {ForbiddenError.code, NotFoundError.code} == {
            "emitter_forbidden",
            "emitter_not_found",
        }


async def test_requests_can_be_awaited_and_two_at_once_get_their_own_answers(
    place: Place,
) -> None:
    client = Client()
    await asyncio.to_thread(client.connect, place.url)
    client.loop_start()
    try:
        async with asyncio.timeout(10):
            first, second, third = await asyncio.gather(
                client.keygen(place.master, f"{place.at('a')}/", "r"),
                client.keygen(place.master, f"{place.root}/#/", "w"),
                client.me(),
            )
            assert len(third["id"]) == 26
            await client.subscribe(first, place.at("a"))
            with pytest.raises(UnauthorizedError):
                await client.subscribe(second, place.at("a"))
            await client.publish(second, place.at("b"), "x", [client.with_at_least_once()])
            with pytest.raises(UnauthorizedError):
                await client.keygen(second, "a/", "r")
    finally:
        await asyncio.to_thread(client.disconnect)
        await asyncio.to_thread(client.loop_stop)


def test_a_reply_runs_the_loop_where_none_runs(place: Place) -> None:
    with linked(place, start=False) as client:
        assert len(client.keygen(place.master, "a/", "r").result()) == 32
        client.subscribe(place.key, place.at("a")).result()


def test_a_reply_is_waited_for_no_longer_than_asked_where_no_loop_runs(running: Running) -> None:
    with linked(running, start=False) as client:
        running.server.pause()
        watch = Stopwatch()
        with pytest.raises(EmitterError, match=r"within 0\.3 s"):
            client.me().result(0.3)
        assert watch.seconds < 0.55
        running.do(_resumed(running.server))


async def _resumed(server: EndpointServer) -> None:
    server.resume()


def test_an_answer_reaches_who_waits_before_and_after_it_once() -> None:
    client = Client()
    for answer in ("resolve", "fail"):
        reply: Reply[int] = Reply(client, "a test")
        found: list[Any] = []
        waiting = threading.Thread(target=lambda r=reply, f=found: f.append(_outcome(r)))
        reply.add_done_callback(found.append)
        waiting.start()
        for _ in range(2):  # the second one changes nothing
            if answer == "resolve":
                reply.resolve(5 + reply.done())
            else:
                reply.fail(NotConnected("a test"))
        waiting.join(5)
        reply.add_done_callback(found.append)
        outcome = "not_connected" if answer == "fail" else 5
        assert [each for each in found if each is not reply] == [outcome]
        assert found.count(reply) == 2
        assert _outcome(reply) == outcome
        late: Reply[int] = Reply(client, "a test")
        late.resolve(7)
        assert late.result() == 7
        assert late.exception() is None


def _outcome(reply: Reply[int]) -> int | str:
    try:
        return reply.result(5)
    except NotConnected as exc:
        return exc.code


# --- the defects of 2.3.0, one test each -----------------------------------------------


def test_q1_q2_neither_a_presence_error_nor_a_raising_handler_ends_the_client(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    with linked(place) as client:
        errors: list[dict[str, Any]] = []
        messages: list[str] = []
        client.on_error = errors.append

        def bad(message: EmitterMessage) -> None:
            messages.append(message.as_string())
            raise RuntimeError("a mistake in a handler")

        client.presence(place.key, "other", True, True)
        wait(lambda: errors)
        assert errors[0]["status"] == 401
        client.subscribe(place.key, place.at("a"), bad).result()
        for number in range(3):
            client.publish(place.key, place.at("a"), str(number))
        wait(lambda: messages == ["0", "1", "2"])
        assert len(client.me().result()["id"]) == 26
        assert caplog.text.count("a mistake in a handler") >= 3


def test_q3_q24_payloads_are_decoded_robustly(caplog: pytest.LogCaptureFixture) -> None:
    class Point(msgspec.Struct):
        x: int

    assert EmitterMessage("a/", b"h\xc3\xa9").as_string() == "hé"
    assert EmitterMessage("a/", b"\xff").as_string() == "\ufffd"
    found = EmitterMessage("a/", b'{"a": {"b": [{"c": 1}]}, "d": null}').as_object()
    assert found["a"]["b"][0]["c"] == found.a.b[0].c == 1
    assert found.d is None
    with pytest.raises(AttributeError):
        _ = found.missing
    for bad in (b"\xff\xfe", b"{", b"", b"[" * 20000):
        assert EmitterMessage("a/", bad).as_object() is None
    assert EmitterMessage("a/", b'{"x": 3}').as_object(Point) == Point(3)
    with pytest.raises(ValueError):
        EmitterMessage("a/", b'{"x": "no"}').as_object(Point)
    assert EmitterMessage("a/", b"\x00").as_binary() == EmitterMessage("a/", b"\x00").asBinary()
    assert EmitterMessage("a/", b"5").asObject() == 5
    assert EmitterMessage("a/", b"t").asString() == "t"
    assert "is not JSON" in caplog.text


def test_q5_an_error_reaches_its_own_handler_and_on_error(place: Place) -> None:
    with linked(place) as client:
        own: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        client.on_keygen = client.on_keyban = client.on_link = own.append
        client.on_error = errors.append
        client.keygen(place.key, "a/", "r")
        client.keyban(place.key, place.key, True)
        client.link(place.key, place.at("a b"), "a0", False)
        wait(lambda: len(errors) == 3)
        assert [each["status"] for each in own] == [401, 401, 400]


def test_q6_q7_presence_without_status_is_no_event_and_leaves_changes(place: Place) -> None:
    with linked(place) as client, linked(place, username="bob") as other:
        events: list[dict[str, Any]] = []
        client.on_presence = events.append
        client.presence(place.key, place.at("room"), False, True).result()
        assert events == []
        client.presence(place.key, place.at("room"), True).result()
        wait(lambda: [each["event"] for each in events] == ["status"])
        other.subscribe(place.key, place.at("room")).result()
        wait(lambda: len(events) == 2)
        assert events[1]["who"]["username"] == "bob"
        client.presence(place.key, place.at("room"), changes=False).result()
        other.unsubscribe(place.key, place.at("room")).result()
        client.me().result()
        assert len(events) == 2


def test_q8_link_answers_have_a_handler(place: Place) -> None:
    with linked(place) as client:
        found: list[dict[str, Any]] = []
        client.on_link = found.append
        client.link(place.key, place.at("a"), "a0", True, [client.without_echo()]).result()
        wait(lambda: found == [{"status": 200, "name": "a0", "channel": place.at("a/?me=0")}])


def test_q9_a_share_group_can_be_left_and_other_handlers_stay(place: Place) -> None:
    with linked(place) as client:
        plain: list[str] = []
        shared: list[str] = []
        client.subscribe(place.wide, place.at("s"), lambda m: plain.append(m.as_string())).result()
        client.subscribe_with_group(
            place.wide, place.at("s"), "g", lambda m: shared.append(m.as_string())
        ).result()
        client.publish(place.wide, place.at("s"), "1")
        wait(lambda: (plain, shared) == (["1"], ["1"]))
        client.unsubscribe(place.wide, place.at("s")).result()
        client.publish(place.wide, place.at("s"), "2")
        wait(lambda: shared == ["1", "2"])
        assert plain == ["1"]
        client.unsubscribe_with_group(place.wide, place.at("s"), "g").result()
        client.publish(place.wide, place.at("s"), "3", [client.with_at_least_once()]).result()
        assert shared == ["1", "2"]


def test_q10_channels_that_begin_with_emitter_are_delivered(place: Place) -> None:
    with linked(place) as client:
        found: list[str] = []
        client.on_message = lambda m: found.append(m.channel)
        for channel in ("emitter-news", "emitterkeygen", "emitter"):
            client.subscribe(place.wide, channel).result()
            client.publish(place.wide, channel, "x", [client.with_at_least_once()]).result()
        wait(lambda: found == ["emitter-news/", "emitterkeygen/", "emitter/"])


def test_q11_a_reconnect_restores_subscriptions_links_and_presence(running: Running) -> None:
    with linked(running) as client:
        found: list[tuple[str, str]] = []
        events: list[dict[str, Any]] = []
        connects: list[int] = []
        client.on_connect = lambda: connects.append(1)
        client.on_message = lambda m: found.append((m.channel, m.as_string()))
        client.on_presence = events.append
        client.subscribe(DEMO, "demo/a", options=[client.with_last(5)]).result()
        client.subscribe(EVERYTHING, "q/r").result()
        client.unsubscribe(EVERYTHING, "q/r").result()
        client.link(EVERYTHING, "q/l", "l", True, {"ttl": 5}).result()
        client.unsubscribe(EVERYTHING, "q/l").result()
        client.subscribe_with_group(EVERYTHING, "s", "g").result()
        client.link(DEMO, "demo/a", "a0", False, [client.with_ttl(60)]).result()
        client.presence(DEMO, "demo/p", changes=True).result()
        running.do(running.server.restart())
        wait(lambda: connects)
        client.publish_with_link("a0", "through the link", [client.with_at_least_once()]).result()
        client.publish(EVERYTHING, "s", "shared", [client.with_at_least_once()]).result()
        client.publish(EVERYTHING, "q/r", "no", [client.with_at_least_once()]).result()
        client.publish_with_link("l", "no", [client.with_at_least_once()]).result()
        assert found == [("demo/a/", "through the link"), ("s/", "shared")]
        with linked(running, username="bob") as other:
            other.subscribe(DEMO, "demo/p").result()
            wait(lambda: events)
        assert events[0]["who"]["username"] == "bob"


def _has(items: list[Any], count: int) -> bool:
    return len(items) == count


def test_q11_stored_messages_are_not_replayed_again_and_restoring_can_be_switched_off(
    leaks: None, tmp_path: Any
) -> None:
    for restore in (True, False):
        server = EmitterServer(license=LICENSE, store=tmp_path / f"store{restore}")
        with Running(server) as running:
            client = Client(restore=restore)
            found: list[str] = []
            connects: list[int] = []
            client.on_connect = lambda connects=connects: connects.append(1)
            client.on_message = lambda m, found=found: found.append(m.as_string())
            client.connect("127.0.0.1", server.port, False)
            hurry(client)
            client.loop_start()
            options = [client.with_ttl(60), client.with_at_least_once()]
            client.publish(DEMO, "demo/a", "stored", options).result()
            client.subscribe(DEMO, "demo/a", options=[client.with_last(5)]).result()
            assert found == ["stored"]
            running.do(server.restart())
            wait(partial(_has, connects, 2))
            client.publish(DEMO, "demo/a", "new", [client.with_at_least_once()]).result()
            assert found == (["stored", "new"] if restore else ["stored"])
            client.disconnect()
            client.loop_stop()


def test_q12_a_refused_connection_is_an_error_and_no_connect(leaks: None) -> None:
    dialect = SmallDialect()
    dialect.refuse = 5
    with Running(EndpointServer(dialect)) as running:
        client = Client()
        called: list[int] = []
        client.on_connect = lambda: called.append(1)
        with pytest.raises(ConnectError):
            client.connect("127.0.0.1", running.server.port, False)
        assert not called
        assert not client.connected


def test_q13_a_hash_is_sent_where_mqtt_allows_it(leaks: None) -> None:
    with Running(EmitterServer(license=LICENSE, matcher="mqtt")) as running:
        with linked(running) as client:
            found: list[str] = []
            client.on_message = lambda m: found.append(m.channel)
            client.subscribe(DEMO, "demo/#/").result()
            client.publish(DEMO, "demo/a/b", "x", [client.with_at_least_once()]).result()
            assert found == ["demo/a/b/"]
            client.unsubscribe(DEMO, "demo/#/").result()
            client.publish(DEMO, "demo/a/b", "x", [client.with_at_least_once()]).result()
            assert found == ["demo/a/b/"]
            for channel, options in (("demo/#/", [client.with_last(5)]), ("demo/#/b", [])):
                with pytest.raises(ValueError, match="'#'"):
                    client.subscribe(DEMO, channel, options=options)


def test_q14_the_loop_can_be_started_first_and_connecting_again_leaves_nothing(
    running: Running,
) -> None:
    client = Client()
    with pytest.raises(NotConnected):
        client.loop(0.1)
    client.loop_start()
    for _ in range(3):
        client.connect("127.0.0.1", running.server.port, False)
        assert len(client.me().result()["id"]) == 26
    wait(lambda: running.server.stats.clients == 1)
    client.disconnect()
    client.disconnect()
    client.loop_stop()
    client.loop_stop()


def test_the_loop_stops_at_once_and_leaves_nothing(running: Running) -> None:
    with linked(running, start=False) as client:
        watch = Stopwatch()
        for _ in range(20):
            client.loop_start()
            client.loop_stop()
        assert watch.seconds < 10  # with paho's own it takes 20


@pytest.mark.parametrize("form", ["{0}", "{0}:{1}", "mqtt://{0}:{1}", "tcp://{0}", "ws://{0}:{1}"])
def test_q15_hosts_in_every_form(form: str, running: Running) -> None:
    client = Client()
    port = running.server.port
    client.connect(form.format("127.0.0.1", port), port, False)
    client.loop_start()
    assert len(client.me().result()["id"]) == 26
    client.disconnect()
    client.loop_stop()


def test_q16_tls_with_an_own_authority_and_a_will(authority: Authority, leaks: None) -> None:
    certificate = authority.issue("emitter-client")
    server = EmitterServer(
        license=LICENSE, certfile=certificate.certfile, keyfile=certificate.keyfile
    )
    with Running(server) as running:
        watching, leaving = Client(), Client()
        found: list[str] = []
        watching.on_message = lambda m: found.append(m.as_string())
        for client, will in ((watching, None), (leaving, Will(f"{DEMO}/demo/w/", b"bye"))):
            client.connect(
                "127.0.0.1", server.port, ca_file=authority.cafile, will=will, client_id="x"
            )
            client.loop_start()
        watching.subscribe(DEMO, "demo/w").result()
        leaving.disconnect()
        leaving.loop_stop()
        wait(lambda: found == ["bye"])
        untrusting = Client()
        with pytest.raises(ConnectError):
            untrusting.connect("127.0.0.1", running.server.port)
        watching.disconnect()
        watching.loop_stop()


def test_q17_what_is_pending_fails_when_the_connection_ends(leaks: None) -> None:
    recorder = Recorder()
    with Running(EndpointServer(recorder)) as running, linked(running) as client:
        lost = client.keygen(MASTER_KEY, "a/", "r")  # acknowledged without an answer
        with pytest.raises(EmitterError, match="did not answer"):
            lost.result()
        client.disconnect()
        for call in (
            client.me,
            lambda: client.publish("K", "a", "x"),
            lambda: client.subscribe("K", "a"),
            lambda: client.unsubscribe("K", "a"),
        ):
            reply: Any = call()
            with pytest.raises(NotConnected):
                reply.result()


def test_a_handler_that_waits_is_told_at_once(place: Place) -> None:
    with linked(place) as client:
        found: list[BaseException] = []

        def waiting(_: EmitterMessage) -> None:
            try:
                client.me().result()
            except RuntimeError as exc:
                found.append(exc)

        client.subscribe(place.key, place.at("a"), waiting).result()
        client.publish(place.key, place.at("a"), "x")
        wait(lambda: found)
        assert "cannot wait" in str(found[0])


def test_q18_a_message_through_a_link_can_have_flags(place: Place) -> None:
    with linked(place) as client:
        client.link(place.key, place.at("a"), "a0", False).result()
        flags = [client.with_retain(), client.with_at_least_once()]
        client.publish_with_link("a0", "kept", flags).result()
        client.publishWithLink("a0", "not kept")
        page = client.history(place.key, place.at("a"), {"last": 9}).result()
        assert [each.payload for each in page] == [b"kept"]


def test_q19_q20_options_come_in_any_form(leaks: None) -> None:
    recorder = Recorder()
    with Running(EndpointServer(recorder)) as running, linked(running) as client:
        forms: list[Any] = [
            None,
            {},
            [],
            {client.with_retain()},
            (client.with_ttl(5), client.with_retain()),
            {"ttl": 5, "me": False},
            client.with_ttl(5),
        ]
        for options in forms:
            client.publish("K", "a", b"m", options)
        wait(lambda: len(recorder.packets) == 7)
        assert [each.topic for each in recorder.packets] == [
            "K/a/", "K/a/", "K/a/", "K/a/", "K/a/?ttl=5", "K/a/?ttl=5&me=0", "K/a/?ttl=5",
        ]  # fmt: skip
        assert [each.retain for each in recorder.packets] == [False] * 3 + [True] * 2 + [False] * 2


def test_q21_several_handlers_and_how_they_go(place: Place) -> None:
    with linked(place) as client:
        first: list[str] = []
        second: list[str] = []
        presence: list[str] = []
        keep = lambda m: first.append(m.as_string())  # noqa: E731
        client.subscribe(place.key, place.at("a"), keep).result()
        client.subscribe(place.key, place.at("a"), lambda m: second.append(m.as_string())).result()
        client.publish(place.key, place.at("a"), "1")
        wait(lambda: (first, second) == (["1"], ["1"]))
        assert client.remove_handler(place.at("a"), keep) == 1
        client.publish(place.key, place.at("a"), "2")
        wait(lambda: second == ["1", "2"])
        assert first == ["1"]
        client.presence(
            place.key, place.at("a"), True, None, lambda e: presence.append(e["event"])
        ).result()
        wait(lambda: presence == ["status"])
        assert client.remove_presence_handler(place.at("a")) == 1


def test_q22_a_refused_subscription_leaves_no_handler(place: Place) -> None:
    with linked(place) as client:
        wrong: list[str] = []
        right: list[str] = []
        elsewhere = place.made("elsewhere/", "rwp")
        client.on_message = lambda m: right.append(m.channel)
        refused = client.subscribe(elsewhere, place.at("a"), lambda m: wrong.append(m.channel))
        with pytest.raises(UnauthorizedError):
            refused.result()
        with pytest.raises(UnauthorizedError):
            client.presence(
                elsewhere, place.at("a"), True, None, lambda e: wrong.append(e["event"])
            ).result()
        client.subscribe(place.key, place.at("a")).result()
        client.publish(place.key, place.at("a"), "x")
        wait(lambda: right == [place.at("a") + "/"])
        assert not wrong


def test_windows_of_time_are_checked() -> None:
    when = datetime(2020, 1, 1, tzinfo=UTC)
    assert Client.with_from(when) == "from=1577836800"
    assert Client.with_from(when.replace(tzinfo=None)) == "from=1577836800"
    assert Client.with_until(1577836800.9) == "until=1577836800"
    assert Client.with_from(OLDEST_TIME) == f"from={OLDEST_TIME}"
    assert Client.with_until(YOUNGEST_TIME) == f"until={YOUNGEST_TIME}"
    for bad in (0, OLDEST_TIME - 1, YOUNGEST_TIME + 1, float("inf"), float("nan")):
        with pytest.raises(ValueError):
            Client.with_from(bad)
        with pytest.raises(ValueError):
            Client.with_until(bad)


def test_no_log_holds_a_key(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with linked(running) as client:
        client.subscribe(DEMO, "demo/a").result()
        client.publish(DEMO, "other", "x")
        for reply in (client.subscribe(DEMO, "other"), client.keygen(DEMO, "a/", "r")):
            with pytest.raises(UnauthorizedError):
                reply.result()
        running.do(running.server.stop())
        wait(lambda: not client.connected)
        client.publish(DEMO, "demo/a", "x")
        shown = caplog.text + repr(client)
    assert DEMO not in shown


# --- 1.x -------------------------------------------------------------------------------


def test_the_api_of_1_x(place: Place) -> None:
    options = {"host": place.host, "port": place.port, "secure": place.secure}
    emitter = connect(options)
    assert isinstance(emitter, Emitter)
    assert options == {"host": place.host, "port": place.port, "secure": place.secure}
    found: list[Any] = []
    emitter.on("message", lambda m: found.append(m.asString()))
    emitter.on("keygen", lambda k: found.append(k["status"]))
    emitter.on("presence", lambda p: found.append(p["event"]))
    emitter.on("me", lambda m: found.append(len(m["id"])))
    emitter.on("nonsense", print)
    emitter.loopStart()
    emitter.subscribe(place.key, place.at("a") + "/", last=2).result()
    emitter.publish(place.key, place.at("a") + "/", "h\u00e9", ttl=5)
    emitter.publish(place.key, place.at("a") + "/", "unheard", me=False)
    wait(lambda: found == ["h\u00e9"])
    emitter.keygen(place.master, "a/").result()
    emitter.presence(place.key, place.at("a") + "/").result()
    emitter.me().result()
    wait(lambda: found[1:] == [200, "status", 26])
    emitter.link(place.key, place.at("a") + "/", "a0", True, True, ttl=5).result()
    emitter.publishWithLink("a0", "linked")
    wait(lambda: found[-1] == "linked")
    emitter.unsubscribe(place.key, place.at("a") + "/").result()
    emitter.disconnect()
    emitter.loopStop()


def test_handlers_given_before_connecting_are_kept_in_1_x(place: Place) -> None:
    called: list[str] = []
    emitter = Emitter()
    emitter.on("connect", lambda: called.append("connect"))
    emitter.on("disconnect", lambda: called.append("disconnect"))
    assert (
        emitter.connect({"host": place.host, "port": place.port, "secure": place.secure}) is emitter
    )
    emitter.disconnect()
    assert called == ["connect", "disconnect"]


# --- a server elsewhere ----------------------------------------------------------------


@pytest.mark.slow
def test_a_server_of_another_process_can_be_given_to_these_tests(leaks: None) -> None:
    with Running(EmitterServer(license=LICENSE)) as running:
        environment = {
            "PUBSUB_EMITTER_URL": running.url,
            "PUBSUB_EMITTER_MASTER_KEY": MASTER_KEY,
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-n", "0", "-q", "-k", "real", __file__],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert running.server.stats.connections > 20
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
