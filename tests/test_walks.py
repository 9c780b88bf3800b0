"""The three walks in docs/design.md are those that a run takes, file by file."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest

from pubsub_core import Bus, Message, Status, connect, sync
from pubsub_core.testing import FaultProxy
from pubsub_mqtt.server import MosquittoServer
from tests.test_layers import CORE
from tests.test_package import CHECKOUT, FOLDERS, ROOT

pytestmark = [
    pytest.mark.usefixtures("no_leaks"),
    pytest.mark.skipif(not CHECKOUT, reason="compares the documents of the checkout"),
]

WORDS = {f"pubsub_core/{name}.py" for name in CORE.layers[0]} | {
    f"pubsub_mqtt/{name}.py" for name in ("options", "errors", "packets")
}
"""Left out of the walks, as the document says: they are passed everywhere."""

LONG = 3600
"""Seconds; a keepalive that no run of this test reaches."""

Event = Callable[[FrameType, str, Any], bool]


def entered(name: str) -> Event:
    return lambda frame, event, _: event == "call" and frame.f_code.co_qualname == name


def told_online(frame: FrameType, event: str, _: Any) -> bool:
    return entered("EventHub.put")(frame, event, _) and (
        getattr(frame.f_locals["event"], "status", None) is Status.ONLINE
    )


def socket_called(*names: str) -> Event:
    def called(frame: FrameType, event: str, function: Any) -> bool:
        return (
            event == "c_call"
            and isinstance(getattr(function, "__self__", None), socket.socket)
            and function.__name__ in names
        )

    return called


class Walk:
    """Notes the files of the project that this thread enters between two events.

    Attributes:
        files: In the order in which they were first entered, the words left out.
        over: Set at the second event.
    """

    def __init__(self, begin: Event, end: Event) -> None:
        self.files: list[str] = []
        self.over = asyncio.Event()
        self._begin = begin
        self._end = end
        self._begun = False

    def __enter__(self) -> Self:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if self.over.is_set():
            return
        self._begun = self._begun or self._begin(frame, event, argument)
        if not self._begun:
            return
        if self._end(frame, event, argument):
            sys.setprofile(None)
            self.over.set()
        elif event == "call":
            name = shown(frame.f_code.co_filename)
            if name is not None and name not in self.files:
                self.files.append(name)


def shown(path: str) -> str | None:
    """Return the name of a file of the project in a walk; None for one that is left out."""
    for folder in FOLDERS:
        if path.startswith(f"{folder}/"):
            name = f"{folder.name}/{Path(path).relative_to(folder)}"
            # The proxy that cuts the connection runs in this thread, too.
            return None if name in WORDS or "/testing/" in name else name
    return None


def written(heading: str) -> list[str]:
    """Return the files of the numbered list below a heading of the document."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"### {heading}\n")
    assert found, f"docs/design.md has no heading {heading!r}"
    section = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^\d+\. `([\w/]+\.py)`", section, flags=re.MULTILINE)


def bus_of(port: int, **options: Any) -> Bus:
    return connect(f"mqtt://127.0.0.1:{port}", keepalive=LONG, **options)


async def test_a_publish_from_the_call_to_the_socket(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    topic = unique("oven")
    async with asyncio.timeout(20), bus_of(mosquitto.port) as bus:
        await bus.publish(topic, 80.5)  # the first one fills caches
        walk = Walk(entered("Bus.publish"), socket_called("send", "sendmsg"))
        with walk:
            await bus.publish(topic, 81.5)
    assert walk.over.is_set()
    assert walk.files == written("A publish, from the call to the socket")


async def test_a_frame_from_the_socket_to_the_handler(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    room = unique("lab").rstrip("/")
    handled = asyncio.Event()

    async def handle(message: Message[float]) -> None:
        handled.set()

    def publish() -> None:
        # From a thread of its own, whose walk is not noted.
        with sync.connect(mosquitto.url) as other:
            other.publish(f"{room}/oven", 81.5)

    async with asyncio.timeout(20), bus_of(mosquitto.port) as bus:
        await bus.subscribe(f"{room}/{{device}}", float, handler=handle)
        await bus.publish(f"{room}/oven", 80.5)
        await handled.wait()
        handled.clear()
        walk = Walk(entered("AsyncioDriver._readable"), entered(handle.__qualname__))
        publisher = threading.Thread(target=publish)
        with walk:
            publisher.start()
            await handled.wait()
        publisher.join()
    assert walk.over.is_set()
    assert walk.files == written("A frame, from the socket to the handler")


async def test_a_lost_session_back_to_online(
    mosquitto: MosquittoServer, unique: Callable[..., str]
) -> None:
    async with asyncio.timeout(20), FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        async with bus_of(proxy.port, reconnect_first=0.0) as bus:
            async with bus.subscribe(unique("lab")):
                walk = Walk(entered("AsyncioDriver._readable"), told_online)
                with walk:
                    await proxy.cut()
                    await walk.over.wait()
                assert bus.status is Status.ONLINE
                assert bus.stats.sessions == 2
    assert walk.files == written("A lost session, back to online")
