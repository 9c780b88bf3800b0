"""What a distributor's configuration file may say, beside roles.

TOML or JSON, under the original's names (``heartbeatInterval``) or Python's
(``heartbeat_interval``). Relative paths start at the file's folder. ``address`` and ``port``
are not read: a file shall not open a server to the network, or choose another port than the
command line does.

What concerns who may come in is never passed over: an ``authentication`` or ``sslConfig``
that cannot be honoured is an error.

Source: jetblack-messagebus ``DistributorConfig``, ``SslConfig``, ``PrometheusConfig`` and
``AuthenticationConfig``, 3.0.0 to 6.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret

from .roles import Policy, load_mapping
from .server_auth import (
    JwtServerAuthenticator,
    LdapServerAuthenticator,
    NullServerAuthenticator,
    PasswordFileAuthenticator,
    ServerAuthenticator,
)

__all__ = ["ServerConfig"]

_METHODS = "null, password, jwt or ldap"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """What a file said. Texts are empty where it said nothing."""

    policy: Policy = field(default_factory=Policy)
    heartbeat_interval: float | None = None
    authentication: Mapping[str, Any] = field(default_factory=dict[str, Any])
    certfile: str = ""
    keyfile: str = ""
    cafile: str = ""
    metrics_port: int | None = None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file.

        Raises:
            BadOption: It is not there, or a value does not fit.
        """
        table = _Table(load_mapping(path), "", Path(path).parent)
        beat = table.value("heartbeatInterval", "heartbeat_interval")
        tls = table.table("sslConfig", "ssl")
        if tls.value("isEnabled", "is_enabled") is False:
            tls = _Table({}, "ssl", tls.folder)
        certfile = tls.path("certFile", "certfile")
        if tls.values and not certfile:
            raise _bad("ssl", "without certFile; certificates are read from PEM files only")
        monitor = table.table("prometheus", "metrics")
        port = monitor.value("port", "port")
        if monitor.value("isEnabled", "is_enabled") is False:
            port = None
        return cls(
            policy=Policy.from_mapping(table.values),
            heartbeat_interval=None if beat is None else _seconds(beat),
            authentication=_authentication(table),
            certfile=certfile,
            keyfile=tls.path("keyFile", "keyfile"),
            cafile=tls.path("caFile", "cafile"),
            metrics_port=None if port is None else _port(port),
        )

    def authenticator(self) -> ServerAuthenticator | None:
        """Make what checks credentials, or None where the file says nothing of it.

        Raises:
            BadOption: It lacks something, or a value does not fit.
            MissingDependency: It needs a library that is not installed.
        """
        told = self.authentication
        if not told:
            return None
        match told["method"]:
            case "password":
                return PasswordFileAuthenticator(told["file"])
            case "jwt":
                return JwtServerAuthenticator(
                    told["key"], algorithms=told["algorithms"], leeway=told["leeway"]
                )
            case "ldap":
                return LdapServerAuthenticator(
                    told["url"], dn=told["dn"], ca_file=told["ca_file"], timeout=told["timeout"]
                )
            case _:
                return NullServerAuthenticator()


class _Table:
    """A table whose keys have two spellings."""

    def __init__(self, values: object, place: str, folder: Path) -> None:
        if not isinstance(values, Mapping):
            raise _bad(place, "no table")
        self.values: Mapping[str, Any] = values  # pyright: ignore[reportUnknownMemberType]
        self.place = place
        self.folder = folder

    def value(self, *names: str) -> Any:
        return next((self.values[name] for name in names if name in self.values), None)

    def table(self, *names: str) -> _Table:
        value = self.value(*names)
        return _Table({} if value is None else value, names[-1], self.folder)

    def text(self, *names: str, default: str | None = None) -> str:
        value = self.value(*names)
        if value is None:
            if default is None:
                raise _bad(f"{self.place}.{names[0]}", "missing")
            return default
        if not isinstance(value, str):
            raise _bad(f"{self.place}.{names[0]}", "no text")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.value(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise _bad(f"{self.place}.{name}", "no number of seconds")
        return float(value)

    def path(self, *names: str) -> str:
        text = self.text(*names, default="")
        return str(self.folder / text) if text else ""


def _authentication(table: _Table) -> dict[str, Any]:
    file = table.path("password_file")
    value = table.value("authentication")
    if value is None:
        return {"method": "password", "file": file} if file else {}
    told = _Table(value, "authentication", table.folder)
    if file:
        raise _bad("password_file", "given beside authentication")
    method = told.text("method", default="")
    if method == "null":
        return {"method": method}
    if method == "password":
        return {"method": method, "file": str(told.folder / told.text("file"))}
    if method == "jwt":
        key = told.folder / told.text("key_file")
        try:
            text = key.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise _bad("authentication.key_file", f"{key}, which cannot be read") from error
        algorithms: Any = told.value("algorithms") or ["HS256"]
        return {
            "method": method,
            "key": Secret(text),
            "algorithms": [algorithms] if isinstance(algorithms, str) else algorithms,
            "leeway": told.number("leeway", 300.0),
        }
    if method == "ldap":
        return {
            "method": method,
            "url": told.text("url"),
            "dn": told.text("dn", default="{}"),
            "ca_file": told.path("ca_file"),
            "timeout": told.number("timeout", 5.0),
        }
    # The original's names an assembly; running without it would let everybody in.
    raise _bad("authentication", f"without a method that is known here: {_METHODS}")


def _port(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 65535:
        raise _bad("metrics.port", "no port")
    return value


def _seconds(value: object) -> float:
    """Read seconds, or the original's ``hh:mm:ss``."""
    try:
        if isinstance(value, str) and ":" in value:
            hours, minutes, seconds = value.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        return float(str(value))
    except ValueError:
        raise _bad("heartbeat_interval", "neither seconds nor hh:mm:ss") from None


def _bad(option: str, what: str) -> BadOption:
    return BadOption(f"the configuration's {option} is {what}", option=option, backend="messagebus")
