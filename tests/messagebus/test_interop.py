"""The real packages, each in an environment of its own, against our distributor.

They are driven as a process by lines of JSON. 3.0.1 spins when the server closes and cannot
close its own socket, so its process is killed to make it leave.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import venv
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import pytest

from pubsub_core.bus import connect
from pubsub_core.message import Part
from pubsub_messagebus.server import ListenerOptions, MessageBusServer
from pubsub_messagebus.server.authenticators import PasswordFile
from pubsub_messagebus.server.roles import FeedPolicy, Policy, Role, RoleChange
from tests.servers import Authority, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

VERSIONS = ("3.0.1", "4.1.1", "6.0.0a1")

DRIVER = """
import asyncio, json, ssl, sys, uuid
from jetblack_messagebus import CallbackClient, DataPacket
from jetblack_messagebus.authentication import BasicAuthenticator

def tell(*what):
    print(json.dumps(what), flush=True)

def packets(data):
    return data and [
        [sorted(p.entitlements) if p.entitlements else None, p.data.decode() if p.data else None]
        for p in data
    ]

async def main(port, user, password, heartbeat, tls):
    options = {"monitor_heartbeat": True} if heartbeat else {}
    if tls:
        authority, *own = tls
        options["ssl"] = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=authority)
        if own:
            options["ssl"].load_cert_chain(*own)
    if user:
        options["authenticator"] = BasicAuthenticator(user, password)
    client = await CallbackClient.create("localhost" if tls else "127.0.0.1", port, **options)
    rights = {}
    async def on_data(user, host, feed, topic, data, flag):
        tell("data", user, feed, topic, packets(data), flag)
    async def on_notification(client_id, user, host, feed, topic, is_add):
        tell("notification", str(client_id), user, feed, topic, is_add)
    async def on_authorization(client_id, host, user, feed, topic):
        tell("authorization", user, feed, topic)
        await client.authorize(client_id, feed, topic, True, rights.get(user))
    client.data_handlers.append(on_data)
    client.notification_handlers.append(on_notification)
    client.authorization_handlers.append(on_authorization)
    asyncio.create_task(client.start())
    loop = asyncio.get_running_loop()
    tell("ready")
    while True:
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            return
        name, *given = json.loads(line)
        if name == "rights":
            rights[given[0]] = set(given[1])
            tell("rights")
        elif name in ("publish", "send"):
            data = given.pop()
            if name == "send":
                given[0] = uuid.UUID(given[0])
            data = data and [DataPacket(set(e) if e else None, d.encode()) for e, d in data]
            await getattr(client, name)(*given, data)
        else:
            await getattr(client, name)(*given)

asyncio.run(main(*json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="session", params=VERSIONS)
def package(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """Return a version and the interpreter that has it."""
    version: str = request.param
    folder = tmp_path_factory.mktemp(f"jetblack-{version}")
    # Without a pip of its own, which takes many seconds to unpack.
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pip", "--python", python),
            *("install", "-q", "--disable-pip-version-check"),
            "--no-deps",
            f"jetblack-messagebus-python3=={version}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the package index is not reachable: {done.stderr.strip()[-200:]}")
    return version, python


class Peer:
    """A process that holds one client of the package."""

    def __init__(
        self,
        python: Path,
        port: int,
        *,
        user: str = "",
        heartbeat: bool = False,
        tls: tuple[str, ...] = (),
    ) -> None:
        arguments = [port, user, "right" if user else "", heartbeat, tls]
        self._arguments = [str(python), "-c", DRIVER, json.dumps(arguments)]

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert await self.next() == ["ready"]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        async with asyncio.timeout(10):
            await self._process.communicate()

    def do(self, *what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def next(self) -> Any:
        assert self._process.stdout is not None
        async with asyncio.timeout(20):
            line = await self._process.stdout.readline()
        assert line, "the package's process ended"
        return json.loads(line)


class Site:
    """Our server as one version of the package needs it."""

    def __init__(self, version: str, python: Path, server: MessageBusServer, port: int) -> None:
        self.content_type = version.startswith("6")
        self.python = python
        self.server = server
        self.port = port
        self.image: Any = "" if self.content_type else True
        self.delta: Any = "" if self.content_type else False

    def peer(self, **options: Any) -> Peer:
        return Peer(self.python, self.port, **options)

    async def until(self, feed: str, topic: str, count: int) -> None:
        await eventually(lambda: len(self.server.broker.subscribers(feed, topic)) == count)


async def _site(package: tuple[str, Path], **options: Any) -> AsyncIterator[Site]:
    version, python = package
    server = MessageBusServer(**options)
    number = server.add_listener(ListenerOptions(dialect="content_type"))
    async with server:
        port = server.ports[number] if version.startswith("6") else server.port
        yield Site(version, python, server, port)


@pytest.fixture
async def site(package: tuple[str, Path]) -> AsyncIterator[Site]:
    async for each in _site(package):
        yield each


@pytest.fixture
async def locked(package: tuple[str, Path], tmp_path: Path) -> AsyncIterator[Site]:
    file = PasswordFile(tmp_path / "passwords.json")
    for user in ("tom", "dick", "warden"):
        file.add(user, "right")
    feeds = {
        "AUTH": FeedPolicy(
            is_authorized=True,
            change=RoleChange(deny=Role.AUTHORIZE),
            users={("*", "warden"): RoleChange(allow=Role.AUTHORIZE)},
        )
    }
    async for each in _site(package, password_file=str(file.path), policy=Policy(feeds=feeds)):
        yield each


async def test_select_feed_data_images_and_the_end_of_a_publisher(site: Site) -> None:
    async with site.peer() as publisher, site.peer() as subscriber:
        publisher.do("add_notification", "LSE")
        await eventually(lambda: site.server.stats()["listeners"] == 1)
        subscriber.do("add_subscription", "LSE", "VOD")
        kind, client_id, user, feed, topic, is_add = await publisher.next()
        assert (kind, user, feed, topic, is_add) == ("notification", "nobody", "LSE", "VOD", True)
        publisher.do("send", client_id, "LSE", "VOD", site.image, [[None, "image"]])
        publisher.do("publish", "LSE", "VOD", site.delta, [[[7], "delta"], [None, "more"]])
        assert await subscriber.next() == [
            "data",
            "nobody",
            "LSE",
            "VOD",
            [[None, "image"]],
            site.image,
        ]
        assert await subscriber.next() == [
            "data",
            "nobody",
            "LSE",
            "VOD",
            [[[7], "delta"], [None, "more"]],
            site.delta,
        ]
        subscriber.do("remove_subscription", "LSE", "VOD")
        assert (await publisher.next())[-1] is False
        subscriber.do("add_subscription", "LSE", "VOD")
        await site.until("LSE", "VOD", 1)
        publisher.do("publish", "LSE", "VOD", site.delta, [[None, "x"]])
        await subscriber.next()
        await publisher.kill()
        # The notice that it went away.
        assert await subscriber.next() == ["data", "", "LSE", "VOD", None, site.image]


async def test_login_and_authorization(locked: Site) -> None:
    async with locked.peer(user="warden") as warden, locked.peer(user="tom") as tom:
        async with locked.peer(user="dick") as dick:
            warden.do("rights", "tom", [1, 2])
            assert await warden.next() == ["rights"], "or it answers before it has them"
            await eventually(lambda: locked.server.stats()["clients"] == 3)
            tom.do("add_subscription", "AUTH", "T")
            assert await warden.next() == ["authorization", "tom", "AUTH", "T"]
            await locked.until("AUTH", "T", 1)
            dick.do("add_subscription", "AUTH", "T")
            assert await warden.next() == ["authorization", "dick", "AUTH", "T"]
            # Denied: the notice.
            assert (await dick.next())[1:5] == ["", "AUTH", "T", None]
            sent = [[[1], "1"], [[2], "2"], [[3], "3"], [[1, 3], "13"], [[1, 2], "12"], [None, "n"]]
            warden.do("publish", "AUTH", "T", locked.delta, sent)
            data = await tom.next()
            assert data[1] == "warden"
            assert [text for _, text in data[4]] == ["1", "2", "12"]


async def test_heartbeats(package: tuple[str, Path]) -> None:
    async for site in _site(package, heartbeat_interval=0.05):
        async with site.peer(heartbeat=True) as peer:
            for _ in range(3):
                assert await peer.next() == [
                    "data",
                    "admin",
                    "__admin__",
                    "heartbeat",
                    None,
                    site.image,
                ]


async def test_tls_with_certificates_of_both_sides(
    package: tuple[str, Path], tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    own, theirs = authority.issue("server"), authority.issue("client", client=True)
    PasswordFile(tmp_path / "passwords.json").add("tom", "right")
    files: dict[str, Any] = {
        "certfile": own.certfile,
        "keyfile": own.keyfile,
        "cafile": authority.cafile,
    }
    certified = (authority.cafile, theirs.certfile, theirs.keyfile)
    options: dict[str, Any] = {**files, "password_file": str(tmp_path / "passwords.json")}
    if package[0].startswith("6"):
        options["dialect"] = "content_type"
    async with MessageBusServer(**options) as server:
        site = Site(*package, server, server.port)
        # Without a certificate it gets no further than the handshake of TLS, which 1.3 lets
        # a client complete before it learns of its refusal.
        async with site.peer(user="tom", tls=(authority.cafile,)) as stranger:
            stranger.do("add_subscription", "F", "T")
            async with site.peer(user="tom", tls=certified) as peer:
                peer.do("add_subscription", "F", "T")
                await site.until("F", "T", 1)
                peer.do("publish", "F", "T", site.delta, [[None, "x" * 20_000]])
                received = await peer.next()
                assert received[:2] == ["data", "tom"]
                assert received[4] == [[None, "x" * 20_000]]
                assert server.count.accepted == 1
    # And the packages verify whom they talk to.
    async with MessageBusServer(**files) as server:
        other = Authority(tmp_path, name="another authority")
        peer = Site(*package, server, server.port).peer(tls=(other.cafile, *certified[1:]))
        with pytest.raises(AssertionError, match="ended"):
            await peer.__aenter__()
        await peer.kill()


async def test_with_our_backend(site: Site) -> None:
    dialect = "content_type" if site.content_type else "is_image"
    url = f"messagebus://127.0.0.1:{site.port}?dialect={dialect}"
    async with connect(url) as bus, site.peer() as peer:
        async with bus.subscribe("F/T") as messages, bus.notifications("G/#") as interest:
            peer.do("publish", "F", "T", site.delta, [[None, "from the package"]])
            assert (await messages.get(10)).payload == b"from the package"
            peer.do("publish", "F", "T", site.delta, [[[1], "a"], [None, "b"]])
            assert (await messages.get(10)).parts == (Part(b"a", frozenset({1})), Part(b"b"))
            peer.do("add_subscription", "G", "U")
            event = await interest.get(10)
            while not event.joined:
                event = await interest.get(10)
            assert event.topic == "G/U"
            assert event.member is not None
            await bus.send_to(event.member, "G/U", b"image")
            await bus.publish("G/U", b"delta")
            assert (await peer.next())[4] == [[None, "image"]]
            assert (await peer.next())[4] == [[None, "delta"]]


def test_this_environment_has_none_of_them() -> None:
    assert "jetblack_messagebus" not in sys.modules
