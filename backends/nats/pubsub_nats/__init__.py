"""NATS: the backend of ``nats://``, and a development server.

Nothing here imports a client library of NATS; the protocol is in `pubsub_nats.protocol`.
"""

from .options import NatsOptions

__all__ = ["NatsOptions"]
