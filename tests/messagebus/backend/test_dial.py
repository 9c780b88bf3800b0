"""Connecting: faults of certificates and files have a text and a remedy each."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pubsub_core.bus import connect
from pubsub_core.errors import ConnectError, TLSProblem
from pubsub_messagebus.server import MessageBusServer
from tests.servers import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


async def refused(server: MessageBusServer, host: str = "127.0.0.1", **options: Any) -> TLSProblem:
    async with server:
        with pytest.raises(TLSProblem) as caught:
            await connect(f"messagebus+tls://{host}:{server.port}", **options)
    return caught.value


def serving(authority: Authority, **about: Any) -> MessageBusServer:
    own = authority.issue("server", **about)
    return MessageBusServer(certfile=own.certfile, keyfile=own.keyfile)


async def test_an_unknown_authority(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "other")
    error = await refused(serving(authority), ca_file=other.cafile)
    assert "unable to get local issuer certificate" in str(error)
    assert "name the certificate of its authority with ca_file" in str(error)


async def test_an_expired_certificate(authority: Authority) -> None:
    error = await refused(serving(authority, expired=True), ca_file=authority.cafile)
    assert "certificate has expired" in str(error)
    assert "needs a new one, or the clock of this machine is wrong" in str(error)


async def test_another_host(authority: Authority) -> None:
    server = serving(authority, hosts=("elsewhere.example",))
    error = await refused(server, ca_file=authority.cafile)
    assert "IP address mismatch" in str(error)
    assert "use a host name that is in the certificate" in str(error)
    error = await refused(
        serving(authority, hosts=("elsewhere.example",)), "localhost", ca_file=authority.cafile
    )
    assert "use the host name that is in the certificate" in str(error)


async def test_a_client_certificate_that_is_missing(authority: Authority) -> None:
    own = authority.issue("server")
    server = MessageBusServer(certfile=own.certfile, keyfile=own.keyfile, cafile=authority.cafile)
    async with server:
        # TLS 1.3: the client learns of it only when it reads.
        with pytest.raises(ConnectError) as caught:
            await connect(f"messagebus+tls://127.0.0.1:{server.port}", ca_file=authority.cafile)
    assert "cert_file" in str(caught.value)


async def test_a_key_with_a_password_is_no_question_at_the_terminal(
    authority: Authority, tmp_path: Path
) -> None:
    own = authority.issue("mine", client=True)
    key = ec.generate_private_key(ec.SECP256R1())
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    error = await refused(
        serving(authority), ca_file=authority.cafile, cert_file=own.certfile, key_file=str(locked)
    )
    assert "locked.key" in str(error)


async def test_unverified_is_told_once(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(authority) as server:
        url = f"messagebus+tls://127.0.0.1:{server.port}"
        with caplog.at_level(logging.WARNING, "pubsub_messagebus"):
            async with connect(url, insecure_skip_verify=True) as bus:
                await server.restart()
                async with asyncio.timeout(20):
                    while bus.stats.sessions < 2:
                        await asyncio.sleep(0.01)
        assert caplog.text.count("insecure_skip_verify is on") == 1
