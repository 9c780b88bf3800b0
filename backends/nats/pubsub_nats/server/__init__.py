"""The development server: `NatsServer`, one node or a cluster on loopback."""

from .nodes import NatsServer, find_server

__all__ = ["NatsServer", "find_server"]
