"""TLS that is on is verified: chain, host name, age, version; switching it off is loud."""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import ConnectError, MissingDependency, Status, TLSProblem, connect
from pubsub_core.testing.proxy import FaultProxy
from pubsub_core.testing.stopwatch import Stopwatch
from pubsub_mqtt.connection import address as broker_address
from pubsub_mqtt.server import MosquittoServer, ServerTLS
from tests.servers import Authority, run

from .support import SOON, VERSIONS, opened, soon, until

pytestmark = [pytest.mark.usefixtures("no_leaks"), pytest.mark.timeout(60)]

SCHEMES = ("mqtts", "wss")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that issued nothing of what the brokers have."""
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def mosquitto_self_signed(
    mosquitto_installed: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MosquittoServer]:
    """Mosquitto with a certificate that nobody vouches for but itself."""
    lonely = Authority(tmp_path_factory.mktemp("lonely"), "lonely")
    own = lonely.issue("lonely-server")
    server = MosquittoServer(tls=ServerTLS(own.certfile, own.keyfile))
    run(server.start())
    yield server
    run(server.stop())


@asynccontextmanager
async def counted(server: MosquittoServer, scheme: str) -> AsyncIterator[tuple[str, FaultProxy]]:
    port = server.port if scheme == "mqtts" else server.websocket_port
    async with FaultProxy(server.host, port) as proxy:
        yield f"{scheme}://127.0.0.1:{proxy.port}", proxy


async def refused(url: str, proxy: FaultProxy, **options: Any) -> TLSProblem:
    """Connect as patiently as can be; return the refusal, which must come at once."""
    watch = Stopwatch()
    with pytest.raises(TLSProblem) as caught:
        await soon(connect(url, wait=10.0, **SOON, **options).open())
    assert watch.seconds < 5
    assert proxy.accepted == 1, "a certificate does not get better by trying again"
    assert caught.value.retryable is False
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_good_certificate_is_accepted(
    mosquitto_tls: MosquittoServer, authority: Authority, scheme: str, version: str
) -> None:
    async with counted(mosquitto_tls, scheme) as (url, _):
        async with opened(url, ca_file=authority.cafile, protocol=version) as bus:
            await soon(bus.ping())


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_a_wrong_authority_is_refused(
    mosquitto_tls: MosquittoServer, stranger: Authority, scheme: str
) -> None:
    async with counted(mosquitto_tls, scheme) as (url, proxy):
        await refused(url, proxy, ca_file=stranger.cafile)


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_an_unknown_authority_is_refused_by_default(
    mosquitto_tls: MosquittoServer, scheme: str
) -> None:
    """Without options the system's authorities count, which know nothing of this one."""
    async with counted(mosquitto_tls, scheme) as (url, proxy):
        await refused(url, proxy)


async def test_a_self_signed_certificate_is_refused(
    mosquitto_self_signed: MosquittoServer, authority: Authority
) -> None:
    async with counted(mosquitto_self_signed, "mqtts") as (url, proxy):
        await refused(url, proxy, ca_file=authority.cafile)


async def test_a_wrong_host_is_refused(
    mosquitto_wrong_host: MosquittoServer, authority: Authority
) -> None:
    async with counted(mosquitto_wrong_host, "mqtts") as (url, proxy):
        await refused(url, proxy, ca_file=authority.cafile)


async def test_an_expired_certificate_is_refused(
    mosquitto_expired: MosquittoServer, authority: Authority
) -> None:
    async with counted(mosquitto_expired, "mqtts") as (url, proxy):
        await refused(url, proxy, ca_file=authority.cafile)


async def test_a_certificate_that_turns_bad_ends_the_attempts(
    mosquitto_tls: MosquittoServer, mosquitto_expired: MosquittoServer, authority: Authority
) -> None:
    """The broker comes back with an expired certificate: that is told, and not retried."""
    async with counted(mosquitto_tls, "mqtts") as (url, proxy):
        async with opened(url, ca_file=authority.cafile, **SOON) as bus:
            proxy._target = (mosquitto_expired.host, mosquitto_expired.port)
            await soon(proxy.cut())
            await until(lambda: bus.status is Status.FAILED, "the bus gives up")
            assert isinstance(bus.error, TLSProblem)
            assert proxy.accepted == 2
            with pytest.raises(TLSProblem):
                await soon(bus.publish("a", b"x"))


def server_hello(version: bytes) -> bytes:
    """Return a ServerHello that chooses *version* (RFC 5246 section 7.4.1.3)."""
    body = version + bytes(32) + b"\x00" + b"\xc0\x13" + b"\x00"
    message = b"\x02" + len(body).to_bytes(3, "big") + body
    return b"\x16" + version + len(message).to_bytes(2, "big") + message


@pytest.mark.parametrize(
    "version", [b"\x03\x00", b"\x03\x01", b"\x03\x02"], ids=["SSL 3", "TLS 1.0", "TLS 1.1"]
)
async def test_old_protocols_are_refused(version: bytes) -> None:
    """A peer that chooses less than TLS 1.2 gets an alert, and nothing of ours."""
    heard = bytearray()
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        heard.extend(await reader.read(4096))
        writer.write(server_hello(version))
        hello = len(heard)
        while chunk := await reader.read(4096):
            heard.extend(chunk)
        del heard[:hello]
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(TLSProblem):
            await soon(connect(f"mqtts://127.0.0.1:{port}", wait=5.0, **SOON).open())
        assert connections == 1
        await until(lambda: heard[:1] == b"\x15", "an alert")
        assert heard[5:7] == b"\x02\x46"  # fatal, protocol_version
    finally:
        server.close()


async def test_verification_is_switched_off_by_name_and_with_one_warning(
    mosquitto_expired: MosquittoServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(broker_address, "_warned_insecure", False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            async with counted(mosquitto_expired, "mqtts") as (url, _):
                async with opened(url, insecure_skip_verify=True) as bus:
                    await soon(bus.ping())
    warnings = [r for r in caplog.records if "insecure" in r.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].levelno == logging.WARNING


async def test_plain_text_is_never_a_fallback(mosquitto: MosquittoServer) -> None:
    """A broker without TLS behind mqtts:// is an error; it hears no CONNECT."""
    async with FaultProxy(mosquitto.host, mosquitto.port) as proxy:
        with pytest.raises(ConnectError, match="does that port speak TLS"):
            await soon(connect(f"mqtts://127.0.0.1:{proxy.port}").open())
        assert proxy.accepted == 1


@pytest.mark.parametrize("scheme", ["mqtt", "ws"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_port_that_wants_tls_is_guessed(
    mosquitto_tls: MosquittoServer, scheme: str, version: str
) -> None:
    async with FaultProxy(mosquitto_tls.host, mosquitto_tls.port) as proxy:
        with pytest.raises(ConnectError, match="does that port want TLS"):
            await soon(connect(f"{scheme}://127.0.0.1:{proxy.port}", protocol=version).open())


async def test_a_tls_alert_instead_of_an_answer_is_recognised() -> None:
    """Servers that answer before they hang up send a TLS record (RFC 8446 section 6.2)."""

    async def alert(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(bytes.fromhex("15 03 03 00 02 02 46"))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(alert, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectError, match="the port wants mqtts://"):
        await soon(connect(f"mqtt://127.0.0.1:{port}").open())
    server.close()
    await soon(server.wait_closed())


@pytest.mark.parametrize(
    ("scheme", "option"),
    [
        ("mqtts", "ca_file"),
        ("mqtts", "ca_path"),
        ("mqtts", "cert_file"),
        ("messagebus+tls", "ca_file"),
        ("messagebus+tls", "cert_file"),
    ],
)
async def test_a_file_that_cannot_be_read_is_named(
    scheme: str, option: str, tmp_path: Path
) -> None:
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for path in (garbage, tmp_path / "missing.pem"):
        given: dict[str, Any] = {option: str(path)}
        with pytest.raises(TLSProblem) as caught:
            await soon(connect(f"{scheme}://127.0.0.1:{port}", **given).open())
        assert str(path) in caught.value.message
        assert option in caught.value.message
    server.close()
    await soon(server.wait_closed())


async def test_websocket_without_its_library_says_what_to_install(
    mosquitto: MosquittoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wsproto", None)
    with pytest.raises(MissingDependency, match="pip install 'wsproto"):
        await soon(connect(mosquitto.websocket_url).open())


def test_a_context_as_it_is_made_checks_everything(tmp_path: Path) -> None:
    context = broker_address.TLSSettings().build()
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
