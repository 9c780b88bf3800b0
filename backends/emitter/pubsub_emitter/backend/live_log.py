"""Which stored messages have already come live: Emitter gives live messages no identifier.

A subscription that begins with stored messages, and one whose hole is filled from them after a
reconnect, must give each message once. A stored message has an identifier and a live one has
none, so live messages get one of ours here, and a stored message that is found to be the same
gets it, too: the core then sees that they are one.

The same are two messages with equal topics and payloads, in the same order. Of the session at
hand the newest live messages are the newest stored ones; of sessions before, what came live was
stored in that order, with holes between. Where equal payloads follow each other around the loss
of a session, which of them came cannot always be told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from pubsub_core.message import InFrame

__all__ = ["Journal"]

_KEPT: Final = 4096
_SLACK: Final = 2.0


class _Entry(NamedTuple):
    generation: int
    time: float
    topic: str
    content: int
    id: str


class Journal:
    """The newest live messages, as far as they must be recognised."""

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=_KEPT)
        self._generation = 0
        self._number = 0

    def begin(self) -> None:
        """Learn that a new session begins."""
        self._generation += 1

    def note(self, topic: str, payload: bytes, now: float) -> str:
        """Keep a live message; return the identifier that it gets."""
        self._number += 1
        identifier = f"live-{self._number}"
        self._entries.append(_Entry(self._generation, now, topic, hash(payload), identifier))
        return identifier

    @property
    def number(self) -> int:
        """How many messages were noted."""
        return self._number

    def topics_since(self, number: int) -> set[str]:
        """Return the topics of messages that came after `number` was *number*."""
        count = min(self._number - number, len(self._entries))
        return {self._entries[-index].topic for index in range(1, count + 1)}

    def seen(self) -> tuple[_Entry, ...]:
        """Return what came live so far, for `recognise`."""
        return tuple(self._entries)

    def recognise(self, stored: Sequence[InFrame], seen: Sequence[_Entry]) -> list[InFrame]:
        """Give stored messages, oldest first, the identifiers of those in *seen*."""
        topics = {entry.topic for entry in seen}
        places: dict[str, list[int]] = {}
        for index, frame in enumerate(stored):
            if frame.topic in topics:
                places.setdefault(frame.topic, []).append(index)
        if not places:
            return list(stored)
        found = list(stored)
        entries: dict[str, list[_Entry]] = {}
        for entry in seen:
            if entry.topic in places:
                entries.setdefault(entry.topic, []).append(entry)
        for topic, indices in places.items():
            self._one_topic(found, indices, entries.get(topic, []))
        return found

    def _one_topic(self, frames: list[InFrame], indices: list[int], seen: list[_Entry]) -> None:
        contents = [hash(frames[index].payload) for index in indices]
        now = [entry for entry in seen if entry.generation == self._generation]
        # Newest first: what came in this session is the newest that is stored.
        end = len(indices)
        known = {entry.content for entry in now}
        at = len(now) - 1
        for place in range(len(indices) - 1, -1, -1):
            if contents[place] not in known:
                continue
            match = at
            while match >= 0 and now[match].content != contents[place]:
                match -= 1
            if match < 0:
                continue
            self._same(frames, indices[place], now[match])
            at = match - 1
            end = place
            if at < 0:
                break
        # Oldest first: what came before was stored before what was missed.
        began = frames[indices[0]].time - _SLACK
        before = [
            entry for entry in seen if entry.generation < self._generation and entry.time >= began
        ]
        known = {entry.content for entry in before}
        at = 0
        for place in range(end):
            if contents[place] not in known:
                continue
            match = at
            while match < len(before) and before[match].content != contents[place]:
                match += 1
            if match < len(before):
                self._same(frames, indices[place], before[match])
                at = match + 1

    @staticmethod
    def _same(frames: list[InFrame], index: int, entry: _Entry) -> None:
        frames[index] = msgspec.structs.replace(frames[index], id=entry.id)
