"""How a distributor checks who connects: nobody, a password file, a token, anything else.

A `ServerAuthenticator` names the kind of handshake it expects and turns credentials into a
`User`, or raises `Refused`. Slow work (a hash, a directory) runs in a thread.

The password file is the original's: ``{"user": {"Salt": …, "Hash": …}}`` with
``Hash = base64(SHA1(password + salt))``. Passwords added here get a scrypt hash beside it,
under ``Scheme``; the original's are still accepted.

Source: jetblack-messagebus ``PasswordManager`` and ``JwtAuthenticator``; RFC 7914.
"""

from __future__ import annotations

import abc
import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import math
import os
import secrets
import ssl
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from pubsub_messagebus.protocol import AuthenticationMethod, Credentials

from .extras import load_extra
from .roles import Permissions

__all__ = [
    "CallableServerAuthenticator",
    "JwtServerAuthenticator",
    "LdapServerAuthenticator",
    "NullServerAuthenticator",
    "PasswordFile",
    "PasswordFileAuthenticator",
    "Refused",
    "ServerAuthenticator",
    "User",
]

# RFC 7914: 16 MiB and some 50 ms a password on a machine of 2025.
_SCRYPT_N: Final = 2**14
_SCRYPT_R: Final = 8
_SCRYPT_P: Final = 1


class Refused(Exception):
    """These credentials are not accepted. The text holds none of them."""


@dataclass(frozen=True, slots=True)
class User:
    """A client whose credentials were accepted.

    Attributes:
        permissions: This user's own rights, or None for the server's rules alone.
    """

    name: str
    method: str
    permissions: Permissions | None = None


class ServerAuthenticator(abc.ABC):
    """Checks credentials."""

    handshake: AuthenticationMethod
    """The kind of handshake that clients must send."""

    @abc.abstractmethod
    async def authenticate(self, credentials: Credentials) -> User:
        """Return who it is.

        Raises:
            Refused: Not acceptable; the connection is closed.
        """


class NullServerAuthenticator(ServerAuthenticator):
    """Accepts every client, as ``nobody``."""

    handshake = "null"

    async def authenticate(self, credentials: Credentials) -> User:
        """Return nobody."""
        return User("nobody", "NULL")


# Passwords stay in a `Secret` down to the frame that needs the text, so that no traceback that
# is printed with its variables, by pytest or a crash reporter, shows one.


def _original_hash(password: Secret, salt: bytes) -> bytes:
    # The original's choice. It is checked, never written: adding a user uses scrypt.
    return hashlib.sha1(password.reveal().encode() + salt).digest()  # noqa: S324


def _scrypt(password: Secret, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(
        password.reveal().encode(), salt=salt, n=n, r=r, p=p, dklen=32, maxmem=256 * n * r
    )


def _secret(text: Secret | str) -> Secret:
    return text if isinstance(text, Secret) else Secret(text)


class PasswordFile:
    """Users and their salted hashes, in a file that is read again when it changes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stamp: tuple[int, int] | None = None
        self._entries: dict[str, dict[str, Any]] = {}

    def verify(self, username: str, password: Secret | str) -> bool:
        """Whether that is the user's password; takes as long for a user that is not there.

        Raises:
            BadOption: The file cannot be read.
        """
        password = _secret(password)
        entry = self._load().get(username)
        if entry is None:
            _scrypt(password, b"nobody", _SCRYPT_N, _SCRYPT_R, _SCRYPT_P)
            return False
        try:
            salt = base64.b64decode(entry["Salt"], validate=True)
            wanted = base64.b64decode(entry["Hash"], validate=True)
            scheme = entry.get("Scheme", "sha1")
            if scheme == "sha1":
                found = _original_hash(password, salt)
            elif scheme == "scrypt":
                n, r, p = int(entry["N"]), int(entry["R"]), int(entry["P"])
                if n > 2**20 or r > 32 or p > 16:
                    return False
                found = _scrypt(password, salt, n, r, p)
            else:
                return False
        except (KeyError, TypeError, ValueError, binascii.Error):
            return False
        return hmac.compare_digest(found, wanted)

    def quick(self, username: str) -> bool:
        """Whether checking this user's password costs next to nothing."""
        entry = self._load().get(username)
        return entry is not None and "Scheme" not in entry

    def add(self, username: str, password: Secret | str) -> None:
        """Add a user, or change a password; the file is replaced in one step, mode 0600."""
        password = _secret(password)
        if not username or ";" in username:
            raise ValueError("a user name is not empty, and has no ';'")
        entries = dict(self._load()) if self.path.exists() else {}
        salt = secrets.token_bytes(32)
        hashed = _scrypt(password, salt, _SCRYPT_N, _SCRYPT_R, _SCRYPT_P)
        entries[username] = {
            "Scheme": "scrypt",
            "N": _SCRYPT_N,
            "R": _SCRYPT_R,
            "P": _SCRYPT_P,
            "Salt": base64.b64encode(salt).decode(),
            "Hash": base64.b64encode(hashed).decode(),
        }
        self._store(entries)

    def remove(self, username: str) -> bool:
        """Remove a user; return whether there was one."""
        entries = dict(self._load())
        if entries.pop(username, None) is None:
            return False
        self._store(entries)
        return True

    def _store(self, entries: Mapping[str, Any]) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".passwords-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(entries, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _load(self) -> Mapping[str, Mapping[str, Any]]:
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp != self._stamp:
                self._entries = json.loads(self.path.read_text(encoding="utf-8"))
                self._stamp = stamp
        except (OSError, ValueError) as error:
            raise BadOption(
                f"the password file {self.path} cannot be read",
                option="password_file",
                hint="make one with python -m pubsub_messagebus.passwords FILE add USER",
                backend="messagebus",
            ) from error
        return self._entries


class PasswordFileAuthenticator(ServerAuthenticator):
    """User name and password against a `PasswordFile`."""

    handshake = "basic"

    def __init__(
        self, path: str | Path, *, permissions: Mapping[str, Permissions] | None = None
    ) -> None:
        self.file = PasswordFile(path)
        self._permissions = permissions

    async def authenticate(self, credentials: Credentials) -> User:
        """Hash and compare; a slow hash in a thread."""
        username, password = credentials.username, credentials.password
        if self.file.quick(username):
            good = self.file.verify(username, password)
        else:
            good = await asyncio.to_thread(self.file.verify, username, password)
        if not good:
            raise Refused("wrong user name or password")
        permissions = None
        if self._permissions is not None:
            permissions = self._permissions.get(credentials.username, {})
        return User(credentials.username, "BASIC", permissions)


class CallableServerAuthenticator(ServerAuthenticator):
    """Asks a coroutine function, which returns a `User` or raises `Refused`."""

    def __init__(
        self,
        function: Callable[[Credentials], Awaitable[User]],
        *,
        handshake: AuthenticationMethod = "basic",
    ) -> None:
        self._function = function
        self.handshake = handshake

    async def authenticate(self, credentials: Credentials) -> User:
        """Ask it."""
        return await self._function(credentials)


class JwtServerAuthenticator(ServerAuthenticator):
    """A signed token whose ``sub`` is the user and which must expire. Needs PyJWT.

    Args:
        key: The shared secret (16 bytes at least), or a public key in PEM.
        leeway: Seconds by which the clocks may differ.
    """

    handshake = "token"

    def __init__(
        self,
        key: Secret | str,
        *,
        algorithms: Iterable[str] = ("HS256",),
        leeway: float = 300.0,
    ) -> None:
        self._key = key = _secret(key)
        self._jwt = load_extra("jwt", "token authentication")
        self._algorithms = list(algorithms)
        self._leeway = leeway
        known = {f"{kind}{bits}" for kind in ("HS", "RS", "PS", "ES") for bits in (256, 384, 512)}
        if not self._algorithms or not known.issuperset(self._algorithms):
            raise BadOption(
                f"algorithms={self._algorithms!r}",
                option="algorithms",
                hint="HS256, RS256 and the like; never none",
                backend="messagebus",
            )
        if any(name.startswith("HS") for name in self._algorithms):
            if len(self._key.reveal().encode()) < 16:
                raise BadOption(
                    "the shared secret is shorter than 16 bytes",
                    option="token_key",
                    backend="messagebus",
                )
            if len({name[:2] for name in self._algorithms}) > 1:
                # A public key must never be taken for a shared secret.
                raise BadOption(
                    "HMAC and public keys do not mix", option="algorithms", backend="messagebus"
                )

    async def authenticate(self, credentials: Credentials) -> User:
        """Check signature and expiry."""
        claims: dict[str, Any] = {}
        fault = ""
        try:
            claims = self._jwt.decode(
                credentials.token.reveal(),
                self._key.reveal(),
                algorithms=self._algorithms,
                leeway=self._leeway,
                options={"require": ["exp", "sub"], "verify_aud": False, "verify_iss": False},
            )
        except self._jwt.InvalidTokenError as error:
            fault = type(error).__name__
        if fault:
            # Outside, so that it does not carry the frames of the library, with token and key.
            raise Refused(f"the token is not valid: {fault}")
        subject = claims["sub"]
        if not isinstance(subject, str) or not subject:
            raise Refused("the token names no user")
        return User(subject, "JWT")


class LdapServerAuthenticator(ServerAuthenticator):
    """A simple bind at a directory with the given user name and password. Needs ldap3.

    Over ``ldaps://`` the directory's certificate and name are verified.

    Args:
        url: ``ldaps://host``; with ``ldap://`` passwords cross the network in clear.
        dn: Pattern of the name to bind with, e.g. ``uid={},ou=people,dc=example``.
        ca_file: Certificate authorities in PEM; the system's by default.
        connect: Makes the connection for a bind, for tests; None for ldap3's own.
    """

    handshake = "basic"

    def __init__(
        self,
        url: str,
        *,
        dn: str = "{}",
        ca_file: str = "",
        timeout: float = 5.0,
        connect: Callable[[str, Secret], Any] | None = None,
    ) -> None:
        self._ldap = load_extra("ldap3", "LDAP authentication")
        self._url = url
        self._dn = dn
        self._ca_file = ca_file
        self._timeout = timeout
        self._connect = connect or self._connection

    async def authenticate(self, credentials: Credentials) -> User:
        """Bind, in a thread."""
        username, password = credentials.username, credentials.password
        if not username or not password:
            # An empty password is an anonymous bind (RFC 4513, 5.1.2), which succeeds.
            raise Refused("no user name or no password")
        if not await asyncio.to_thread(self._bind, username, password):
            raise Refused("wrong user name or password")
        return User(username, "LDAP")

    def _connection(self, name: str, password: Secret) -> Any:
        # ldap3 verifies nothing unless it is told to.
        tls = self._ldap.Tls(validate=ssl.CERT_REQUIRED, ca_certs_file=self._ca_file or None)
        server = self._ldap.Server(self._url, tls=tls, connect_timeout=self._timeout)
        # ldap3 hands this to setsockopt, which takes whole seconds.
        seconds = max(1, math.ceil(self._timeout))
        return self._ldap.Connection(
            server, user=name, password=password.reveal(), receive_timeout=seconds
        )

    def _bind(self, username: str, password: Secret) -> bool:
        escape = load_extra("ldap3.utils.dn", "LDAP authentication").escape_rdn
        name = self._dn.replace("{}", escape(username)) if self._dn != "{}" else username
        try:
            return self._bound(name, password)
        except (self._ldap.core.exceptions.LDAPException, OSError) as error:
            fault = type(error).__name__
        # Outside, and in another frame than the connection, whose text shows the password.
        raise Refused(f"the directory did not answer: {fault}")

    def _bound(self, name: str, password: Secret) -> bool:
        connection = self._connect(name, password)
        try:
            return bool(connection.bind())
        finally:
            connection.unbind()
            # Of an attempt that failed, ldap3 leaves the socket open.
            if (left := getattr(connection, "socket", None)) is not None:
                left.close()
