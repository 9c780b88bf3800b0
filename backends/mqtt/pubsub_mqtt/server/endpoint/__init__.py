"""A small MQTT 3.1.1 server for services without sessions, whose rules a `Dialect` gives.

`packets` reads and writes packets, `Client` knows which may come next, and `EndpointServer` has
the sockets: plain, TLS and WebSocket. What a service means by a topic, who may publish, and who
gets what, is its dialect's. There are no sessions that outlive a connection, and nothing is sent
above QoS 0: the services it was made for have neither. It is no broker for plain MQTT; see
`pubsub_mqtt.server` for those.
"""

from __future__ import annotations

from .client import Client, Dialect, Ending, EndpointStats
from .packets import Leniency, PacketError
from .profile import HttpRequest, HttpResponse, Profile
from .server import EndpointServer

__all__ = [
    "Client",
    "Dialect",
    "Ending",
    "EndpointServer",
    "EndpointStats",
    "HttpRequest",
    "HttpResponse",
    "Leniency",
    "PacketError",
    "Profile",
]
