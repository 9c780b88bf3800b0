"""Fixtures over ``servers.py``: brokers, certificates, unique topics, leak checks.

A test that takes a ``mosquitto…`` fixture gets the marker ``mosquitto`` and is skipped,
with the reason, where Mosquitto is not installed.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from pubsub_mqtt.server import AmqttServer, MosquittoServer, ServerTLS, find_mosquitto
from tests.servers import Authority, Certificate, LeakCheck, run

pytest_plugins = ["pubsub_core.testing.plugin"]

# A deadline per example would measure the machine, not the code.
settings.register_profile("pubsub", deadline=None)
settings.load_profile("pubsub")

PASSWORD = "opens sesame/%:@"
"""Password of the user ``alice`` at `mosquitto_users`; it needs escaping in a URL."""

ACL = """\
user alice
topic readwrite open/#
topic read readonly/#
topic write writeonly/#
user bob
topic readwrite bob/#
"""


def pytest_xdist_auto_num_workers() -> int:
    """Two workers per core: most tests wait for a socket or a timer most of their time."""
    return 2 * (os.cpu_count() or 1)


def pytest_configure() -> None:
    # A shell that starts a command in the background lets it ignore interrupts, and programs
    # inherit that; those that the tests start are to be interrupted.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Else each program that a test starts compiles all of the packages, most of its time.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if os.environ.get("PUBSUB_TEST_LOOP") == "uvloop":
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def pytest_collection_finish() -> None:
    # Leak checks collect garbage after every test. What was imported and collected until
    # here stays for good; left out of those collections, they cost a fraction.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names: tuple[str, ...] = getattr(item, "fixturenames", ())
        if any(name.startswith("mosquitto") for name in names):
            item.add_marker(pytest.mark.mosquitto)


@pytest.fixture(scope="session")
def mosquitto_installed() -> None:
    if find_mosquitto() is None:
        pytest.skip("mosquitto is not installed; apt-get install mosquitto")


def _started(server: MosquittoServer) -> Iterator[MosquittoServer]:
    run(server.start())
    yield server
    run(server.stop())


@pytest.fixture(scope="session")
def mosquitto(mosquitto_installed: None) -> Iterator[MosquittoServer]:
    """Mosquitto on TCP, WebSocket and a Unix socket, open to everybody, for the session."""
    yield from _started(MosquittoServer(websockets=True, unix=True))


@pytest.fixture(scope="session")
def mosquitto_users(mosquitto_installed: None) -> Iterator[MosquittoServer]:
    """Mosquitto with the users ``alice`` (`PASSWORD`) and ``bob`` ("b"), and `ACL`."""
    yield from _started(MosquittoServer(users={"alice": PASSWORD, "bob": "b"}, acl=ACL))


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def client_certificate(authority: Authority) -> Certificate:
    return authority.issue("client", client=True)


@pytest.fixture(scope="session")
def mosquitto_tls(mosquitto_installed: None, authority: Authority) -> Iterator[MosquittoServer]:
    """Mosquitto with TLS on TCP and WebSocket; the certificate is for 127.0.0.1, localhost."""
    server = authority.issue("server")
    tls = ServerTLS(server.certfile, server.keyfile)
    yield from _started(MosquittoServer(websockets=True, tls=tls))


@pytest.fixture(scope="session")
def mosquitto_wrong_host(
    mosquitto_installed: None, authority: Authority
) -> Iterator[MosquittoServer]:
    """Mosquitto whose certificate is for another host."""
    server = authority.issue("elsewhere", hosts=("elsewhere.example",))
    yield from _started(MosquittoServer(tls=ServerTLS(server.certfile, server.keyfile)))


@pytest.fixture(scope="session")
def mosquitto_expired(mosquitto_installed: None, authority: Authority) -> Iterator[MosquittoServer]:
    """Mosquitto whose certificate ran out yesterday."""
    server = authority.issue("expired", expired=True)
    yield from _started(MosquittoServer(tls=ServerTLS(server.certfile, server.keyfile)))


@pytest.fixture(scope="session")
def mosquitto_client_certificates(
    mosquitto_installed: None, authority: Authority
) -> Iterator[MosquittoServer]:
    """Mosquitto that wants a certificate of every client."""
    server = authority.issue("strict")
    tls = ServerTLS(server.certfile, server.keyfile, authority.cafile, require_certificate=True)
    yield from _started(MosquittoServer(tls=tls))


@pytest.fixture
async def mosquitto_own(mosquitto_installed: None) -> AsyncIterator[MosquittoServer]:
    """Mosquitto for this test alone, to be killed and restarted; it stores sessions."""
    async with MosquittoServer(persistence=True) as server:
        yield server


@pytest.fixture
async def amqtt_server() -> AsyncIterator[AmqttServer]:
    """amqtt's broker in the test's own loop."""
    pytest.importorskip("amqtt", reason="amqtt is not installed")
    async with AmqttServer() as server:
        yield server


_numbers = itertools.count(1)


@pytest.fixture
def unique(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return a function that makes a topic no other test uses."""
    run_id = f"t{os.getpid()}-{uuid.uuid4().hex[:8]}-{next(_numbers)}"

    def make(topic: str = "") -> str:
        return f"{run_id}/{topic}" if topic else run_id

    return make


@pytest.fixture
async def no_leaks() -> AsyncIterator[LeakCheck]:
    """Fail the test when tasks, threads or descriptors are left behind.

    For a whole module: ``pytestmark = pytest.mark.usefixtures("no_leaks")``.
    """
    check = LeakCheck()
    yield check
    await check.check()


@pytest.fixture
def data() -> Path:
    """Return the folder of golden bytes and vectors."""
    return Path(__file__).parent / "data"
