"""No fault shows a secret, neither in its text nor in the variables of its traceback.

pytest with ``-l`` and crash reporters print the variables of every frame that an error passed,
of its cause and of its context.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.bus import connect
from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from pubsub_messagebus.authentication import BasicAuthenticator, TokenAuthenticator
from pubsub_messagebus.protocol import (
    Credentials,
    HandshakeDecoder,
    ProtocolError,
    basic_handshake,
    encode_string,
    token_handshake,
)
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import (
    CallableServerAuthenticator,
    JwtServerAuthenticator,
    LdapServerAuthenticator,
    PasswordFileAuthenticator,
)
from pubsub_messagebus.server.config import ServerConfig

CANARY = "canary" + "-of-the-mine"
OURS = Path(__file__).parents[1]


def shown(error: BaseException) -> str:
    """Return everything that is printed of an error, without the variables of the tests."""
    whole = traceback.TracebackException.from_exception(error, capture_locals=True)
    text: list[str] = []
    seen: list[traceback.TracebackException | None] = [whole]
    while seen:
        each = seen.pop()
        if each is None:
            continue
        text += each.format_exception_only()
        for frame in each.stack:
            if not Path(frame.filename).is_relative_to(OURS):
                text.append(f"{frame.name}: {frame.locals}")
        seen.append(each.__cause__)
        if not each.__suppress_context__:
            seen.append(each.__context__)
    return "\n".join(text)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, and where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_this_finds_a_secret() -> None:
    with pytest.raises(ValueError, match="surrogates") as caught:
        encode_string(CANARY + "\ud800")
    assert CANARY in shown(caught.value)


LONG = CANARY * 6000
FAULTS: dict[str, Callable[[], object]] = {
    "basic, ;": lambda: basic_handshake("tom", CANARY + ";", form="connection-string"),
    "basic, half a pair": lambda: basic_handshake("tom", CANARY + "\ud800"),
    "basic, long": lambda: basic_handshake("tom", LONG),
    "basic, long string": lambda: basic_handshake("tom", LONG, form="connection-string"),
    "basic, user": lambda: basic_handshake(3, CANARY),  # type: ignore[arg-type]
    "basic, bytes": lambda: basic_handshake("tom", CANARY.encode()),  # type: ignore[arg-type]
    "basic, form": lambda: basic_handshake("tom", CANARY, form="x"),  # type: ignore[arg-type]
    "basic, behalf": lambda: basic_handshake("tom", CANARY, "\ud800"),
    "token, ;": lambda: token_handshake(CANARY + ";", form="connection-string"),
    "token, half a pair": lambda: token_handshake(CANARY + "\ud800"),
    "client, ;": lambda: BasicAuthenticator("tom", CANARY + ";", application="x"),
    "client, half a pair": lambda: BasicAuthenticator("tom", CANARY + "\ud800"),
    "client, token": lambda: TokenAuthenticator(CANARY + ";", handshake="connection-string"),
    "short key": lambda: JwtServerAuthenticator(CANARY[:8]),
    "algorithm": lambda: JwtServerAuthenticator(CANARY * 2, algorithms=["none"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_sent_or_used(fault: str) -> None:
    with pytest.raises((ValueError, TypeError, BadOption)) as caught:
        FAULTS[fault]()
    assert CANARY[:8] not in shown(caught.value)


@pytest.mark.parametrize(
    "wire",
    [
        encode_string(f"Username=tom;Password={CANARY};Password={CANARY}"),
        encode_string(f"Username=tom;Pass={CANARY}"),
        encode_string(f"Username=tom;{CANARY}"),
        encode_string("tom") + encode_string(CANARY) + b"\x7f\xff\xff\xff",
        encode_string("tom") + encode_string(CANARY) + b"\0\0\0\x01\xff",
        encode_string(CANARY) + encode_string("") + b"\x7f\xff\xff\xff",
    ],
)
@pytest.mark.parametrize("method", ["basic", "token"])
def test_a_handshake_that_is_none(wire: bytes, method: Any) -> None:
    decoder = HandshakeDecoder(method)
    decoder.feed(wire)
    decoder.eof()
    for _ in range(2):
        error: ProtocolError | None = None
        found = None
        try:
            found = decoder.next_credentials()
        except ProtocolError as raised:
            error = raised
        if error is not None:
            assert CANARY not in shown(error)
        elif method == "basic":  # a server for tokens takes the user for one
            assert CANARY not in repr(found)


async def test_authenticators_that_fail(tmp_path: Path, closed_port: int) -> None:
    pytest.importorskip("ldap3", reason="ldap3 is not installed; extra messagebus-server")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    password = Credentials("basic", username="tom", password=Secret(CANARY))
    token = Credentials("token", token=Secret(CANARY))
    key = Secret("a key of the tests, " + CANARY)
    for authenticator, credentials in (
        (PasswordFileAuthenticator(broken), password),
        (LdapServerAuthenticator(f"ldap://127.0.0.1:{closed_port}", timeout=1), password),
        (JwtServerAuthenticator(key), token),
        (JwtServerAuthenticator(Secret("no PEM " + CANARY), algorithms=["RS256"]), token),
    ):
        with pytest.raises(Exception) as caught:
            await authenticator.authenticate(credentials)
        assert CANARY not in shown(caught.value), authenticator


@pytest.mark.parametrize(
    "text",
    [
        '{{"authentication": {plugin}, "allow": ["All"], "wrong": 1}}',
        '{{"distributor": {{"authentication": {plugin}}}, "wrong": 1}}',
        '{{"authentication": {plugin}, "authentication": {plugin}}}',
        '{{"authentication": {plugin}, "allow": 3}}',
        '{{"authentication": {plugin}, "allow"',
    ],
)
@pytest.mark.parametrize("kind", ["JwtAuthenticator", "LdapAuthenticator", "Kerberos"])
def test_configuration_files(tmp_path: Path, text: str, kind: str) -> None:
    name = f"JetBlack.MessageBus.Common.Security.Authentication.{kind}"
    for arguments in ([CANARY], [CANARY, CANARY], [CANARY, 1]):
        plugin = json.dumps({"typeName": name, "args": arguments})
        path = tmp_path / "appsettings.json"
        path.write_text(text.format(plugin=plugin))
        with pytest.raises(Exception) as caught:
            ServerConfig.load(path)
        assert CANARY not in shown(caught.value)


async def test_connecting(caplog: pytest.LogCaptureFixture, closed_port: int) -> None:
    async def failing(credentials: Credentials) -> Any:
        raise RuntimeError("a fault of the authenticator")

    caplog.set_level(logging.DEBUG)
    async with MessageBusServer(authenticator=CallableServerAuthenticator(failing)) as server:
        attempts: list[tuple[str, dict[str, Any]]] = [
            (f"messagebus://tom:{CANARY}@127.0.0.1:{closed_port}", {}),
            (f"messagebus://tom:{CANARY}@127.0.0.1:{server.port}", {}),
            (f"messagebus://127.0.0.1:{server.port}", {"token": Secret(CANARY)}),
            (f"messagebus://tom:{CANARY}%3B@127.0.0.1:{server.port}", {}),
            (f"messagebus+tls://tom:{CANARY}@127.0.0.1:{server.port}", {}),
        ]
        for url, options in attempts:
            with pytest.raises(Exception) as caught:
                async with asyncio.timeout(20):
                    await connect(url, **options)
            assert CANARY not in shown(caught.value), url.partition("://")[0]
        await asyncio.sleep(0)
    assert CANARY not in caplog.text
    for record in caplog.records:
        if record.exc_info and record.exc_info[1] is not None:
            assert CANARY not in shown(record.exc_info[1])
    assert sys.exc_info()[1] is None
