"""The whole contract on a NATS server: core mode, and a stream of JetStream."""

from __future__ import annotations

import pytest

from pubsub_core.capabilities import Cap
from pubsub_core.testing import Harness, suite

# What the server's permissions can refuse is a subject, and a consumer's has the filter in it.
USERS = """
authorization {
  users: [
    { user: tester, password: right }
    { user: guest, password: right }
    { user: nobody, password: right,
      permissions: { publish: { deny: [
        "denied.>", "suite.denied.>", "$JS.API.CONSUMER.CREATE.*.*.suite.denied.>" ] },
        subscribe: { deny: ["denied.>"] } } }
  ]
}
"""

AT_MOST_ONCE = (
    "core NATS delivers at most once: what was on its way when the session was lost fails as "
    "unknown, and nobody sends it again; tests/nats/test_backend.py has what does hold"
)

EXEMPT = {
    "restart_broker_during_traffic": AT_MOST_ONCE,
    "network_partition_and_heal": AT_MOST_ONCE,
    "every_native_error_classified": (
        "a NATS server speaks first, and the suite's faulty one waits for the client; "
        "tests/nats/test_connect.py has the errors"
    ),
}


CORE = Harness(
    url="nats://tester:right@127.0.0.1:{port}",
    server="pubsub_nats.server:NatsServer",
    server_options={"config": USERS, "jetstream": False},
    restart=True,
    second_identity="nats://guest:right@127.0.0.1:{port}",
    unprivileged_identity="nats://nobody:right@127.0.0.1:{port}",
    wrong_identity="nats://tester:wrong@127.0.0.1:{port}",
    keepalive=({"keepalive": 0.5}, 0.5),
    dollar=False,
    exempt=EXEMPT,
)

_STREAM = "?stream=SUITE&prefix=suite&create=true&presence=true&presence_ttl=2"

STREAM = Harness(
    url=f"nats://tester:right@127.0.0.1:{{port}}{_STREAM}",
    server="pubsub_nats.server:NatsServer",
    server_options={"config": USERS},
    restart=True,
    options_for={Cap.PERSISTENT_SESSION: {"client_id": "{unique}"}},
    second_identity=f"nats://guest:right@127.0.0.1:{{port}}{_STREAM}",
    unprivileged_identity=f"nats://nobody:right@127.0.0.1:{{port}}{_STREAM}",
    wrong_identity=f"nats://tester:wrong@127.0.0.1:{{port}}{_STREAM}",
    keepalive=({"keepalive": 0.5}, 0.5),
    dollar=False,
    exempt={
        "every_native_error_classified": EXEMPT["every_native_error_classified"],
        "presence_denied_is_notauthorized": (
            "who may read the stream of presence sees every member; the server has no rights for "
            "single topics of it"
        ),
    },
)


class TestNats(suite("nats")):  # type: ignore[misc]  # the base is made at run time
    harness = CORE


# Every message is stored: CI runs it, every change need not.
@pytest.mark.slow
class TestNatsStream(suite("nats")):  # type: ignore[misc]  # the base is made at run time
    harness = STREAM
