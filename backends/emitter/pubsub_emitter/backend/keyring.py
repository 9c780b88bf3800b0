"""Which key goes with which channel: given ones by pattern, and narrow ones made on demand.

Given keys are opaque unless there is a license to read them with. A pattern is a topic filter, and
covers a channel when every topic of the channel matches it; of several the most specific wins,
for each permission separately. Where no key is given and there is a master key or a license, a
key is made for that channel alone, with only the permissions of that kind of work, and kept
until shortly before it expires.

Nothing here shows the text of a key: it is in no repr and no error.

Source: emitter-io/emitter, ``internal/security/key.go`` for the channels that a target covers.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from pubsub_core.errors import BadOption
from pubsub_core.keyed import BoundedCache
from pubsub_core.secrets import Secret
from pubsub_core.topics import validate_filter
from pubsub_emitter.keys import (
    MAX_PARTS,
    InvalidKey,
    InvalidTarget,
    License,
    encode_target,
    is_useless_target,
    target_allows,
)
from pubsub_emitter.options import ChannelKeys

__all__ = ["KeyRing", "RingKey", "covers", "target_for"]

_ALL: Final = "rwslp"
_KEPT: Final = 4096
_MARGIN: Final = 0.1

_BUNDLES: Final = {"r": "rl", "l": "rl", "w": "ws", "s": "ws", "p": "p"}
"""Permissions that a made key gets together: those of reading, writing, and looking."""


@dataclass(slots=True, eq=False)
class RingKey:
    """A key and the facts about it.

    Attributes:
        text: The key itself. Secret.
        pattern: The filter that it was given for, or the channel that it was made for.
        letters: Permissions that it may be used for.
        expires: Unix seconds, 0 for never or not known.
        made: Whether the ring had it made.
        told: Whether it was told that its time is over.
        worked: Operations and topics that the broker accepted it for, the latest of them.
    """

    text: str = field(repr=False)
    pattern: str
    letters: str
    expires: float = 0.0
    made: bool = False
    told: bool = False
    worked: BoundedCache[tuple[str, str], bool] = field(
        default_factory=lambda: BoundedCache[tuple[str, str], bool](_KEPT), repr=False
    )

    def accepted(self, operation: str, topic: str) -> None:
        """Note that the broker accepted it."""
        self.worked.keep((operation, topic), True)


def covers(pattern: str, channel: str) -> bool:
    """Whether every topic of *channel* matches *pattern*; both may have wildcards.

    >>> covers("a/+/#", "a/b/c/"), covers("a/+", "a/#/")
    (True, False)
    """
    wanted = pattern.strip("/").split("/")
    levels = channel.strip("/").split("/")
    for index, level in enumerate(wanted):
        if level == "#":
            return True
        if index == len(levels):
            return False
        theirs = levels[index]
        if theirs == "#" or level not in ("+", theirs):
            return False
    return len(wanted) == len(levels)


def target_for(*channels: str) -> str:
    """Return the narrowest target of a key that allows all *channels*, the first deciding.

    >>> target_for("a/b/"), target_for("a/+/"), target_for("+/")
    ('a/b/', 'a/#/', '+/')
    """
    parts = channels[0].strip("/").split("/")
    if parts[-1] == "#":
        parts.pop()
    candidates = ["/".join(parts) + "/"] if parts else []
    candidates += [
        "/".join(parts[:count]) + "/#/" for count in range(min(len(parts), MAX_PARTS), 0, -1)
    ]
    for candidate in candidates:
        try:
            path, target = encode_target(candidate)
        except InvalidTarget:
            continue
        if is_useless_target(candidate):
            continue
        if all(target_allows(path, target, channel) for channel in channels):
            return candidate
    return "#/"


def _specificity(pattern: str) -> tuple[int, ...]:
    """Return a sort key: earlier literal levels count most; an end beats ``#``."""
    rank = {"#": 0, "+": 1}
    return (*(rank.get(level, 2) for level in pattern.strip("/").split("/")), 3)


Issue = Callable[[str, str, int], Awaitable[str]]
"""Makes a key for a target, letters and seconds to live."""


class KeyRing:
    """The keys of one bus.

    Args:
        key: For every channel.
        keys: By pattern.
        license: Reads given keys, and makes keys.
        can_issue: Whether there is a master key besides.
        ttl: Seconds that made keys are valid; 0: they do not expire.
        clock: Unix seconds.
    """

    def __init__(
        self,
        *,
        key: Secret | None = None,
        keys: Iterable[tuple[str, ChannelKeys | Secret]] = (),
        license: License | None = None,
        can_issue: bool = False,
        ttl: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._license = license
        self._issues = can_issue or license is not None
        self._ttl = ttl
        self._clock = clock
        given: list[RingKey] = []
        for pattern, value in keys:
            _check_pattern(pattern)
            found = value if isinstance(value, ChannelKeys) else ChannelKeys(key=value)
            given += [self._given(pattern, letters, each) for letters, each in found.pairs()]
        given.sort(key=lambda each: _specificity(each.pattern), reverse=True)
        if key is not None:
            given.append(self._given("#", _ALL, key))
        self._keys = tuple(given)
        self._found = BoundedCache[tuple[str, str], RingKey](_KEPT)
        self._made: OrderedDict[tuple[str, str], RingKey] = OrderedDict()
        self._making: dict[tuple[str, str], asyncio.Task[RingKey]] = {}

    def __repr__(self) -> str:
        return f"<KeyRing of {len(self._keys)} given and {len(self._made)} made keys>"

    def _given(self, pattern: str, letters: str, secret: Secret) -> RingKey:
        text = secret.reveal().strip()
        problem = ""
        expires = 0
        if not text or "/" in text:
            problem = "is none: it is empty, or has a '/'"
        elif self._license is not None:
            try:
                key = self._license.decrypt(text)
            except InvalidKey as exc:
                problem = f"is none: {exc}"
            else:
                if not self._license.owns(key):
                    problem = "is not of this license"
                elif key.is_master:
                    problem = "is a master key, which can only make keys; set master_key to it"
                said = key.permissions.letters
                letters = "".join(letter for letter in letters if letter in said)
                expires = key.expires
        if problem:
            raise BadOption(
                f"the key for {pattern!r} {problem}",
                option="keys",
                hint="copy all 32 characters of a channel key",
                backend="emitter",
            )
        return RingKey(text, pattern, letters, expires)

    def may(self, letter: str) -> bool:
        """Whether there is, or can be made, a key with that permission for some channel."""
        return self._issues or any(letter in each.letters for each in self._keys)

    @property
    def issues(self) -> bool:
        """Whether it can make keys."""
        return self._issues

    def peek(self, letters: str, *channels: str) -> RingKey | None:
        """Return a known key for all *channels*, or None: see `obtain`."""
        wanted = (letters, channels[0]) if len(channels) == 1 else (letters, "\n".join(channels))
        found = self._found.get(wanted)
        if found is None or self.is_old(found):
            found = self._look_up(letters, channels)
            if found is None:
                self._found.pop(wanted, None)
                return None
            self._found.keep(wanted, found)
        return found

    def _look_up(self, letters: str, channels: tuple[str, ...]) -> RingKey | None:
        for each in self._keys:
            if all(letter in each.letters for letter in letters) and all(
                covers(each.pattern, channel) for channel in channels
            ):
                return each
        if not self._issues:
            return None
        place = (_BUNDLES[letters[0]], target_for(*channels))
        made = self._made.get(place)
        if made is None or self.is_old(made):
            return None
        self._made.move_to_end(place)
        return made

    def is_old(self, key: RingKey) -> bool:
        """Whether a made key is so close to its end that another one shall be made."""
        # A given key is used until the broker refuses it: the clocks may differ.
        return key.made and key.expires != 0 and self._clock() >= key.expires

    async def obtain(self, issue: Issue, letters: str, *channels: str) -> RingKey | None:
        """Return a key for all *channels*, made if need be; None when there is none.

        Callers who want the same key share one request.
        """
        found = self.peek(letters, *channels)
        if found is not None or not self._issues:
            return found
        place = (_BUNDLES[letters[0]], target_for(*channels))
        task = self._making.get(place)
        if task is None:
            task = asyncio.create_task(self._make(issue, place), name="pubsub emitter key")
            self._making[place] = task
            task.add_done_callback(lambda done: self._made_one(place, done))
        # Shielded: a caller that gives up must not take the key away from the others.
        return await asyncio.shield(task)

    async def _make(self, issue: Issue, place: tuple[str, str]) -> RingKey:
        letters, target = place
        now = self._clock()
        if self._license is not None:
            text = self._license.make_key(target, letters, ttl=self._ttl, now=now)
        else:
            text = await issue(target, letters, self._ttl)
        # Not used in its last tenth, so that none expires on its way to the broker. Keys know
        # whole seconds.
        expires = math.floor(now) + self._ttl * (1 - _MARGIN) if self._ttl else 0.0
        made = RingKey(text, target, letters, expires, made=True)
        while len(self._made) >= _KEPT:
            self._made.popitem(last=False)
        self._made[place] = made
        return made

    def _made_one(self, place: tuple[str, str], task: asyncio.Task[RingKey]) -> None:
        self._making.pop(place, None)
        if not task.cancelled():
            task.exception()  # the waiters have it, if any are left; read, or asyncio complains

    def forget(self, key: RingKey) -> None:
        """Drop a made key that the broker refused, so that the next use has a new one."""
        if not key.made:
            return
        for place, made in tuple(self._made.items()):
            if made is key:
                del self._made[place]
        self._found.clear()  # what is still right costs one look-up


def _check_pattern(pattern: str) -> None:
    try:
        validate_filter(pattern.strip("/"))
    except ValueError as exc:
        raise BadOption(
            f"keys: {exc}",
            option="keys",
            hint="name a filter such as 'demo/#'",
            backend="emitter",
        ) from None
