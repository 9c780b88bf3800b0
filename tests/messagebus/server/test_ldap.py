"""Login at a directory: Debian's slapd where it is installed, ldap3's own mock server always.

slapd runs with a configuration, a database and ports of its own; the system's is not touched.
"""

from __future__ import annotations

import gc
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pubsub_core.secrets import Secret
from pubsub_messagebus.protocol import Credentials, basic_handshake
from pubsub_messagebus.server import MessageBusServer
from pubsub_messagebus.server.authenticators import LdapServerAuthenticator, Refused
from tests.messagebus.raw import Raw
from tests.servers import Authority

ldap3: Any = pytest.importorskip("ldap3", reason="ldap3 is not installed; extra messagebus-server")

# ldap3 2.9.1 uses names that pyasn1 0.6 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PEOPLE = "uid={},ou=people,dc=example"
SLAPD = shutil.which("slapd", path="/usr/sbin:/usr/local/sbin:/usr/local/libexec:/usr/libexec")

CONFIGURATION = """
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/inetorgperson.schema
pidfile {folder}/slapd.pid
modulepath /usr/lib/ldap
moduleload back_mdb
TLSCACertificateFile {authority}
TLSCertificateFile {certificate}
TLSCertificateKeyFile {key}
database mdb
maxsize 10485760
suffix "dc=example"
directory {folder}/data
"""
ENTRIES = """
dn: dc=example
objectClass: dcObject
objectClass: organization
o: example
dc: example

dn: ou=people,dc=example
objectClass: organizationalUnit
ou: people

dn: uid=tom,ou=people,dc=example
objectClass: inetOrgPerson
uid: tom
cn: Tom
sn: Tom
userPassword: right

dn: uid=a\\2Cb,ou=people,dc=example
objectClass: inetOrgPerson
uid: a,b
cn: Comma
sn: Comma
userPassword: right
"""


@dataclass(frozen=True)
class Directory:
    """A running slapd."""

    plain: str
    tls: str
    authority: str
    stranger: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Directory]:
    if SLAPD is None or not Path("/etc/ldap/schema").is_dir():
        pytest.skip("Debian's slapd is not installed; only ldap3's mock server is asked")
    folder = tmp_path_factory.mktemp("slapd")
    (folder / "data").mkdir()
    authority = Authority(folder)
    stranger = Authority(folder, name="another authority")
    own = authority.issue("directory", hosts=("localhost",))
    configuration = folder / "slapd.conf"
    configuration.write_text(
        CONFIGURATION.format(
            folder=folder, authority=authority.cafile, certificate=own.certfile, key=own.keyfile
        )
    )
    (folder / "entries.ldif").write_text(ENTRIES)
    subprocess.run(
        [str(Path(SLAPD).with_name("slapadd")), "-f", configuration, "-l", folder / "entries.ldif"],
        check=True,
        capture_output=True,
        timeout=20,
    )
    ports = free_ports(2)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                SLAPD,
                *("-f", str(configuration), "-d", "0"),
                *("-h", f"ldap://127.0.0.1:{ports[0]} ldaps://127.0.0.1:{ports[1]}"),
            ],
            stdout=log,
            stderr=log,
        )
        try:
            _wait(process, ports, folder / "log")
            yield Directory(
                f"ldap://127.0.0.1:{ports[0]}",
                f"ldaps://localhost:{ports[1]}",
                authority.cafile,
                stranger.cafile,
            )
        finally:
            process.terminate()
            process.wait(10)


def _wait(process: subprocess.Popen[bytes], ports: list[int], log: Path) -> None:
    deadline = time.monotonic() + 10
    waiting = list(ports)
    while waiting:
        try:
            socket.create_connection(("127.0.0.1", waiting[-1]), 1).close()
            waiting.pop()
        except OSError:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, "slapd does not listen"
            time.sleep(0.02)


def basic(username: str, password: str) -> Credentials:
    return Credentials("basic", username=username, password=Secret(password))


@pytest.mark.parametrize("scheme", ["ldap", "ldaps"])
async def test_a_bind_at_slapd(directory: Directory, scheme: str) -> None:
    url = directory.tls if scheme == "ldaps" else directory.plain
    authenticator = LdapServerAuthenticator(url, dn=PEOPLE, ca_file=directory.authority)
    for name in ("tom", "a,b"):
        user = await authenticator.authenticate(basic(name, "right"))
        assert (user.name, user.method) == (name, "LDAP")
    for username, password in (
        ("tom", "canary"),
        ("nobody", "right"),
        ("tom", ""),
        ("", "right"),
        ("tom,ou=people", "right"),
        ("*", "right"),
    ):
        with pytest.raises(Refused) as caught:
            await authenticator.authenticate(basic(username, password))
        assert "canary" not in str(caught.value)


async def test_clients_log_in_with_what_slapd_knows(directory: Directory) -> None:
    authenticator = LdapServerAuthenticator(directory.tls, dn=PEOPLE, ca_file=directory.authority)
    async with MessageBusServer(authenticator=authenticator) as server:
        async with Raw(server.port) as client, Raw(server.port) as other:
            client.send(basic_handshake("tom", "right"))
            other.send(basic_handshake("tom", "right", form="connection-string"))
            await client.fence()
            await other.fence()
        async with Raw(server.port) as client:
            client.send(basic_handshake("tom", "wrong"))
            assert await client.closed() == b""


# ldap3 leaves the sockets of attempts that fail in between to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_directory_that_cannot_prove_itself_sees_no_password(directory: Directory) -> None:
    by_address = directory.tls.replace("localhost", "127.0.0.1")
    for url, authority in (
        (directory.tls, directory.stranger),  # signed by somebody else
        (directory.tls, ""),  # not by an authority of the system
        (by_address, directory.authority),  # for another name
    ):
        authenticator = LdapServerAuthenticator(url, dn=PEOPLE, ca_file=authority)
        with pytest.raises(Refused, match="did not answer"):
            await authenticator.authenticate(basic("tom", "right"))
    gc.collect()


async def test_a_directory_that_is_not_there() -> None:
    (port,) = free_ports(1)
    authenticator = LdapServerAuthenticator(f"ldap://127.0.0.1:{port}", dn=PEOPLE, timeout=1)
    with pytest.raises(Refused, match="did not answer"):
        await authenticator.authenticate(basic("tom", "right"))


async def test_a_bind_at_the_mock_server_of_ldap3() -> None:
    bound: list[str] = []

    def connect(name: str, password: Secret) -> Any:
        bound.append(name)
        connection = ldap3.Connection(
            ldap3.Server("mock"),
            user=name,
            password=password.reveal(),
            client_strategy=ldap3.MOCK_SYNC,
        )
        connection.strategy.add_entry(PEOPLE.format("tom"), {"userPassword": "right", "sn": "tom"})
        return connection

    authenticator = LdapServerAuthenticator("ldaps://mock", dn=PEOPLE, connect=connect)
    user = await authenticator.authenticate(basic("tom", "right"))
    assert (user.name, user.method) == ("tom", "LDAP")
    for credentials in (
        basic("tom", "wrong"),
        basic("tom", ""),  # would be an anonymous bind
        basic("", "right"),
        basic("tom,ou=people", "right"),
    ):
        with pytest.raises(Refused):
            await authenticator.authenticate(credentials)
    # A name cannot leave its place in the pattern.
    assert bound[-1] == "uid=tom\\,ou\\=people,ou=people,dc=example"
