"""How a client learns that a server has acted on everything sent so far.

Nothing is acknowledged. But a server acts on the messages of one client in order, and tells it
of its own subscriptions if it listens to the feed. So a client listens to a feed of its own, and
subscribes there: the notification that comes back is the fence. It proves the login, too, and
shows the client its own identifier, which nothing else does.

One feed serves all fences of a connection, one subscription after the other: each add is told,
however often the topic was added. A feed for each fence was tried; servers up to 6.0 keep a
subscription that was added and removed once, so those feeds heaped up there until the
connection ended.
"""

from __future__ import annotations

from uuid import UUID, uuid4

from .decoder import ForwardedSubscriptionRequest
from .encoding import FENCE_FEEDS, encode_notification_request, encode_subscription_request

__all__ = ["Fence"]

_TOPIC = "x"


class Fence:
    """The fences of one connection, which come back in the order they were asked for.

    Attributes:
        feed: The feed that nobody else knows.
        client_id: Our own identifier, once a fence has come back.
    """

    def __init__(self) -> None:
        self.feed = f"{FENCE_FEEDS}{uuid4()}"
        self.client_id: UUID | None = None
        self._listening = False

    def ask(self) -> bytes:
        """Return the frames of one fence."""
        frames = encode_subscription_request(self.feed, _TOPIC, True)
        if not self._listening:
            self._listening = True
            frames = encode_notification_request(self.feed, True) + frames
        return frames

    def owns(self, message: ForwardedSubscriptionRequest) -> bool:
        """Whether a notification is about these fences, and of no concern to anybody else."""
        return message.feed == self.feed

    def take(self, message: ForwardedSubscriptionRequest) -> bytes | None:
        """Return the frames to send when the oldest fence has come back, or None."""
        if not message.is_add:
            return None
        self.client_id = message.client_id
        return encode_subscription_request(self.feed, _TOPIC, False)
