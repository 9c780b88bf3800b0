"""Pages of stored messages: which to ask for next, and in which order they come.

A page is one packet: if its JSON would be longer than that, the broker leaves the answer out and
only confirms the request, so the page is asked for again with fewer messages. The order within a
page is not reliable (the Go broker gives those of one second newest first), so messages are sorted
by their identifiers. A page may be shorter than asked although there is more. So an empty page is
the end, and no other. The backend and the native client page alike.

Source: emitter-io/emitter, ``internal/service/history``, ``internal/message/id.go``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from .protocol import MessageId, build_topic

__all__ = ["LARGEST_PAGE", "HistoryPages", "StoredMessage"]

LARGEST_PAGE: Final = 512
"""Messages that are asked for at once; more hardly ever fit into one packet."""


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """One message of a page; *text* is its identifier as it was sent."""

    text: str
    channel: str
    payload: bytes
    id: MessageId


class HistoryPages:
    """Pages backwards from the newest message.

    Args:
        key: Goes into the channel, as the broker wants it here.
        channel: Whose stored messages, and those below.
        options: Beside ``last``.
        size: Messages of the first page.
        before: Begin with messages older than that one.

    Attributes:
        size: Messages that the next page asks for. Set it before `body` to ask for fewer or more.
        ended: Whether nothing is left to ask for.
        too_long: Whether it ended at a message that fits into no answer.
    """

    def __init__(
        self,
        key: str,
        channel: str,
        options: Iterable[tuple[str, str]],
        size: int,
        before: str = "",
    ) -> None:
        self.size = size
        self.ended = False
        self.too_long = False
        self._key = key
        self._channel = channel
        self._options = tuple(options)
        self._before = before
        self._oldest: tuple[int, int] | None = None

    def body(self) -> dict[str, object]:
        """Return the request for the next page."""
        options = (("last", str(self.size)), *self._options)
        body: dict[str, object] = {"channel": build_topic(self._key, self._channel, options)}
        if self._before:
            body["startFromID"] = self._before
        return body

    def take(self, answer: Mapping[str, Any] | None) -> list[StoredMessage]:
        """Take the answer, None where the broker left it out; return its messages, oldest first."""
        if answer is None:
            self.ended = self.too_long = self.size <= 1
            self.size = max(self.size // 4, 1)
            return []
        page = _page(answer)
        if not page or (self._oldest is not None and page[0].id.age >= self._oldest):
            self.ended = True  # or a broker that does not go on where it was told to
            return []
        self._before, self._oldest = page[0].text, page[0].id.age
        return page


def _page(answer: Mapping[str, Any]) -> list[StoredMessage]:
    messages: object = answer.get("messages")
    if not isinstance(messages, list):
        return []
    found: list[StoredMessage] = []
    for each in cast("list[object]", messages):
        if not isinstance(each, Mapping):
            continue
        fields = cast("Mapping[str, object]", each)
        text, channel, payload = fields.get("id"), fields.get("channel"), fields.get("payload")
        if not (isinstance(text, str) and isinstance(channel, str)):
            continue
        try:
            identifier = MessageId.parse(text)
            data = base64.b64decode(payload if isinstance(payload, str) else "", validate=True)
        except (ValueError, binascii.Error):
            continue
        found.append(StoredMessage(text, channel, data, identifier))
    found.sort(key=lambda message: message.id.age)
    return found
