"""Questions of the distributor: may this client see that topic?"""

from __future__ import annotations

import logging
import uuid
from typing import TypeAlias

from pubsub_core import interfaces
from pubsub_core.message import Member
from pubsub_core.topics import TopicFilter, parse_filter
from pubsub_messagebus.handlers import AuthorizationHandler
from pubsub_messagebus.protocol import AuthorizationRequest

from .names import TopicNames
from .session import Session

__all__ = ["Questions", "Tag"]

logger = logging.getLogger("pubsub_messagebus.backend")

# As many as our own distributor lets wait.
_MOST = 10_000

Tag: TypeAlias = tuple[uuid.UUID, str, str]
"""Client, feed and topic of an answer."""


class Questions:
    """Passes questions on to handlers; keeps them while there is none.

    A new authorizer is asked at once about every client that waits, which may be before this
    program has set up its handlers.
    """

    def __init__(
        self, session: Session, names: TopicNames, handlers: list[AuthorizationHandler]
    ) -> None:
        self._session = session
        self._names = names
        self._handlers = handlers
        self._watched: dict[str, TopicFilter] = {}
        self._waiting: dict[Tag, AuthorizationRequest] = {}

    def watch(self, filter: str) -> None:
        """Pass on questions about topics that match, those that wait included."""
        parsed = self._watched[filter] = parse_filter(filter)
        for tag, question in tuple(self._waiting.items()):
            if parsed.matches(self._names.core(question.feed, question.topic)):
                del self._waiting[tag]
                self._ask(question)

    def unwatch(self, filter: str) -> None:
        """Stop passing on; later questions wait."""
        self._watched.pop(filter, None)

    def take(self, question: AuthorizationRequest) -> None:
        """Act on one question."""
        topic = self._names.core(question.feed, question.topic)
        for handler in self._handlers:
            self._session.spawn(self._call(handler, question), "authorization")
        if any(parsed.matches(topic) for parsed in self._watched.values()):
            self._ask(question)
        elif not self._handlers and len(self._waiting) < _MOST:
            self._waiting[question.client_id, question.feed, question.topic] = question

    def _ask(self, question: AuthorizationRequest) -> None:
        member = Member(str(question.client_id), question.user, question.host)
        tag = (question.client_id, question.feed, question.topic)
        topic = self._names.core(question.feed, question.topic)
        self._session.sink.authorization(interfaces.AuthorizationRequest(member, topic, tag))

    async def _call(self, handler: AuthorizationHandler, question: AuthorizationRequest) -> None:
        try:
            await handler(
                question.client_id, question.host, question.user, question.feed, question.topic
            )
        except Exception:
            logger.exception("an authorization handler failed; the client goes on waiting")
