"""What is kept: merging, bounds, and the file across ends of every kind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.errors import ConnectError
from pubsub_losant import LosantServer
from pubsub_losant.server.storage import Storage
from pubsub_mqtt.server.endpoint.packets import ConnAck, Connect, PubAck, Publish
from tests.losant.application import A, Peer, broker, command, state
from tests.mqtt.server.endpoint.attacks import acknowledged_until_killed
from tests.mqtt.server.endpoint.stores import check_refusals
from tests.mqtt.server.endpoint.wire import Wire

pytestmark = pytest.mark.usefixtures("no_leaks")

# As version 0.1.0 wrote it.
FILE_0_1_0 = """
PRAGMA journal_mode = WAL;
CREATE TABLE attributes (
    device TEXT, name TEXT, value TEXT, ms INTEGER, PRIMARY KEY (device, name)
) WITHOUT ROWID;
CREATE TABLE commands (
    number INTEGER PRIMARY KEY, device TEXT, ms INTEGER, receivers INTEGER, body BLOB
);
CREATE TABLE connections (number INTEGER PRIMARY KEY, device TEXT, entry TEXT);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
INSERT INTO "facts" VALUES('format','1');
INSERT INTO "facts" VALUES('device_id','575ecf887ae143cd83dc4aa2');
CREATE TABLE states (
    device TEXT, ms INTEGER, received INTEGER, data TEXT, meta TEXT, flow_version TEXT,
    PRIMARY KEY (device, ms)
) WITHOUT ROWID;
INSERT INTO "states" VALUES('575ecf887ae143cd83dc4aa2',1000,0,'{"a":1.5}',NULL,NULL);
"""

STATES = st.lists(
    st.tuples(
        st.integers(0, 12),
        st.dictionaries(st.sampled_from("abc"), st.integers(0, 99), min_size=1),
    ),
    max_size=40,
)


@given(STATES)
def test_states_are_in_order_merged_and_the_last_of_each_attribute_is_known(
    states: list[tuple[int, dict[str, int]]],
) -> None:
    storage = Storage()
    wanted: dict[int, dict[str, int]] = {}
    for ms, data in states:
        storage.add_state("x", ms, dict(data))
        wanted.setdefault(ms, {}).update(data)
    assert [(each.ms, each.data) for each in storage.states("x")] == sorted(wanted.items())
    last = {name: (data[name], ms) for ms, data in sorted(wanted.items()) for name in data}
    assert storage.last_values("x") == last
    assert [each.ms for each in storage.states("x", since=3, until=7)] == [
        ms for ms in sorted(wanted) if 3 <= ms <= 7
    ]


def test_the_oldest_goes_first_and_last_values_stay() -> None:
    storage = Storage(max_states=100, max_entries=5)
    storage.add_state("x", 0, {"rare": 1, "a": 0})
    for ms in range(1, 500):
        storage.add_state("x", ms, {"a": ms})
    assert storage.count("x") <= 100
    assert storage.states("x")[-1].ms == 499
    assert storage.last_values("x") == {"rare": (1, 0), "a": (499, 499)}
    for number in range(9):
        storage.add_command("x", number, b'{"name":"c%d"}' % number, 1)
        storage.add_connection("x", {"connected": number})
    assert [each.name for each in storage.commands("x")] == ["c4", "c5", "c6", "c7", "c8"]
    assert [each["connected"] for each in storage.connections("x")] == [8, 7, 6, 5, 4]
    assert storage.states("nobody") == []
    assert storage.commands("nobody") == []
    assert storage.connections("nobody") == []


def test_all_states_together_have_a_bound() -> None:
    storage = Storage(max_bytes=100_000)
    for ms in range(1000):
        storage.add_state("large", ms, {"a": ms}, size=1000)
        storage.add_state("small", ms, {"a": ms}, size=10)
    assert storage._bytes <= 100_000
    assert storage._bytes == sum(
        each.size for name in ("large", "small") for each in storage.states(name)
    )
    assert storage.last_values("large")["a"] == storage.last_values("small")["a"] == (999, 999)


async def test_a_file_has_everything_the_memory_had(tmp_path: Path) -> None:
    path = tmp_path / "store"
    storage = Storage(path, max_states=50, max_entries=5)
    await storage.open()
    storage.add_state("x", 0, {"rare": "é", "b": True}, meta=[1], flow_version="v1", received_ms=7)
    for ms in range(1, 200):
        storage.add_state("x", ms % 150, {"a": ms / 2, f"n{ms % 3}": ms})
        storage.add_command("x", ms, b'{"name":"c%d"}' % ms, ms % 2)
        storage.add_connection("x", {"connected": ms})
    storage.add_state("y", 5, {"a": 1}, meta={"m": None})
    storage.set_fact("device_id", "x")
    before = [
        (
            storage.states(name), storage.last_values(name), storage.commands(name),
            storage.connections(name),
        ) for name in "xy"
    ]  # fmt: skip
    await storage.close()
    assert storage.states("x") == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Storage(path, max_states=50, max_entries=5)
    await again.open()
    for name, (states, last, commands, connections) in zip("xy", before, strict=True):
        found = again.states(name)
        assert [(e.ms, e.data, e.meta, e.flow_version, e.received_ms) for e in found] == [
            (e.ms, e.data, e.meta, e.flow_version, e.received_ms) for e in states
        ]
        assert again.last_values(name) == last
        assert again.commands(name) == commands
        assert again.connections(name) == connections
    assert again.fact("device_id") == "x"
    assert again.last_values("x")["rare"] == ("é", 0)
    again.add_command("x", 1, b'{"name":"new"}', 0)
    assert again.commands("x")[-1].number > before[0][2][-1].number
    await again.close()


async def test_a_file_in_use_or_that_is_no_database_is_an_error(
    tmp_path: Path,
) -> None:
    path = tmp_path / "store"
    async with broker(store=path):
        with pytest.raises(ConnectError, match="store"):
            await LosantServer(store=path).start()
    other = tmp_path / "other"
    other.write_bytes(b"this is no database, but quite something else" * 50)
    with pytest.raises(ConnectError):
        await LosantServer(store=other).start()
    with pytest.raises(ConnectError):
        await LosantServer(store=tmp_path / "no" / "folder").start()


async def test_a_newer_or_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "store"
    await check_refusals(path, lambda: LosantServer(store=path))


async def test_a_file_of_version_0_1_0_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(FILE_0_1_0)
    async with LosantServer(store=path) as server:
        assert server.device_id == "575ecf887ae143cd83dc4aa2"
        assert server.last_state(server.device_id) == {"a": (1.5, 1000)}
    async with LosantServer(store=path) as server:
        assert server.last_state(server.device_id) == {"a": (1.5, 1000)}


async def test_a_file_keeps_the_credentials_that_were_made(tmp_path: Path) -> None:
    async with LosantServer(store=tmp_path / "store") as server:
        first = {name: server.describe()[name] for name in ("device_id", "access_key")}
        url = server.url
        port = server.port
    async with LosantServer(store=tmp_path / "store", port=port) as server:
        assert {name: server.describe()[name] for name in first} == first
        assert server.url == url


async def test_a_disk_that_fails_ends_the_connection_that_waits_for_it(tmp_path: Path) -> None:
    async with broker(store=tmp_path / "store") as server, Peer.connected(server) as peer:
        storage = server.storage
        assert storage.journal is not None
        storage.journal.write("INSERT INTO nowhere VALUES (1)")
        await peer.publish(state(), {"data": {"a": 1}}, qos=1)
        assert await peer.wire.closed() == []
        async with Peer.connected(server) as again:
            await again.publish(state(), {"data": {"a": 1}}, qos=1)
            assert await again.wire.next() == PubAck(1)


async def test_a_disk_far_behind_is_given_no_more(tmp_path: Path) -> None:
    async with broker(store=tmp_path / "store") as server:
        storage = server.storage
        assert storage.journal is not None
        storage.journal._max_waiting = -1
        storage.add_state(A, 1, {"a": 1})
        assert storage.unsaved == 1
        assert storage.count(A) == 1
        storage.journal._max_waiting = 1000


CHILD = """
import asyncio, sys
from pubsub_losant import LosantServer
async def main():
    server = LosantServer(store=sys.argv[1])
    await server.start()
    print(server.port, server.device_id, server.access_key, server.access_secret, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await server.send_command(server.device_id, "last words", {"n": 1})
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    store = tmp_path / "store"
    acknowledged = 0
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(store)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        line = await asyncio.to_thread(process.stdout.readline)
        port, device_id, key, secret = line.split()
        wire = await Wire.open(int(port))
        await wire.send(Connect(device_id, key, secret.encode()))
        assert await wire.next() == ConnAck(0)
        process.stdin.write("\n")
        process.stdin.flush()
        base = int(time.time() * 1000)
        acknowledged = await acknowledged_until_killed(
            process.pid,
            wire,
            lambda number: (
                state(device_id),
                json.dumps({"data": {"n": number}, "time": base - number}).encode(),
            ),
        )
        wire.close()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    assert acknowledged >= 1000
    async with LosantServer(store=store) as server:
        assert (server.device_id, server.access_secret) == (device_id, secret)
        kept = {each.data["n"] for each in server.states(device_id)}
        assert set(range(1, acknowledged + 1)) <= kept
        assert [each.name for each in server.command_history(device_id)] == ["last words"]
        assert server.connection_log(device_id)[-1]["connected"] == 1
        connect = Connect(device_id, key, secret.encode())
        async with Wire.connected(server.port, connect) as wire:
            await wire.send(Publish(command(device_id), b"{}"))
            await wire.closed()
