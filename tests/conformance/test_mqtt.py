"""The whole contract on MQTT: 3.1.1 and 5 on Mosquitto, 3.1.1 on amqtt."""

from __future__ import annotations

import pytest

from pubsub_core import AuthenticationFailed, Cap, ConnectError, ServerRefused
from pubsub_core.testing import Harness, NativeError, suite
from pubsub_mqtt.server import find_mosquitto

ACL = """\
user tester
topic readwrite #
topic readwrite $conformance/#
user guest
topic deny denied/#
topic readwrite #
"""

USERS = {"tester": "right", "guest": "right"}

DURABLE = {"client_id": "durable-{unique}", "clean_start": False, "session_expiry": 60}

REFUSED_SUBSCRIPTIONS = (
    "Mosquitto's access file does not restrict subscribing (its documentation, acl_file); "
    "what a refused SUBACK becomes is tested against a scripted server"
)


COPIES = (
    "amqtt 0.12.1 sends a copy for each filter that matches, and MQTT 3.1.1 has no subscription "
    "identifiers by which to tell the copies apart"
)


def connack_3(code: int) -> bytes:
    """Return a CONNACK of MQTT 3.1.1, section 3.2."""
    return bytes([0x20, 2, 0, code])


def connack_5(code: int) -> bytes:
    """Return a CONNACK of MQTT 5 without properties, section 3.2."""
    return bytes([0x20, 3, 0, code, 0])


ERRORS_3 = (
    NativeError("unacceptable protocol version", connack_3(1), ServerRefused, False),
    NativeError("identifier rejected", connack_3(2), ServerRefused, False),
    NativeError("server unavailable", connack_3(3), ServerRefused, True),
    NativeError("bad user name or password", connack_3(4), AuthenticationFailed, False),
    NativeError("not authorized", connack_3(5), AuthenticationFailed, False),
    NativeError("no MQTT at all", b"HTTP/1.1 400 Bad Request\r\n\r\n", ConnectError),
    NativeError("closed without an answer", b"\x20", ConnectError, True),
)

ERRORS_5 = (
    NativeError("malformed packet", connack_5(0x81), ServerRefused, False),
    NativeError("unsupported protocol version", connack_5(0x84), ServerRefused, False),
    NativeError("client identifier not valid", connack_5(0x85), ServerRefused, False),
    NativeError("bad user name or password", connack_5(0x86), AuthenticationFailed, False),
    NativeError("not authorized", connack_5(0x87), AuthenticationFailed, False),
    NativeError("server unavailable", connack_5(0x88), ServerRefused, True),
    NativeError("server busy", connack_5(0x89), ServerRefused, True),
    NativeError("banned", connack_5(0x8A), ConnectError, False),
    NativeError("quota exceeded", connack_5(0x97), ServerRefused, True),
)

needs_mosquitto = pytest.mark.skipif(
    find_mosquitto() is None, reason="mosquitto is not installed; apt-get install mosquitto"
)


@pytest.mark.mosquitto
@needs_mosquitto
class TestMosquitto5(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="mqtt://tester:right@127.0.0.1:{port}",
        server="pubsub_mqtt.server:MosquittoServer",
        server_options={"users": USERS, "acl": ACL},
        restart=True,
        options={"protocol": "5"},
        options_for={Cap.REDELIVERY: DURABLE, Cap.PERSISTENT_SESSION: DURABLE},
        second_identity="mqtt://guest:right@127.0.0.1:{port}",
        unprivileged_identity="mqtt://guest:right@127.0.0.1:{port}",
        wrong_identity="mqtt://tester:wrong@127.0.0.1:{port}",
        keepalive=({"keepalive": 1}, 1.0),
        client_modules=("paho",),
        native_errors=ERRORS_5,
        exempt={"subscribe_refused_raises_notauthorized": REFUSED_SUBSCRIPTIONS},
    )


@pytest.mark.slow
@pytest.mark.mosquitto
@needs_mosquitto
class TestMosquitto311(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="mqtt://tester:right@127.0.0.1:{port}",
        server="pubsub_mqtt.server:MosquittoServer",
        server_options={"users": USERS, "acl": ACL},
        restart=True,
        # A 3.1.1 broker cannot be asked; Mosquitto has share groups.
        options={"protocol": "3.1.1", "shared_subscriptions": True},
        options_for={
            Cap.REDELIVERY: {"client_id": "durable-{unique}", "clean_start": False},
            Cap.PERSISTENT_SESSION: {"client_id": "durable-{unique}", "clean_start": False},
        },
        second_identity="mqtt://guest:right@127.0.0.1:{port}",
        unprivileged_identity="mqtt://guest:right@127.0.0.1:{port}",
        wrong_identity="mqtt://tester:wrong@127.0.0.1:{port}",
        keepalive=({"keepalive": 1}, 1.0),
        client_modules=("paho",),
        native_errors=ERRORS_3,
        exempt={"subscribe_refused_raises_notauthorized": REFUSED_SUBSCRIPTIONS},
    )


# amqtt is slow, and judges less than Mosquitto does: CI runs it, every change need not.
@pytest.mark.slow
class TestAmqtt(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="mqtt://127.0.0.1:{port}",
        server="pubsub_mqtt.server:AmqttServer",
        in_process=True,
        restart=True,
        options={"protocol": "3.1.1", "shared_subscriptions": False},
        keepalive=({"keepalive": 1}, 1.0),
        client_modules=("paho",),
        native_errors=ERRORS_3,
        # amqtt 0.12.1 goes on answering such a client and delivers nothing to it any more.
        dollar=False,
        # No options_for: amqtt 0.12.1 keeps no session of an anonymous client, and forgets
        # what was not acknowledged. Without such a session nothing of it is claimed.
        exempt={
            "overlapping_filters_deliver_once_per_subscription": COPIES,
            "matcher_against_reference": COPIES,
        },
        slow=2.0,
    )
