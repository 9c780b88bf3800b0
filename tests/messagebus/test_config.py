"""The distributor's configuration file, and what the server tells of itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.errors import BadOption
from pubsub_messagebus.config import ServerConfig
from pubsub_messagebus.protocol import basic_handshake, token_handshake
from pubsub_messagebus.server import ListenerOptions, MessageBusServer
from pubsub_messagebus.server_auth import (
    JwtServerAuthenticator,
    LdapServerAuthenticator,
    NullServerAuthenticator,
    PasswordFileAuthenticator,
)
from tests.servers import Authority

from .raw import Raw

PASSWORDS = Path(__file__).parent.parent / "data" / "messagebus_passwords.json"
SECRET = "a shared secret of the tests, " * 3


def written(folder: Path, values: dict[str, Any]) -> str:
    path = folder / "appsettings.json"
    path.write_text(json.dumps({"distributor": values}))
    return str(path)


def test_the_originals_file_and_ours_say_the_same(tmp_path: Path) -> None:
    original = ServerConfig.load(
        written(
            tmp_path,
            {
                "address": "0.0.0.0",
                "port": 9001,
                "heartbeatInterval": "00:01:02.5",
                "sslConfig": {"isEnabled": True, "certFile": "own.crt", "keyFile": "own.key"},
                "prometheus": {"isEnabled": True, "port": 9002},
                "isAuthorizationRequired": True,
            },
        )
    )
    toml = tmp_path / "bus.toml"
    toml.write_text(
        "heartbeat_interval = 62.5\nis_authorization_required = true\n"
        '[ssl]\ncertfile = "own.crt"\nkeyfile = "own.key"\n[metrics]\nport = 9002\n'
    )
    assert ServerConfig.load(toml) == original
    assert original.heartbeat_interval == 62.5
    assert original.certfile == str(tmp_path / "own.crt")
    assert original.metrics_port == 9002
    assert original.policy.authorization_required("F")
    nothing = ServerConfig.load(written(tmp_path, {}))
    assert nothing == ServerConfig()
    assert nothing.authenticator() is None
    off = {"sslConfig": {"isEnabled": False}, "prometheus": {"isEnabled": False, "port": 1}}
    assert ServerConfig.load(written(tmp_path, off)) == ServerConfig()


@pytest.mark.parametrize(
    ("values", "option"),
    [
        # The original's authentication names an assembly, which cannot be run here.
        ({"authentication": {"assemblyName": "X", "typeName": "Y", "args": []}}, "authentication"),
        ({"authentication": {"method": "kerberos"}}, "authentication"),
        ({"authentication": {"method": "password"}}, "authentication.file"),
        ({"authentication": {"method": "jwt"}}, "authentication.key_file"),
        ({"authentication": {"method": "jwt", "key_file": "none"}}, "authentication.key_file"),
        ({"authentication": {"method": "ldap"}}, "authentication.url"),
        ({"authentication": {"method": "ldap", "url": 3}}, "authentication.url"),
        (
            {"authentication": {"method": "ldap", "url": "ldaps://x", "timeout": "long"}},
            "authentication.timeout",
        ),
        ({"authentication": 3}, "authentication"),
        ({"authentication": {"method": "null"}, "password_file": "x"}, "password_file"),
        # A certificate of the Windows store: without it passwords would cross in clear.
        ({"sslConfig": {"isEnabled": True, "subjectName": "x"}}, "ssl"),
        ({"prometheus": {"port": 70000}}, "metrics.port"),
        ({"prometheus": {"port": True}}, "metrics.port"),
        ({"heartbeatInterval": "often"}, "heartbeat_interval"),
        ({"heartbeatInterval": "1:2"}, "heartbeat_interval"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, values: dict[str, Any], option: str
) -> None:
    with pytest.raises(BadOption) as caught:
        MessageBusServer(config=written(tmp_path, values))
    assert caught.value.option == option


async def test_every_method_of_authentication(tmp_path: Path) -> None:
    jwt = pytest.importorskip("jwt", reason="PyJWT is not installed; extra messagebus-server")
    pytest.importorskip("ldap3", reason="ldap3 is not installed; extra messagebus-server")
    (tmp_path / "token.key").write_text(SECRET + "\n")
    (tmp_path / "passwords.json").write_bytes(PASSWORDS.read_bytes())
    methods: list[tuple[dict[str, Any], type]] = [
        ({"method": "null"}, NullServerAuthenticator),
        ({"method": "password", "file": "passwords.json"}, PasswordFileAuthenticator),
        ({"method": "jwt", "key_file": "token.key"}, JwtServerAuthenticator),
        (
            {"method": "ldap", "url": "ldaps://directory", "dn": "uid={},dc=example"},
            LdapServerAuthenticator,
        ),
    ]
    for told, kind in methods:
        server = MessageBusServer(config=written(tmp_path, {"authentication": told}))
        assert type(server.authenticator) is kind
    own = NullServerAuthenticator()
    config = written(tmp_path, {"authentication": methods[1][0]})
    assert MessageBusServer(config=config, authenticator=own).authenticator is own
    config = written(tmp_path, {"authentication": methods[2][0]})
    assert SECRET.strip() not in repr(ServerConfig.load(config))
    async with MessageBusServer(config=config) as server:
        async with Raw(server.port) as client:
            signed = jwt.encode({"sub": "tom", "exp": time.time() + 60}, SECRET.strip())
            client.send(token_handshake(signed))
            await client.fence()
        async with Raw(server.port) as client:
            client.send(token_handshake(signed[:-2]))
            assert await client.closed() == b""


async def test_what_the_ready_line_tells(tmp_path: Path) -> None:
    """Contents of ``pubsub serve messagebus --json``, beside host, port and URL."""
    authority = Authority(tmp_path)
    own = authority.issue("server")
    config = written(
        tmp_path,
        {
            "sslConfig": {"isEnabled": True, "certFile": own.certfile, "keyFile": own.keyfile},
            "prometheus": {"isEnabled": True, "port": 0},
            "authentication": {"method": "password", "file": str(PASSWORDS)},
        },
    )
    server = MessageBusServer(config=config)
    server.add_listener(ListenerOptions(dialect="content_type"))
    async with server:
        assert server.url == f"messagebus+tls://127.0.0.1:{server.port}"
        told = dict(server.describe())
        assert json.loads(json.dumps(told)) == {
            "dialect": "is_image",
            "authentication": "basic",
            "ports": list(server.ports),
            "metrics": server.metrics_url,
        }
        assert len(set(server.ports)) == 2
        async with Raw(server.ports[1], dialect="content_type") as client:
            client.send(basic_handshake("guest", "right"))
            await client.fence()
    assert dict(MessageBusServer().describe()) == {"dialect": "is_image", "authentication": "null"}
