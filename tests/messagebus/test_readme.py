"""The programs of the README, run as they stand."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pubsub_core.bus import connect
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import PasswordFile
from pubsub_messagebus.server.roles import Role
from tests.readme import Document
from tests.servers import Authority, eventually

README = Document("backends/messagebus/README.md")

pytestmark = README.needed


async def test_the_select_feed() -> None:
    program = README.block("python", "notifications")
    assert len(program.splitlines()) <= 20
    namespace = README.execute(program)
    async with MessageBusServer() as server:
        publishing = asyncio.create_task(namespace["main"](server.url))
        async with connect(server.url) as one, connect(server.url) as two:
            await eventually(
                lambda: any("LSE" in view.listening for view in server.broker.interactors())
            )
            async with one.subscribe("LSE/VOD") as first:
                messages = [await first.get(5) for _ in range(3)]
                assert [message.origin.value for message in messages].count("image") == 1
                async with two.subscribe("LSE/VOD") as second:
                    origins = [(await second.get(5)).origin.value for _ in range(4)]
                    assert "image" in origins
                    assert "live" in origins
                more = [(await first.get(5)).origin.value for _ in range(2)]
                assert set(more) == {"live"}, "the image was for the newcomer alone"
            await eventually(
                lambda: (
                    not [task for task in asyncio.all_tasks() if "changes" in repr(task.get_coro())]
                ),
                what="the feed stops",
            )
        publishing.cancel()
        await asyncio.wait([publishing])


def test_the_imports() -> None:
    README.execute(README.block("python", "CallbackClient"))


async def test_the_configuration(tmp_path: Path) -> None:
    authority = Authority(tmp_path, name="clients")
    own = authority.issue("server")
    path = tmp_path / "bus.toml"
    path.write_text(README.blocks("toml")[0].replace("port = 9002", "port = 0"))
    PasswordFile(tmp_path / "passwords.json").add("warden", "right")
    assert {Path(own.certfile).name, Path(own.keyfile).name, Path(authority.cafile).name} == {
        "server.crt",
        "server.key",
        "clients.pem",
    }
    async with MessageBusServer(config=str(path)) as server:
        assert server.url.startswith("messagebus+tls://")
        assert server.metrics_url
        assert server.authenticator.handshake == "basic"
        policy = server.broker.policy
        assert policy.authorization_required("AUTH")
        assert policy.roles("AUTH", "warden", "anywhere") & Role.AUTHORIZE
        assert not policy.roles("AUTH", "tom", "anywhere") & Role.AUTHORIZE
