"""Core topics and the broker's feed and topic, each from the other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Pair", "TopicNames"]


class Pair(NamedTuple):
    """The broker's name of a core topic."""

    feed: str
    topic: str


class TopicNames:
    """Translates names, as the options ``feed`` and ``feeds`` say.

    Args:
        feed: The one feed that holds every topic, or None.
        feeds: Feeds whose names have several levels.
    """

    def __init__(self, feed: str | None, feeds: Iterable[str]) -> None:
        self.feed = feed
        # The longest first: with A and A/B listed, A/B/c is topic c of A/B.
        self._feeds = tuple(sorted(feeds, key=len, reverse=True))

    def pair(self, topic: str) -> Pair:
        """Return feed and topic of a core topic."""
        if self.feed is not None:
            return Pair(self.feed, topic)
        for name in self._feeds:
            if topic == name or topic.startswith(f"{name}/"):
                return Pair(name, topic[len(name) + 1 :])
        feed, _, rest = topic.partition("/")
        return Pair(feed, rest)

    def core(self, feed: str, topic: str) -> str:
        """Return the core topic of a feed and a topic."""
        if self.feed is not None and feed == self.feed:
            return topic
        return f"{feed}/{topic}" if topic else feed
