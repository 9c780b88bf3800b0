"""What is taken of paho-mqtt, and that it is still there."""

from __future__ import annotations

import inspect

from paho.mqtt.client import Client

from pubsub_mqtt.connection.paho_client import PahoClient
from tests.mqtt.lines import (
    Line,
)


def unhex(text: str) -> bytes:
    return bytes.fromhex(text)


def test_paho_still_calls_what_is_replaced_here() -> None:
    """paho's private methods that `PahoClient` overrides, and how paho calls them."""
    for name in (
        "_create_socket",
        "_packet_queue",
        "_packet_read",
        "_packet_write",
        "_mid_generate",
        "_messages_reconnect_reset",
        "_check_keepalive",
        "want_write",
    ):
        ours = inspect.signature(getattr(PahoClient, name))
        theirs = inspect.signature(getattr(Client, name))
        assert list(ours.parameters) == list(theirs.parameters), name
    assert "self._create_socket()" in inspect.getsource(Client.reconnect)
    assert "_send_connect(self._keepalive)" in inspect.getsource(Client.reconnect)
    assert "self._packet_read()" in inspect.getsource(Client.loop_read)
    assert "self._packet_write()" in inspect.getsource(Client.loop_write)
    assert "self._check_keepalive()" in inspect.getsource(Client.loop_misc)
    for name in ("_send_connect", "_send_subscribe", "_send_unsubscribe", "_send_disconnect"):
        assert "self._packet_queue(" in inspect.getsource(getattr(Client, name)), name
    for name in ("_packet_handle", "_handle_connack", "_handle_suback", "_handle_unsuback"):
        assert hasattr(Client, name), name


def test_paho_s_own_store_stays_empty(lines: type[Line]) -> None:
    line = lines(clean_start=False)
    line.open()
    for _ in range(10):
        line.publish(qos=1)
        line.publish(qos=2)
    client = line.connection.paho
    assert client is not None
    assert len(client._out_messages) == 0
    assert len(client._in_messages) == 0
