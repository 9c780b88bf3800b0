"""The whole contract on Losant: the embedded broker, with keys that allow custom topics."""

from __future__ import annotations

from pubsub_core import AuthenticationFailed, ConnectError, ServerRefused
from pubsub_core.testing import Harness, NativeError, suite
from pubsub_losant import AccessKey, DeviceSpec, LosantThrottled
from tests.conformance.test_mqtt import connack_3

DEVICE = "5f0c1a5f0c1a5f0c1a5f0c1a"
OTHER = "0ddba110ddba110ddba110dd"

KEYS = [
    AccessKey("tester", "right", filter_type="all"),
    AccessKey("guest", "right", filter_type="blacklist", pub_topics=["denied/#"]),
]


def url(user: str, device: str = DEVICE) -> str:
    return f"losant://{user}@{device}:{{port}}?endpoint=127.0.0.1&secure=false"


class TestLosant(suite("losant")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url=url("tester:right"),
        server="pubsub_losant.server:LosantServer",
        server_options={
            "devices": {DEVICE: DeviceSpec(), OTHER: DeviceSpec()},
            "keys": KEYS,
            # Several buses of a test are the same device.
            "one_connection": False,
        },
        # For the URLs that cases make themselves: none of them may lead to the platform.
        options={"endpoint": "127.0.0.1", "secure": False},
        restart=True,
        in_process=True,
        second_identity=url("guest:right", OTHER),
        unprivileged_identity=url("guest:right"),
        wrong_identity=url("tester:wrong"),
        keepalive=({"keepalive": 1}, 1.0),
        rate={"rate_guard": True},
        client_modules=("paho",),
        native_type="pubsub_losant.backend:LosantBackend",
        native_errors=(
            NativeError("unacceptable protocol version", connack_3(1), ServerRefused, False),
            NativeError("identifier rejected", connack_3(2), ServerRefused, False),
            NativeError("banned, or too many connections", connack_3(3), LosantThrottled, True),
            NativeError("bad user name or password", connack_3(4), AuthenticationFailed, False),
            NativeError("not authorized", connack_3(5), AuthenticationFailed, False),
            NativeError("no MQTT at all", b"HTTP/1.1 400 Bad Request\r\n\r\n", ConnectError),
            NativeError("closed without an answer", b"\x20", ConnectError, True),
        ),
        dollar=False,
    )
