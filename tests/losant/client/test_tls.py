"""Certificates: a bad one is refused with the reason, before a byte of MQTT was sent."""

from __future__ import annotations

import asyncio
import socket
import ssl
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pubsub_losant import AsyncDevice, Device, LosantTLSError
from pubsub_losant.client.tls import TLSOptions
from tests.losant.support import (
    CONNECT,
    Events,
    ScriptedBroker,
    connected,
    make,
    scripted,
    turn_until,
    wait_until,
)
from tests.losant.vectors import DEVICE
from tests.servers import Authority, Certificate, eventually

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("losant-ca"), "losant test authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that issued nothing of what the brokers have."""
    return Authority(tmp_path_factory.mktemp("losant-stranger"), "stranger")


def _server(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certfile, certificate.keyfile)
    return context


@contextmanager
def _broker(certificate: Certificate, *, websocket: bool = False) -> Iterator[ScriptedBroker]:
    with scripted(tls=_server(certificate), websocket=websocket) as broker:
        yield broker


def _good(authority: Authority, stranger: Authority) -> tuple[Certificate, str | None]:
    return authority.issue("good"), authority.cafile


def _wrong_host(authority: Authority, stranger: Authority) -> tuple[Certificate, str | None]:
    return authority.issue("elsewhere", hosts=("elsewhere.example",)), authority.cafile


def _expired(authority: Authority, stranger: Authority) -> tuple[Certificate, str | None]:
    return authority.issue("expired", expired=True), authority.cafile


def _wrong_ca(authority: Authority, stranger: Authority) -> tuple[Certificate, str | None]:
    return authority.issue("good"), stranger.cafile


def _self_signed(authority: Authority, stranger: Authority) -> tuple[Certificate, str | None]:
    return authority.issue("good"), None  # nobody the system trusts vouches for it


Problem = Callable[[Authority, Authority], tuple[Certificate, str | None]]
PROBLEMS = pytest.mark.parametrize(
    ("problem", "reason"),
    [
        pytest.param(_wrong_host, "IP address mismatch|Hostname mismatch", id="wrong host"),
        pytest.param(_expired, "expired", id="expired"),
        pytest.param(_wrong_ca, "unable to get local issuer", id="wrong authority"),
        pytest.param(_self_signed, "unable to get local issuer|self.signed", id="unknown to all"),
    ],
)


@PROBLEMS
@pytest.mark.parametrize("blocking", [False, True], ids=["loop", "blocking"])
def test_a_bad_certificate_is_refused_with_the_reason_and_not_tried_again(
    problem: Problem, reason: str, blocking: bool, authority: Authority, stranger: Authority
) -> None:
    certificate, cafile = problem(authority, stranger)
    with _broker(certificate) as broker:
        device = make(broker, cafile=cafile, retry_first=True)
        with pytest.raises(LosantTLSError, match=reason) as caught:
            device.connect(blocking=blocking)
        assert isinstance(caught.value, ssl.SSLError)
        assert caught.value.hint
        assert device.is_connected() is False
        device.loop(0.1)
        wait_until(lambda: broker.tls_errors)
        assert len(broker.accepted) == 1
        assert broker.packets == [], "neither key nor secret left"


@PROBLEMS
async def test_asyncio_refuses_a_bad_certificate_as_well(
    problem: Problem, reason: str, authority: Authority, stranger: Authority
) -> None:
    certificate, cafile = problem(authority, stranger)
    with _broker(certificate) as broker:
        device = make(broker, AsyncDevice, cafile=cafile, retry_first=True)
        async with asyncio.timeout(10):
            with pytest.raises(LosantTLSError, match=reason):
                await device.connect()
        assert len(broker.accepted) == 1
        assert broker.packets == []


def test_a_self_signed_certificate_is_refused_by_the_systems_store(authority: Authority) -> None:
    own = Certificate(authority.cafile, "")
    key = Path(authority.cafile).with_suffix(".own.key")
    from cryptography.hazmat.primitives import serialization

    key.write_bytes(
        authority._key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    with _broker(Certificate(own.certfile, str(key))) as broker:
        with pytest.raises(LosantTLSError, match=r"self.signed"):
            make(broker).connect()
        assert broker.packets == []


@pytest.mark.parametrize("websocket", [False, True], ids=["tcp", "websockets"])
@pytest.mark.parametrize("way", ["cafile", "cadata", "ssl_context"])
def test_a_private_authority_is_accepted(way: str, websocket: bool, authority: Authority) -> None:
    every: dict[str, Any] = {
        "cafile": authority.cafile,
        "cadata": Path(authority.cafile).read_text(),
        "ssl_context": ssl.create_default_context(cafile=authority.cafile),
    }
    with _broker(authority.issue("good"), websocket=websocket) as broker:
        device = make(broker, **{way: every[way]})
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, lambda: events.names == ["connect"])
        assert device.send_state({"a": 1}) is True
        device.close()


async def test_asyncio_accepts_a_private_authority(authority: Authority) -> None:
    with _broker(authority.issue("good")) as broker:
        async with asyncio.timeout(10):
            async with make(broker, AsyncDevice, cafile=authority.cafile) as device:
                assert await device.send_state({"a": 1}) is True


def test_a_certificate_that_became_bad_ends_the_attempts_of_a_reconnect(
    authority: Authority,
) -> None:
    with _broker(authority.issue("good")) as broker:
        device = make(broker, cafile=authority.cafile)
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, lambda: "connect" in events.names)
        broker.tls = _server(authority.issue("expired", expired=True))
        broker.cut()
        with pytest.raises(LosantTLSError, match="expired"):
            turn_until(device, lambda: False)
        assert isinstance(events.of("error")[0][0], LosantTLSError)
        device.loop(0.1)
        assert len(broker.accepted) == 2
        assert len(broker.of(CONNECT)) == 1


def test_a_handshake_that_fails_for_a_while_is_tried_again(authority: Authority) -> None:
    """As behind a balancer whose broker restarts; nothing was wrong with the certificate."""
    good = _server(authority.issue("good"))
    with scripted(tls=good) as broker:
        with connected(broker, cafile=authority.cafile) as (device, events):
            broker.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # it has no certificate to show
            broker.cut()
            turn_until(device, lambda: len(broker.tls_errors) >= 2)
            broker.tls = good
            turn_until(device, lambda: "reconnect" in events.names)
        assert events.names == ["connect", "disconnect", "reconnect", "close"]
        broker.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with pytest.raises(LosantTLSError):
            device.connect(blocking=False)


async def test_asyncio_tries_a_failed_handshake_again_as_well(authority: Authority) -> None:
    good = _server(authority.issue("good"))
    with scripted(tls=good) as broker:
        device = make(broker, AsyncDevice, cafile=authority.cafile)
        events = Events().watch(device)
        async with asyncio.timeout(10), device:
            broker.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            broker.cut()
            await eventually(lambda: len(broker.tls_errors) >= 2)
            broker.tls = good
            await eventually(lambda: "reconnect" in events.names)
        assert "error" not in events.names


def test_a_port_without_tls_is_refused_and_never_used_in_the_clear() -> None:
    with scripted() as broker:
        device = make(broker, secure=True, connect_timeout=0.3)
        with pytest.raises((LosantTLSError, TimeoutError)):
            device.connect(blocking=False)
        assert not any(b"SEC" in packet.raw for packet in broker.packets)


def test_a_client_certificate_takes_the_place_of_key_and_secret(authority: Authority) -> None:
    own = authority.issue("device", client=True)
    context = _server(authority.issue("good"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.cafile)
    with scripted(tls=context) as broker:
        device = Device(
            DEVICE,
            None,
            None,
            host="127.0.0.1",
            port=broker.port,
            cafile=authority.cafile,
            certfile=own.certfile,
            keyfile=own.keyfile,
        )
        events = Events().watch(device)
        device.connect(blocking=False)
        turn_until(device, lambda: "connect" in events.names)
        device.close()
        assert broker.of(CONNECT)[0].body[7] == 0x02, "clean session, no user name, no password"


def test_a_missing_file_is_said_before_anything_is_dialled(tmp_path: Path) -> None:
    device = Device(DEVICE, "AK", "SEC", cafile=str(tmp_path / "none.pem"), host="127.0.0.1")
    with pytest.raises(FileNotFoundError):
        device.connect()
    assert device.is_connected() is False


def test_the_context_checks_host_names_and_refuses_old_protocols() -> None:
    context = TLSOptions().build()
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


def test_certifi_helps_where_the_system_trusts_nobody(
    monkeypatch: pytest.MonkeyPatch, authority: Authority, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    monkeypatch.setenv("SSL_CERT_FILE", str(empty))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    assert not ssl.create_default_context().get_ca_certs()
    certifi = types.ModuleType("certifi")
    certifi.where = lambda: authority.cafile  # type: ignore[attr-defined] # a stand-in
    monkeypatch.setitem(sys.modules, "certifi", certifi)
    assert len(TLSOptions().build().get_ca_certs()) == 1
    monkeypatch.setitem(sys.modules, "certifi", None)
    assert not TLSOptions().build().get_ca_certs()


def test_files_and_a_context_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        Device(DEVICE, "k", "s", cafile="x", ssl_context=ssl.create_default_context())


def test_the_host_name_is_sent_and_checked(authority: Authority) -> None:
    names: list[str | None] = []
    context = _server(authority.issue("good"))
    context.sni_callback = lambda sock, name, _: names.append(name)
    with scripted(tls=context) as broker:
        device = make(broker, host="localhost", cafile=authority.cafile)
        device.connect(blocking=False)
        assert names == ["localhost"]
        device.close()


@pytest.mark.parametrize("kind", [Device, AsyncDevice])
async def test_a_peer_that_hangs_up_during_the_handshake_is_no_bad_certificate(
    kind: type[Any],
) -> None:
    with scripted(hangs_up=True) as broker:
        device = make(broker, kind, secure=True)

        async def run() -> None:
            done = device.connect()
            if done is not None:
                async with asyncio.timeout(5):
                    await done

        with pytest.raises(OSError) as caught:
            await run()
        assert not isinstance(caught.value, LosantTLSError)


def test_an_unresolvable_name_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(socket.gaierror):
        Device(DEVICE, "k", "s", host="nowhere.invalid").connect()
