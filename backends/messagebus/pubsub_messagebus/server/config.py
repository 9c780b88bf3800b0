"""A distributor's configuration file, except for roles.

TOML or JSON, under the original's names (``heartbeatInterval``) or Python's
(``heartbeat_interval``). Relative paths start at the file's folder. ``address`` and ``port``
are not read: the command line alone opens a server to the network and chooses its port. Nor is
``useJsonLogger``.

Nothing else is passed over: an unknown key is an error wherever it stands, and so is an
``authentication``, ``sslConfig`` or ``sspi`` that cannot be honoured.

Source: jetblack-messagebus ``DistributorConfig``, ``SslConfig``, ``PrometheusConfig`` and
``AuthenticationConfig``, 3.0.0 to 6.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from pubsub_core.secrets import Secret

from .authenticators import (
    JwtServerAuthenticator,
    LdapServerAuthenticator,
    NullServerAuthenticator,
    PasswordFileAuthenticator,
    ServerAuthenticator,
)
from .roles import POLICY_KEYS, Policy, load_permissions
from .table import Table, bad_value, expand, load_file

__all__ = ["ServerConfig"]

_SECTION: Final = "distributor"
_LOGGING: Final = "logging"
"""The original's own section beside it; read nowhere here."""

_METHODS: Final = {
    "null": (),
    "password": ("file", "roles_file"),
    "jwt": ("key_file", "algorithms", "leeway"),
    "ldap": ("url", "dn", "ca_file", "timeout"),
}
_PLUGIN_KEYS: Final = ("assembly_path", "assembly_name", "type_name", "args")
_PLUGINS: Final = "JetBlack.MessageBus."
# How many arguments each takes; the password file alone up to 6.0.0-alpha.1, then one more.
_PLUGIN_ARGUMENTS: Final = {
    "NullAuthenticator": (0, 0),
    "PasswordFileAuthenticator": (1, 2),
    "JwtAuthenticator": (1, 1),
    "LdapAuthenticator": (2, 2),
}
_HMAC: Final = ("HS256", "HS384", "HS512")
_TLS_KEYS: Final = (
    "is_enabled",
    "cert_file",
    "key_file",
    "ca_file",
    "store_location",
    "subject_name",
)
_METRICS_KEYS: Final = ("is_enabled", "port")
_SSPI_KEYS: Final = ("is_enabled", "address", "port")
_KEYS: Final = (
    *POLICY_KEYS,
    "heartbeat_interval",
    "authentication",
    "password_file",
    "ssl",
    "ssl_config",
    "metrics",
    "prometheus",
    "sspi",
    # Known, and not read: see above.
    "sspi_authentication",
    "address",
    "port",
    "use_json_logger",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The values of a file. Texts are empty where it has none."""

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
            BadOption: It is not there, a key is unknown, or a value does not fit.
        """
        table = _whole(load_file(path), Path(path).parent)
        certfile, keyfile, cafile = _tls(table)
        beat = "heartbeat_interval"
        if table.table("sspi", _SSPI_KEYS).flag("is_enabled"):
            raise bad_value(table.where("sspi"), "enabled, and this distributor has no SSPI")
        return cls(
            policy=Policy.from_table(table),
            heartbeat_interval=(
                _seconds(table.value(beat), table.where(beat)) if beat in table else None
            ),
            authentication=_authentication(table),
            certfile=certfile,
            keyfile=keyfile,
            cafile=cafile,
            metrics_port=_metrics_port(table),
        )

    def authenticator(self) -> ServerAuthenticator | None:
        """Make the authenticator, or return None where the file has no authentication.

        Raises:
            BadOption: It lacks something, or a value does not fit.
            MissingDependency: It needs a library that is not installed.
        """
        told = self.authentication
        if not told:
            return None
        match told["method"]:
            case "password":
                roles = told.get("roles_file")
                permissions = load_permissions(roles) if roles else None
                return PasswordFileAuthenticator(told["file"], permissions=permissions)
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


def _whole(values: Mapping[str, Any], folder: Path) -> Table:
    """Return the section ``distributor``; a file without any section is one itself."""
    table = Table(values, "", (*_KEYS, _SECTION, _LOGGING), folder)
    if _SECTION not in table:
        return table
    # The original reads nothing else, so roles beside the section would have no effect.
    table.only(_SECTION, _LOGGING)
    return table.table(_SECTION, _KEYS)


def _tls(table: Table) -> tuple[str, str, str]:
    name = table.either("ssl", "ssl_config")
    tls = table.table(name, _TLS_KEYS)
    if name not in table or not tls.flag("is_enabled", default=True):
        return "", "", ""
    certfile = tls.path("cert_file")
    if not certfile:
        raise bad_value(
            table.where(name), "without certFile", "name PEM files; certificate stores are not read"
        )
    return certfile, tls.path("key_file"), tls.path("ca_file")


def _metrics_port(table: Table) -> int | None:
    name = table.either("metrics", "prometheus")
    metrics = table.table(name, _METRICS_KEYS)
    port = metrics.port("port")
    # The original's are off unless it says so, and the file that it ships says nothing.
    return port if metrics.flag("is_enabled", default=name == "metrics") else None


def _authentication(table: Table) -> dict[str, Any]:
    file = table.path("password_file")
    name = "authentication"
    if name not in table:
        return {"method": "password", "file": file} if file else {}
    if file:
        raise bad_value(table.where("password_file"), f"given beside {table.where(name)}")
    every = dict.fromkeys(key for keys in _METHODS.values() for key in keys)
    whole = table.table(name, ("method", *every, *_PLUGIN_KEYS))
    if "type_name" in whole and "method" not in whole:
        return _plugin(table.table(name, _PLUGIN_KEYS))
    method = whole.value("method")
    if method not in _METHODS:
        # Running without it would let everybody in.
        raise bad_value(
            table.where(name),
            "without a method that is known here",
            f"use method = {', '.join(_METHODS)}",
        )
    told = table.table(name, ("method", *_METHODS[method]))
    if method == "password":
        return {
            "method": method,
            "file": told.path("file", None),
            "roles_file": told.path("roles_file"),
        }
    if method == "jwt":
        return {
            "method": method,
            "key": _read_key(told.path("key_file", None), told.where("key_file")),
            "algorithms": told.texts("algorithms", ("HS256",)),
            "leeway": told.number("leeway", 300.0),
        }
    if method == "ldap":
        return {
            "method": method,
            "url": told.text("url"),
            "dn": told.text("dn", "{}"),
            "ca_file": told.path("ca_file"),
            "timeout": told.number("timeout", 5.0),
        }
    return {"method": method}


def _plugin(told: Table) -> dict[str, Any]:
    """Translate an authenticator of the original by its type; no assembly is loaded."""
    kind = told.text("type_name")
    place = told.where("type_name")
    name = kind.rpartition(".")[2]
    if not kind.startswith(_PLUGINS) or name not in _PLUGIN_ARGUMENTS:
        raise bad_value(
            place,
            f"{kind!r}, which cannot be run here",
            f"known are {', '.join(_PLUGIN_ARGUMENTS)} of the original, or write method instead",
        )
    where = told.where("args")
    arguments = told.secrets("args")
    least, most = _PLUGIN_ARGUMENTS[name]
    if not least <= len(arguments) <= most:
        raise bad_value(where, f"a list of {len(arguments)}; {name} has {least} to {most}")
    if name == "NullAuthenticator":
        return {"method": "null"}
    if name == "PasswordFileAuthenticator":
        files = [told.resolve(path.reveal(), where) for path in arguments]
        return {
            "method": "password",
            "file": files[0],
            "roles_file": files[1] if len(files) > 1 else "",
        }
    if name == "JwtAuthenticator":
        key = Secret(expand(arguments[0].reveal(), where))
        return {"method": "jwt", "key": key, "algorithms": _HMAC, "leeway": 300.0}
    host, port = [expand(argument.reveal(), where) for argument in arguments]
    if not port.isdecimal():
        raise bad_value(where, "without a port in its second place")
    return {
        "method": "ldap",
        "url": f"ldaps://{host}:{port}",
        "dn": "{}",
        "ca_file": "",
        "timeout": 5.0,
    }


def _read_key(path: str, place: str) -> Secret:
    try:
        return Secret(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, ValueError) as error:
        raise bad_value(place, f"{path}, which cannot be read") from error


def _seconds(value: object, place: str) -> float:
    """Read seconds, or the original's ``hh:mm:ss``."""
    try:
        if isinstance(value, str) and ":" in value:
            hours, minutes, seconds = value.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        return float(str(value))
    except ValueError:
        raise bad_value(place, "neither seconds nor hh:mm:ss") from None
