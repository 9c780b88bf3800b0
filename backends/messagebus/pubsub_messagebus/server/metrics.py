"""A distributor's counters as Prometheus text, over HTTP. Needs prometheus-client and h11.

Names and labels are the original's, so its dashboards and alerts go on working. There a
connection's series stay until the server ends; here they end with the connection, and their
values are added to the series whose labels are empty, so that sums never fall.

Sources: jetblack-messagebus 5.1.1 (names and labels); the Prometheus text format 0.0.4; RFC
9112 by h11.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, cast

import h11

from .counters import Snapshot, Traffic
from .extras import load_extra

__all__ = ["MetricsExporter"]

# Every number that a client had a hand in, with the original's name.
_HELP: Final = {
    "reads": "Messages read.",
    "writes": "Messages written.",
    "interactor_faults": "Connections that ended for a fault; without an id.",
    "authorization_requests": "Authorization requests sent.",
    "authorization_responses": "Authorization responses accepted.",
    "forwarded_subscriptions": "Notifications sent.",
    "published_unicast_messages": "Messages published to one client.",
    "published_multicast_messages": "Messages published to all subscribers.",
    "write_queue_length": "Messages that wait to be written.",
    "interactors": "Connections.",
    "notification_requests": "Feeds listened to.",
    "subscriptions": "Topics subscribed to.",
    "events_enqueued": "Connects, disconnects, messages and heartbeats that arrived.",
    "events_dequeued": "Those of them that were acted upon.",
    "events_queue_length": "Connections whose next messages wait for their turn.",
}
_GAUGES: Final = frozenset(
    {
        "write_queue_length",
        "interactors",
        "notification_requests",
        "subscriptions",
        "events_queue_length",
    }
)

_TEXT_FORMAT: Final = b"text/plain; version=0.0.4; charset=utf-8"
_REQUEST_TIMEOUT: Final = 5.0
_MAX_HEAD: Final = 16 * 1024
_MAX_CONNECTIONS: Final = 16


class _Collector:
    """Takes a snapshot for each scrape; keeps nothing."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot
        self._metric: Any = load_extra("prometheus_client.core", "the metrics endpoint").Metric

    def collect(self) -> Iterator[Any]:
        """Return one family for each name."""
        families: dict[str, Any] = {
            name: self._metric(
                f"messagebus_{name}", text, "gauge" if name in _GAUGES else "counter"
            )
            for name, text in _HELP.items()
        }

        def sample(name: str, value: float, labels: dict[str, str]) -> None:
            families[name].add_sample(f"messagebus_{name}", labels, value)

        def by_feed(name: str, counted: Mapping[str, int], who: dict[str, str]) -> None:
            for feed, count in counted.items():
                sample(name, count, {"feed": feed, **who})

        def counters(who: dict[str, str], traffic: Traffic, written: int) -> None:
            sample("reads", traffic.reads, who)
            sample("writes", written, who)
            sample("authorization_requests", traffic.authorization_requests, who)
            sample("authorization_responses", traffic.authorization_responses, who)
            by_feed("forwarded_subscriptions", traffic.told, who)
            by_feed("published_unicast_messages", traffic.unicast, who)
            by_feed("published_multicast_messages", traffic.multicast, who)

        seen = self._snapshot()
        for counts in seen.interactors:
            view = counts.view
            who = _labels(view.host, view.user, str(view.id), view.application)
            counters(who, view.traffic, counts.written)
            sample("interactors", 1, who)
            sample("write_queue_length", counts.waiting, who)
            by_feed("notification_requests", view.listening, who)
            by_feed("subscriptions", view.subscriptions, who)
        counters(_labels(), seen.ended, seen.ended_written)
        for (host, user, application), count in seen.faults.items():
            sample("interactor_faults", count, _labels(host, user, "", application))
        sample("events_enqueued", seen.events_enqueued, {})
        sample("events_dequeued", seen.events_dequeued, {})
        sample("events_queue_length", seen.events_queue_length, {})
        yield from families.values()


def _labels(host: str = "", user: str = "", id: str = "", application: str = "") -> dict[str, str]:
    return {"host": host, "user": user, "id": id, "application": application}


class MetricsExporter:
    """Answers ``GET /metrics``, on a port of its own.

    Args:
        snapshot: Returns the numbers when somebody asks.
        port: 0 for a free one. It stays the same when it is started again.
    """

    def __init__(self, snapshot: Callable[[], Snapshot], host: str, port: int) -> None:
        prometheus = load_extra("prometheus_client", "the metrics endpoint")
        self._registry: Any = prometheus.CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(snapshot))
        self._generate: Any = prometheus.generate_latest
        self.host = host
        self.port = port
        self.connections: set[_Scrape] = set()
        self._listener: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def text(self) -> bytes:
        """Return the body of the answer."""
        # The library appends _total to the names of counters in their headings; the
        # original's names have none, and a heading must name the samples below it.
        return re.sub(
            rb"^(# (?:HELP|TYPE) messagebus_\w+)_total ",
            rb"\1 ",
            self._generate(self._registry),
            flags=re.MULTILINE,
        )

    async def start(self) -> None:
        """Listen; afterwards `port` is known."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Scrape(self), self.host, self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close everything."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        listener.close()
        for each in tuple(self.connections):
            each.abort()
        await listener.wait_closed()


class _Scrape(asyncio.Protocol):
    """One request, one answer, within a few seconds."""

    def __init__(self, endpoint: MetricsExporter) -> None:
        self._endpoint = endpoint
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._head_only = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request; close at once where too many do."""
        # No isinstance: the transports of uvloop are of a class of their own.
        self._transport = cast("asyncio.Transport", transport)
        connections = self._endpoint.connections
        connections.add(self)
        if len(connections) > _MAX_CONNECTIONS:
            self._transport.abort()
            return
        self._deadline = asyncio.get_running_loop().call_later(_REQUEST_TIMEOUT, self.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._endpoint.connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def abort(self) -> None:
        """Close without an answer."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Answer once the head of the request is complete."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._http.receive_data(data)
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError:
            self._answer(transport, 400, b"not a request\n")
            return
        if not isinstance(event, h11.Request):
            return
        self._head_only = event.method == b"HEAD"
        if event.method not in (b"GET", b"HEAD"):
            self._answer(transport, 405, b"GET only\n", allow=b"GET, HEAD")
        elif event.target.partition(b"?")[0] != b"/metrics":
            self._answer(transport, 404, b"/metrics only\n")
        else:
            self._answer(transport, 200, self._endpoint.text(), _TEXT_FORMAT)

    def _answer(
        self,
        transport: asyncio.Transport,
        status: int,
        body: bytes,
        kind: bytes = b"text/plain; charset=utf-8",
        allow: bytes = b"",
    ) -> None:
        http = self._http
        if http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            transport.abort()
            return
        headers = [
            (b"content-type", kind),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if allow:
            headers.append((b"allow", allow))
        transport.write(http.send(h11.Response(status_code=status, headers=headers)) or b"")
        if not self._head_only:
            transport.write(http.send(h11.Data(data=body)) or b"")
        transport.write(http.send(h11.EndOfMessage()) or b"")
        transport.close()
