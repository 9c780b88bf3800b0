"""Recognises stored messages that have already come live.

A subscription that begins with stored messages, and one whose hole is filled from them after a
reconnect, must deliver each message once. Emitter gives stored messages an identifier and live
ones none. So a live message gets an identifier here, and a stored message that is the same gets
it, too: the core drops the second by its identifier.

Two messages are the same if topic and payload are equal and the order fits. In the current
session the newest live messages are the newest stored ones. In earlier sessions live messages were
stored in the order in which they came, with holes between. Where equal payloads stand on both
sides of a lost session, the log cannot always tell which of them came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from pubsub_core.message import InFrame

__all__ = ["LiveLog"]

_KEPT: Final = 4096
_SLACK: Final = 2.0


class _Entry(NamedTuple):
    generation: int
    time: float
    topic: str
    content: int
    id: str


class LiveLog:
    """The newest live messages: topic, time and a hash of the payload.

    The payload itself is not kept, since 4,096 of them may take 256 MB. Two payloads with one hash
    on one topic would be taken for one; with 64 bits that does not happen by chance.
    """

    def __init__(self) -> None:
        self._entries: deque[_Entry] = deque(maxlen=_KEPT)
        self._generation = 0
        self._number = 0

    def begin(self) -> None:
        """Count a new session."""
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
        """Return the messages so far, for `recognise`; taken before history is asked for."""
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
        # Newest first, since this session has no hole at its end: its live messages are the
        # newest stored ones. Oldest first would pair the first of several equal payloads, which
        # may be older than the session, with a message of this one. A stored message without a
        # live one is skipped: it came while the subscription was being made.
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
        # Oldest first for earlier sessions: their live messages were stored before the messages
        # that the hole swallowed, so equal payloads belong to the older stored ones. The query
        # begins somewhere in those sessions; the clocks of broker and client may differ a little.
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
