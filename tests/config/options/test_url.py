"""URLs, and errors that show no credential."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pubsub_core.config.options import (
    parse_url,
)
from pubsub_core.errors import BadOption
from pubsub_core.secrets import Secret
from tests.test_secrets import CANARY, told


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "path"),
    [
        ("mqtt://broker.example:1883", "mqtt", "broker.example", 1883, ""),
        ("MQTTS://Broker.Example", "mqtts", "Broker.Example", None, ""),
        ("losant://5f0C1aDeviceID", "losant", "5f0C1aDeviceID", None, ""),
        ("mqtt://[::1]:1883", "mqtt", "::1", 1883, ""),
        ("mqtt://[fe80::1%25eth0]", "mqtt", "fe80::1%eth0", None, ""),
        ("ws://h:80/mqtt%20path", "ws", "h", 80, "/mqtt path"),
        ("mqtt+unix:///run/a@b.sock", "mqtt+unix", "", None, "/run/a@b.sock"),
        ("memory://", "memory", "", None, ""),
        ("memory://lab", "memory", "lab", None, ""),
        ("mqtt://h:", "mqtt", "h", None, ""),
        ("mqtt://h/", "mqtt", "h", None, "/"),
    ],
)
def test_where_the_broker_is(url: str, scheme: str, host: str, port: int | None, path: str) -> None:
    address, options = parse_url(url)
    assert (address.scheme, address.host, address.port, address.path) == (scheme, host, port, path)
    assert (address.username, address.password) == (None, None)
    assert options == {}


@pytest.mark.parametrize(
    ("userinfo", "username", "password"),
    [
        ("tom:secret", "tom", "secret"),
        ("tom", "tom", None),
        ("tom:", "tom", ""),
        (":secret", None, "secret"),
        ("t%40m:p%2Fw%3A%25", "t@m", "p/w:%"),
        ("tom:a:b@c", "tom", "a:b@c"),
        ("caf%C3%A9:x", "café", "x"),
    ],
)
def test_credentials(userinfo: str, username: str | None, password: str | None) -> None:
    address, _ = parse_url(f"mqtt://{userinfo}@h:1")
    assert address.host == "h"
    assert address.username == username
    assert address.password == (None if password is None else Secret(password))


@given(user=st.text(min_size=1), password=st.text())
def test_quoted_credentials_come_back_and_stay_hidden(user: str, password: str) -> None:
    safe = not any(ord(c) < 32 or ord(c) == 127 for c in user)
    url = f"mqtt://{quote(user, safe='')}:{quote(password, safe='')}@h"
    if not safe:
        with pytest.raises(BadOption):
            parse_url(url)
        return
    address, _ = parse_url(url)
    assert (address.username, address.password) == (user, Secret(password))
    assert str(address) == "mqtt://h"


def test_query() -> None:
    _, options = parse_url("mqtt://h?keepalive=5&client_id=a%26b&topic=a/+/b&empty=")
    assert options == {"keepalive": "5", "client_id": "a&b", "topic": "a/+/b", "empty": ""}


BAD_URLS = [
    ("localhost", "not a URL"),
    ("mqtt:h", "not a URL"),
    ("://h", "not a URL"),
    ("", "not a URL"),
    (f"tom:{CANARY}@h", "not a URL"),
    (f"mqtt://tom:{CANARY}@h:port", "@ after the first /"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:port", "port that is not a number"),
    (f"mqtt://tom:{CANARY}", "port"),
    (f"mqtt://tom:12/{CANARY}@h", "@ after the first /"),
    (f"mqtt://tom:1?{CANARY}@h", "option 1 of the mqtt:// URL has no value"),
    (f"mqtt://tom:a#{CANARY}@h", "fragment"),
    (f"mqtt://tom:{CANARY}%@h", "%"),
    (f"mqtt://tom:{quote(CANARY, safe='')}%FF@h", "UTF-8"),
    (f"mqtt://tom:{CANARY} x@h", "space"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:0", "port 0"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:65536", "port 65536"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h:99999999999999", "port that is not a number"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@:1883", "no host"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@[::1", r"\["),
    (f"mqtt://tom:{quote(CANARY, safe='')}@[::1]x", r"\]"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@::1", "more than one :"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?a=1&a=2", "'a' twice"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?=1", "no name"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?a", "no value"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h?a=1&", "option 2"),
    (f"mqtt://tom:{quote(CANARY, safe='')}@h%00", "control character"),
]


@pytest.mark.parametrize(("url", "problem"), BAD_URLS)
def test_bad_urls_are_refused_without_their_credentials(url: str, problem: str) -> None:
    with pytest.raises(BadOption, match=problem) as caught:
        parse_url(url)
    assert caught.value.hint
    # A formatted traceback shows this file's source line, never the value.
    assert CANARY not in told(caught.value)
    assert quote(CANARY, safe="") not in told(caught.value)
