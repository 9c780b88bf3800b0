"""Rights to the guarded topics of a space: questions, answers, and the visible parts of messages.

A right is of one client and one topic. A client that subscribes to a guarded topic is asked
about, of everybody who authorizes there; so is one whose wildcards match it, once something is
published. A client without an answer, or with a no, sees nothing, and nothing is kept for later.

Everything here is called with the lock of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import msgspec

from pubsub_core.events import Notice
from pubsub_core.interfaces import AuthorizationRequest, Entitlements, Everything
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import InFrame
from pubsub_core.topics import TopicFilter, parse_filter

from .client import Client

__all__ = ["Rights", "is_exact"]

_MOST_WAITING = 10_000
_MOST_CACHED = 10_000


def is_exact(filter: str) -> bool:
    """Whether *filter* is one topic, without a wildcard."""
    return "+" not in filter and "#" not in filter


class _Question:
    """An unanswered question, and who was asked in their session."""

    __slots__ = ("asked",)

    def __init__(self) -> None:
        self.asked: set[Client] = set()


class Rights:
    """The rights of the clients of one space.

    Args:
        may_authorize: Whether a client may answer for a topic.
    """

    def __init__(self, may_authorize: Callable[[Client, str], bool]) -> None:
        self._may_authorize = may_authorize
        self._filters: dict[str, TopicFilter] = {}
        self._guarded = BoundedCache[str, bool](_MOST_CACHED)
        self._authorizers: dict[Client, dict[str, TopicFilter]] = {}
        # An answer of None is a no.
        self._known: dict[Client, dict[str, Entitlements | _Question | None]] = {}
        self._waiting = 0

    @property
    def needed(self) -> bool:
        """Whether any topic is guarded at all."""
        return bool(self._filters)

    def guard(self, filters: Iterable[str]) -> None:
        """Guard the topics of these filters from now on."""
        for each in filters:
            self._filters[each] = parse_filter(each)
        self._guarded.clear()

    def guards(self, topic: str) -> bool:
        """Whether *topic* is guarded."""
        if not self._filters:
            return False
        found = self._guarded.get(topic)
        if found is None:
            guarded = any(each.matches(topic) for each in self._filters.values())
            found = self._guarded.keep(topic, guarded)
        return found

    def held(self, client: Client, topic: str) -> Entitlements | None:
        """Return the entitlements of *client* for a guarded topic, or None for no right."""
        known = self._known.get(client, {}).get(topic)
        return None if isinstance(known, _Question) else known

    def may_see(self, client: Client, topic: str) -> bool:
        """Whether anything of *topic* is for *client*."""
        return not self.guards(topic) or self.held(client, topic) is not None

    def shown(self, client: Client, frame: InFrame, *, tell: bool = False) -> InFrame | None:
        """Return the parts of *frame* that *client* may see; None for none.

        With *tell* a client that has a right, but to no part of it, is told.
        """
        if not self.guards(frame.topic):
            return frame
        held = self.held(client, frame.topic)
        if held is None:
            return None
        if isinstance(held, Everything) or not frame.parts:
            return frame
        parts = tuple(part for part in frame.parts if part.entitlements <= held)
        if len(parts) == len(frame.parts):
            return frame
        if not parts:
            if tell:
                text = f"a message of {frame.topic!r} had nothing that this client is entitled to"
                client.note(Notice("not_entitled", text, frame.topic))
            return None
        return msgspec.structs.replace(frame, payload=parts[0].data, parts=parts)

    # --- questions -----------------------------------------------------------------------

    def want(self, client: Client, topic: str) -> None:
        """Ask for the rights of *client* to a guarded topic, unless they are known or asked for."""
        known = self._known.setdefault(client, {})
        if topic in known:
            return
        if self._waiting >= _MOST_WAITING:
            known[topic] = None
            client.note(
                Notice(
                    "not_entitled",
                    f"this client may not see {topic!r}: too many questions wait for an answer",
                    topic,
                )
            )
            return
        question = known[topic] = _Question()
        self._waiting += 1
        for authorizer, filters in self._authorizers.items():
            if any(each.matches(topic) for each in filters.values()):
                self._ask(authorizer, client, topic, question)

    def ask_again(self, client: Client, filter: TopicFilter) -> None:
        """Forget refusals of *client* for that filter's topics."""
        known = self._known.get(client, {})
        for topic in [topic for topic, held in known.items() if held is None]:
            if filter.matches(topic):
                del known[topic]

    def drop(self, client: Client, wanted: Callable[[str], bool]) -> None:
        """Forget questions and refusals about topics that *client* no longer wants."""
        known = self._known.get(client)
        if not known:
            return
        for topic, held in tuple(known.items()):
            if (held is None or isinstance(held, _Question)) and not wanted(topic):
                self._forget(known, topic)

    def leave(self, client: Client) -> None:
        """Forget everything about *client*."""
        self.end_session(client)
        known = self._known.pop(client, {})
        for topic in tuple(known):
            self._forget(known, topic)

    # --- answers -------------------------------------------------------------------------

    def answer(self, client: Client, topic: str, held: Entitlements | None) -> bool:
        """Take an answer; return False when nobody wants to know."""
        known = self._known.get(client, {})
        if topic not in known:
            return False
        before = known[topic]
        self._forget(known, topic)
        known[topic] = held
        if held is None and before is not None:
            client.note(Notice("not_entitled", f"this client may not see {topic!r}", topic))
        return True

    def watch(self, authorizer: Client, filter: str) -> None:
        """Ask *authorizer* about that filter's topics, starting with open questions."""
        parsed = parse_filter(filter)
        self._authorizers.setdefault(authorizer, {})[filter] = parsed
        for client, topic, question in tuple(self._questions()):
            if authorizer not in question.asked and parsed.matches(topic):
                self._ask(authorizer, client, topic, question)

    def unwatch(self, authorizer: Client, filter: str) -> None:
        """Ask no more; open questions are asked again when it watches again."""
        filters = self._authorizers.get(authorizer, {})
        filters.pop(filter, None)
        for _, topic, question in self._questions():
            if not any(each.matches(topic) for each in filters.values()):
                question.asked.discard(authorizer)

    def end_session(self, authorizer: Client) -> None:
        """Ask *authorizer* nothing until it watches again."""
        if self._authorizers.pop(authorizer, None) is not None:
            for _, _, question in self._questions():
                question.asked.discard(authorizer)

    # --- helpers -------------------------------------------------------------------------

    def _questions(self) -> Iterator[tuple[Client, str, _Question]]:
        for client, known in self._known.items():
            for topic, held in known.items():
                if isinstance(held, _Question):
                    yield client, topic, held

    def _ask(self, authorizer: Client, client: Client, topic: str, question: _Question) -> None:
        if self._may_authorize(authorizer, topic):
            question.asked.add(authorizer)
            authorizer.ask(AuthorizationRequest(client.member, topic))

    def _forget(self, known: dict[str, Entitlements | _Question | None], topic: str) -> None:
        if isinstance(known.pop(topic), _Question):
            self._waiting -= 1
