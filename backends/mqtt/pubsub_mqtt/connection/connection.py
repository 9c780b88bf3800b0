"""One MQTT connection: paho-mqtt, a window in front of it, and the outcome of each publish.

This module and `paho_client` below it are the only ones that know paho-mqtt. It knows no event
loop: a driver (see `asyncio_driver` and `blocking_driver`) brings a socket, calls
`Connection.feed` when bytes arrived, `Connection.flush` when asked to, and `Connection.tick`
when it is time; what happens comes back through callbacks.

What paho does: CONNECT and its properties, CONNACK, SUBSCRIBE, UNSUBSCRIBE and their
acknowledgements, DISCONNECT, PING, and its own blocking loops. What is done here instead,
because paho-mqtt 2.2 gets it wrong or slowly (all of it read in its ``client.py``):

* PUBLISH and its acknowledgements, both ways. paho resends its whole store after a
  reconnect without regard to the broker's receive maximum, takes a PUBREC that refuses
  for success, hands QoS 2 messages over after PUBREC, and needs some 100 µs for a message
  that takes 5 µs here. Its store of messages therefore stays empty.
* Reading and writing: whole buffers instead of byte by byte and packet by packet.
* Keepalive: paho notices a dead peer after two intervals, here it takes one and a half.
* CONNACK and DISCONNECT that refuse: paho maps, retries or hides the codes.

Sources: MQTT 3.1.1 and MQTT 5.0; section numbers in comments are those of 5.0 unless said.
"""

from __future__ import annotations

import contextlib
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from pubsub_core.errors import (
    ConnectError,
    NotConnected,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PubSubError,
    ServerRefused,
    SubscribeFailed,
    TakenOver,
)
from pubsub_core.keyed import BoundedCache
from pubsub_mqtt.errors import (
    ProtocolError,
    as_ours,
    connack_error,
    dial_error,
    disconnect_error,
    early_end_hint,
    printable,
    publish_error,
    subscribe_error,
)
from pubsub_mqtt.options import DEFAULT_MAX_PACKET, MAX_PACKET
from pubsub_mqtt.packets import (
    NO_PROPERTIES,
    Incoming,
    PublishProperties,
    encode_length,
    malformed,
    publish_properties,
    read_length,
    read_publish_properties,
)

from .keepalive import KeepalivePolicy, Quiet, standard_keepalive
from .outgoing import Outgoing, Phase, Request
from .paho_client import PahoClient, paho_properties, reason_text
from .session_data import (
    ConnectionStats,
    Session,
    SessionSettings,
    Subscribe,
    Version,
    Will,
    random_client_id,
)
from .transport import BufferedSocket, PeerClosed

if TYPE_CHECKING:
    from paho.mqtt.client import ConnectFlags
    from paho.mqtt.reasoncodes import ReasonCode

__all__ = [
    "NO_PROPERTIES",
    "Connection",
    "ConnectionStats",
    "Incoming",
    "Outgoing",
    "PahoClient",
    "PublishProperties",
    "Request",
    "Session",
    "SessionSettings",
    "Subscribe",
    "Version",
    "Will",
    "publish_properties",
]

logger = logging.getLogger("pubsub_mqtt")

_CONNACK: Final = 0x20
# What a TLS record with an alert begins with (RFC 8446 section 5.1).
_ALERT: Final = 0x15
_PUBLISH: Final = 0x30
_PUBACK: Final = 0x40
_PUBREC: Final = 0x50
_PUBREL: Final = 0x60
_PUBCOMP: Final = 0x70
_SUBSCRIBE: Final = 0x80
_SUBACK: Final = 0x90
_UNSUBACK: Final = 0xB0
_PINGRESP: Final = 0xD0
_DISCONNECT: Final = 0xE0

_EARLY_PACKET = 65_536
"""Longest packet that is read before the broker accepted us."""

_TOPICS_CACHED = 4096
_DEFERRED_BYTES = 1_048_576
"""Messages kept while deliveries are paused, before the socket is no longer read."""

_QOS2_WINDOW_311 = 19
"""Most QoS 2 publishes under way under MQTT 3.1.1.

A 3.1.1 broker cannot tell its receive maximum. Mosquitto 2.0 counts QoS 2 against its
``max_inflight_messages``, 20 by default, and closes the connection of a client that
exceeds it. With exactly 20 under way, 2.0.11 confirms a QoS 1 publish and delivers it to
nobody (eclipse/mosquitto issue 2876 has more of that kind), so one place stays free for it.
"""

_SOON = 0.01
"""Least seconds between two looks at the clock, or rounding could make a busy loop of them."""

_SHORT_SESSION = 2.0
_TAKEOVERS = 3
_TAKEOVER_WINDOW = 60.0
_REFUSED_REPLAYS = 2
_QUICK_CLOSE = 1.0

_REFUSING = frozenset({0x80, 0x81, 0x82, 0x83, 0x87, 0x90, 0x95, 0x99, 0x9A, 0x9B})
"""Reasons of a DISCONNECT that a single packet can have caused."""


def _discard(_: object) -> None:
    """Take what happens while nobody listens."""


def _cost(message: Incoming) -> int:
    """Return about how many bytes a message that is kept takes."""
    return len(message.payload) + len(message.topic) + 200


# --- the connection -------------------------------------------------------------------


class Connection:
    """What outlives a session: identifier, window, unfinished messages; and the session.

    A driver calls `begin`, `feed`, `flush`, `tick`, `end`; users of the driver call the
    rest. Nothing here blocks, waits or knows about threads: calls must not overlap.

    Callbacks, all replaceable attributes, all called with nothing half done, none may
    raise:

    * ``wake()``: bytes wait; call `flush` soon.
    * ``dial()``: return a new socket; for paho's own loops, which reconnect by themselves.
    * ``on_close(socket)``: the session is over, its socket is closed next.
    * ``on_session(session)``: CONNACK accepted us.
    * ``on_message(incoming)``: every message, in wire order.
    * ``on_lost(error)``: the session, or the attempt at one, ended; once per `begin`.
    * ``on_notice(kind, text, topic)``: something that belongs to no call.
    * ``on_resend(topic)``: a message of an earlier session is about to be sent again. Take a
      note and return: it is called between two packets.

    Seams for services that speak MQTT with rules of their own; replace them before `begin`:

    * ``keepalive_policy(quiet)``: when to ping, and when silence means a dead link; see
      `pubsub_mqtt.connection.keepalive`.
    * ``short_life_policy()``: whether a stream that the peer closed right after CONNACK may
      mean that another client uses our identifier. It is asked once for each such end.
    * `ask` and `subscribe_verbatim`: packets that go past window, gate and paho's checks.

    Args:
        backend: Name of the backend that errors belong to.
        clock: Seconds; only differences count.
    """

    def __init__(
        self,
        settings: SessionSettings,
        *,
        backend: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.backend = backend
        self.client_id = random_client_id() if settings.client_id is None else settings.client_id
        self.stats = ConnectionStats()
        self.generation = 0
        self.session: Session | None = None
        self.version: Version = settings.versions[0]
        self.dial: Callable[[], BufferedSocket] | None = None
        self.wake: Callable[[], None] = lambda: None
        self.on_close: Callable[[BufferedSocket], None] = _discard
        self.on_session: Callable[[Session], None] = _discard
        self.on_message: Callable[[Incoming], None] = _discard
        self.on_lost: Callable[[ConnectError], None] = _discard
        self.on_notice: Callable[[str, str, str], None] = lambda kind, text, topic: None
        self.on_resend: Callable[[str], None] = _discard
        self.keepalive_policy: KeepalivePolicy = standard_keepalive
        # A random identifier, or one that the broker chose, is nobody else's.
        self.short_life_policy: Callable[[], bool] = lambda: settings.client_id is not None
        self._clock = clock
        self._proved = len(settings.versions) == 1
        self._had_session = False
        self._said_connect = False
        self._short_lives: deque[float] = deque()

        self._paho: PahoClient | None = None
        self._offered: BufferedSocket | None = None
        self._sock: BufferedSocket | None = None
        self._woken = False
        self._reset = False
        self._rest: list[bytes] = []
        self._rest_size = 0
        self._need = 0
        self._where = ""

        self._open = False
        self._usable = False
        self._gate = False
        self._window = settings.max_inflight
        self._window2 = settings.max_inflight
        self._under_way2 = 0
        self._max_out = MAX_PACKET
        self._receive_maximum = settings.receive_maximum or 65535
        self._next = 0
        self._queue: deque[Outgoing] = deque()
        self._inflight: dict[int, Outgoing] = {}
        self._resend: dict[int, Outgoing] = {}
        self._unflushed: deque[Outgoing] = deque()
        self._requests: dict[int, Request] = {}
        self._pings: deque[Callable[[ConnectError | None], None]] = deque()
        self._topics = BoundedCache[bytes, str](_TOPICS_CACHED)
        self._encoded = BoundedCache[str, bytes](_TOPICS_CACHED)

        # Messages above QoS 0 that wait for `settle`, by serial number.
        self._serial = 0
        self._unsettled: dict[int, tuple[int, int]] = {}
        # QoS 2 between PUBLISH and PUBREL, by packet id: whether it is settled, and whether
        # the broker waits for our PUBREC in this session.
        self._received: dict[int, tuple[bool, bool]] = {}

        self._paused = False
        self._deferred: deque[Incoming] = deque()
        self._deferred_bytes = 0

        self._keepalive = 0
        self._last_in = 0.0
        self._last_out = 0.0
        self._pinged_at: float | None = None
        self._accepted_at = 0.0
        self._last_ack = 0.0
        self._released_at = 0.0

    # --- what a driver calls ------------------------------------------------------------

    def begin(self, sock: BufferedSocket, *, where: str = "") -> None:
        """Start a session on *sock*, which is connected: send CONNECT.

        The end is `on_session` or `on_lost`. The connection closes *sock* in the end.
        """
        if self._sock is not None:
            raise RuntimeError("a session is under way; end it first")
        settings = self.settings
        version = self.version
        paho = self._paho = PahoClient(self, client_id=self.client_id, version=version)
        if settings.username is not None:
            paho.username = settings.username
        if settings.password is not None:
            # paho sends it only beside a user name, as 3.1.1 demands.
            if settings.username is None:
                paho.username = ""
            paho.password = settings.password.reveal()
        if settings.will is not None:
            self._set_will(paho, settings.will)
        self._offered = sock
        self._where = where
        clean = settings.clean_start and not (
            version == 5 and settings.expiry and self._had_session
        )
        paho.start(
            settings.keepalive,
            clean=clean,
            properties=self._connect_properties() if version == 5 else None,
        )

    def _connect_properties(self) -> Properties | None:
        settings = self.settings
        # None at all with the defaults: amqtt 0.12, which knows 3.1.1 only, takes properties
        # for the client id and waits for the rest of it instead of refusing the version.
        announce = settings.max_packet_size != DEFAULT_MAX_PACKET
        if not (settings.expiry or settings.receive_maximum is not None or announce):
            return None
        properties = paho_properties(PacketTypes.CONNECT)
        if settings.expiry:
            properties.SessionExpiryInterval = settings.expiry
        if settings.receive_maximum is not None:
            properties.ReceiveMaximum = settings.receive_maximum
        if announce:
            properties.MaximumPacketSize = settings.max_packet_size
        return properties

    def _set_will(self, paho: PahoClient, will: Will) -> None:
        properties = None
        if self.version == 5 and will.delay:
            properties = paho_properties(PacketTypes.WILLMESSAGE)
            properties.WillDelayInterval = will.delay
        paho.will_set(will.topic, will.payload, will.qos, will.retain, properties)

    def next_socket(self) -> BufferedSocket:
        """Hand the prepared socket to paho; everything of the last session is over."""
        sock, self._offered = self._offered, None
        if sock is None and self.dial is not None:
            self._close_session(NotConnected("the session was ended", backend=self.backend))
            sock = self.dial()
        if sock is None:
            raise ConnectionError("no socket was prepared")
        self._sock = sock
        self._said_connect = True
        self.generation += 1
        self._woken = False
        self._reset = False
        self._rest.clear()
        self._rest_size = self._need = 0
        self._open = self._usable = self._gate = False
        self.session = None
        self._keepalive = 0
        self._deferred.clear()
        self._deferred_bytes = 0
        self._paused = False
        self._last_in = self._last_out = self._clock()
        self._pinged_at = None
        return sock

    @property
    def connecting(self) -> bool:
        """Whether CONNECT is sent and CONNACK not yet here."""
        return self._sock is not None and not self._open

    @property
    def connected(self) -> bool:
        """Whether there is a session."""
        return self._open

    @property
    def socket(self) -> BufferedSocket | None:
        """The socket of the session at hand."""
        return self._sock

    @property
    def client(self) -> PahoClient | None:
        """Paho's client of the session at hand, or of the last one."""
        return self._paho

    @property
    def wants_write(self) -> bool:
        """Whether `flush` has something to do."""
        return self._sock is not None and not self._sock.idle

    @property
    def unsent(self) -> int:
        """Bytes that wait for the operating system."""
        return 0 if self._sock is None else self._sock.unsent

    @property
    def unfinished(self) -> int:
        """Publishes whose outcome is not known yet."""
        return len(self._queue) + len(self._inflight) + len(self._resend) + len(self._unflushed)

    @property
    def reading(self) -> bool:
        """Whether the driver shall watch the socket for input."""
        return not (self._paused and self._deferred_bytes >= _DEFERRED_BYTES)

    def feed(self) -> None:
        """Read once what the socket holds, and act on it."""
        sock = self._sock
        if sock is None:
            return
        try:
            chunk = sock.fill()
            if chunk:
                self._last_in = self._clock()
                self.stats.bytes_in += len(chunk)
                if self._rest_size:
                    self._rest.append(chunk)
                    self._rest_size += len(chunk)
                    if self._rest_size < self._need:
                        return
                    chunk = b"".join(self._rest)
                    self._rest.clear()
                    self._rest_size = 0
                self._parse(chunk, sock)
        except ProtocolError as exc:
            self._break(exc)
        except PeerClosed as exc:
            self._peer_closed(exc)
        except (OSError, ConnectError) as exc:
            self._lose(
                dial_error(
                    exc,
                    self._where,
                    backend=self.backend,
                    secure=self._early_end(sock),
                )
            )
        if sock is self._sock and not self._woken and not sock.idle:
            self._wake()  # a WebSocket ping wants its answer

    def flush(self) -> bool:
        """Hand what waits to the operating system; return whether all of it went."""
        self._woken = False
        return self._hand_over(BufferedSocket.flush)

    def push(self) -> bool:
        """Do as `flush`, which follows soon: the system may wait for it with small packets."""
        return self._hand_over(BufferedSocket.push)

    def _hand_over(self, how: Callable[[BufferedSocket], bool]) -> bool:
        sock = self._sock
        if sock is None:
            return True
        try:
            before = sock.done
            empty = how(sock)
            if sock.done != before:
                self._last_out = self._clock()
        except OSError as exc:
            self._reset = True
            self._last_words(sock)
            if self._sock is sock:
                self._lose(
                    dial_error(
                        exc,
                        self._where,
                        backend=self.backend,
                        secure=self._early_end(sock),
                    )
                )
            return True
        if self._unflushed:
            self._confirm_flushed(sock.done)
        return empty

    def _early_end(self, sock: BufferedSocket | None) -> bool | None:
        """Return whether *sock* is encrypted, or None once the broker has let us in."""
        return None if self._open or sock is None else sock.secure

    def _last_words(self, sock: BufferedSocket) -> None:
        """Read what the peer said before it closed: most often the reason."""
        before = -1
        while self._sock is sock and self.stats.bytes_in != before:
            before = self.stats.bytes_in
            self.feed()

    def tick(self) -> float | None:
        """Do what is due; return seconds until the next call, or None when nothing will be."""
        keepalive = self._keepalive
        if not self._open or not keepalive:
            return None
        now = self._clock()
        step = self.keepalive_policy(
            Quiet(
                keepalive=keepalive,
                inbound=now - self._last_in,
                outbound=now - self._last_out,
                pinged=None if self._pinged_at is None else now - self._pinged_at,
                reading=self.reading,
            )
        )
        if step.dead:
            self._lose(
                ConnectError(
                    f"{self._where or 'the broker'} {step.dead}",
                    hint="the link or the broker is dead",
                    backend=self.backend,
                )
            )
            return None
        if step.ping:
            self._pinged_at = now
            self._send_ping(_discard)
        return max(step.due, _SOON)

    def end(self, error: ConnectError | None = None) -> None:
        """Close the socket at once, without a word to the broker.

        Args:
            error: Reported to `on_lost`; None ends the session silently.
        """
        if error is not None:
            self._lose(error)
        else:
            self._close_session(NotConnected("the session was ended", backend=self.backend))

    def try_older(self, error: ConnectError) -> bool:
        """Return whether the attempt that failed with *error* shall be made once more.

        True when the next protocol level is to be tried: the broker refused this one, or
        closed the stream after CONNECT, and never spoke it before.
        """
        versions = self.settings.versions
        at = versions.index(self.version)
        if self._proved or at + 1 >= len(versions):
            return False
        refused = isinstance(error, ServerRefused) and error.reason in (1, 0x84)
        # Before CONNECT was sent a closed stream says nothing about the version.
        closed = self._said_connect and isinstance(
            error.__cause__, (PeerClosed, ConnectionResetError)
        )
        if not (refused or closed):
            return False
        self._said_connect = False
        self.version = versions[at + 1]
        logger.info("no MQTT %d with %s, trying level %d", 5, self._where, self.version)
        return True

    def first_version(self) -> None:
        """Forget a fallback that did not lead to a session."""
        if not self._proved:
            self.version = self.settings.versions[0]

    # --- sessions ---------------------------------------------------------------------

    def release(self) -> None:
        """Let publishes go: first those of the last session in their order, then new ones."""
        if self._open and not self._gate:
            self._gate = True
            self._released_at = self._clock()
            self._pump()

    def hold(self) -> None:
        """Keep new publishes back until `release`."""
        self._gate = False

    def disconnect(self, reason: int = 0) -> None:
        """Say DISCONNECT; nothing is sent after it. The driver flushes and calls `end`."""
        if not self._usable:
            return
        self._usable = self._gate = False
        if self.version == 5 and reason:
            self.write(bytes((_DISCONNECT, 1, reason)))
        else:
            self.write(b"\xe0\x00")

    def fail_pending(self) -> None:
        """Give every unfinished publish its outcome: unknown if sent, else not sent."""
        for out in self._take_all():
            self._finish(out, self._failure(out, None))

    def _take_all(self) -> list[Outgoing]:
        every = [
            *self._inflight.values(),
            *self._resend.values(),
            *self._unflushed,
            *self._queue,
        ]
        for store in (self._resend, self._inflight, self._unflushed, self._queue):
            store.clear()
        return every

    def _failure(self, out: Outgoing, why: BaseException | None) -> PublishFailed:
        if out.sent:
            error = PublishFailed(
                f"the connection ended before the broker confirmed the message for {out.topic!r}",
                outcome=Outcome.UNKNOWN,
                hint="it may have arrived",
                backend=self.backend,
                topic=out.topic,
                retryable=True,
            )
        else:
            error = PublishFailed(
                f"the connection ended before the message for {out.topic!r} was sent",
                outcome=Outcome.NOT_SENT,
                hint="publish it again when the bus is online",
                backend=self.backend,
                topic=out.topic,
                retryable=True,
            )
        error.__cause__ = why
        return error

    def _accepted(self, properties: Properties | None, *, present: bool) -> None:
        settings = self.settings

        def said(name: str, default: Any) -> Any:
            return getattr(properties, name, default) if properties is not None else default

        v5 = self.version == 5
        self._proved = True
        self._had_session = True
        if self._paho is not None and settings.expiry:
            self._paho.keep_session()
        self.client_id = str(said("AssignedClientIdentifier", self.client_id))
        self._window = min(settings.max_inflight, int(said("ReceiveMaximum", 65535)))
        self._window2 = self._window if v5 else min(self._window, _QOS2_WINDOW_311)
        self._max_out = min(MAX_PACKET, int(said("MaximumPacketSize", MAX_PACKET)))
        self._keepalive = int(said("ServerKeepAlive", settings.keepalive))
        session = self.session = Session(
            version=self.version,
            present=present,
            client_id=self.client_id,
            keepalive=self._keepalive,
            window=self._window,
            max_packet_size=self._max_out,
            maximum_qos=int(said("MaximumQoS", 2)),
            retain=bool(said("RetainAvailable", 1)),
            wildcards=bool(said("WildcardSubscriptionAvailable", 1)),
            shared=bool(said("SharedSubscriptionAvailable", 1)) if v5 else None,
            identifiers=v5 and bool(said("SubscriptionIdentifierAvailable", 1)),
            expiry=int(said("SessionExpiryInterval", settings.expiry)) if v5 else 0,
        )
        if present:
            # What waited at QoS 2 comes again, and is acknowledged then without being
            # delivered twice; what waited at QoS 1 is delivered again.
            self._received = {mid: (settled, False) for mid, (settled, _) in self._received.items()}
            self._unsettled = {
                serial: (mid, qos) for serial, (mid, qos) in self._unsettled.items() if qos == 2
            }
        else:
            self._received.clear()
            self._unsettled.clear()
        for packet_id, out in list(self._resend.items()):
            if present:
                continue
            if out.abandoned:  # nobody waits and the broker forgot it
                del self._resend[packet_id]
            else:
                out.phase = Phase.SENT  # the broker knows no PUBREC any more
        self._open = self._usable = True
        self._accepted_at = self._clock()
        self.stats.sessions += 1
        self.on_session(session)

    def _peer_closed(self, exc: PeerClosed) -> None:
        secure = self._early_end(self._sock)
        error = ConnectError(
            f"{self._where or 'the broker'} closed the connection",
            hint="" if secure is None else early_end_hint(secure),
            backend=self.backend,
        )
        error.__cause__ = exc
        quick = self._open and self._clock() - self._released_at < _QUICK_CLOSE
        if quick and self._gate and self._last_ack < self._released_at:
            self._suspect("closed the connection")
        # Behind a failed write the end of the stream only repeats that the link broke.
        if self._open and not self._reset and self.short_life_policy():
            self._lose(self._count_short_life(error, taken=False))
        else:
            self._lose(error)

    def _count_short_life(self, error: ConnectError, *, taken: bool) -> ConnectError:
        """Return *error*, or `TakenOver` when somebody else keeps using our identifier."""
        now = self._clock()
        if not taken and now - self._accepted_at > _SHORT_SESSION:
            return error
        lives = self._short_lives
        lives.append(now)
        while now - lives[0] > _TAKEOVER_WINDOW:
            lives.popleft()
        if len(lives) < _TAKEOVERS:
            return error
        lives.clear()
        over = TakenOver(
            f"the session of client id {printable(self.client_id)!r} was ended {_TAKEOVERS} times "
            f"within {_TAKEOVER_WINDOW:.0f} s right after connecting",
            hint="give each client its own client_id",
            backend=self.backend,
        )
        over.__cause__ = error
        return over

    def _suspect(self, how: str) -> None:
        """Notice that the broker ended the session over a message that was sent again.

        Without this a message that the broker cannot stand would end every session.
        """
        for out in self._inflight.values():
            if out.resent_in != self.generation:
                return
            out.refusals += 1
            if out.refusals >= _REFUSED_REPLAYS:
                del self._inflight[out.packet_id]
                self.stats.refused_replays += 1
                text = (
                    f"the broker {how} each time the message for {out.topic!r} was sent again; "
                    "it is given up"
                )
                self.on_notice("publish_refused", text, out.topic)
                self._finish(
                    out,
                    PublishFailed(
                        text,
                        outcome=Outcome.UNKNOWN,
                        hint="look into the broker's log",
                        backend=self.backend,
                        topic=out.topic,
                        retryable=False,
                    ),
                )
            return

    def _break(self, error: ProtocolError) -> None:
        """End the session over what the peer sent; tell it why where MQTT 5 can."""
        as_ours(error, self.backend)
        sock = self._sock
        if sock is not None and self._open and self.version == 5:
            self.write(bytes((_DISCONNECT, 1, error.reason)))
            with contextlib.suppress(OSError):  # it is ending anyway
                sock.flush()
        self._lose(error)

    def _lose(self, error: ConnectError) -> None:
        if self._sock is None:
            return
        self._close_session(error)
        self.on_lost(error)

    def _close_session(self, why: PubSubError) -> None:
        sock = self._sock
        if sock is None:
            return
        self._sock = None
        self._open = self._usable = self._gate = False
        self._deferred.clear()
        self._deferred_bytes = 0
        self._paused = False
        self.on_close(sock)
        sock.close()
        if self._paho is not None:
            self._paho.forget_socket()
        # QoS 0: what left is out of our hands, what did not can be told.
        gone: list[Outgoing] = []
        for out in self._unflushed:
            if out.end <= sock.done:
                self._finish(out, None)
            else:
                if out.start >= sock.begun:
                    out.phase = Phase.QUEUED
                gone.append(out)
        self._unflushed.clear()
        # Those in flight are older than what still waits to be sent again.
        self._resend = {**self._inflight, **self._resend}
        self._inflight = {}
        self._under_way2 = 0
        kept: deque[Outgoing] = deque()
        for out in self._queue:
            if out.phase is Phase.DONE:
                continue
            if out.qos:
                kept.append(out)
            else:
                gone.append(out)
        self._queue = kept
        for out in gone:
            self._finish(out, self._failure(out, why))
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.error = NotConnected(
                "the session ended before the broker answered", backend=self.backend, retryable=True
            )
            request.error.__cause__ = why
            request.on_done(request)
        pings, self._pings = self._pings, deque()
        lost = (
            why if isinstance(why, ConnectError) else ConnectError(str(why), backend=self.backend)
        )
        for waiter in pings:
            waiter(lost)

    # --- publishing -------------------------------------------------------------------

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        shown: str | None = None,
        on_done: Callable[[Outgoing], None] = _discard,
    ) -> Outgoing:
        """Send a message as soon as the window allows, in the order of the calls.

        Above QoS 0 it survives the session: it is sent again in the next one, after
        `release`. *on_done* is called when its outcome is known, never from within this.

        *topic* must be valid; *properties* are what `publish_properties` made, and are left
        out under 3.1.1. *shown* is the topic's name in errors, notices and `Outgoing.topic`,
        where that on the wire holds a key or means nothing to users.

        Raises:
            NotConnected: There is no session.
            PublishFailed: This session cannot carry it.
        """
        name = topic if shown is None else shown
        if not self._usable:
            raise NotConnected("there is no session", backend=self.backend, topic=name)
        lead, tail, size = self._encode(topic, payload, qos, retain, properties, name)
        head = _PUBLISH | qos << 1 | retain
        out = Outgoing(name, qos, head, lead, tail, size, on_done)
        if qos == 0 and self._gate and not self._queue and not self._resend:
            self._send_qos0(out)  # what `_pump` would do, and the most common case
            return out
        self._queue.append(out)
        self._pump()
        return out

    def publish_now(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        properties: bytes = NO_PROPERTIES,
        shown: str | None = None,
    ) -> bool:
        """Write a QoS 0 message to the socket's buffer, if nothing is waiting before it.

        The short way for the most common case: nothing is kept, so its outcome is the
        socket's counters. Returns False when it has to wait; call `publish` then.

        Raises:
            NotConnected, PublishFailed: As `publish`.
        """
        name = topic if shown is None else shown
        if not self._usable:
            raise NotConnected("there is no session", backend=self.backend, topic=name)
        if not self._gate or self._queue:
            return False
        lead, tail, _ = self._encode(topic, payload, 0, retain, properties, name)
        first = bytes((_PUBLISH | retain,)) + lead
        if len(tail) == 1:
            self.write(first + tail[0])
        else:
            self.write(first)
            for part in tail:
                self.write(part)
        return True

    def ask(
        self, topic: str, payload: bytes, on_done: Callable[[Outgoing], None], *, shown: str
    ) -> Outgoing:
        """Publish at QoS 1 at once, past the window and whether or not publishes may go.

        For requests that the broker answers with a message: a session may need them before
        the publishes of users go out. *on_done* is called when the broker confirmed it; when
        the session is lost it is not, and the request shall be abandoned.

        Raises:
            NotConnected: There is no session.
            PublishFailed: This session cannot carry it.
        """
        if not self._usable:
            raise NotConnected("there is no session", backend=self.backend)
        lead, tail, size = self._encode(topic, payload, 1, False, NO_PROPERTIES, shown)
        out = Outgoing(shown, 1, _PUBLISH | 1 << 1, lead, tail, size, on_done)
        out.packet_id = self.next_id()
        out.phase = Phase.SENT
        self._inflight[out.packet_id] = out
        self._send(out, 0)
        return out

    def abandon(self, out: Outgoing) -> None:
        """Stop waiting for *out*. What was not sent never will be.

        A message that was sent keeps its packet id until the broker answers; in a
        resumed session it is even sent again, as MQTT demands.
        """
        out.on_done = _discard
        out.abandoned = True
        if out.phase is Phase.QUEUED and out.packet_id == 0:
            out.phase = Phase.DONE  # and `_pump` passes it over

    def pending(self, packet_id: int) -> Outgoing | None:
        """Return the unfinished message with that packet id."""
        return self._inflight.get(packet_id) or self._resend.get(packet_id)

    def _encode(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,
        properties: bytes,
        shown: str,
    ) -> tuple[bytes, tuple[bytes, ...], int]:
        name = self._encoded.get(topic)
        if name is None:
            data = topic.encode()
            name = self._encoded.keep(topic, len(data).to_bytes(2, "big") + data)
        if self.version == 4:
            properties = b""
        size = len(name) + len(properties) + len(payload) + (2 if qos else 0)
        if size + 5 > self._max_out and size + 1 + len(encode_length(size)) > self._max_out:
            over = size + 1 + len(encode_length(min(size, MAX_PACKET))) - len(payload)
            raise PayloadTooLarge(
                size=len(payload),
                limit=max(self._max_out - over, 0),
                hint="send less; the broker accepts no longer packet",
                backend=self.backend,
                topic=shown,
            )
        session = self.session
        if session is not None:
            if qos > session.maximum_qos:
                raise PublishFailed(
                    f"the broker has no QoS {qos}",
                    outcome=Outcome.NOT_SENT,
                    hint=f"publish with qos={session.maximum_qos}",
                    backend=self.backend,
                    topic=shown,
                    retryable=False,
                )
            if retain and not session.retain:
                raise PublishFailed(
                    "the broker keeps no retained messages",
                    outcome=Outcome.NOT_SENT,
                    hint="publish without retain",
                    backend=self.backend,
                    topic=shown,
                    retryable=False,
                )
        lead = (bytes((size,)) if size < 128 else encode_length(size)) + name
        if len(payload) <= 4096:
            return lead, (properties + payload,), size
        return lead, (properties, payload), size

    def _pump(self) -> None:
        """Send what the window allows."""
        if not self._gate:
            return
        inflight = self._inflight
        while self._resend and len(inflight) < self._window:
            packet_id, out = next(iter(self._resend.items()))
            if out.qos == 2:
                if self._under_way2 >= self._window2:
                    return
                self._under_way2 += 1
            del self._resend[packet_id]
            inflight[packet_id] = out
            out.resent_in = self.generation
            self.on_resend(out.topic)
            self.stats.resent += 1
            if out.phase is Phase.RELEASED:
                self.write(struct.pack("!BBH", _PUBREL | 2, 2, packet_id))
            else:
                self._send(out, 0x08)
        if self._resend:
            return
        queue = self._queue
        while queue:
            out = queue[0]
            if out.phase is Phase.DONE:
                queue.popleft()
                continue
            if out.qos == 0:
                queue.popleft()
                self._send_qos0(out)
                continue
            if len(inflight) >= self._window:
                return
            if out.qos == 2:
                if self._under_way2 >= self._window2:
                    return
                self._under_way2 += 1
            queue.popleft()
            out.packet_id = self.next_id()
            out.phase = Phase.SENT
            inflight[out.packet_id] = out
            self._send(out, 0)

    def _send(self, out: Outgoing, duplicate: int) -> None:
        first = bytes((out.head | duplicate,)) + out.lead
        first += out.packet_id.to_bytes(2, "big")
        tail = out.tail
        if len(tail) == 1:
            self.write(first + tail[0])
        else:
            self.write(first)
            for part in tail:
                self.write(part)

    def _send_qos0(self, out: Outgoing) -> None:
        sock = self._sock
        if sock is None:
            return
        out.start = sock.written
        tail = out.tail
        rest = tail[0] if len(tail) == 1 else b"".join(tail)
        self.write(bytes((out.head,)) + out.lead + rest)
        out.end = sock.written
        out.phase = Phase.SENT
        self._unflushed.append(out)

    def _confirm_flushed(self, done: int) -> None:
        waiting = self._unflushed
        while waiting and waiting[0].end <= done:
            self._finish(waiting.popleft(), None)

    def _finish(self, out: Outgoing, error: PubSubError | None) -> None:
        out.error = error
        out.phase = Phase.DONE
        out.on_done(out)

    def next_id(self) -> int:
        """Return a packet id that nothing unfinished uses."""
        candidate = self._next
        while True:
            candidate = candidate + 1 if candidate < 65535 else 1
            if (
                candidate not in self._inflight
                and candidate not in self._resend
                and candidate not in self._requests
            ):
                self._next = candidate
                return candidate

    # --- subscribing ------------------------------------------------------------------

    def subscribe(self, wants: Sequence[Subscribe], on_done: Callable[[Request], None]) -> Request:
        """Send one SUBSCRIBE. All *wants* must have the same identifier.

        The request given to *on_done* holds one code per filter, or an error.

        Raises:
            NotConnected: There is no session.
            SubscribeFailed: paho refuses the filter.
        """
        paho = self._paho
        if not self._usable or paho is None:
            raise NotConnected("there is no session", backend=self.backend)
        request = Request(tuple(want.filter for want in wants), on_done)
        try:
            if self.version == 5:
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
                backend=self.backend,
                topic=request.filters[0] if request.filters else "",
                retryable=False,
            ) from exc
        if packet_id is None:
            raise NotConnected("there is no session", backend=self.backend)
        request.packet_id = packet_id
        self._requests[packet_id] = request
        return request

    def subscribe_verbatim(self, filter: str, on_done: Callable[[Request], None]) -> Request:
        """Send one SUBSCRIBE at QoS 0 with *filter* as it is (MQTT 3.1.1).

        For services whose filters are not MQTT's, which paho refuses. The request does not
        hold the filter, which may have a key in it.

        Raises:
            NotConnected: There is no session.
        """
        if not self._usable:
            raise NotConnected("there is no session", backend=self.backend)
        request = Request(("",), on_done)
        request.packet_id = self.next_id()
        self._requests[request.packet_id] = request
        name = filter.encode()
        body = struct.pack("!HH", request.packet_id, len(name)) + name + b"\x00"
        self.write(bytes((_SUBSCRIBE | 2,)) + encode_length(len(body)) + body)
        return request

    def unsubscribe(self, filters: Sequence[str], on_done: Callable[[Request], None]) -> Request:
        """Send one UNSUBSCRIBE; see `subscribe`."""
        paho = self._paho
        if not self._usable or paho is None:
            raise NotConnected("there is no session", backend=self.backend)
        request = Request(tuple(filters), on_done)
        _, packet_id = paho.unsubscribe(list(filters))
        if packet_id is None:
            raise NotConnected("there is no session", backend=self.backend)
        request.packet_id = packet_id
        self._requests[packet_id] = request
        return request

    def refusal(self, request: Request, index: int = 0) -> SubscribeFailed | None:
        """Return the error for one filter of a finished SUBSCRIBE, or None if it was granted."""
        code = request.codes[index]
        if code < 0x80:
            return None
        return subscribe_error(
            code, filter=request.filters[index], backend=self.backend, said=request.said
        )

    def _answered(
        self,
        packet_id: int,
        codes: Iterable[ReasonCode],
        properties: Properties | None,
        *,
        granted: bool,
    ) -> None:
        request = self._requests.get(packet_id)
        if request is None:
            self.stats.unknown_acks += 1
            return
        values = tuple(code.value for code in codes)
        if granted and len(values) != len(request.filters):
            raise malformed("SUBACK with another number of codes than filters")
        del self._requests[packet_id]
        request.codes = values
        request.said = str(getattr(properties, "ReasonString", ""))
        request.on_done(request)

    def ping(self, on_done: Callable[[ConnectError | None], None]) -> None:
        """Send PINGREQ; *on_done* is called when its answer arrives or the session ends."""
        if not self._usable:
            raise NotConnected("there is no session", backend=self.backend)
        self._send_ping(on_done)

    def _send_ping(self, on_done: Callable[[ConnectError | None], None]) -> None:
        self._pings.append(on_done)
        self.stats.pings += 1
        self.write(b"\xc0\x00")

    # --- receiving --------------------------------------------------------------------

    def pause(self) -> None:
        """Deliver no more messages. Acknowledgements are still read, up to a bound.

        Up to 1 MiB of messages is kept so that a handler that publishes while it holds the
        flow back still sees its acknowledgement; beyond that the socket is left alone.
        """
        self._paused = True

    def resume(self) -> None:
        """Deliver again, first what was kept."""
        was_reading = self.reading
        self._paused = False
        deferred = self._deferred
        while deferred and not self._paused:
            message = deferred.popleft()
            self._deferred_bytes -= _cost(message)
            try:
                self.on_message(message)
            except Exception:
                logger.exception("the consumer of a message failed")
        if not was_reading:
            self._last_in = self._clock()  # nobody listened meanwhile

    def settle(self, serial: int, *, refuse: bool = False) -> None:
        """Acknowledge the message with that serial number; unknown ones are ignored.

        One that arrived in an earlier session is left to the broker, which sends it again;
        at QoS 2, in a session that was resumed, it is acknowledged when it does.
        Acknowledgements go out in the order of the calls, not of arrival: a message that is
        never settled must not hold back every other.

        *refuse* says that it was not handled (MQTT 5); the broker forgets it all the same.
        """
        packet_id, qos = self._unsettled.pop(serial, (0, 0))
        if qos == 2:
            asked = self._received[packet_id][1]
            self._received[packet_id] = (True, asked)
            if not asked or not self._usable:
                return
            command = _PUBREC
        elif qos == 1 and self._usable:
            command = _PUBACK
        else:
            return
        if refuse and self.version == 5:
            self._received.pop(packet_id, None)
            self.write(struct.pack("!BBHB", command, 3, packet_id, 0x83))
        else:
            self.write(struct.pack("!BBH", command, 2, packet_id))

    def packet_id_of(self, serial: int) -> int | None:
        """Return the packet identifier of a message that waits for `settle`."""
        return self._unsettled[serial][0] if serial in self._unsettled else None

    # --- packets ----------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Put a packet into the socket's buffer."""
        sock = self._sock
        if sock is None:
            return
        self.stats.packets_out += 1
        sock.write(data)
        if not self._woken:
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        self.wake()

    def _parse(self, data: bytes, sock: BufferedSocket) -> None:
        pos = 0
        end = len(data)
        packets = 0
        limit = self.settings.max_packet_size if self._open else _EARLY_PACKET
        need = 0
        try:
            while end - pos >= 2:
                head = data[pos]
                if head != _CONNACK and not self._open:
                    alert = " (a TLS alert: the port wants mqtts://)" if head == _ALERT else ""
                    raise ProtocolError(
                        f"instead of CONNACK the peer sent what begins with 0x{head:02X}{alert}"
                    )
                size = data[pos + 1]
                start = pos + 2
                if size & 0x80:
                    size &= 0x7F
                    shift = 7
                    while True:
                        if start >= end:
                            size = -1
                            break
                        byte = data[start]
                        start += 1
                        size |= (byte & 0x7F) << shift
                        if byte < 0x80:
                            break
                        shift += 7
                        if shift > 21:
                            raise malformed("a length of more than four bytes")
                    if size < 0:
                        break
                stop = start + size
                if stop - pos > limit:
                    raise ProtocolError(
                        f"the broker sent a packet of {stop - pos} bytes; the limit is {limit}",
                        reason=0x95,
                    )
                if stop > end:
                    need = stop - pos
                    break
                packets += 1
                kind = head & 0xF0
                if not self._open:
                    self._connack(head, data[start:stop])
                    limit = self.settings.max_packet_size
                elif kind == _PUBLISH:
                    self._publish_in(data, head, start, stop)
                elif kind in (_PUBACK, _PUBREC, _PUBREL, _PUBCOMP):
                    self._acknowledged(head, kind, data, start, stop)
                else:
                    self._other(head, kind, data[start:stop])
                pos = stop
                if self._sock is not sock:
                    return
        finally:
            self.stats.packets_in += packets
        if pos < end:
            self._rest.append(data[pos:])
            self._rest_size = end - pos
            self._need = need

    def _connack(self, head: int, body: bytes) -> None:
        if len(body) < 2 or (self.version == 4 and len(body) != 2):
            raise malformed(f"CONNACK of {len(body)} bytes")
        code = body[1]
        if code:
            # A broker without MQTT 5 answers two bytes, with a return code of 3.1.1.
            said = ""
            if self.version == 5 and code >= 0x80:
                said = reason_text(body[2:], PacketTypes.CONNACK)
            self._lose(
                connack_error(
                    code,
                    version=self.version,
                    backend=self.backend,
                    said=said,
                    client_id=self.client_id,
                )
            )
            return
        paho = self._paho
        if paho is None:
            return

        def connected(
            client: Client,
            userdata: object,
            flags: ConnectFlags,
            reason: ReasonCode,
            properties: Properties | None,
        ) -> None:
            self._accepted(properties, present=flags.session_present)

        paho.on_connect = connected

        def subscribed(
            client: Client,
            userdata: object,
            mid: int,
            codes: list[ReasonCode],
            properties: Properties | None,
        ) -> None:
            self._answered(mid, codes, properties, granted=True)

        def unsubscribed(
            client: Client,
            userdata: object,
            mid: int,
            codes: list[ReasonCode],
            properties: Properties | None,
        ) -> None:
            self._answered(mid, codes, properties, granted=False)

        paho.on_subscribe = subscribed
        paho.on_unsubscribe = unsubscribed
        paho.give(head, body)

    def _publish_in(self, data: bytes, head: int, start: int, stop: int) -> None:
        pos = start + 2
        if pos > stop:
            raise malformed("PUBLISH without a topic")
        name_end = pos + (data[start] << 8 | data[start + 1])
        if name_end > stop:
            raise malformed("a topic reaches beyond the packet")
        raw = data[pos:name_end]
        topic = self._topics.get(raw)
        if topic is None:
            topic = self._new_topic(raw)
        qos = head >> 1 & 3
        pos = name_end
        packet_id = 0
        if qos:
            if qos == 3 or pos + 2 > stop:
                raise malformed("PUBLISH with QoS 3" if qos == 3 else "no packet id")
            packet_id = data[pos] << 8 | data[pos + 1]
            pos += 2
            if not packet_id:
                raise malformed("packet id 0")
        elif head & 0x08:
            raise malformed("DUP with QoS 0")
        properties = None
        if self.version == 5:
            if pos >= stop:
                raise malformed("PUBLISH without properties")
            size = data[pos]
            pos += 1
            if size:
                if size > 127:
                    size, pos = read_length(data, pos - 1, stop)
                after = pos + size
                if after > stop:
                    raise malformed("properties reach beyond the packet")
                properties = read_publish_properties(data, pos, after)
                pos = after
        if qos == 2:
            state = self._received.get(packet_id)
            if state is not None:
                self._duplicate(packet_id, settled=state[0])
                return
            self._received[packet_id] = (False, True)
        serial = 0
        if qos:
            serial = self._serial = self._serial + 1
            self._unsettled[serial] = (packet_id, qos)
            if len(self._unsettled) > self._receive_maximum:
                raise ProtocolError(
                    "the broker sent more unacknowledged messages than allowed", reason=0x93
                )
        message = Incoming(
            topic,
            data[pos:stop],
            qos,
            head & 1 == 1,
            head & 0x08 != 0,
            serial,
            properties,
        )
        if self._paused:
            self._deferred.append(message)
            self._deferred_bytes += _cost(message)
            return
        try:
            self.on_message(message)
        except Exception:
            logger.exception("the consumer of a message failed")

    def _new_topic(self, raw: bytes) -> str:
        try:
            topic = raw.decode()
        except UnicodeDecodeError:
            raise malformed("a topic is not UTF-8") from None
        if not topic:
            raise ProtocolError("a message without a topic", reason=0x82)
        if "\0" in topic or "+" in topic or "#" in topic:
            raise ProtocolError("a message to a topic with NUL or a wildcard", reason=0x90)
        return self._topics.keep(raw, topic)

    def _duplicate(self, packet_id: int, *, settled: bool) -> None:
        """Answer a QoS 2 message that was delivered before (section 4.3.3)."""
        self.stats.duplicates += 1
        self._received[packet_id] = (settled, True)
        if settled:
            self.write(struct.pack("!BBH", _PUBREC, 2, packet_id))

    def _acknowledged(self, head: int, kind: int, data: bytes, start: int, stop: int) -> None:
        if head & 0x0F != (2 if kind == _PUBREL else 0):
            raise malformed(f"flags of packet 0x{head:02X}")
        size = stop - start
        if size < 2 or (size > 2 and self.version == 4):
            raise malformed(f"packet 0x{head:02X} of {size} bytes")
        packet_id = data[start] << 8 | data[start + 1]
        reason = data[start + 2] if size > 2 else 0
        if kind == _PUBREL:
            # Also for one that is unknown: the broker must be able to finish (4.3.3).
            known = self._received.pop(packet_id, None)
            if known is not None and not known[0]:
                self._received[packet_id] = known
                raise ProtocolError("PUBREL for a message without PUBREC", reason=0x82)
            if known is None and self.version == 5:
                self.write(struct.pack("!BBHB", _PUBCOMP, 3, packet_id, 0x92))
            else:
                self.write(struct.pack("!BBH", _PUBCOMP, 2, packet_id))
            return
        out = self._inflight.get(packet_id)
        if out is None:
            self._unknown(kind, packet_id)
            return
        qos = out.qos
        if kind == _PUBACK:
            fits = qos == 1
        elif kind == _PUBREC:
            fits = qos == 2
        else:
            fits = qos == 2 and out.phase is Phase.RELEASED
        if not fits:
            self.stats.wrong_phase_acks += 1
            if self.version == 5:
                raise ProtocolError(
                    f"packet 0x{kind:02X} for a message that does not wait for it", reason=0x82
                )
            return
        self._last_ack = self._last_in
        failed = reason >= 0x80 and kind != _PUBCOMP
        if kind == _PUBREC and not failed:
            out.phase = Phase.RELEASED
            out.reason = reason
            self.write(struct.pack("!BBH", _PUBREL | 2, 2, packet_id))
            return
        del self._inflight[packet_id]
        if qos == 2:
            self._under_way2 -= 1
        if failed:
            said = reason_text(data[start + 3 : stop], PacketTypes.PUBACK) if size > 3 else ""
            out.reason = reason
            self._finish(
                out,
                publish_error(
                    reason, topic=out.topic, size=out.size, backend=self.backend, said=said
                ),
            )
        else:
            if kind == _PUBACK:
                out.reason = reason
            self._finish(out, None)
        if self._queue or self._resend:
            self._pump()

    def _unknown(self, kind: int, packet_id: int) -> None:
        self.stats.unknown_acks += 1
        if kind == _PUBREC and self.version == 5:
            # An earlier process of ours may have begun this; let the broker forget it.
            self.write(struct.pack("!BBHB", _PUBREL | 2, 3, packet_id, 0x92))

    def _other(self, head: int, kind: int, body: bytes) -> None:
        paho = self._paho
        if kind == _PINGRESP and head == _PINGRESP and not body:
            if self._pings:
                self._pings.popleft()(None)
            return
        if kind in (_SUBACK, _UNSUBACK) and head & 0x0F == 0 and paho is not None:
            paho.give(head, body)
            return
        if kind == _DISCONNECT and head == _DISCONNECT and self.version == 5:
            self._disconnected(body)
            return
        raise ProtocolError(f"the broker sent packet type {kind >> 4}, which only clients send")

    def _disconnected(self, body: bytes) -> None:
        reason = body[0] if body else 0
        said = reason_text(body[1:], PacketTypes.DISCONNECT) if len(body) > 1 else ""
        error = disconnect_error(reason, backend=self.backend, said=said)
        if reason in _REFUSING and self._gate:
            self._suspect(f"ended the session with reason 0x{reason:02X}")
        if reason == 0x8E:
            error = self._count_short_life(error, taken=True)
        self._lose(error)
