"""Handlers of the native client: under channels, found in the SDK's order.

A handler is called for its channel and everything below it; ``+`` stands for one segment and
``#`` for nothing, as with the broker's default matching rule. Several handlers may stand under
one channel, each of them once: a program that subscribes whenever it is connected gives the same
one again.

The order is that of emitter-io's own trie: from the root downwards, and at each level the
segment itself before ``+``. For ``a/b/c/d/`` that is ``a/``, ``a/b/c/``, ``a/b/c/d/``,
``a/+/c/``, ``a/+/c/+/``.

Source: emitter-io 2.3.0, ``emitter/subtrie.py``.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any, Generic, TypeVar

from pubsub_core.trie import HandlerTrie

__all__ = ["Handler", "Handlers", "canonical"]

A = TypeVar("A")


class Handler(Generic[A]):
    """One callable under a channel.

    Attributes:
        group: Share group of the subscription it came with, or ``""``.
        claims: How often it was given.
    """

    __slots__ = ("call", "channel", "claims", "group", "order")

    def __init__(self, channel: str, call: Callable[[A], Any], group: str, number: int) -> None:
        self.channel = channel
        self.call = call
        self.group = group
        self.claims = 0
        levels = tuple(segment == "+" for segment in channel.split("/")[:-1])
        self.order = (levels, number)


class Handlers(Generic[A]):
    """Handlers by channel. Any thread may call any method."""

    def __init__(self) -> None:
        self._trie: HandlerTrie[Handler[A]] = HandlerTrie("emitter")
        self._by_channel: dict[str, list[Handler[A]]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def add(self, channel: str, call: Callable[[A], Any], group: str = "") -> Handler[A]:
        """Put a handler under *channel*; slashes at its ends and double ones do not matter.

        One that is there already is claimed once more.
        """
        name = canonical(channel)
        with self._lock:
            there = self._by_channel.setdefault(name, [])
            for handler in there:
                if handler.group == group and _same(handler.call, call):
                    break
            else:
                handler = Handler(name, call, group, next(self._numbers))
                there.append(handler)
                if name:  # nothing is found under the root, as in the SDK
                    self._trie.add(name, handler)
            handler.claims += 1
        return handler

    def discard(self, handler: Handler[A], claims: int = 1) -> None:
        """Take claims to a handler back; with its last one it goes."""
        with self._lock:
            handler.claims -= claims
            if handler.claims <= 0:
                self._drop(handler)

    def claimed(self, channel: str, group: str) -> list[tuple[Handler[A], int]]:
        """Return the handlers of exactly that channel and group, and their claims at the moment."""
        with self._lock:
            there = self._by_channel.get(canonical(channel), [])
            return [(handler, handler.claims) for handler in there if handler.group == group]

    def _drop(self, handler: Handler[A]) -> None:
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
        with self._lock:
            found = [
                handler
                for handler in self._by_channel.get(canonical(channel), [])
                if (call is None or _same(handler.call, call)) and group in (None, handler.group)
            ]
            for handler in found:
                self._drop(handler)
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


def _same(one: Callable[[A], Any], other: Callable[[A], Any]) -> bool:
    """Whether two handlers are one.

    A lambda that is evaluated again, with the same variables around it, is the same handler.
    """
    if one == other:
        return True
    return (
        isinstance(one, FunctionType)
        and isinstance(other, FunctionType)
        and one.__code__ is other.__code__
        and one.__globals__ is other.__globals__
        and _all_same(one.__closure__, other.__closure__)
        and _all_same(one.__defaults__, other.__defaults__)
        and not one.__kwdefaults__
        and not other.__kwdefaults__
    )


def _all_same(ones: tuple[Any, ...] | None, others: tuple[Any, ...] | None) -> bool:
    ones, others = ones or (), others or ()
    return len(ones) == len(others) and all(map(operator.is_, ones, others))
