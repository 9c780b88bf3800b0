"""Servers that the tests of NATS share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from pubsub_nats.server import NatsServer
from tests.servers import run

needs_nkeys = pytest.mark.skipif(importlib.util.find_spec("nkeys") is None, reason="needs nkeys")


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    """A server without users, with JetStream, MQTT and WebSocket."""
    started = NatsServer(mqtt=True, websocket=True)
    run(started.start())
    yield started
    run(started.stop())
