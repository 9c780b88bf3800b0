"""Getting in: credentials of six kinds, TLS before anything secret, peers that are no servers."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import pytest

from pubsub_core import connect
from pubsub_core.errors import (
    AuthenticationFailed,
    BadOption,
    ConnectError,
    ConnectTimeout,
    PubSubError,
    ServerRefused,
    TLSProblem,
)
from pubsub_core.events import Status
from pubsub_core.secrets import Secret
from pubsub_nats.options import NatsOptions, host_port
from pubsub_nats.server import NatsServer
from tests.servers import Authority, eventually

from .conftest import needs_nkeys
from .fake import INFO, fake

SECRET = "s3cret-word"


async def works(url: str, **options: Any) -> None:
    async with connect(url, **options) as bus, bus.subscribe("a") as messages:
        await bus.publish("a", b"x")
        assert (await messages.get(timeout=5)).payload == b"x"


async def refused(url: str, kind: type[PubSubError] = AuthenticationFailed, **options: Any) -> Any:
    with pytest.raises(kind) as caught:
        async with connect(url, **options):
            pass
    shown = "".join(
        f"{error!s}{error!r}" for error in (caught.value, caught.value.__cause__) if error
    )
    assert SECRET not in shown
    assert caught.value.hint
    return caught.value


# --- credentials ---------------------------------------------------------------------------


async def test_user_and_password() -> None:
    config = f"authorization {{ user: u, password: {SECRET} }}"
    async with NatsServer(config=config, jetstream=False) as server:
        at = f"127.0.0.1:{server.port}"
        await works(f"nats://u:{SECRET}@{at}")
        await works(f"nats://{at}", username="u", password=SECRET)
        await works(f"nats://x:y@{at}", username="u", password=SECRET)
        for url in (f"nats://u:wrong@{at}", f"nats://{at}", f"nats://{SECRET}@{at}"):
            error = await refused(url)
            assert error.retryable is False


async def test_token() -> None:
    config = f"authorization {{ token: {SECRET} }}"
    async with NatsServer(config=config, jetstream=False) as server:
        at = f"127.0.0.1:{server.port}"
        await works(f"nats://{SECRET}@{at}")
        await works(f"nats://{at}", token=SECRET)
        await refused(f"nats://{at}", token="wrong")


@needs_nkeys
async def test_nkey() -> None:
    from .jwt import Key

    key, other = Key("user"), Key("user")
    config = f"authorization {{ users: [ {{ nkey: {key.public} }} ] }}"
    async with NatsServer(config=config, jetstream=False) as server:
        await works(server.url, nkey_seed=key.seed)
        error = await refused(server.url, nkey_seed=other.seed)
        assert other.seed not in str(error)
        error = await refused(server.url, BadOption, nkey_seed=SECRET)
    async with NatsServer(jetstream=False) as server:
        error = await refused(server.url, nkey_seed=key.seed)
        assert "nonce" in str(error)


@needs_nkeys
async def test_credentials_file(tmp_path: Path) -> None:
    from .jwt import Operator

    operator, stranger = Operator(), Operator()
    file = tmp_path / "u.creds"
    async with NatsServer(config=operator.config, jetstream=False) as server:
        file.write_text(operator.credentials())
        await works(server.url, credentials=str(file))
        file.write_text(operator.credentials(expires_in=-60))
        error = await refused(server.url, credentials=str(file))
        assert error.retryable is False
        file.write_text(stranger.credentials())
        await refused(server.url, credentials=str(file))
        file.write_text(f"no credentials, but {SECRET}")
        await refused(server.url, BadOption, credentials=str(file))
        file.write_bytes(b"\xff\xfe")
        await refused(server.url, BadOption, credentials=str(file))
        error = await refused(server.url, BadOption, credentials=str(tmp_path / "missing"))
        assert "missing" in str(error)


@needs_nkeys
async def test_a_token_that_expires_ends_the_session_for_good(tmp_path: Path) -> None:
    from .jwt import Operator

    operator = Operator()
    file = tmp_path / "u.creds"
    file.write_text(operator.credentials(expires_in=2))
    async with NatsServer(config=operator.config, jetstream=False) as server:
        async with connect(server.url, credentials=str(file), reconnect_first=0.01) as bus:
            await eventually(lambda: bus.status is Status.FAILED, within=15)
            assert isinstance(bus.error, AuthenticationFailed)
            assert bus.error.retryable is False


async def test_client_certificates(tmp_path: Path, authority: Authority) -> None:
    certificate = authority.issue("server")
    client = authority.issue("client", client=True)
    for verify in ("verify: true", "verify_and_map: true"):
        config = f"""
        tls {{ cert_file: "{certificate.certfile}", key_file: "{certificate.keyfile}",
               ca_file: "{authority.cafile}", {verify} }}
        """
        if "map" in verify:
            config += 'authorization { users: [ { user: "CN=client" } ] }'
        async with NatsServer(config=config, jetstream=False) as server:
            await works(
                server.url,
                ca_file=authority.cafile,
                cert_file=client.certfile,
                key_file=client.keyfile,
            )
            await refused(server.url, TLSProblem, ca_file=authority.cafile)
            if "map" in verify:
                other = authority.issue("other", client=True)
                await refused(
                    server.url,
                    ca_file=authority.cafile,
                    cert_file=other.certfile,
                    key_file=other.keyfile,
                )


# --- TLS -----------------------------------------------------------------------------------


async def test_tls(authority: Authority) -> None:
    certificate = authority.issue("server")
    config = f'tls {{ cert_file: "{certificate.certfile}", key_file: "{certificate.keyfile}" }}'
    async with NatsServer(config=config, jetstream=False) as server:
        at = f"127.0.0.1:{server.port}"
        await works(f"nats+tls://{at}", ca_file=authority.cafile)
        # A server that requires TLS gets it, with full checks, whatever the scheme says.
        await works(f"nats://{at}", ca_file=authority.cafile)
        await works(f"nats+tls://{at}", insecure_skip_verify=True)
        context = ssl.create_default_context(cafile=authority.cafile)
        await works(f"nats+tls://{at}", ssl_context=context)
        for url in (f"nats+tls://{at}", f"nats://{at}"):
            error = await refused(url, TLSProblem)
            assert error.retryable is False
        await refused(f"nats+tls://{at}", BadOption, key_file="k.pem")
        await refused(f"nats+tls://{at}", TLSProblem, ca_file="missing.pem")


async def test_the_certificate_must_have_the_name(authority: Authority) -> None:
    certificate = authority.issue("elsewhere", hosts=("elsewhere.example",))
    config = f'tls {{ cert_file: "{certificate.certfile}", key_file: "{certificate.keyfile}" }}'
    async with NatsServer(config=config, jetstream=False) as server:
        error = await refused(
            f"nats+tls://127.0.0.1:{server.port}", TLSProblem, ca_file=authority.cafile
        )
        assert "127.0.0.1" in str(error)


async def test_tls_first_both_ways(authority: Authority) -> None:
    certificate = authority.issue("server")
    tls = f'cert_file: "{certificate.certfile}", key_file: "{certificate.keyfile}"'
    async with NatsServer(config=f"tls {{ {tls}, handshake_first: true }}") as server:
        at = f"127.0.0.1:{server.port}"
        await works(f"nats+tls://{at}", ca_file=authority.cafile, tls_first=True)
        # The server waits two seconds for the handshake; then it is plain what it was.
        error = await refused(f"nats+tls://{at}", ConnectError, ca_file=authority.cafile)
        assert "tls_first" in str(error)
    async with NatsServer(config=f"tls {{ {tls} }}") as server:
        at = f"127.0.0.1:{server.port}"
        await refused(f"nats+tls://{at}", ConnectError, ca_file=authority.cafile, tls_first=True)


async def test_websocket_over_tls(authority: Authority) -> None:
    certificate = authority.issue("server")
    config = f"""
    websocket {{ listen: "127.0.0.1:-1",
      tls {{ cert_file: "{certificate.certfile}", key_file: "{certificate.keyfile}" }} }}
    """
    async with NatsServer(config=config, jetstream=False) as server:
        ports = server._nodes[0].ports()
        assert ports is not None
        port = int(ports["websocket"][0].rpartition(":")[2])
        await works(f"nats+wss://127.0.0.1:{port}", ca_file=authority.cafile)
        await refused(f"nats+wss://127.0.0.1:{port}", TLSProblem)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("nats+tls", {}),
        ("nats", {"ca_file": "authority"}),
        ("nats", {"insecure_skip_verify": True}),
    ],
)
async def test_nothing_is_sent_where_tls_is_wanted_and_not_offered(
    scheme: str, options: dict[str, Any], authority: Authority
) -> None:
    if "ca_file" in options:
        options = {"ca_file": authority.cafile}
    async with fake() as server:
        error = await refused(
            f"{scheme}://u:{SECRET}@127.0.0.1:{server.port}", TLSProblem, **options
        )
        assert error.retryable is False
        await asyncio.wait_for(server.ended.wait(), 5)
        assert server.heard == b""


async def test_nothing_is_sent_where_somebody_puts_bytes_before_the_handshake() -> None:
    greeting = INFO.replace(b'"headers"', b'"tls_required":true,"headers"') + b"PING\r\n"
    async with fake(greeting) as server:
        await refused(f"nats+tls://u:{SECRET}@127.0.0.1:{server.port}", TLSProblem)
        await asyncio.wait_for(server.ended.wait(), 5)
        # At most the answer to that PING; it is no secret.
        assert server.heard.replace(b"PONG\r\n", b"") == b""


# --- peers that are none -----------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x15\x03\x01\x00\x02", b"220 ready\r\n"]
)
async def test_a_peer_that_is_no_server(greeting: bytes) -> None:
    async with fake(greeting) as server:
        error = await refused(f"nats://u:{SECRET}@127.0.0.1:{server.port}", ConnectError)
        assert error.retryable is False
        assert "no NATS server" in str(error)
        await asyncio.wait_for(server.ended.wait(), 5)
        assert server.heard == b""


@pytest.mark.parametrize("greeting", [b"", b"INFO {", INFO])
async def test_a_peer_that_falls_silent(greeting: bytes) -> None:
    async with fake(greeting, lambda _: b"") as server:
        before = asyncio.all_tasks()
        await refused(f"nats://127.0.0.1:{server.port}", ConnectTimeout, connect_timeout=0.2)
        await asyncio.wait_for(server.ended.wait(), 5)
        await eventually(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@pytest.mark.parametrize(
    ("text", "kind", "retryable"),
    [
        (b"Authorization Violation", AuthenticationFailed, False),
        (b"User Authentication Expired", AuthenticationFailed, False),
        (b"Authentication Timeout", ConnectTimeout, True),
        (b"maximum connections exceeded", ServerRefused, True),
        (b"Stale Connection", ConnectError, True),
        (b"Unknown Protocol Operation", ConnectError, True),
    ],
)
async def test_what_the_server_says_becomes_an_error(
    text: bytes, kind: type[ConnectError], retryable: bool
) -> None:
    def answer(line: bytes) -> bytes:
        if line != b"PING\r\n":
            return b""
        server.writers[-1].write(b"-ERR '%b'\r\n" % text)
        server.writers[-1].close()
        return b""

    async with fake(INFO, answer) as server:
        error = await refused(f"nats://127.0.0.1:{server.port}", kind)
        assert type(error) is kind
        assert error.retryable is retryable


async def test_a_websocket_needs_a_websocket(server: NatsServer) -> None:
    error = await refused(f"nats+ws://127.0.0.1:{server.port}", ConnectError)
    assert "websocket" in error.hint
    async with fake(
        b"",
        lambda line: (
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n" if line == b"\r\n" else b""
        ),
    ) as peer:
        error = await refused(f"nats+ws://127.0.0.1:{peer.port}/x", ServerRefused)
        assert "404" in str(error)


async def test_a_plain_client_at_the_websocket_port(server: NatsServer) -> None:
    # That server waits for a request, so the deadline ends it.
    port = server.websocket_url.rpartition(":")[2]
    await refused(f"nats://127.0.0.1:{port}", ConnectError, connect_timeout=0.3)


async def test_cancelling_at_each_await_leaves_nothing(server: NatsServer) -> None:
    before = asyncio.all_tasks()
    for turns in range(40):
        bus = connect(server.url)
        opening = asyncio.ensure_future(bus.open())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        await bus.close()
    await eventually(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


# --- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"keepalive": -1.0},
        {"servers": ("user:secret@host:1",)},
        {"servers": ("host:0",)},
        {"prefix": "$SYS"},
        {"prefix": "a/#"},
        {"prefix": "a b"},
        {"ssl_context": 1},
        {"token": Secret("a"), "username": "b"},
        {"credentials": "a", "nkey_seed": Secret("b")},
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any]) -> None:
    with pytest.raises(BadOption) as caught:
        NatsOptions(**options)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("nats://", {}),
        ("nats://host/path", {}),
        ("nats+ws://host", {"ca_file": "x"}),
    ],
)
async def test_addresses_that_do_not_fit(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(BadOption):
        await connect(url, **options).open()


def test_addresses_of_further_servers() -> None:
    assert host_port("a") == ("a", 4222)
    assert host_port("a:1") == ("a", 1)
    assert host_port("[::1]:7") == ("::1", 7)
    assert host_port("[::1]") == ("::1", 4222)
    assert host_port("::1") == ("::1", 4222)
    for text in ("", ":1", "a:b", "a:70000", "a/b", "[::1", "[::1]x", "u@h"):
        with pytest.raises(ValueError, match=r".*"):
            host_port(text)
