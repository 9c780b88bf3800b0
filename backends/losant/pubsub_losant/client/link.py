"""The keepalive of a device, which differs from that of other MQTT clients.

Sources: Losant's documentation of the MQTT broker; losant-mqtt 1.2.1 for the intervals.
"""

from __future__ import annotations

import contextlib
import os
import socket

from pubsub_mqtt.connection import Connection, SessionSettings
from pubsub_mqtt.connection.keepalive import KeepaliveStep, Quiet

__all__ = ["device_connection", "device_keepalive", "limit_unacknowledged"]


def device_connection(settings: SessionSettings) -> Connection:
    """Return a connection that keeps alive as a device does; see `device_keepalive`."""
    connection = Connection(settings, backend="losant")
    connection.keepalive_policy = device_keepalive
    # The platform ends sessions over forbidden publishes, too: that one ended early says
    # nothing about who else uses the device id.
    connection.short_life_policy = lambda: False
    return connection


def device_keepalive(quiet: Quiet) -> KeepaliveStep:
    """Ping after one interval without sending; wait another one for any answer.

    A device that only sends never needs to ping: data that is never acknowledged by
    the peer's system ends the connection by itself; see `limit_unacknowledged`.
    """
    if quiet.pinged is not None and quiet.unanswered:
        if quiet.pinged >= quiet.keepalive:
            return KeepaliveStep(0.0, dead=f"did not answer for {quiet.pinged:.1f} s")
        return KeepaliveStep(quiet.keepalive - quiet.pinged)
    if quiet.outbound < quiet.keepalive:
        return KeepaliveStep(quiet.keepalive - quiet.outbound)
    return KeepaliveStep(quiet.keepalive, ping=True)


def limit_unacknowledged(descriptor: int, seconds: float) -> None:
    """Let the system end a TCP connection whose peer acknowledges no data for so long.

    A device that only sends never needs to ping, so it would notice a dead link after the
    system's own patience of a quarter of an hour. Does nothing where that cannot be set.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:
        return
    # The option belongs to the connection, not to the descriptor.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as same:
        same.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))
