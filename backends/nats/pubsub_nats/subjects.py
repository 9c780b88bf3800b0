"""Topics and subjects: the mapping of the NATS server's own MQTT gateway.

Per level: an empty one becomes ``/``, every ``.`` inside one becomes ``//``, and the levels are
joined with ``.``. So MQTT devices on the same server and programs meet on one topic. The
mapping is a bijection onto its image; a subject outside of the image has no topic.

Source: observed on nats-server 2.15.1 and 2.9.10: all 363 texts of one to five characters over
``a``, ``.`` and ``/``, in both directions.
"""

from __future__ import annotations

from pubsub_core.errors import InvalidFilter, InvalidTopic
from pubsub_core.keyed import BoundedCache

__all__ = [
    "FORBIDDEN",
    "MAX_SUBJECT",
    "Subjects",
    "subject_of",
    "subjects_of",
    "topic_of",
]

FORBIDDEN = " \t\n\x0b\f\r\x7f"
"""Characters that the server or its MQTT gateway cannot carry, and VT.

VT passes through both, but ends the connection of clients that split lines at any white space.
"""

MAX_SUBJECT = 3072
"""Bytes of a subject. The server's control line has 4096; a consumer's name must fit as well."""

_KEPT = 10_000
_WILDCARDS = ("*", ">")
_INBOXES = ("_INBOX", "_R_", "_GR_")


def _token(level: str) -> str:
    return level.replace(".", "//") if level else "/"


def _check(text: str, error: type[InvalidTopic]) -> list[str]:
    levels = text.split("/")
    for position, level in enumerate(levels):
        for character in level:
            if character in FORBIDDEN:
                raise error(
                    f"{text!r} has {character!r} in level {position}, which nats cannot carry",
                    topic=text,
                    level=position,
                    character=character,
                    reason="forbidden_character",
                    hint="rename the level",
                    backend="nats",
                )
        if level in _WILDCARDS:
            raise error(
                f"level {position} of {text!r} is {level!r}, a wildcard of nats",
                topic=text,
                level=position,
                character=level,
                reason="wildcard_token",
                hint="rename the level; as part of a level the character is fine",
                backend="nats",
            )
    if levels[0].startswith("$") or levels[0] in _INBOXES:
        raise error(
            f"{text!r} begins with {levels[0]!r}, which nats keeps for itself",
            topic=text,
            level=0,
            reason="reserved",
            hint="use a first level without '$' that is none of _INBOX, _R_ and _GR_",
            backend="nats",
        )
    return levels


def _short_enough(subject: str, text: str, error: type[InvalidTopic]) -> str:
    if len(subject) * 4 > MAX_SUBJECT and len(subject.encode()) > MAX_SUBJECT:
        raise error(
            f"the subject of a topic of {len(text)} characters has {len(subject.encode())} bytes, "
            f"and nats carries {MAX_SUBJECT}",
            topic=text,
            reason="too_long",
            hint="shorten it; a '.' counts twice",
            backend="nats",
        )
    return subject


def subject_of(topic: str, *, error: type[InvalidTopic] = InvalidTopic) -> str:
    """Return the subject of *topic*.

    Raises:
        InvalidTopic: ``reason`` is ``forbidden_character``, ``wildcard_token``, ``reserved`` or
            ``too_long``.

    >>> subject_of("lab//oven.1/temp")
    'lab./.oven//1.temp'
    """
    levels = _check(topic, error)
    return _short_enough(".".join(map(_token, levels)), topic, error)


def topic_of(subject: str) -> str | None:
    """Return the topic of *subject*, or None where it has none.

    >>> topic_of("lab./.oven//1.temp")
    'lab//oven.1/temp'
    >>> topic_of("a/b") is None  # the server's gateway would make "ab" of it
    True
    """
    first, _, _ = subject.partition(".")
    if first.startswith("$") or first in _INBOXES:
        return None
    levels: list[str] = []
    for part in subject.split("."):
        if part == "/":
            levels.append("")
        elif not part or part in _WILDCARDS:
            return None
        elif "/" in part:
            level = part.replace("//", ".")
            if "/" in level:
                return None
            levels.append(level)
        else:
            levels.append(part)
    topic = "/".join(levels)
    return topic or None  # the subject "/" alone would be the empty topic


def subjects_of(filter: str) -> tuple[str, ...]:
    """Return the one or two disjoint subjects that match what *filter* does.

    ``>`` needs at least one token where ``#`` matches its parent as well, hence two.

    Raises:
        InvalidFilter: ``reason`` as in `subject_of`.

    >>> subjects_of("lab/+/#")
    ('lab.*', 'lab.*.>')
    """
    levels = _check(filter, InvalidFilter)
    everything = levels[-1] == "#"
    if everything:
        del levels[-1]
    base = ".".join("*" if level == "+" else _token(level) for level in levels)
    if not everything:
        return (_short_enough(base, filter, InvalidFilter),)
    if not levels:
        return (">",)
    return base, _short_enough(f"{base}.>", filter, InvalidFilter)


class Subjects:
    """The mapping below a prefix, with what was translated before kept.

    Attributes:
        prefix: Subject that stands before every other, with its ``.``; or ``""``.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = f"{subject_of(prefix)}." if prefix else ""
        self._skip = len(self.prefix)
        self._subjects = BoundedCache[str, bytes](_KEPT)
        self._topics = BoundedCache[bytes, str | None](_KEPT)

    def subject(self, topic: str) -> bytes:
        """Return the subject of *topic*.

        Raises:
            InvalidTopic: See `subject_of`.
        """
        found = self._subjects.get(topic)
        if found is None:
            text = _short_enough(self.prefix + subject_of(topic), topic, InvalidTopic)
            found = self._subjects.keep(topic, text.encode())
        return found

    def topic(self, subject: bytes) -> str | None:
        """Return the topic of *subject*, or None where it has none or lies beside the prefix."""
        found = self._topics.get(subject, ...)
        if found is not ...:
            return found
        try:
            text = subject.decode()
        except UnicodeDecodeError:
            return None
        topic = topic_of(text[self._skip :]) if text.startswith(self.prefix) else None
        return self._topics.keep(subject, topic)

    def filters(self, filter: str) -> tuple[bytes, ...]:
        """Return the subjects of *filter*.

        Raises:
            InvalidFilter: See `subjects_of`.
        """
        found = tuple(self.prefix + subject for subject in subjects_of(filter))
        return tuple(_short_enough(each, filter, InvalidFilter).encode() for each in found)
