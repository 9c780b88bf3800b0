"""The whole contract on Emitter: the embedded broker with both of its matching rules, and a real
broker that the environment names.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pubsub_core import AuthenticationFailed, ConnectError, ServerRefused
from pubsub_core.testing import Harness, NativeError, suite
from pubsub_emitter.keys import License
from tests.emitter.places import Place, real
from tests.emitter.vectors import LICENSE, MASTER_KEY

EXEMPT = {
    "notification_replays_existing_then_live": (
        "the broker tells who is subscribed to one channel, and not to which channels below it: "
        "existing interest is told for exact topics only, changes for all; "
        "tests/emitter/test_backend.py has both"
    ),
}

KEYS_FROM_THE_BROKER = {
    "publish_outcome_unknown_on_cut": (
        "the first message waits for the broker to make its key, so it was not sent when the link "
        "is cut, and the error says that; the class with a given key has it"
    )
}

KEEPALIVE = ({"keepalive": 1}, 1.0)


def connack(code: int) -> bytes:
    """Return a CONNACK of MQTT 3.1.1, section 3.2."""
    return bytes([0x20, 2, 0, code])


NATIVE_ERRORS = (
    NativeError("unacceptable protocol version", connack(1), ServerRefused, False),
    NativeError("server unavailable", connack(3), ServerRefused, True),
    NativeError("not authorized", connack(5), AuthenticationFailed, False),
    NativeError("no MQTT at all", b"HTTP/1.1 400 Bad Request\r\n\r\n", ConnectError),
    NativeError("closed without an answer", b"\x20", ConnectError, True),
    NativeError("closed after CONNACK", connack(0), ConnectError),
)

EVERYTHING = License.parse(LICENSE).make_key("#/", "rwslp")

# Keys cannot leave a channel out, so the suite's own topics have a first level of their own.
SUITE_KEY = License.parse(LICENSE).make_key("suite/#/", "rwslp")


def below_suite(prefix: str, name: str) -> str:
    """Return a topic that `SUITE_KEY` allows."""
    return f"suite/{prefix}/{name}"


class TestEmitter(suite("emitter")):  # type: ignore[misc]  # the base is made at run time
    """The broker's own matching rule; everything is stored; one key is given.

    A thousand filters would else need a thousand keys, made here and checked there.
    """

    harness = Harness(
        # In the URL and not among the options, so that the command line gets it, too.
        url=f"emitter://tester@127.0.0.1:{{port}}?key={EVERYTHING}&store=3600",
        server="pubsub_emitter.server:EmitterServer",
        server_options={"license": LICENSE},
        restart=True,
        in_process=True,
        unprivileged_identity=f"emitter://guest@127.0.0.1:{{port}}?key={SUITE_KEY}",
        unique=below_suite,
        keepalive=KEEPALIVE,
        client_modules=("paho",),
        native_type="pubsub_emitter.backend:EmitterBackend",
        native_errors=NATIVE_ERRORS,
        exempt=EXEMPT,
    )


@pytest.mark.slow
class TestEmitterMqtt(suite("emitter")):  # type: ignore[misc]  # the base is made at run time
    """The rule that is MQTT's, over WebSocket; what is retained counts; keys are the broker's."""

    harness = Harness(
        url=f"emitter+ws://tester@127.0.0.1:{{port}}?master_key={MASTER_KEY}",
        server="pubsub_emitter.server:EmitterServer",
        server_options={"license": LICENSE, "matcher": "mqtt"},
        restart=True,
        in_process=True,
        unprivileged_identity=f"emitter+ws://guest@127.0.0.1:{{port}}?key={SUITE_KEY}",
        unique=below_suite,
        keepalive=KEEPALIVE,
        client_modules=("paho",),
        exempt=EXEMPT
        | KEYS_FROM_THE_BROKER
        | dict.fromkeys(
            (
                "history_last_n_in_order",
                "history_time_window",
                "history_paging_complete",
                "replay_then_live_without_gap_or_duplicate",
                "replayed_messages_marked",
                "new_subscriber_receives_old",
                "gap_event_after_disconnect",
                "gap_filled_from_history_without_duplicates",
            ),
            "without the option store only messages with a ttl or retained are stored, and the "
            "suite publishes without; the other class has the option",
        ),
    )


REAL = real()

if isinstance(REAL, Place):
    PLACE = REAL
    _URL = f"{PLACE.bus_url('{user}')}?store=3600"

    @pytest.mark.slow
    class TestEmitterReal(suite("emitter")):  # type: ignore[misc]  # the base is made at run time
        """A broker that is there already, which may be the Go one; keys are the broker's."""

        harness = Harness(
            url=_URL.format(user="tester") + f"&master_key={PLACE.master}",
            # Its key is made by the broker when the class begins.
            unprivileged_identity=_URL.format(user="guest"),
            unique=below_suite,
            keepalive=KEEPALIVE,
            client_modules=("paho",),
            native_type="pubsub_emitter.backend:EmitterBackend",
            native_errors=NATIVE_ERRORS,
            exempt=EXEMPT | KEYS_FROM_THE_BROKER,
            slow=3.0,
        )

        @classmethod
        def setup_class(cls) -> None:
            key = PLACE.made("suite/#/", "rwslp")
            cls.harness = replace(
                cls.harness, unprivileged_identity=f"{_URL.format(user='guest')}&key={key}"
            )
            super().setup_class()

else:

    def test_a_real_server_is_asked_for_by_the_environment() -> None:
        assert isinstance(REAL, str)
        pytest.skip(REAL)
