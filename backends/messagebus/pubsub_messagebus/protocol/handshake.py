"""The handshake of the messagebus protocol: a client's login, in both forms.

It goes from the client to the server only; the server answers nothing, whether it accepts or
refuses. Servers up to 3.0 read plain strings, those since 4.0 one connection string. A client
must know which; `HandshakeDecoder` recognises both.

The grammar of a connection string has no escaping: ``;`` cannot be part of a value.

Source: jetblack-messagebus, the authenticators and ``ConnectionString`` parsing of 3.0 to 6.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pubsub_core.secrets import Secret

from .decoder import LengthUnit, codepoints_end
from .encoding import (
    DEFAULT_LIMITS,
    ProtocolError,
    Truncated,
    WireLimits,
    encode_string,
    unpack_int,
)

__all__ = [
    "AuthenticationMethod",
    "Credentials",
    "HandshakeDecoder",
    "HandshakeForm",
    "basic_handshake",
    "parse_connection_string",
    "token_handshake",
]

HandshakeForm: TypeAlias = Literal["strings", "connection-string"]
AuthenticationMethod: TypeAlias = Literal["null", "basic", "token"]

_KNOWN = ("Username", "Password", "Token", "Impersonating", "ForwardedFor", "Application")


@dataclass(frozen=True, slots=True)
class Credentials:
    """The credentials of a client. Their repr holds no secret.

    Attributes:
        impersonating: The user it wants to stand for, or ``""``; blank is absent.
        forwarded_for: The host it stands in front of, or ``""``; blank is absent.
        application: Only the connection string can carry it.
    """

    method: AuthenticationMethod
    username: str = ""
    password: Secret = Secret("")  # noqa: RUF009 - immutable
    token: Secret = Secret("")  # noqa: RUF009 - immutable
    impersonating: str = ""
    forwarded_for: str = ""
    application: str = "unspecified"


# pytest and crash reporters print the local variables of every frame that an error passes. So
# the functions below reveal a secret only within an expression, and replace an error from
# deeper down, whose frames hold the text, by a new one.


def _connection_string(pairs: list[tuple[str, Secret | None]]) -> bytes:
    present = [(key, value) for key, value in pairs if value is not None]
    for key, value in present:
        if ";" in value.reveal():
            raise ValueError(
                f"{key} has a ';', which a connection string cannot carry; "
                "use handshake='strings' where the server speaks it"
            )
    return _encoded(
        Secret(";".join([f"{key}={value.reveal()}" for key, value in present])),
        "the connection string",
    )


def _encoded(value: Secret | None, name: str) -> bytes:
    if value is None:
        return encode_string(None)
    try:
        return encode_string(value.reveal())
    except ValueError as error:
        why = str(error) if not isinstance(error, UnicodeError) else "it is not Unicode text"
    raise ValueError(f"{name} cannot be sent: {why}")


def _hidden(value: object, name: str) -> Secret | TypeError:
    if isinstance(value, Secret):
        return value
    if not isinstance(value, str):
        return TypeError(f"{name} is a str, not {type(value).__name__}")
    return Secret(value)


def _optional(value: str | None) -> Secret | None:
    return Secret(value) if value else None


def _form(form: HandshakeForm | None, application: str | None) -> HandshakeForm:
    if form is None:
        return "connection-string" if application else "strings"
    if form not in ("strings", "connection-string"):
        raise ValueError(f"handshake={form!r}; use 'strings' or 'connection-string'")
    if form == "strings" and application:
        raise ValueError("application needs handshake='connection-string'")
    return form


def basic_handshake(
    username: str,
    password: Secret | str,
    impersonating: str | None = None,
    forwarded_for: str | None = None,
    application: str | None = None,
    *,
    form: HandshakeForm | None = None,
) -> bytes:
    """Return the handshake of a client with a user name and a password.

    *form* None is ``strings``, or ``connection-string`` when there is an application.

    Raises:
        ValueError: A value cannot be carried in that form.
    """
    who = [("Username", _hidden(username, "username")), ("Password", _hidden(password, "password"))]
    del password
    return _handshake(who, impersonating, forwarded_for, application, form)


def token_handshake(
    token: Secret | str,
    impersonating: str | None = None,
    forwarded_for: str | None = None,
    application: str | None = None,
    *,
    form: HandshakeForm | None = None,
) -> bytes:
    """Return the handshake of a client with a token; see `basic_handshake`."""
    who = [("Token", _hidden(token, "token"))]
    del token
    return _handshake(who, impersonating, forwarded_for, application, form)


def _handshake(
    who: list[tuple[str, Secret | TypeError]],
    impersonating: str | None,
    forwarded_for: str | None,
    application: str | None,
    form: HandshakeForm | None,
) -> bytes:
    fields: list[tuple[str, Secret | None]] = []
    for key, value in who:
        if isinstance(value, TypeError):
            raise value
        fields.append((key, value))
    fields += [
        ("Impersonating", _optional(impersonating)),
        ("ForwardedFor", _optional(forwarded_for)),
    ]
    if _form(form, application) == "strings":
        return b"".join([_encoded(value, key) for key, value in fields])
    return _connection_string([*fields, ("Application", _optional(application))])


def parse_connection_string(text: str) -> dict[str, str]:
    """Return the values by key. Empty parts are passed over, also at the end.

    Raises:
        ProtocolError: A part has no ``=``, or a key stands twice.
    """
    found: dict[str, str] = {}
    for part in text.split(";"):
        if not part.strip():
            continue
        key, equals, value = part.partition("=")
        if not equals:
            raise ProtocolError("a part of the connection string has no '='")
        if key in found:
            name = key if key in _KNOWN else "a key"
            raise ProtocolError(f"{name} stands twice in the connection string")
        found[key] = value
    return found


def _present(value: str) -> str:
    return value if value.strip() else ""


class HandshakeDecoder:
    """Reads the handshake of one client.

    Args:
        method: The kind that the server expects. ``null`` expects none, and skips the one
            empty string that some C# clients send.
        form: ``auto`` recognises both. A first string that is no connection string is a user
            name of 3.0, and three more strings are waited for; hence a server needs a
            deadline.
        limits: All strings together have no more bytes than one string may.
        string_length_unit: As for `Decoder`.

    Attributes:
        rest: The bytes after the handshake, for a `Decoder`.
    """

    def __init__(
        self,
        method: AuthenticationMethod,
        *,
        form: HandshakeForm | Literal["auto"] = "auto",
        limits: WireLimits = DEFAULT_LIMITS,
        string_length_unit: LengthUnit = "bytes",
    ) -> None:
        self._codepoints = string_length_unit == "codepoints"
        self._method: AuthenticationMethod = method
        self._form = form
        self._limit = self._left = limits.handshake_string
        self._buffer = bytearray()
        self._strings: list[str] = []
        self._wanted = 1
        self._need = 4
        self._eof = False
        self._error: ProtocolError | None = None
        self.rest = b""

    @property
    def inside(self) -> bool:
        """Whether it has begun and is not complete."""
        return bool(self._buffer or self._strings)

    def feed(self, data: bytes) -> None:
        """Take bytes."""
        self._buffer += data

    def eof(self) -> None:
        """Learn that nothing more will come."""
        self._eof = True

    def next_credentials(self) -> Credentials | None:
        """Return the credentials, once, or None until more data arrives.

        Raises:
            ProtocolError: It is no handshake, or not this server's kind. Every later call
                raises again. The text holds nothing that the client sent.
        """
        found: Credentials | None = None
        if self._error is None:
            try:
                found = self._null() if self._method == "null" else self._read()
            except ProtocolError as error:
                self._error = error.again()
            else:
                if found is None and self._eof:
                    self._error = Truncated("the stream ended inside the handshake")
        if self._error is not None:
            # Not the one that was raised: its frames hold the credentials.
            raise self._error.again()
        if found is not None:
            self.rest = bytes(self._buffer)
            self._buffer.clear()
        return found

    def _null(self) -> Credentials | None:
        head = bytes(self._buffer[:4])
        if head == b"\0\0\0\0":
            del self._buffer[:4]
        elif not head or b"\0\0\0\0".startswith(head):
            return None
        return Credentials("null")

    def _read(self) -> Credentials | None:
        while len(self._strings) < self._wanted:
            text = self._next_string()
            if text is None:
                return None
            self._strings.append(text)
            if len(self._strings) == 1:
                found = self._first(text)
                if found is not None:
                    return found
        strings = [*self._strings, ""]
        if self._method == "basic":
            username, password, impersonating, forwarded_for, *_ = strings
            return Credentials(
                "basic",
                username=username,
                password=Secret(password),
                impersonating=_present(impersonating),
                forwarded_for=_present(forwarded_for),
            )
        token, impersonating, forwarded_for, *_ = strings
        return Credentials(
            "token",
            token=Secret(token),
            impersonating=_present(impersonating),
            forwarded_for=_present(forwarded_for),
        )

    def _first(self, text: str) -> Credentials | None:
        """Judge the first string; None when it is the first of several."""
        if not text:
            raise ProtocolError("the handshake begins with an empty string")
        required = ("Username", "Password") if self._method == "basic" else ("Token",)
        if self._form != "strings":
            certain = self._form == "connection-string" or (
                # No user is called so. A fault in it is reported now and not after the deadline.
                text.startswith(tuple(f"{key}=" for key in ("Username", "Password", "Token")))
            )
            try:
                values = parse_connection_string(text)
            except ProtocolError:
                if certain:
                    raise
                values = {}
            if all(key in values for key in required):
                return Credentials(
                    self._method,
                    username=values.get("Username", ""),
                    password=Secret(values.get("Password", "")),
                    token=Secret(values.get("Token", "")),
                    impersonating=_present(values.get("Impersonating", "")),
                    forwarded_for=_present(values.get("ForwardedFor", "")),
                    application=_present(values.get("Application", "")) or "unspecified",
                )
            if certain:
                raise ProtocolError(f"the connection string lacks {' or '.join(required)}")
        self._wanted = 4 if self._method == "basic" else 3
        return None

    def _next_string(self) -> str | None:
        buffer = self._buffer
        if len(buffer) < self._need:
            return None
        (size,) = unpack_int(buffer)
        if not 0 <= size <= self._left:
            raise ProtocolError(
                f"a handshake string of length {size}; the most of all together is {self._limit}"
            )
        stop, missing = 4 + size, 0
        if self._codepoints:
            stop, missing = codepoints_end(buffer, 4, size)
        if missing or len(buffer) < stop:
            self._need = stop + missing
            return None
        self._need = 4
        self._left -= size
        data = bytes(buffer[4:stop])
        del buffer[:stop]
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ProtocolError("a string of the handshake is not UTF-8") from None
