"""Handlers of the native client: under channels, found in the SDK's order.

A handler is called for its channel and everything below it; ``+`` stands for one segment and
``#`` for nothing, as with the broker's default matching rule. Several handlers may stand under
one channel.

The order is that of emitter-io's own trie: from the root downwards, and at each level the
segment itself before ``+``. For ``a/b/c/d/`` that is ``a/``, ``a/b/c/``, ``a/b/c/d/``,
``a/+/c/``, ``a/+/c/+/``.

Source: emitter-io 2.3.0, ``emitter/subtrie.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pubsub_core.trie import HandlerTrie

__all__ = ["Handler", "Handlers", "canonical"]

A = TypeVar("A")


class Handler(Generic[A]):
    """One callable under a channel.

    Attributes:
        group: Share group of the subscription it came with, or ``""``.
    """

    __slots__ = ("call", "channel", "group", "order")

    def __init__(self, channel: str, call: Callable[[A], Any], group: str, number: int) -> None:
        self.channel = channel
        self.call = call
        self.group = group
        levels = tuple(segment == "+" for segment in channel.split("/")[:-1])
        self.order = (levels, number)


class Handlers(Generic[A]):
    """Handlers by channel. Any thread may call any method."""

    def __init__(self) -> None:
        self._trie: HandlerTrie[Handler[A]] = HandlerTrie("emitter")
        self._by_channel: dict[str, list[Handler[A]]] = {}
        self._numbers = itertools.count()

    def add(self, channel: str, call: Callable[[A], Any], group: str = "") -> Handler[A]:
        """Put a handler under *channel*; slashes at its ends and double ones do not matter."""
        name = canonical(channel)
        handler = Handler(name, call, group, next(self._numbers))
        self._by_channel.setdefault(name, []).append(handler)
        if name:  # nothing is found under the root, as in the SDK
            self._trie.add(name, handler)
        return handler

    def discard(self, handler: Handler[A]) -> None:
        """Remove one handler, if it is there."""
        there = self._by_channel.get(handler.channel, [])
        if handler in there:
            there.remove(handler)
            self._trie.remove(handler.channel, handler)
            if not there:
                del self._by_channel[handler.channel]

    def remove(
        self, channel: str, call: Callable[[A], Any] | None = None, group: str | None = None
    ) -> int:
        """Remove the handlers of exactly that channel; return how many there were.

        With *call* only that one, with *group* only those of that share group; ``""`` are
        those of none.
        """
        found = [
            handler
            for handler in self._by_channel.get(canonical(channel), [])
            if call in (None, handler.call) and group in (None, handler.group)
        ]
        for handler in found:
            self.discard(handler)
        return len(found)

    def find(self, channel: str) -> list[Callable[[A], Any]]:
        """Return who is to be called for a message on *channel*, in order."""
        found = self._trie.match(canonical(channel))
        if len(found) > 1:
            found = tuple(sorted(found, key=lambda handler: handler.order))
        return [handler.call for handler in found]


def canonical(channel: str) -> str:
    """Return *channel* with one slash after each segment and none elsewhere."""
    segments = [segment for segment in channel.split("/") if segment]
    return "/".join(segments) + "/" if segments else ""
