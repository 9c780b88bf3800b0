"""A URL becomes an address and the options of its query.

No error shows any part of a URL that can hold a credential.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pubsub_core.errors import BadOption
from pubsub_core.interfaces import Address
from pubsub_core.secrets import Secret

__all__ = ["parse_url"]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ENCODE = (
    "percent-encode special characters in a user name or password "
    "(/ is %2F, @ is %40, # is %23, ? is %3F, % is %25)"
)


class _Fault(NamedTuple):
    """A fault of a URL.

    It is returned, not raised: the frames and the context of an exception would lead to the
    URL with its password.
    """

    problem: str
    hint: str = _ENCODE
    option: str = "url"


def parse_url(url: str) -> tuple[Address, dict[str, str]]:
    """Split a URL into where the broker is and the options of its query.

    The scheme becomes lower case; the host keeps its case and loses the brackets of an IPv6
    literal. User, password, path and query are percent-decoded; ``+`` stays ``+``.

    Raises:
        BadOption: It is no URL. The text shows no part that can hold a credential.
    """
    parsed = _parse_url(url)
    if isinstance(parsed, _Fault):
        raise BadOption(parsed.problem, hint=parsed.hint, option=parsed.option)
    return parsed


def _parse_url(url: str) -> tuple[Address, dict[str, str]] | _Fault:
    found = _URL.fullmatch(url)
    if found is None:
        return _Fault("this is not a URL", "write SCHEME://HOST:PORT, for example mqtt://localhost")
    scheme = found[1].lower()
    rest = found[2]
    label = f"the {scheme}:// URL"
    if re.search(r"[\s\x00-\x1f\x7f]", rest):
        return _Fault(f"{label} has a space or control character", "percent-encode it: %20")
    if "#" in rest:
        return _Fault(f"{label} has a fragment (#…), which has no meaning here")
    if _BAD_PERCENT.search(rest):
        return _Fault(f"{label} has a % that two hexadecimal digits do not follow")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    # "user:12/34@host" would otherwise be host "user", port 12 and a path with the password.
    if authority and "@" in path:
        return _Fault(f"{label} has an @ after the first /")
    try:
        address = _parse_authority(scheme, label, authority, _unquote(slash + path))
        options = _parse_query(label, query)
    except UnicodeDecodeError:
        return _Fault(f"{label} has percent-encoded bytes that are not UTF-8")
    if isinstance(address, _Fault):
        return address
    if isinstance(options, _Fault):
        return options
    return address, options


def _unquote(text: str) -> str:
    if "%" not in text:
        return text
    # urllib's unquote replaces bad UTF-8; here it is an error.
    data = re.sub(rb"%([0-9A-Fa-f]{2})", lambda hit: bytes.fromhex(hit[1].decode()), text.encode())
    return data.decode()


def _parse_authority(scheme: str, label: str, authority: str, path: str) -> Address | _Fault:
    userinfo, at, location = authority.rpartition("@")
    user, colon, password = userinfo.partition(":")
    if location.startswith("["):
        host, bracket, after = location[1:].partition("]")
        if not bracket or ":" not in host:
            return _Fault(f"{label} has a [ without an IPv6 address and ]", "write [::1]:1883")
        if after and not after.startswith(":"):
            return _Fault(f"{label} has text between ] and the port", "write [::1]:1883")
        port_text = after[1:] if after else None
    else:
        host, separator, port_text = location.partition(":")
        if ":" in port_text:
            return _Fault(
                f"{label} has more than one : in its host", "write an IPv6 address as [::1]"
            )
        port_text = port_text if separator else None
    port = None
    if port_text:
        if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5):
            return _Fault(f"{label} has a port that is not a number")
        port = int(port_text)
        if not 1 <= port <= 65535:
            return _Fault(f"{label} has port {port}", "a port is a number from 1 to 65535")
    if port is not None and not host:
        return _Fault(f"{label} has a port and no host", f"write {scheme}://HOST:{port}")
    host, user, password = _unquote(host), _unquote(user), _unquote(password)
    if _CONTROL.search(host + user + path):
        return _Fault(f"{label} has a control character in user name, host or path", "remove it")
    return Address(
        scheme=scheme,
        host=host,
        port=port,
        path=path,
        username=user if at and user else None,
        password=Secret(password) if colon else None,
    )


def _parse_query(label: str, query: str) -> dict[str, str] | _Fault:
    options: dict[str, str] = {}
    for number, pair in enumerate(query.split("&") if query else (), 1):
        key, equals, value = pair.partition("=")
        # Neither text is shown: without a "=", it may be the tail of a password with a "?".
        if not equals:
            return _Fault(f"option {number} of {label} has no value", "write ?NAME=VALUE&…")
        if not key:
            return _Fault(f"option {number} of {label} has no name", "write ?NAME=VALUE&…")
        key = _unquote(key)
        if key in options:
            return _Fault(f"{label} has {key!r} twice", "give each option once", f"?{key}=")
        options[key] = _unquote(value)
    return options
