"""SUBSCRIBE, UNSUBSCRIBE and PINGREQ, and who waits for their answers.

Sources: MQTT 5.0 sections 3.8 to 3.13.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.subscribeoptions import SubscribeOptions

from pubsub_core.errors import ConnectError, NotConnected, PubSubError, SubscribeFailed
from pubsub_core.keyed import BoundedCache
from pubsub_mqtt.errors import subscribe_error
from pubsub_mqtt.packets import SUBSCRIBE, encode_length, malformed

from .paho_client import paho_properties
from .session_data import Subscribe
from .state import ConnectionState, Request

if TYPE_CHECKING:
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

__all__ = ["Requests"]

_REFUSALS: Final = 2
"""Sessions that a SUBSCRIBE may end before it is given up."""

_QUICK_END: Final = 1.0
"""Seconds after a sending, or the answer to the one before, within which an end counts."""

_REMEMBERED: Final = 1024


class Requests:
    """Requests that wait for SUBACK, UNSUBACK or PINGRESP; all of them end with the session.

    Attributes:
        pings: Who waits for PINGRESP, in the order of the questions.
    """

    def __init__(self, state: ConnectionState) -> None:
        self._state = state
        self._waiting = state.unanswered
        self.pings: deque[Callable[[ConnectError | None], None]] = deque()
        self._last_answer = 0.0
        self._refusals = BoundedCache[tuple[str, ...], int](_REMEMBERED)

    def suspect(self, how: str, *, named: bool = False) -> None:
        """Notice that the broker ended the session, perhaps over a SUBSCRIBE.

        The oldest without an answer is suspected, as with publishes (see `Outbound.suspect`).
        Otherwise a filter that the broker cannot stand would end every session, since it is
        subscribed to first thing in the next one. The second time it fails for good, and from
        then on it is not sent.

        Args:
            how: What the broker did, as a verb with its object.
            named: Whether the broker gave a reason that a filter can have caused.
        """
        for request in self._waiting.values():
            if not request.sent_at:
                continue
            since = max(request.sent_at, self._last_answer)
            if named or self._state.clock() - since < _QUICK_END:
                count = (self._refusals.get(request.filters) or 0) + 1
                self._refusals.keep(request.filters, count)
                if count >= _REFUSALS:
                    request.error = self._given_up(request.filters, how)
            return

    def _given_up(self, filters: tuple[str, ...], how: str) -> SubscribeFailed:
        shown = ", ".join(map(repr, filters))
        return SubscribeFailed(
            f"the broker {how} {_REFUSALS} times when {shown} was subscribed to; it is given up",
            hint="most often it has too many levels, or the broker has no such filters: share "
            "groups and names that begin with $ are not everywhere",
            backend=self._state.backend,
            topic=filters[0],
            retryable=False,
        )

    def session_ended(self, why: PubSubError) -> None:
        """Tell everybody that no answer will come."""
        requests = list(self._waiting.values())
        self._waiting.clear()
        for request in requests:
            if request.error is None:
                request.error = NotConnected(
                    "the session ended before the broker answered",
                    backend=self._state.backend,
                    retryable=True,
                )
            request.error.__cause__ = why
            request.on_done(request)
        pings, self.pings = self.pings, deque()
        lost = (
            why
            if isinstance(why, ConnectError)
            else ConnectError(str(why), backend=self._state.backend)
        )
        for waiter in pings:
            waiter(lost)

    def pong(self) -> None:
        """Take PINGRESP; one without a question is ignored."""
        if self.pings:
            self.pings.popleft()(None)

    def subscribe(self, wants: Sequence[Subscribe], on_done: Callable[[Request], None]) -> Request:
        """Send one SUBSCRIBE. All *wants* must have the same identifier.

        The request given to *on_done* holds one code per filter, or an error.

        Raises:
            NotConnected: There is no session.
            SubscribeFailed: paho refuses the filter, or it was given up; see `suspect`.
        """
        paho = self._state.paho
        if not self._state.usable or paho is None:
            raise self._state.not_connected()
        request = Request(tuple(want.filter for want in wants), on_done)
        if (self._refusals.get(request.filters) or 0) >= _REFUSALS:
            raise self._given_up(request.filters, "ended the session")
        try:
            if self._state.version == 5:
                properties = None
                if wants[0].identifier:
                    properties = paho_properties(PacketTypes.SUBSCRIBE)
                    properties.SubscriptionIdentifier = wants[0].identifier
                _, packet_id = paho.subscribe(
                    [
                        (
                            want.filter,
                            SubscribeOptions(
                                want.qos,
                                want.no_local,
                                want.retain_as_published,
                                want.retain_handling,
                            ),
                        )
                        for want in wants
                    ],
                    properties=properties,
                )
            else:
                _, packet_id = paho.subscribe([(want.filter, want.qos) for want in wants])
        except ValueError as exc:
            raise SubscribeFailed(
                f"{request.filters!r} cannot be subscribed to: {exc}",
                backend=self._state.backend,
                topic=request.filters[0] if request.filters else "",
                retryable=False,
            ) from exc
        if packet_id is None:
            raise self._state.not_connected()
        request.packet_id = packet_id
        request.sent_at = self._state.clock()
        self._waiting[packet_id] = request
        return request

    def subscribe_verbatim(self, filter: str, on_done: Callable[[Request], None]) -> Request:
        """Send one SUBSCRIBE at QoS 0 with *filter* as it is (MQTT 3.1.1).

        For services whose filters are not MQTT's, which paho refuses. The request does not
        hold the filter, which may have a key in it.

        Raises:
            NotConnected: There is no session.
        """
        if not self._state.usable:
            raise self._state.not_connected()
        request = Request(("",), on_done)
        request.packet_id = self._state.next_id()
        self._waiting[request.packet_id] = request
        name = filter.encode()
        body = struct.pack("!HH", request.packet_id, len(name)) + name + b"\x00"
        self._state.write(bytes((SUBSCRIBE | 2,)) + encode_length(len(body)) + body)
        return request

    def unsubscribe(self, filters: Sequence[str], on_done: Callable[[Request], None]) -> Request:
        """Send one UNSUBSCRIBE; see `subscribe`."""
        paho = self._state.paho
        if not self._state.usable or paho is None:
            raise self._state.not_connected()
        request = Request(tuple(filters), on_done)
        _, packet_id = paho.unsubscribe(list(filters))
        if packet_id is None:
            raise self._state.not_connected()
        request.packet_id = packet_id
        self._waiting[packet_id] = request
        return request

    def refusal(self, request: Request, index: int = 0) -> SubscribeFailed | None:
        """Return the error for one filter of a finished SUBSCRIBE, or None if it was granted."""
        code = request.codes[index]
        if code < 0x80:
            return None
        return subscribe_error(
            code, filter=request.filters[index], backend=self._state.backend, said=request.said
        )

    def answered(
        self,
        packet_id: int,
        codes: Iterable[ReasonCode],
        properties: Properties | None,
        *,
        granted: bool,
    ) -> None:
        """Take SUBACK (*granted*) or UNSUBACK as paho read it.

        Raises:
            ProtocolError: It does not fit the request.
        """
        request = self._waiting.get(packet_id)
        if request is None:
            self._state.stats.unknown_acks += 1
            return
        values = tuple(code.value for code in codes)
        if granted and len(values) != len(request.filters):
            raise malformed("SUBACK with another number of codes than filters")
        del self._waiting[packet_id]
        self._last_answer = self._state.last_in
        if self._refusals.get(request.filters):
            self._refusals.keep(request.filters, 0)  # it was another that ended the session
        request.codes = values
        request.said = str(getattr(properties, "ReasonString", ""))
        request.on_done(request)

    def ping(self, on_done: Callable[[ConnectError | None], None]) -> None:
        """Send PINGREQ; *on_done* is called when its answer arrives or the session ends."""
        if not self._state.usable:
            raise self._state.not_connected()
        self.send_ping(on_done)

    def send_ping(self, on_done: Callable[[ConnectError | None], None]) -> None:
        """Send PINGREQ in a session."""
        self.pings.append(on_done)
        self._state.stats.pings += 1
        self._state.write(b"\xc0\x00")
