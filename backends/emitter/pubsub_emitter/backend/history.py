"""Stored messages, through Emitter's history request, which knows less than it seems.

A page is one packet: if its JSON would be longer than that, the broker leaves the answer out and
only confirms the request, so the page is asked for again with fewer messages. The order within a
page is not reliable, so messages are sorted by their identifiers. The broker matches by prefix and
counts its own matches; so pages are requested until enough messages fit the filter.
The time of a message is told in whole seconds.

Source: emitter-io/emitter, ``internal/service/history``, ``internal/message/id.go``.
"""

from __future__ import annotations

import base64
import binascii
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, cast

from pubsub_core.interfaces import HistoryQuery
from pubsub_core.message import InFrame, Origin
from pubsub_core.topics import overlap
from pubsub_emitter.protocol import OLDEST_TIME, YOUNGEST_TIME, MessageId

__all__ = ["fetch", "history_channel"]

logger = logging.getLogger("pubsub_emitter.backend")

_FIRST_PAGE: Final = 64
_LARGEST_PAGE: Final = 512

# The end of a second: what is stored in the second of a moment is not taken for older than it.
_END_OF_SECOND: Final = 0.999

Ask = Callable[[Mapping[str, object]], Awaitable["Mapping[str, Any] | None"]]
"""Makes one history request; None when the broker left the answer out."""


def history_channel(filter: str) -> str | None:
    """Return the channel whose stored messages include those of *filter*, or None.

    The broker looks messages up by their first segment, so that must be no wildcard.
    """
    levels = filter.split("/")
    if levels[-1] == "#":
        levels.pop()
    if not levels or levels[0] == "+":
        return None
    return "/".join(levels) + "/"


async def fetch(
    ask: Ask,
    key: str,
    channel: str,
    filter: str,
    query: HistoryQuery,
    *,
    now: Callable[[], float],
    on_first: Callable[[], None],
    scan: int | None = None,
) -> list[InFrame]:
    """Return stored messages that match *filter*, oldest first.

    Args:
        ask: Makes the request.
        key: Goes into the channel, as the broker wants it here.
        channel: From `history_channel`.
        filter: A topic filter.
        query: Which of them.
        now: Unix seconds.
        on_first: Called when the first page has arrived.
        scan: Look at so many messages at most.
    """
    options = ""
    if query.since is not None and query.since > OLDEST_TIME:
        options += f"&from={min(math.floor(query.since), YOUNGEST_TIME)}"
    if query.until is not None and query.until < YOUNGEST_TIME:
        options += f"&until={max(math.floor(query.until), OLDEST_TIME)}"
    wanted = query.last
    found: list[InFrame] = []
    scanned = 0
    before = ""
    oldest: tuple[int, int] | None = None
    size = _FIRST_PAGE if wanted is None else min(max(wanted, 1), _FIRST_PAGE)
    first = True
    while wanted is None or len(found) < wanted:
        body: dict[str, object] = {"channel": f"{key}/{channel}?last={size}{options}"}
        if before:
            body["startFromID"] = before
        answer = await ask(body)
        if first:
            on_first()
            first = False
        if answer is None:
            if size == 1:
                logger.warning(
                    "a stored message of %r is too long for the broker's history; "
                    "older ones cannot be read",
                    channel,
                )
                break
            size = max(size // 4, 1)
            continue
        page = _page(answer)
        if not page or (oldest is not None and page[0][3].age >= oldest):
            break  # the end, or a broker that does not go on where it was told to
        before, oldest = page[0][0], page[0][3].age
        scanned += len(page)
        clock = now()
        found[:0] = [
            _frame(text, topic, payload, identifier, clock)
            for text, topic, payload, identifier in page
            if overlap(filter, topic)
        ]
        if scan is not None and scanned >= scan:
            break
        size = min(size * 2, _LARGEST_PAGE)
    if wanted is not None:
        found = found[max(len(found) - wanted, 0) :]
    return found


def _page(answer: Mapping[str, Any]) -> list[tuple[str, str, bytes, MessageId]]:
    messages: object = answer.get("messages")
    if not isinstance(messages, list):
        return []
    found: list[tuple[str, str, bytes, MessageId]] = []
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
        found.append((text, channel.removesuffix("/"), data, identifier))
    found.sort(key=lambda item: item[3].age)
    return found


def _frame(text: str, topic: str, payload: bytes, identifier: MessageId, now: float) -> InFrame:
    return InFrame(
        topic=topic,
        payload=payload,
        origin=Origin.REPLAY,
        time=max(min(identifier.time + _END_OF_SECOND, now), identifier.time),
        id=text,
    )
