"""What a bus uses: `NatsBackend`, and the connection below it."""

from .nats import NatsBackend

__all__ = ["NatsBackend"]
