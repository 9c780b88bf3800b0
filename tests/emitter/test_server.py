"""`EmitterServer`: starting, telling, storing in a file, HTTP, TLS and WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import ssl
import stat
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.errors import BadOption, ConnectError
from pubsub_core.interfaces import DevServer
from pubsub_emitter import EmitterServer, License
from pubsub_emitter.server.storage import Storage, StorageFull
from pubsub_mqtt.server.endpoint.journal import Done
from pubsub_mqtt.server.endpoint.packets import ConnAck, Connect, PubAck, Publish, encode
from tests.emitter.support import Peer, broker
from tests.emitter.vectors import KEYS, LICENSE, MASTER_KEY
from tests.mqtt.server.endpoint.attacks import acknowledged_until_killed
from tests.mqtt.server.endpoint.stores import check_refusals
from tests.mqtt.server.endpoint.wire import WebWire, Wire
from tests.servers import Authority, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")

DEMO = KEYS["demo/#/ rwslp"]


# --- starting ----------------------------------------------------------------------------


async def test_a_new_server_makes_a_license_and_a_master_key_and_tells_them() -> None:
    server: DevServer = EmitterServer()
    await server.start()
    try:
        assert server.backend == "emitter"
        assert server.host == "127.0.0.1"
        assert server.url == f"emitter://127.0.0.1:{server.port}"
        told = server.describe()
        license_ = License.parse(str(told["license"]))
        assert license_.version == 3
        assert license_.decrypt(str(told["master_key"])).is_master
        assert told["matcher"] == "emitter"
        assert "volatile" in str(told["store"])
    finally:
        await server.stop()


async def test_a_given_license_is_used() -> None:
    async with broker() as server, Peer.connected(server) as peer:
        assert server.license == LICENSE == server.describe()["license"]
        made = server.make_key("a/#/", "rw", ttl=60)
        assert await peer.refusal(f"{made}/a/b/") == 0
        answer = await peer.request("keygen", key=server.master_key, channel="b/", type="rw")
        assert await peer.refusal(f"{answer['key']}/b/") == 0


@pytest.mark.parametrize("number", range(7))
async def test_licenses_of_every_version_work(number: int) -> None:
    from tests.emitter.vectors import VECTORS

    text = VECTORS["license"][number]["license"]
    async with EmitterServer(license=text) as server, Peer.connected(server) as peer:
        answer = await peer.request("keygen", key=server.master_key, channel="b/", type="rw")
        await peer.subscribe(f"{answer['key']}/b/")
        assert await peer.publish(f"{answer['key']}/b/") == [("b/", b"x")]


def test_bad_options_are_refused_without_repeating_a_license() -> None:
    for options in (
        {"license": "nonsense-that-is-secret:3"},
        {"matcher": "nats"},
        {"certfile": "x"},
        {"keyfile": "x"},
    ):
        with pytest.raises(BadOption) as caught:
            EmitterServer(**options)  # type: ignore[arg-type]  # as a command line may give them
        assert "secret" not in str(caught.value)


async def test_it_starts_again_on_the_same_port_and_has_forgotten_what_was_in_memory() -> None:
    async with broker() as server:
        port = server.port
        async with Peer.connected(server) as peer:
            await peer.publish(f"{DEMO}/demo/a/?ttl=60")
            assert len(server.storage) == 1
            await server.restart()
            assert await peer.wire.closed() == []
        assert (server.port, len(server.storage)) == (port, 0)
        async with Peer.connected(server) as peer:
            assert await peer.subscribe(f"{DEMO}/demo/a/") == []


async def test_a_taken_port_leaves_nothing_open(tmp_path: Path) -> None:
    async with broker() as server:
        other = EmitterServer(port=server.port, store=tmp_path / "store")
        with pytest.raises(ConnectError):
            await other.start()
    async with EmitterServer(store=tmp_path / "store"):
        pass


# --- storing in a file ---------------------------------------------------------------------


async def test_a_file_keeps_messages_bans_and_the_license(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    async with EmitterServer(store=path) as server, Peer.connected(server) as peer:
        key = server.make_key("demo/#/", "rwsl")
        banned = server.make_key("demo/#/", "rw")
        license_, master = server.license, server.master_key
        for number in range(20):
            await peer.publish(f"{key}/demo/a/?ttl=600", b"%d" % number)
        await peer.publish(f"{key}/demo/gone/?ttl=1", b"short")
        await peer.request("keyban", secret=master, target=banned, banned=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = EmitterServer(store=path)
    monkeypatch.setattr(again.storage, "_clock", lambda: time.time() + 1)
    async with again as server, Peer.connected(server) as peer:
        assert server.license == license_
        found = await peer.subscribe(f"{key}/demo/a/?last=99")
        assert [payload for _, payload in found] == [b"%d" % number for number in range(20)]
        assert await peer.subscribe(f"{key}/demo/gone/?last=9") == []
        assert await peer.refusal(f"{banned}/demo/a/") == 401
        await peer.publish(f"{key}/demo/a/?ttl=600", b"newest")
        assert (await peer.subscribe(f"{key}/demo/a/"))[0][1] == b"newest"


async def test_a_given_license_wins_over_that_of_the_file(tmp_path: Path) -> None:
    async with EmitterServer(store=tmp_path / "store") as server:
        first = server.license
    async with EmitterServer(store=tmp_path / "store", license=LICENSE) as server:
        assert server.license == LICENSE != first
    async with EmitterServer(store=tmp_path / "store") as server:
        assert server.license == LICENSE


@pytest.mark.slow  # sqlite waits a second for a file in use
async def test_a_file_in_use_or_of_something_else_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "store"
    async with EmitterServer(store=path):
        with pytest.raises(ConnectError, match="store"):
            await EmitterServer(store=path).start()
    other = tmp_path / "text"
    other.write_text("no database " * 100)
    with pytest.raises(ConnectError, match="text"):
        await EmitterServer(store=other).start()
    assert other.read_text().startswith("no database")


async def test_a_newer_or_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await check_refusals(path, lambda: EmitterServer(store=path))


# As version 0.1.0 wrote it.
FILE_0_1_0 = """
PRAGMA journal_mode = WAL;
CREATE TABLE bans (key TEXT PRIMARY KEY);
INSERT INTO "bans" VALUES('key');
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
INSERT INTO "facts" VALUES('counter','7');
CREATE TABLE messages (
    counter INTEGER PRIMARY KEY,
    contract INTEGER,
    time INTEGER,
    expires INTEGER,
    channel TEXT,
    payload BLOB
);
INSERT INTO "messages" VALUES(1,1,1796052067,4294967295,'a/b/',X'78');
"""


async def test_a_file_of_version_0_1_0_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(FILE_0_1_0)
    for _ in range(2):
        async with EmitterServer(store=path) as server:
            (found,) = server.storage.query(1, "a/b/", last=9)
            assert (found.payload, found.counter) == (b"x", 1)
            assert server.storage.is_banned("key")


CHILD = """
import asyncio, sys
from pubsub_emitter import EmitterServer
async def main():
    server = EmitterServer(license=sys.argv[1], store=sys.argv[2])
    await server.start()
    print(server.port, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_what_was_acknowledged_as_stored_survives_kill_9(tmp_path: Path) -> None:
    store = tmp_path / "store"
    acknowledged = 0
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, LICENSE, str(store)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port = int(await asyncio.to_thread(process.stdout.readline))
        wire = await Wire.open(port)
        await wire.send(Connect("c"))
        assert await wire.next() == ConnAck(0)
        acknowledged = await acknowledged_until_killed(
            process.pid, wire, lambda number: (f"{DEMO}/demo/k/?ttl=600", b"%d" % number)
        )
        wire.close()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert acknowledged >= 1000
    storage = Storage(store)
    await storage.open()
    contract = License.parse(LICENSE).contract
    numbers: set[int] = set()
    before = None
    while page := storage.query(contract, "demo/k/", last=500, before=before):
        numbers |= {int(each.payload) for each in page}
        before = page[0].id(contract, storage.process)
    await storage.close()
    assert set(range(1, acknowledged + 1)) <= numbers


@pytest.mark.slow
async def test_license_and_bans_that_were_told_survive_kill_9(tmp_path: Path) -> None:
    store = tmp_path / "store"
    command = Path(sys.executable).parent / "pubsub"
    process = subprocess.Popen(
        [command, "serve", "emitter", "--json", "--store", str(store)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        ready = json.loads(await asyncio.to_thread(process.stdout.readline))
        license_ = License.parse(ready["license"])
        banned, spared = (license_.make_key("a/", "rw") for _ in range(2))
        async with Wire.connected(ready["port"]) as wire:
            body = {"secret": ready["master_key"], "target": banned, "banned": True}
            await wire.send(Publish("emitter/keyban/", json.dumps(body).encode(), 1, packet_id=7))
            answer = await wire.next()
            os.kill(process.pid, signal.SIGKILL)
            assert isinstance(answer, Publish)
            assert json.loads(answer.payload) == {"req": 7, "status": 200, "banned": True}
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    async with EmitterServer(store=store) as server, Peer.connected(server) as peer:
        assert server.license == ready["license"]
        assert await peer.refusal(f"{spared}/a/") == 0
        assert await peer.refusal(f"{banned}/a/") == 401


async def test_a_ban_is_answered_when_the_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        broker(store=tmp_path / "store") as server,
        Peer.connected(server) as peer,
        Peer.connected(server) as other,
    ):
        key = server.make_key("a/", "rw")
        held: list[Done] = []

        def slowly(done: Done) -> bool:
            held.append(done)
            return False

        monkeypatch.setattr(server.storage, "settled", slowly)
        body = json.dumps({"secret": MASTER_KEY, "target": key, "banned": True}).encode()
        await peer.wire.send(Publish("emitter/keyban/", body, 1, packet_id=9))
        await peer.wire.send(Publish("emitter/keyban/", body))
        assert await peer.settled() == []
        assert await other.refusal(f"{key}/a/") == 401  # it holds already
        held[0](None)
        answer = await peer.wire.next()
        assert isinstance(answer, Publish)
        assert json.loads(answer.payload)["status"] == 200
        assert await peer.wire.next() == PubAck(9)
        held[1](OSError("the disk is full"))
        answer = await peer.wire.next()
        assert isinstance(answer, Publish)
        assert json.loads(answer.payload)["status"] == 500


async def test_a_file_that_falls_behind_takes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pubsub_mqtt.server.endpoint.journal.Journal.is_full", True)
    async with broker(store=tmp_path / "store") as server, Peer.connected(server) as peer:
        await peer.subscribe(f"{DEMO}/demo/a/")
        found = await peer.publish(f"{DEMO}/demo/a/?ttl=60")
        assert found[0] == ("demo/a/", b"x")
        assert found[1][1]["status"] == 500
        assert len(server.storage) == 0


async def test_a_disk_that_fails_is_told_to_the_publisher(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = tmp_path / "store"
    async with broker(store=store) as server, Peer.connected(server) as peer:
        storage = server.storage
        assert storage.journal is not None
        storage.write("DROP TABLE messages", ())
        ((topic, body),) = await peer.publish(f"{DEMO}/demo/a/?ttl=60")
        assert (topic, body["status"]) == ("emitter/error/", 500)
        assert await peer.publish(f"{DEMO}/demo/a/") == []
    assert "could not be written" in caplog.text


async def test_a_full_store_refuses_and_makes_room_when_messages_expire() -> None:
    now = [1000.0]
    storage = Storage(max_bytes=2000, clock=lambda: now[0])
    await storage.open()
    for _ in range(4):
        storage.store(1, "a/b/", bytes(190), 10)
    with pytest.raises(StorageFull):
        storage.store(1, "a/b/", bytes(190), 10)
    now[0] += 10
    assert storage.query(1, "a/", last=9) == []
    storage.store(1, "a/b/", b"", 10)
    assert len(storage) == 1
    assert storage.query(2, "a/", last=9) == []


async def test_stored_channels_are_found_by_their_segments_whatever_these_are() -> None:
    storage = Storage()
    await storage.open()
    for name in ("d/a.b/c/", "d/axb/c/", "d/[\\^$`_]:-/c/", "d/a.b/", "d/a.b/cc/e/"):
        storage.store(1, name, name.encode(), 10)
    for wanted, count in (
        ("d/", 5),
        ("d/a.b/", 3),
        ("d/a.b/+/", 2),
        ("d/a.b/c/", 1),
        ("d/a.b/#/e/", 1),
        ("d/[\\^$`_]:-/+/", 1),
        ("d/+/c/", 3),
        ("d/+/+/+/", 1),
        ("d/a/", 0),
        ("d/*/", 0),
        ("+/", 0),
    ):
        assert len(storage.query(1, wanted, last=9)) == count, wanted
    assert storage.query(1, "d/", last=0) == []
    assert [each.channel for each in storage.query(1, "d/", last=2)] == ["d/a.b/", "d/a.b/cc/e/"]


async def test_a_full_store_is_a_500_and_the_message_is_delivered_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with broker() as server, Peer.connected(server) as peer:
        monkeypatch.setattr(server.storage, "_max_bytes", 10)
        await peer.subscribe(f"{DEMO}/demo/a/")
        found = await peer.publish(f"{DEMO}/demo/a/?ttl=60")
        assert found[0] == ("demo/a/", b"x")
        assert found[1][1]["status"] == 500


# --- HTTP and WebSocket ------------------------------------------------------------------------


async def http(
    server: EmitterServer, method: str, path: str, body: bytes = b"", tls: Any = None
) -> tuple[int, str]:
    wire = await Wire.open(server.port, tls=tls)
    head = f"{method} {path} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
    await wire.send(head.encode() + body)
    async with asyncio.timeout(5):
        answer = (await wire.reader.read()).decode()
    wire.close()
    first, _, rest = answer.partition("\r\n")
    return int(first.split()[1]), rest.partition("\r\n\r\n")[2]


async def test_health_and_what_is_not_there() -> None:
    async with broker() as server:
        assert await http(server, "GET", "/health") == (200, "")
        assert await http(server, "GET", "/") == (400, "Bad Request")
        assert await http(server, "POST", "/health") == (400, "Bad Request")


async def test_keys_are_made_over_http() -> None:
    async with broker() as server, Peer.connected(server) as peer:
        status, page = await http(server, "GET", "/keygen")
        assert status == 200
        assert "<form" in page
        assert (await http(server, "PUT", "/keygen"))[0] == 405

        async def post(**fields: str) -> str:
            status, page = await http(
                server, "POST", "/keygen", urllib.parse.urlencode(fields).encode()
            )
            assert status == 200
            return page.partition('<pre id="keygenResponse">')[2].partition("</pre>")[0]

        text = await post(key=MASTER_KEY, channel="a/b/", ttl="60", sub="on", pub="on", load="off")
        first, second = text.split("\n")
        assert first == "channel: a/b/"
        assert second.startswith("key    : ")
        key = second.removeprefix("key    : ")
        decoded = License.parse(LICENSE).decrypt(key)
        assert decoded.permissions.letters == "rw"
        assert 50 < decoded.expires - time.time() < 62
        assert await peer.refusal(f"{key}/a/b/") == 0
        assert await post(channel="a/b/") == "Missing SecretKey"
        assert await post(key=MASTER_KEY) == "Missing Channel"
        for ttl in ("soon", "--5", "-", "٣", "1" * 11):
            assert await post(key=MASTER_KEY, channel="a/", ttl=ttl) == "invalid arguments"
        assert await post(key=MASTER_KEY, channel="a/", sub="yes") == "invalid arguments"
        assert "not authorized" in await post(key=DEMO, channel="a/")
        assert "should end with" in await post(key=MASTER_KEY, channel="a")
        assert "<script>" not in await post(key=MASTER_KEY, channel="<script>/")


async def test_presence_over_http_needs_a_key_that_may() -> None:
    async with broker() as server, Peer.connected(server, "alice") as peer:
        await peer.subscribe(f"{DEMO}/demo/room/")
        body = json.dumps({"key": DEMO, "channel": "demo/room/"}).encode()
        status, text = await http(server, "POST", "/presence", body)
        assert status == 200
        assert [each["username"] for each in json.loads(text)["who"]] == ["alice"]
        body = json.dumps({"key": KEYS["a/b/ rw"], "channel": "a/b/"}).encode()
        assert (await http(server, "POST", "/presence", body))[0] == 401
        assert (await http(server, "POST", "/presence", b"{"))[0] == 400
        assert (await http(server, "GET", "/presence"))[0] == 404


@pytest.mark.parametrize("path", ["/", "/mqtt"])
@pytest.mark.parametrize("text", [False, True])
async def test_mqtt_over_websocket_on_the_same_port(path: str, text: bool) -> None:
    async with broker() as server:
        peer = await WebWire.open(server.port, path)
        assert peer.subprotocol == "mqtt"
        data = encode(Connect("ws")) + encode(Publish("emitter/me/", b"", 1, packet_id=5))
        await peer.send(data.decode() if text else data)
        assert await peer.next() == ConnAck(0)
        answer = await peer.next()
        assert isinstance(answer, Publish)
        assert answer.topic == "emitter/me/"
        assert await peer.next() == PubAck(5)
        peer.wire.close()
        await eventually(lambda: not server.links)


async def test_all_of_it_inside_tls(authority: Authority) -> None:
    certificate = authority.issue("emitter")
    context = ssl.create_default_context(cafile=authority.cafile)
    async with broker(certfile=certificate.certfile, keyfile=certificate.keyfile) as server:
        assert server.url.startswith("emitters://")
        assert await http(server, "GET", "/health", tls=context) == (200, "")
        async with Wire.connected(server.port, tls=context) as wire:
            await wire.send(Publish("emitter/me/", b"", 1, packet_id=5))
            answer = await wire.next()
            assert isinstance(answer, Publish)
            assert await wire.next() == PubAck(5)
        await eventually(lambda: not server.links)
