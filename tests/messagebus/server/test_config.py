"""The distributor's configuration file, and what the server tells of itself."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.errors import BadOption
from pubsub_messagebus.protocol import basic_handshake, token_handshake
from pubsub_messagebus.server import ListenerOptions, MessageBusServer
from pubsub_messagebus.server.authenticators import (
    JwtServerAuthenticator,
    LdapServerAuthenticator,
    NullServerAuthenticator,
    PasswordFileAuthenticator,
)
from pubsub_messagebus.server.config import ServerConfig
from pubsub_messagebus.server.roles import Role
from tests.messagebus.raw import Raw
from tests.messagebus.vectors import PASSWORDS
from tests.servers import Authority

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
    # The file that the original ships has a port, and no metrics.
    shipped = {"prometheus": {"port": 9002}}
    assert ServerConfig.load(written(tmp_path, shipped)).metrics_port is None
    off = {"sslConfig": {"isEnabled": False}, "prometheus": {"isEnabled": False, "port": 1}}
    assert ServerConfig.load(written(tmp_path, off)) == ServerConfig()


# Every key that may stand anywhere, as the original spells it where it has it.
FULL: dict[str, Any] = {
    "address": "0.0.0.0",
    "port": 9001,
    "heartbeatInterval": "00:00:05",
    "authentication": {
        "method": "ldap",
        "url": "ldaps://x",
        "dn": "{}",
        "caFile": "",
        "timeout": 1,
    },
    "sslConfig": {
        "isEnabled": True,
        "certFile": "own.crt",
        "keyFile": "own.key",
        "caFile": "",
        "storeLocation": "",
        "subjectName": "",
    },
    "sspi": {"isEnabled": False, "address": "0.0.0.0", "port": 9002},
    "sspiAuthentication": {},
    "prometheus": {"isEnabled": True, "port": 0},
    "allow": ["All"],
    "deny": ["Publish"],
    "isAuthorizationRequired": True,
    "isImpersonationAllowed": True,
    "isProxyAllowed": True,
    "useJsonLogger": True,
    "feedRoles": {
        "Feed": {
            "isAuthorized": True,
            "isImpersonationAllowed": True,
            "isProxyAllowed": True,
            "allow": ["Publish"],
            "deny": ["Notify"],
            "interactorRoles": {"Host": {"Tom": {"allow": ["Notify"], "deny": ["Publish"]}}},
        }
    },
}
NAMED = ("Feed", "Host", "Tom")  # somebody's choice, and no keys


def keys_of(values: Any, *above: str) -> Iterator[tuple[str, ...]]:
    if isinstance(values, dict):
        for key, value in values.items():
            if key not in NAMED:
                yield (*above, key)
            yield from keys_of(value, *above, key)


def renamed(values: Any, old: tuple[str, ...], new: str) -> dict[str, Any]:
    """Return *values* with another name for the key at the path *old*; in the same place."""
    first, *rest = old
    return {
        (new if key == first and not rest else key): (
            renamed(value, tuple(rest), new) if key == first and rest else value
        )
        for key, value in values.items()
    }


def snake(key: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in key)


@pytest.mark.parametrize("path", list(keys_of(FULL)), ids=".".join)
def test_every_key_ignores_case_and_no_other_is_passed_over(
    tmp_path: Path, path: tuple[str, ...]
) -> None:
    key = path[-1]
    whole = ServerConfig.load(written(tmp_path, FULL))
    for spelt in (key.lower(), key.upper(), key.capitalize(), snake(key)):
        assert ServerConfig.load(written(tmp_path, renamed(FULL, path, spelt))) == whole
    for wrong in (key[0] + key[2:], snake(key) + "s_"):
        with pytest.raises(BadOption, match="is not a key") as caught:
            ServerConfig.load(written(tmp_path, renamed(FULL, path, wrong)))
        assert caught.value.option == ".".join(("distributor", *path[:-1], wrong))
        if len(key) > 4:
            assert "did you mean " in str(caught.value)
    with pytest.raises(BadOption, match="twice"):
        ServerConfig.load(written(tmp_path, twice(FULL, path)))


def twice(values: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """Return *values* with the key at *path* once more, in other letters."""
    first, *rest = path
    if rest:
        return {**values, first: twice(values[first], tuple(rest))}
    return {**values, first.upper() if first.islower() else snake(first): values[first]}


def test_what_closes_a_server_for_the_original_closes_it_here(tmp_path: Path) -> None:
    told = ServerConfig.load(written(tmp_path, {"Allow": ["All"], "Deny": ["Publish"]}))
    assert told.policy.roles("F", "tom", "h") == Role.ALL & ~Role.PUBLISH
    bare = tmp_path / "bare.json"
    for text in (
        '{"Allow": ["All"], "Deny": ["Publish"]}',
        '\ufeff{"DISTRIBUTOR": {"Allow": ["All"], "Deny": ["Publish"]}, "logging": {"any": 1}}',
    ):
        bare.write_text(text)
        assert ServerConfig.load(bare) == told
    for text, hint in (
        ('{"distributor": {"alow": ["None"]}}', "did you mean 'allow'"),
        ('{"distributer": {"allow": ["None"]}}', "did you mean 'distributor'"),
        ('{"distributor": {}, "deny": ["All"]}', "put it into distributor"),
        ('{"deny": ["All"], "deny": []}', "stands twice"),
        # For the original this allows nothing; without feeds it would allow everything here.
        ('{"feedRoles": {"F": {"allow": ["All"]}}}', 'allow = ["All"]'),
        ('{"allow": null}', "does not fit"),
        ('{"isAuthorizationRequired": "yes"}', "neither true nor false"),
        ('{"isAuthorizationRequired": null}', "neither true nor false"),
        ("[]", "no table"),
    ):
        bare.write_text(text)
        with pytest.raises(BadOption) as caught:
            MessageBusServer(config=str(bare))
        assert hint in str(caught.value)


ORIGINAL = "JetBlack.MessageBus.Common.Security.Authentication"


def plugin(name: str, *args: str) -> dict[str, Any]:
    about = {"assemblyPath": "%NOT_SET_HERE%/x.dll", "assemblyName": "X"}
    return {"authentication": {**about, "typeName": name, "args": list(args)}}


async def test_the_originals_authentication_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passwords.json").write_bytes(PASSWORDS.read_bytes())
    roles = {"tester": {"AUTH": {"*": {"Allow": ["Notify"], "deny": ["Publish"]}, "x": {}}}}
    (tmp_path / "roles.json").write_text(json.dumps(roles))
    monkeypatch.setenv("JETBLACK_TEST_ROOT", str(tmp_path))
    file = "%JETBLACK_TEST_ROOT%/passwords.json"
    name = "JetBlack.MessageBus.Extension.PasswordFileAuthentication.PasswordFileAuthenticator"
    config = written(tmp_path, plugin(name, file, "roles.json"))
    async with MessageBusServer(config=config) as server, Raw(server.port) as client:
        client.send(basic_handshake("tester", "right"))
        client.add("AUTH", "T")
        await client.fence()
        client.publish("AUTH", "T")
        client.publish("OTHER", "T")
        await client.fence()
        assert (server.broker.stats.multicast, server.broker.stats.ignored) == (1, 1)
        async with Raw(server.port) as other:
            other.send(basic_handshake("tester", "wrong"))
            assert await other.closed() == b""
    # Up to 6.0.0-alpha.1 there is no file of roles.
    told = ServerConfig.load(
        written(tmp_path, plugin(f"{ORIGINAL}.PasswordFileAuthenticator", file))
    )
    assert told.authentication["file"] == str(tmp_path / "passwords.json")
    roles["tester"]["AUTH"]["*"]["alow"] = []
    (tmp_path / "roles.json").write_text(json.dumps(roles))
    with pytest.raises(BadOption, match="did you mean 'allow'"):
        MessageBusServer(config=written(tmp_path, plugin(name, file, "roles.json")))


def test_the_originals_other_authenticators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LDAP_HOST", "directory.example")
    monkeypatch.setenv("TOKEN_KEY", SECRET)
    config = written(tmp_path, plugin(f"{ORIGINAL}.NullAuthenticator"))
    assert isinstance(MessageBusServer(config=config).authenticator, NullServerAuthenticator)
    told = ServerConfig.load(
        written(tmp_path, plugin(f"{ORIGINAL}.LdapAuthenticator", "%LDAP_HOST%", "636"))
    )
    assert told.authentication["url"] == "ldaps://directory.example:636"
    # The file that is shipped names the type so, without the assembly's last part.
    config = written(
        tmp_path, plugin("JetBlack.MessageBus.Extension.JwtAuthenticator", "%TOKEN_KEY%")
    )
    told = ServerConfig.load(config)
    assert told.authentication["key"].reveal() == SECRET
    assert SECRET not in repr(told)


def test_hosts_and_paths_may_hold_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/own/of/tom")
    monkeypatch.delenv("HOSTNAME", raising=False)
    values = {
        "sslConfig": {"isEnabled": True, "certFile": "%HOME%/.keys/own.crt"},
        "allow": ["None"],
        "feedRoles": {
            "AUTH": {"interactorRoles": {"%HOSTNAME%": {"tom": {"allow": ["Subscribe"]}}}}
        },
    }
    told = ServerConfig.load(written(tmp_path, values))
    assert told.certfile == "/own/of/tom/.keys/own.crt"
    # A shell seldom exports it; then it is the name that peers on this machine have.
    assert told.policy.roles("AUTH", "tom", socket.gethostname()) == Role.SUBSCRIBE
    assert told.policy.roles("AUTH", "tom", "elsewhere") == Role.NONE
    monkeypatch.setenv("HOSTNAME", "elsewhere")
    told = ServerConfig.load(written(tmp_path, values))
    assert told.policy.roles("AUTH", "tom", "elsewhere") == Role.SUBSCRIBE


@pytest.mark.parametrize(
    ("values", "option"),
    [
        # The original's authentication names an assembly; one of somebody else cannot be run.
        (plugin("Company.JwtAuthenticator", "x"), "authentication.typeName"),
        (plugin(f"{ORIGINAL}.KerberosAuthenticator"), "authentication.typeName"),
        (plugin(f"{ORIGINAL}.JwtAuthenticator"), "authentication.args"),
        (plugin(f"{ORIGINAL}.PasswordFileAuthenticator"), "authentication.args"),
        (plugin(f"{ORIGINAL}.LdapAuthenticator", "host", "ldaps"), "authentication.args"),
        (plugin(f"{ORIGINAL}.JwtAuthenticator", "%NOT_SET_HERE%"), "authentication.args"),
        ({"authentication": {"assemblyName": "X", "args": []}}, "authentication"),
        ({"sslConfig": {"certFile": "%NOT_SET_HERE%/own.crt"}}, "sslConfig.certFile"),
        ({"authentication": {"method": "kerberos"}}, "authentication"),
        ({"authentication": {}}, "authentication"),
        ({"authentication": {"method": "password"}}, "authentication.file"),
        ({"authentication": {"method": "password", "file": "x", "url": "y"}}, "authentication.url"),
        ({"authentication": {"method": "jwt"}}, "authentication.key_file"),
        ({"authentication": {"method": "jwt", "key_file": "none"}}, "authentication.key_file"),
        ({"authentication": {"method": "ldap"}}, "authentication.url"),
        ({"authentication": {"method": "ldap", "url": 3}}, "authentication.url"),
        (
            {"authentication": {"method": "ldap", "url": "ldaps://x", "timeout": "long"}},
            "authentication.timeout",
        ),
        (
            {"authentication": {"method": "jwt", "key_file": "own.key", "algorithms": [1]}},
            "authentication.algorithms",
        ),
        ({"authentication": 3}, "authentication"),
        ({"authentication": {"method": "null"}, "password_file": "x"}, "password_file"),
        # A certificate of the Windows store: without it passwords would cross in clear.
        ({"sslConfig": {"isEnabled": True, "subjectName": "x"}}, "sslConfig"),
        ({"sslConfig": {}}, "sslConfig"),
        ({"ssl": {"isEnabled": False}, "sslConfig": {"isEnabled": True}}, "sslConfig"),
        ({"sspi": {"isEnabled": True, "port": 9002}}, "sspi"),
        ({"prometheus": {"port": 70000}}, "prometheus.port"),
        ({"metrics": {"port": True}}, "metrics.port"),
        ({"heartbeatInterval": "often"}, "heartbeatInterval"),
        ({"heartbeatInterval": "1:2"}, "heartbeatInterval"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tmp_path: Path, values: dict[str, Any], option: str
) -> None:
    (tmp_path / "own.key").write_text(SECRET)
    with pytest.raises(BadOption) as caught:
        MessageBusServer(config=written(tmp_path, values))
    assert caught.value.option == f"distributor.{option}"


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
