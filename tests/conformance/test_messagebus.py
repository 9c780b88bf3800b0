"""The whole contract on a messagebus: the embedded distributor, both dialects."""

from __future__ import annotations

from pathlib import Path

import pytest

from pubsub_core.capabilities import Cap
from pubsub_core.testing import Harness, suite
from pubsub_messagebus.server.roles import FeedPolicy, Policy, Role, RoleChange

EXEMPT = {
    "presence_denied_is_notauthorized": "the distributor silently ignores unauthorized requests",
    "source_identity_present_when_declared": (
        "a message tells user and host of its publisher, not which of their connections; "
        "tests/messagebus/backend/test_backend.py has two users"
    ),
}

# Who subscribes to the feed AUTH needs an answer, which only one user may give.
POLICY = Policy(
    feeds={
        "AUTH": FeedPolicy(
            is_authorized=True,
            change=RoleChange(deny=Role.AUTHORIZE),
            users={("*", "tester"): RoleChange(allow=Role.AUTHORIZE)},
        )
    }
)
# In the other dialect nobody logs in, and everybody may answer; who does not, does not.
OPEN_POLICY = Policy(feeds={"AUTH": FeedPolicy(is_authorized=True)})
GUARDED = "AUTH/{unique}"
EVERYONE = {Cap.ENTITLEMENTS: {"everyone": 0}}

PASSWORDS = Path(__file__).parent.parent / "data" / "messagebus_passwords.json"


class TestMessageBus(suite("messagebus")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="messagebus://tester:right@127.0.0.1:{port}",
        server="pubsub_messagebus.server:MessageBusServer",
        server_options={"password_file": str(PASSWORDS), "policy": POLICY},
        restart=True,
        in_process=True,
        second_identity="messagebus://guest:right@127.0.0.1:{port}",
        wrong_identity="messagebus://tester:wrong@127.0.0.1:{port}",
        authorizer_identity="messagebus://tester:right@127.0.0.1:{port}",
        guarded=GUARDED,
        options_for=EVERYONE,
        keepalive=({"keepalive": 0.5}, 0.5),
        exempt=EXEMPT,
    )


@pytest.mark.slow
class TestContentType(suite("messagebus")):  # type: ignore[misc]  # the base is made at run time
    harness = Harness(
        url="messagebus://127.0.0.1:{port}?dialect=content_type",
        server="pubsub_messagebus.server:MessageBusServer",
        server_options={"dialect": "content_type", "policy": OPEN_POLICY},
        second_identity="messagebus://127.0.0.1:{port}?dialect=content_type",
        authorizer_identity="messagebus://127.0.0.1:{port}?dialect=content_type",
        guarded=GUARDED,
        options_for=EVERYONE,
        restart=True,
        in_process=True,
        keepalive=({"keepalive": 0.5}, 0.5),
        exempt=EXEMPT,
    )
