"""The grammar of topics and topic filters: validation, captures, overlap, limits.

A topic is one or more levels joined by ``/``. A filter may use ``+`` for one whole level
and ``#`` as its last level, for that level's parent and everything below. In the filters
of this library ``{name}`` and ``{name:path}`` are the same two wildcards with a name under
which the message gives the text they matched. A wildcard never matches a first level that
begins with ``$``. Levels are compared character by character: no case folding, no Unicode
normalisation, and an empty level is a level like any other (``/a`` is not ``a``).

Every function is linear in the length of its input. Results kept from earlier calls
are bounded in number and in size, so a peer that invents topics cannot fill the memory.

Source: MQTT 3.1.1, sections 1.5.3 and 4.7; MQTT 5.0, section 4.8.2 for ``$share``.
"""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from .capabilities import Limits
from .errors import BadOption, BadType, InvalidFilter, InvalidTopic
from .keyed import BoundedCache

__all__ = [
    "MAX_TOPIC_BYTES",
    "TopicFilter",
    "check_limits",
    "overlap",
    "parse_filter",
    "split_shared",
    "validate_filter",
    "validate_topic",
]

MAX_TOPIC_BYTES: Final = 65535
"""The longest topic or filter, in UTF-8 bytes: the wire has two bytes for the length."""

_KEPT_TOPICS = 8192
_KEPT_FILTERS = 1024
# Longer texts are checked each time, so that kept results stay within a few megabytes.
_KEPT_LENGTH = 512

_SHARE = "$share/"
_WILDCARDS = frozenset("+#")


# --- topics ------------------------------------------------------------------------------

_valid_topics = BoundedCache[str, bool](_KEPT_TOPICS)


def validate_topic(topic: str) -> None:
    """Check that *topic* can be published to.

    A topic that was found valid before costs one set lookup, so this may run on each
    publish.

    Raises:
        InvalidTopic: ``reason`` is ``empty``, ``nul``, ``not_utf8``, ``too_long`` or
            ``wildcard_in_topic``; ``level`` and ``character`` say where.
        TypeError: It is no ``str``.

    >>> validate_topic("lab/oven/temp")
    >>> validate_topic("lab/+/temp")
    Traceback (most recent call last):
        ...
    pubsub_core.errors.InvalidTopic: topic 'lab/+/temp' has the wildcard '+' in level 1; \
publish to one exact topic
    """
    try:
        if _valid_topics.get(topic):
            return
    except TypeError:  # not hashable, so no str: said in words below
        pass
    _check_text(topic, InvalidTopic)
    found = [position for position in (topic.find("+"), topic.find("#")) if position >= 0]
    if found:
        raise _error(
            InvalidTopic,
            topic,
            "wildcard_in_topic",
            f"has the wildcard {topic[min(found)]!r} in level {{level}}",
            "publish to one exact topic",
            min(found),
        )
    if len(topic) <= _KEPT_LENGTH:
        _valid_topics.keep(topic, True)


# --- filters -----------------------------------------------------------------------------


def validate_filter(filter: str) -> None:
    """Check that *filter* is a topic filter as MQTT defines it.

    This is the plain form: braces are ordinary characters here, and ``$share/group/filter``
    is checked in all its parts. `parse_filter` checks a filter with captures.

    Raises:
        InvalidFilter: ``reason`` is ``empty``, ``nul``, ``not_utf8``, ``too_long``,
            ``plus_not_alone``, ``hash_not_alone``, ``hash_not_last``,
            ``share_missing_filter``, ``share_empty_name`` or ``share_wildcard_in_name``.
        TypeError: It is no ``str``.

    >>> validate_filter("lab/+/temp")
    >>> validate_filter("$share/workers/jobs/#")
    >>> validate_filter("lab/#/temp")
    Traceback (most recent call last):
        ...
    pubsub_core.errors.InvalidFilter: filter 'lab/#/temp' has '#' in level 1, which is not \
the last; end the filter there, or use '+' for one level
    """
    _check_text(filter, InvalidFilter)
    group, plain = split_shared(filter)
    check_wildcards(plain.split("/"), filter, offset=0 if group is None else 2)


def check_wildcards(levels: Sequence[str], filter: str, *, offset: int = 0) -> None:
    """Refuse ``+`` and ``#`` that do not stand where a wildcard may stand.

    Args:
        levels: The filter's levels.
        filter: The text that errors show.
        offset: Index in *filter* of the first of *levels*.

    Raises:
        InvalidFilter: With ``reason`` ``plus_not_alone``, ``hash_not_alone`` or
            ``hash_not_last``.
    """
    if "+" not in filter and "#" not in filter:
        return
    last = len(levels) - 1
    for index, level in enumerate(levels):
        if "#" in level:
            if level != "#":
                raise _wildcard_error(filter, index + offset, "#")
            if index != last:
                raise InvalidFilter(
                    f"filter {_shown(filter)} has '#' in level {index + offset}, which is not "
                    "the last",
                    topic=filter,
                    level=index + offset,
                    character="#",
                    reason="hash_not_last",
                    hint="end the filter there, or use '+' for one level",
                )
        elif "+" in level and level != "+":
            raise _wildcard_error(filter, index + offset, "+")


def split_shared(filter: str) -> tuple[str | None, str]:
    """Split ``$share/group/filter`` into group and filter.

    A filter without a share group comes back as ``(None, filter)``. The prefix is exactly
    ``$share/``, case included. The filter itself is not checked.

    Raises:
        InvalidFilter: It begins like a shared filter and is none: ``reason`` is
            ``share_missing_filter``, ``share_empty_name`` or ``share_wildcard_in_name``.

    >>> split_shared("$share/workers/jobs/#")
    ('workers', 'jobs/#')
    >>> split_shared("jobs/#")
    (None, 'jobs/#')
    """
    if not filter.startswith(_SHARE):
        if filter == "$share":
            raise _share_error(filter, "share_missing_filter", "has no group and no filter", 0)
        return None, filter
    group, _, plain = filter[len(_SHARE) :].partition("/")
    if not plain:
        raise _share_error(
            filter, "share_missing_filter", "has no filter in level 2, after its group", 2
        )
    if not group:
        raise _share_error(filter, "share_empty_name", "has an empty group name in level 1", 1)
    for character in "+#":
        if character in group:
            raise _share_error(
                filter,
                "share_wildcard_in_name",
                f"has the wildcard {character!r} in level 1, its group name",
                1,
                character,
            )
    return group, plain


@dataclass(frozen=True, slots=True)
class TopicFilter:
    """A topic filter as a user wrote it, taken apart; made by `parse_filter`.

    Attributes:
        text: As given, with its captures.
        filter: The same with ``+`` and ``#`` in place of captures, as brokers and tries
            are given.
        captures: Names of the captures, from left to right.

    >>> wanted = parse_filter("lab/{device}/temp")
    >>> wanted.filter
    'lab/+/temp'
    >>> wanted.matches("lab/oven/temp"), wanted.matches("lab/oven")
    (True, False)
    >>> wanted.params("lab/oven/temp")
    {'device': 'oven'}
    """

    text: str
    filter: str
    captures: tuple[str, ...]
    _single: tuple[tuple[str, int], ...] = field(repr=False, compare=False)
    _path: tuple[str, int] | None = field(repr=False, compare=False)
    _literals: tuple[tuple[int, str], ...] = field(repr=False, compare=False)
    _depth: int = field(repr=False, compare=False)
    _open_end: bool = field(repr=False, compare=False)
    _hides_dollar: bool = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.text

    @property
    def is_exact(self) -> bool:
        """Whether it has no wildcard, and so matches one topic only."""
        return not self._open_end and len(self._literals) == self._depth

    def matches(self, topic: str) -> bool:
        """Whether a message on *topic* belongs to this filter.

        For many filters at once, `pubsub_core.trie.HandlerTrie` takes the time of one.
        """
        if self._hides_dollar and topic.startswith("$"):
            return False
        levels = topic.split("/")
        if len(levels) < self._depth or (len(levels) > self._depth and not self._open_end):
            return False
        return all(levels[index] == literal for index, literal in self._literals)

    def params(self, topic: str) -> dict[str, str]:
        """Return the text that each capture matched in *topic*.

        ``{name:path}`` gives all levels below its parent joined by ``/``, and ``""`` for the
        parent itself. The topic must be one that matches: that is not checked again.

        >>> parse_filter("lab/{rest:path}").params("lab/oven/temp")
        {'rest': 'oven/temp'}
        """
        if not self.captures:
            return {}
        levels = topic.split("/")
        try:
            found = {name: levels[index] for name, index in self._single}
        except IndexError:
            raise BadOption(f"{_shown(topic)} does not match {_shown(self.text)}") from None
        if self._path is not None:
            name, index = self._path
            found[name] = "/".join(levels[index:])
        return found


def parse_filter(text: str) -> TopicFilter:
    """Check a filter of this library, which may have captures, and take it apart.

    A capture is a whole level: ``{name}`` stands for ``+``, and ``{name:path}``, as the last
    level, for ``#``. Names are Python identifiers and differ. Other braces are refused,
    since they are most likely a capture with a mistake; a topic with braces is reached
    with ``+``. Share groups are an argument of subscribing, so ``$share/…`` is refused too.

    Filters seen before come from a bounded cache.

    Raises:
        InvalidFilter: ``reason`` is one of those of `validate_filter`, or
            ``capture_not_alone``, ``capture_name``, ``capture_repeated``,
            ``path_not_last`` or ``share_in_filter``.
        TypeError: It is no ``str``.

    >>> parse_filter("site/{name}/{rest:path}").filter
    'site/+/#'
    >>> parse_filter("lab/oven-{number}")
    Traceback (most recent call last):
        ...
    pubsub_core.errors.InvalidFilter: filter 'lab/oven-{number}' has a brace in level 1 \
beside other text; a capture is a whole level: {name}, or {name:path} as the last
    """
    _require_str(text, "filter")
    return _parse(text) if len(text) > _KEPT_LENGTH else _parse_cached(text)


def _parse(text: str) -> TopicFilter:
    _check_text(text, InvalidFilter)
    group, _ = split_shared(text)
    if group is not None:
        raise _share_error(
            text, "share_in_filter", f"names the share group {_shown(group)}", 0, hint="pass group="
        )
    given = text.split("/")
    levels, single, path = (
        (given, [], None) if "{" not in text and "}" not in text else _captures(text, given)
    )
    check_wildcards(levels, text)
    open_end = levels[-1] == "#"
    depth = len(levels) - open_end
    names = [name for name, _ in single]
    if path is not None:
        names.append(path[0])
    return TopicFilter(
        text,
        text if levels is given else "/".join(levels),
        tuple(names),
        tuple(single),
        path,
        tuple((index, level) for index, level in enumerate(levels) if level not in _WILDCARDS),
        depth,
        open_end,
        levels[0] in _WILDCARDS,
    )


_parse_cached = lru_cache(maxsize=_KEPT_FILTERS)(_parse)


def _captures(
    text: str, given: list[str]
) -> tuple[list[str], list[tuple[str, int]], tuple[str, int] | None]:
    """Return the levels with plain wildcards, the captures of one level, and the path."""
    levels = list(given)
    single: list[tuple[str, int]] = []
    path: tuple[str, int] | None = None
    names: set[str] = set()
    for index, level in enumerate(given):
        if "{" not in level and "}" not in level:
            continue
        inner = level[1:-1]
        if level[0] != "{" or level[-1] != "}" or "{" in inner or "}" in inner:
            raise InvalidFilter(
                f"filter {_shown(text)} has a brace in level {index} beside other text",
                topic=text,
                level=index,
                character="{" if "{" in level else "}",
                reason="capture_not_alone",
                hint="a capture is a whole level: {name}, or {name:path} as the last",
            )
        name, colon, kind = inner.partition(":")
        if not name.isidentifier() or keyword.iskeyword(name) or (colon and kind != "path"):
            raise InvalidFilter(
                f"filter {_shown(text)} has the capture {_shown(level)} in level {index}",
                topic=text,
                level=index,
                character="{",
                reason="capture_name",
                hint="write {name} or {name:path}, where name is a Python identifier",
            )
        if name in names:
            raise InvalidFilter(
                f"filter {_shown(text)} uses the capture name {name!r} again in level {index}",
                topic=text,
                level=index,
                character="{",
                reason="capture_repeated",
                hint="give each capture its own name",
            )
        names.add(name)
        if not colon:
            single.append((name, index))
            levels[index] = "+"
        elif index == len(given) - 1:
            path = (name, index)
            levels[index] = "#"
        else:
            raise InvalidFilter(
                f"filter {_shown(text)} has {_shown(level)} in level {index}, "
                "which is not the last",
                topic=text,
                level=index,
                character="{",
                reason="path_not_last",
                hint=f"end the filter there, or use {{{name}}} for one level",
            )
    return levels, single, path


def overlap(a: str, b: str) -> bool:
    """Whether some topic matches both filters.

    Both may have captures. Lengths are not considered: two filters whose common topics
    would all be longer than `MAX_TOPIC_BYTES` still overlap.

    Raises:
        InvalidFilter: As `parse_filter` does, for either.

    >>> overlap("lab/+/temp", "lab/oven/#")
    True
    >>> overlap("lab/+", "lab/oven/temp")
    False
    >>> overlap("#", "$SYS/#")  # a wildcard never matches a first level with a dollar sign
    False
    """
    left = parse_filter(a).filter.split("/")
    right = parse_filter(b).filter.split("/")
    first = (left[0], right[0])
    if (first[0] in _WILDCARDS and first[1].startswith("$")) or (
        first[1] in _WILDCARDS and first[0].startswith("$")
    ):
        return False
    for one, other in zip(left, right, strict=False):
        if "#" in (one, other):
            return True
        if one != other and "+" not in (one, other):
            return False
    if len(left) == len(right):
        return True
    shorter = min(len(left), len(right))
    longest = left if len(left) > shorter else right
    # Of "+" and "/#" the only topic in common would be the empty text, which is none.
    return longest[shorter] == "#" and (shorter > 1 or longest[0] != "")


# --- limits ------------------------------------------------------------------------------


def check_limits(topic: str, limits: Limits, backend: str, *, is_filter: bool = False) -> None:
    """Check that a backend can carry *topic*, which is valid in itself.

    Args:
        topic: A topic, or with *is_filter* a plain filter, whose wildcards are not counted
            among the characters that the backend may forbid.
        limits: The backend's.
        backend: Its name, for the error.
        is_filter: Raise `InvalidFilter` instead.

    Raises:
        InvalidTopic: ``reason`` is ``too_long``, ``too_many_levels``, ``empty_level`` or
            ``forbidden_character``; ``level`` and ``character`` say where.

    >>> check_limits("a b/c", Limits(forbidden_characters=" "), "losant")
    Traceback (most recent call last):
        ...
    pubsub_core.errors.InvalidTopic: topic 'a b/c' has ' ' in level 0, which losant cannot \
carry; rename the level
    """
    error = InvalidFilter if is_filter else InvalidTopic
    most = limits.max_topic_bytes
    # No character takes more than four bytes: most topics need not be encoded to know.
    if most is not None and len(topic) * 4 > most:
        size = len(topic) if topic.isascii() else len(topic.encode())
        if size > most:
            raise _error(
                error,
                topic,
                "too_long",
                f"has {size} bytes and {backend} carries {most}",
                "shorten it",
                backend=backend,
            )
    if limits.max_levels is not None and topic.count("/") >= limits.max_levels:
        raise _error(
            error,
            topic,
            "too_many_levels",
            f"has {topic.count('/') + 1} levels and {backend} carries {limits.max_levels}",
            "use fewer levels",
            backend=backend,
        )
    if not limits.allow_empty_levels:
        position = _empty_level(topic)
        if position is not None:
            raise _error(
                error,
                topic,
                "empty_level",
                f"has the empty level {{level}}, which {backend} cannot carry",
                "name the level, or leave out the extra '/'",
                position,
                backend=backend,
                character="",
            )
    for character in limits.forbidden_characters:
        if character not in topic or (is_filter and character in _WILDCARDS):
            continue
        raise _error(
            error,
            topic,
            "forbidden_character",
            f"has {character!r} in level {{level}}, which {backend} cannot carry",
            "rename the level",
            topic.find(character),
            backend=backend,
        )


def _empty_level(topic: str) -> int | None:
    """Return the position of the first empty level, or None."""
    if topic.startswith("/"):
        return 0
    position = topic.find("//")
    if position >= 0:
        return position + 1
    return len(topic) if topic.endswith("/") else None


# --- errors ------------------------------------------------------------------------------


def _check_text(text: str, error: type[InvalidTopic]) -> None:
    """Check the characters and the length of a topic or filter."""
    kind = "filter" if error is InvalidFilter else "topic"
    _require_str(text, kind)
    if not text:
        raise error(
            f"a {kind} is empty",
            reason="empty",
            hint="give it at least one character",
        )
    # Length first: a text of more characters than bytes allowed need not be encoded.
    size = len(text)
    if size <= MAX_TOPIC_BYTES and not text.isascii():
        try:
            size = len(text.encode())
        except UnicodeEncodeError as exc:
            raise _error(
                error,
                text,
                "not_utf8",
                f"has the lone surrogate {text[exc.start]!r} in level {{level}}",
                "decode received bytes as UTF-8, without surrogateescape",
                exc.start,
            ) from None
    if size > MAX_TOPIC_BYTES:
        raise _error(
            error,
            text,
            "too_long",
            f"has more than the {MAX_TOPIC_BYTES} bytes of UTF-8 that can be sent",
            "shorten it",
        )
    position = text.find("\0")
    if position >= 0:
        raise _error(
            error, text, "nul", "has U+0000 in level {level}", "remove the character", position
        )


def _require_str(text: object, kind: str) -> None:
    if not isinstance(text, str):
        raise BadType(f"a {kind} is a str, not {type(text).__name__}", hint="decode it as UTF-8")


def _error(
    error: type[InvalidTopic],
    text: str,
    reason: str,
    what: str,
    hint: str,
    position: int | None = None,
    *,
    backend: str = "",
    character: str | None = None,
) -> InvalidTopic:
    """Return an error about the character at *position*, whose level *what* may name."""
    level = None if position is None else text.count("/", 0, position)
    if character is None:
        character = "" if position is None else text[position]
    kind = "filter" if error is InvalidFilter else "topic"
    return error(
        f"{kind} {_shown(text)} {what.replace('{level}', str(level))}",
        topic=text,
        level=level,
        character=character,
        reason=reason,
        hint=hint,
        backend=backend,
    )


def _wildcard_error(filter: str, level: int, character: str) -> InvalidFilter:
    word = "hash" if character == "#" else "plus"
    return InvalidFilter(
        f"filter {_shown(filter)} has {character!r} in level {level} beside other text",
        topic=filter,
        level=level,
        character=character,
        reason=f"{word}_not_alone",
        hint="a wildcard is a whole level",
    )


def _share_error(
    filter: str,
    reason: str,
    what: str,
    level: int,
    character: str = "",
    *,
    hint: str = "write $share/group/filter",
) -> InvalidFilter:
    return InvalidFilter(
        f"filter {_shown(filter)} {what}",
        topic=filter,
        level=level,
        character=character,
        reason=reason,
        hint=hint,
    )


def _shown(text: str) -> str:
    """Return *text* escaped and cut, for messages: a peer may have chosen it."""
    return repr(text) if len(text) <= 200 else f"{text[:200]!r}…"
