"""No secret is printed: not in logs, repr, str, tracebacks, events, nor by the command.

Every secret here is a canary: a word that occurs nowhere else. After faults of all kinds,
with every logger at its most talkative and the event loop in its debugging mode, which prints
the callbacks it runs, none of it may be found in anything that was written, in any spelling.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner

from pubsub_core import Bus, connect
from pubsub_core.cli.root import build
from pubsub_core.errors import PubSubError
from pubsub_core.memory import Space
from pubsub_core.testing.proxy import Direction, FaultProxy
from pubsub_mqtt.backend import MQTTBackend
from pubsub_mqtt.server import MosquittoServer
from tests.conftest import PASSWORD
from tests.servers import Authority

from .support import SOON, VERSIONS, lost, noting, opened, resumed, soon

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

CANARY = "canary/7f:@%3a"


def spellings(secret: str) -> set[str]:
    return {
        secret,
        quote(secret, safe=""),
        quote(secret),
        repr(secret)[1:-1],
        base64.b64encode(secret.encode()).decode(),
        secret.encode().hex(),
    }


class Written:
    """Everything that was written, in one text."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog
        self._parts: list[str] = []
        caplog.set_level(logging.DEBUG)

    def add(self, *values: object) -> None:
        for value in values:
            self._parts += [repr(value), str(value), f"{value}"]
            if isinstance(value, BaseException):
                self._parts += traceback.format_exception(value)
                self._parts.append(repr(vars(value)))

    def check(self, *secrets: str) -> None:
        text = "\n".join([*self._parts, self._caplog.text])
        for record in self._caplog.records:
            text += repr(record.args)
        assert len(text) > 100, "nothing was written; the test shows nothing"
        for secret in secrets:
            for spelling in spellings(secret):
                assert spelling not in text, _context(text, spelling)


def _context(text: str, secret: str) -> str:
    at = text.index(secret)
    return f"…{text[max(0, at - 200) : at + 100]}…"


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Written:
    return Written(caplog)


@pytest.fixture
async def talkative() -> None:
    """The loop says what it runs."""
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0


def told(bus: Bus) -> list[object]:
    parts: list[object] = [bus, bus.info, bus.stats, bus.limits, bus.guarantees, bus.error]
    parts += [bus._resolved, bus.capabilities, bus.clock]
    try:
        native = bus.native(MQTTBackend)
    except PubSubError as error:
        parts.append(error)
    else:
        connection = native.connection
        parts += [
            native,
            native.context,
            native.endpoint,
            native.driver,
            connection,
            connection.settings,
            connection.session,
            connection.paho,
        ]
    return parts


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_password_through_all_faults(
    mosquitto_users: MosquittoServer,
    unique: Callable[..., str],
    written: Written,
    talkative: None,
    version: str,
) -> None:
    """Connected, cut, refused, black-holed, closed: the right password is nowhere."""
    async with FaultProxy(mosquitto_users.host, mosquitto_users.port) as proxy:
        url = f"mqtt://alice:{quote(PASSWORD, safe='')}@127.0.0.1:{proxy.port}"
        options = {**SOON, "protocol": version, "connect_timeout": 0.3}
        bus = connect(url, **options)
        written.add(bus)
        await soon(bus.open())
        async with noting(bus) as events:
            async with bus.subscribe("open/a") as subscription:
                await soon(bus.publish("open/a", b"x"))
                written.add(await soon(subscription.get()), subscription, *told(bus))
                for fault in ("cut", "refuse", "bytes"):
                    sessions = bus.stats.sessions
                    if fault == "refuse":
                        proxy.refuse()
                    if fault == "bytes":
                        proxy.drop_after(1, Direction.DOWN)
                    else:
                        await soon(proxy.cut())
                    try:
                        written.add(await soon(bus.publish("open/a", b"x")))
                    except PubSubError as error:
                        written.add(error)
                    await lost(bus, sessions)
                    written.add(*told(bus))
                    proxy.refuse(False)
                    await resumed(bus, sessions)
            try:
                await soon(bus.publish("readonly/a", b"x"))
            except PubSubError as error:
                written.add(error)
            await soon(bus.close())
            written.add(*events, *told(bus))
    written.check(PASSWORD)


@pytest.mark.parametrize("version", ["3.1.1", "5", "auto"])
@pytest.mark.parametrize("where", ["url", "option"])
async def test_a_refused_password(
    mosquitto_users: MosquittoServer, written: Written, talkative: None, version: Any, where: str
) -> None:
    url = mosquitto_users.url
    options: dict[str, Any] = {"username": "alice", "password": CANARY}
    if where == "url":
        url, options = url.replace("//", f"//alice:{quote(CANARY, safe='')}@"), {}
    bus = connect(url, protocol=version, **options)
    with pytest.raises(PubSubError) as caught:
        await soon(bus.open())
    written.add(bus, caught.value, *told_closed(bus))
    written.check(CANARY)


def told_closed(bus: Bus) -> list[object]:
    return [bus, bus.info, bus.error, bus._resolved]


async def test_a_refused_password_of_a_memory_space(
    unique: Callable[..., str], written: Written, talkative: None
) -> None:
    name = unique().replace("/", "-")
    Space.named(name).allow("me", "something else " + CANARY[::-1])
    try:
        bus = connect(f"memory://{name}", username="me", password=CANARY)
        with pytest.raises(PubSubError) as caught:
            await soon(bus.open())
        written.add(bus, caught.value, *told_closed(bus))
        written.check(CANARY, CANARY[::-1])
    finally:
        Space.forget(name)


async def test_headers_keys_and_wills(
    mosquitto: MosquittoServer,
    authority: Authority,
    written: Written,
    talkative: None,
) -> None:
    """A token in a WebSocket header, the password of a key file, the payload of a will."""
    will = {"topic": "a/will", "payload": CANARY}
    async with opened(
        mosquitto.websocket_url, ws_headers={"Authorization": f"Bearer {CANARY}"}, will=will
    ) as bus:
        written.add(*told(bus))
    with pytest.raises(PubSubError) as caught:
        await soon(connect(mosquitto.url.replace("mqtt", "ws", 1), ws_headers={"X": CANARY}).open())
    written.add(caught.value)
    pair = authority.issue("locked", client=True)
    broken = Path(pair.keyfile)
    broken.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nbm8=\n")
    options: dict[str, Any] = {
        "cert_file": pair.certfile,
        "key_file": pair.keyfile,
        "key_password": CANARY,
    }
    bus = connect(mosquitto.url.replace("mqtt", "mqtts", 1), **options)
    with pytest.raises(PubSubError) as caught:
        await soon(bus.open())
    written.add(caught.value, *told_closed(bus))
    written.check(CANARY)


@pytest.mark.parametrize(
    "url",
    [
        f"nosuch://me:{quote(CANARY, safe='')}@host",
        f"mqtt://me:{quote(CANARY, safe='')}@host/path",
        f"mqtt://me:{quote(CANARY, safe='')}@host:notaport",
        f"mqtt://me:{quote(CANARY, safe='')}@host?keepalive={-5}",
        f"mqtt://me@host?password={quote(CANARY, safe='')}&nonsense=1",
        f"memory://x?password={quote(CANARY, safe='')}&historie=1",
    ],
)
async def test_addresses_that_are_wrong(url: str, written: Written, talkative: None) -> None:
    bus = connect(url)
    written.add(bus)
    with pytest.raises(PubSubError) as caught:
        await soon(bus.open())
    written.add(bus, caught.value)
    written.add("padding" * 20)
    written.check(CANARY)


async def test_nothing_can_be_pickled_or_dumped(written: Written) -> None:
    bus = connect("memory://", password=CANARY, username="me")
    try:
        await soon(bus.open())
    except PubSubError as error:
        written.add(error)
    with pytest.raises(TypeError) as caught:
        pickle.dumps(bus._resolved)
    written.add(caught.value, bus._resolved, bus)
    await soon(bus.close())
    written.check(CANARY)


@pytest.mark.parametrize(
    "arguments",
    [
        ("pub", "{url}", "a", "x"),
        ("sub", "{url}", "a", "--count", "1"),
        ("doctor", "{url}"),
        ("caps", "{url}"),
        ("--verbose", "pub", "{url}", "a", "x"),
    ],
)
def test_the_command_prints_no_secret(
    mosquitto_users: MosquittoServer,
    arguments: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    url = mosquitto_users.url.replace("//", f"//alice:{quote(CANARY, safe='')}@")
    result = CliRunner().invoke(
        build(), [each.format(url=url) for each in arguments], env={"COLUMNS": "200"}
    )
    text = result.output
    if result.exception is not None:
        text += "".join(traceback.format_exception(result.exception))
    assert text
    for spelling in spellings(CANARY):
        assert spelling not in text, _context(text, spelling)
