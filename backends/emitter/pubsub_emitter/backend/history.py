"""Stored messages, through Emitter's history request, which knows less than it seems.

How they come in pages is in `pubsub_emitter.history_pages`. The broker matches by prefix and counts
its own matches; so pages are requested until enough messages fit the filter.
The time of a message is told in whole seconds.

Source: emitter-io/emitter, ``internal/service/history``, ``internal/message/id.go``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from pubsub_core.interfaces import HistoryQuery
from pubsub_core.message import InFrame, Origin
from pubsub_core.topics import overlap
from pubsub_emitter.history_pages import LARGEST_PAGE, HistoryPages, StoredMessage
from pubsub_emitter.protocol import OLDEST_TIME, YOUNGEST_TIME

__all__ = ["fetch", "history_channel"]

logger = logging.getLogger("pubsub_emitter.backend")

_FIRST_PAGE: Final = 64

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
    options: list[tuple[str, str]] = []
    if query.since is not None and query.since > OLDEST_TIME:
        options.append(("from", str(min(math.floor(query.since), YOUNGEST_TIME))))
    if query.until is not None and query.until < YOUNGEST_TIME:
        options.append(("until", str(max(math.floor(query.until), OLDEST_TIME))))
    wanted = query.last
    found: list[InFrame] = []
    scanned = 0
    size = _FIRST_PAGE if wanted is None else min(max(wanted, 1), _FIRST_PAGE)
    pages = HistoryPages(key, channel, options, size)
    first = True
    while not pages.ended and (wanted is None or len(found) < wanted):
        answer = await ask(pages.body())
        if first:
            on_first()
            first = False
        page = pages.take(answer)
        if not page:
            continue
        scanned += len(page)
        clock = now()
        found[:0] = [
            _frame(message, topic, clock)
            for message in page
            if overlap(filter, topic := message.channel.removesuffix("/"))
        ]
        if scan is not None and scanned >= scan:
            break
        pages.size = min(pages.size * 2, LARGEST_PAGE)
    if pages.too_long:
        logger.warning(
            "a stored message of %r is too long for the broker's history; "
            "older ones cannot be read",
            channel,
        )
    if wanted is not None:
        found = found[max(len(found) - wanted, 0) :]
    return found


def _frame(message: StoredMessage, topic: str, now: float) -> InFrame:
    second = message.id.time
    return InFrame(
        topic=topic,
        payload=message.payload,
        origin=Origin.REPLAY,
        time=max(min(second + _END_OF_SECOND, now), second),
        id=message.text,
    )
