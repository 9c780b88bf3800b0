"""The whole contract on a messagebus: the embedded distributor, both dialects."""

from __future__ import annotations

from pathlib import Path

import pytest

from pubsub_core.testing import Harness, suite

NO_AUTHORIZER = (
    "the suite plays no authorizer, without whom a feed that needs one gives nothing; "
    "tests/messagebus/test_backend.py does"
)

EXEMPT = {
    "entitled_parts_only": NO_AUTHORIZER,
    "not_entitled_is_told": NO_AUTHORIZER,
    "entitlements_change_live": NO_AUTHORIZER,
    "authorizer_gone_denies": NO_AUTHORIZER,
    "network_partition_and_heal": (
        "what went into the partition is gone: a receipt is the operating system's, and the "
        "distributor acknowledges nothing (at_most_once, as declared)"
    ),
    "presence_denied_is_notauthorized": "the distributor ignores what is not allowed, in silence",
    "source_identity_present_when_declared": (
        "a message tells user and host of its publisher, not which of their connections; "
        "tests/messagebus/test_backend.py has two users"
    ),
}

PASSWORDS = Path(__file__).parent.parent / "data" / "messagebus_passwords.json"


class TestMessageBus(suite("messagebus")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="messagebus://tester:right@127.0.0.1:{port}",
        server="pubsub_messagebus.server:MessageBusServer",
        server_options={"password_file": str(PASSWORDS)},
        restart=True,
        in_process=True,
        second_identity="messagebus://guest:right@127.0.0.1:{port}",
        wrong_identity="messagebus://tester:wrong@127.0.0.1:{port}",
        keepalive=({"keepalive": 0.5}, 0.5),
        exempt=EXEMPT,
    )


@pytest.mark.slow
class TestContentType(suite("messagebus")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="messagebus://127.0.0.1:{port}?dialect=content_type",
        server="pubsub_messagebus.server:MessageBusServer",
        server_options={"dialect": "content_type"},
        restart=True,
        in_process=True,
        keepalive=({"keepalive": 0.5}, 0.5),
        exempt=EXEMPT,
    )
