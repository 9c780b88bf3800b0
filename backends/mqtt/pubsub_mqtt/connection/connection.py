"""One MQTT connection: the life of its sessions, on which the other parts of this room work.

This module, `requests` and `outbound` know paho-mqtt, through `paho_client`. None knows an event
loop: a driver (see `asyncio_driver` and `blocking_driver`) brings a socket, calls
`Connection.feed` when bytes arrived, `Connection.flush` when asked to, and `Connection.tick` when
it is time; what happens comes back through callbacks.

What paho does: CONNECT and its properties, CONNACK, SUBSCRIBE, UNSUBSCRIBE and their
acknowledgements, DISCONNECT, PING, and its own blocking loops. What is done here instead,
because paho-mqtt 2.2 gets it wrong or slowly (all of it read in its ``client.py``):

* PUBLISH and its acknowledgements, both ways: see `outbound` and `inbound`. A message took paho
  some 100 µs that takes 5 µs here.
* Reading and writing: whole buffers instead of byte by byte and packet by packet.
* Keepalive: paho notices a dead peer after two intervals, here it takes one and a half.
* CONNACK and DISCONNECT that refuse: paho maps, retries or hides the codes.

Sources: MQTT 3.1.1 and MQTT 5.0; section numbers in comments are those of 5.0 unless said.
"""

from __future__ import annotations

import contextlib
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from pubsub_core.errors import ConnectError, NotConnected, PubSubError, ServerRefused, TakenOver
from pubsub_mqtt.errors import (
    ProtocolError,
    as_ours,
    connack_error,
    dial_error,
    disconnect_error,
    early_end_hint,
    printable,
)
from pubsub_mqtt.options import DEFAULT_MAX_PACKET, MAX_PACKET
from pubsub_mqtt.packets import DISCONNECT, PINGRESP, SUBACK, UNSUBACK, malformed

from .inbound import Inbound
from .keepalive import Quiet
from .outbound import Outbound
from .paho_client import PahoClient, paho_properties, reason_text
from .reader import Reader
from .requests import Requests
from .session_data import Session, SessionSettings, Will
from .state import ConnectionState, discard
from .transport import BufferedSocket, PeerClosed

if TYPE_CHECKING:
    from paho.mqtt.client import ConnectFlags
    from paho.mqtt.reasoncodes import ReasonCode

__all__ = ["Connection"]

logger = logging.getLogger("pubsub_mqtt")

_SOON: Final = 0.01
"""Least seconds between two looks at the clock, or rounding could make a busy loop of them."""

_SHORT_SESSION: Final = 2.0
_TIMES: Final = 3
_WINDOW: Final = 60.0

_HUNG_UP: Final = (
    ConnectionResetError,
    ConnectionAbortedError,
    BrokenPipeError,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
)
"""Errors of a socket whose peer has ended the connection, and not the network."""

_REFUSING: Final = frozenset({0x80, 0x81, 0x82, 0x83, 0x87, 0x90, 0x95, 0x99, 0x9A, 0x9B})
"""Reasons of a DISCONNECT that a single message can have caused."""

_REFUSING_FILTERS: Final = frozenset(
    {0x80, 0x81, 0x82, 0x83, 0x87, 0x8F, 0x95, 0x97, 0x9E, 0xA1, 0xA2}
)
"""Reasons of a DISCONNECT that a single SUBSCRIBE can have caused."""


class Connection(ConnectionState):
    """One client of a broker: its sessions, and all that outlives them.

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

    `publish` to `fail_pending` are `Outbound`'s methods, `subscribe` to `ping` are `Requests`', and
    `settle` to `resume` are `Inbound`'s.

    Seams for services that speak MQTT with rules of their own; replace them before `begin`:

    * ``keepalive_policy(quiet)``: when to ping, and when silence means a dead link; see
      `pubsub_mqtt.connection.keepalive`.
    * ``short_life_policy()``: whether a session that the peer ended right after CONNACK may
      mean that another client uses our identifier. It is asked once for each such end.
    * `ask` and `subscribe_verbatim`: packets that go past window, gate and paho's checks.

    Args:
        backend: Name of the backend that errors belong to.
        clock: Seconds; only differences count.

    Attributes:
        flapping: Whether the last session was one of several in a minute that the peer ended
            soon after they began, as it looks when another client uses our identifier.
    """

    def __init__(
        self,
        settings: SessionSettings,
        *,
        backend: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, backend=backend, clock=clock)
        self.outbound = Outbound(self)
        self.inbound = Inbound(self)
        self.requests = Requests(self)
        self._reader = Reader(
            self, self.inbound, self.outbound, connack=self._connack, other=self._other
        )
        # Bound methods, and not methods that pass the call on, which would cost each message
        # another call with all its arguments.
        self.publish = self.outbound.publish
        self.publish_now = self.outbound.publish_now
        self.ask = self.outbound.ask
        self.abandon = self.outbound.abandon
        self.pending = self.outbound.pending
        self.release = self.outbound.release
        self.fail_pending = self.outbound.fail_pending
        self.subscribe = self.requests.subscribe
        self.subscribe_verbatim = self.requests.subscribe_verbatim
        self.unsubscribe = self.requests.unsubscribe
        self.refusal = self.requests.refusal
        self.ping = self.requests.ping
        self.settle = self.inbound.settle
        self.packet_id_of = self.inbound.packet_id_of
        self.pause = self.inbound.pause
        self.resume = self.inbound.resume

        self._proved = len(settings.versions) == 1
        self._had_session = False
        self._said_connect = False
        self._short_lives: deque[float] = deque()
        self._takeovers: deque[float] = deque()
        self.flapping = False
        self._offered: BufferedSocket | None = None
        self._keepalive = 0
        self._pinged_at: float | None = None
        self._accepted_at = 0.0

    # --- what a driver calls ------------------------------------------------------------

    def begin(self, sock: BufferedSocket, *, where: str = "") -> None:
        """Start a session on *sock*, which is connected: send CONNECT.

        The end is `on_session` or `on_lost`. The connection closes *sock* in the end.
        """
        if self.socket is not None:
            raise RuntimeError("a session is under way; end it first")
        settings = self.settings
        version = self.version
        paho = self.paho = PahoClient(self, client_id=self.client_id, version=version)
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
        self.where = where
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
        if sock is None and self.dial is not None:  # paho's own loop reconnects
            self._close_session(NotConnected("the session was ended", backend=self.backend))
            sock = self.dial()
        if sock is None:
            raise ConnectionError("no socket was prepared")
        self.socket = sock
        self._said_connect = True
        self.generation += 1
        self._woken = False
        self._reader.begin()
        self.connected = self.usable = self.outbound.released = False
        self.session = None
        self._keepalive = 0
        self.inbound.session_ended()
        self.last_in = self.last_out = self.clock()
        self._pinged_at = None
        return sock

    @property
    def unfinished(self) -> int:
        """Publishes whose outcome is not known yet."""
        return self.outbound.unfinished

    @property
    def reading(self) -> bool:
        """Whether the driver shall watch the socket for input."""
        return self.inbound.reading

    def feed(self) -> None:
        """Read once from the socket, and act on it."""
        sock = self.socket
        if sock is None:
            return
        try:
            chunk = sock.fill()
            if chunk:
                self.last_in = self.clock()
                self.stats.bytes_in += len(chunk)
                self._reader.feed(chunk, sock)
        except ProtocolError as exc:
            self._break(exc)
        except PeerClosed as exc:
            self._peer_closed(exc)
        except (OSError, ConnectError) as exc:
            self._link_failed(exc, sock)
        if sock is self.socket and not self._woken and not sock.idle:
            self.wake_up()  # a WebSocket ping wants its answer

    def flush(self) -> bool:
        """Hand unsent bytes to the operating system; return whether all of them went."""
        self._woken = False
        return self._hand_over(BufferedSocket.flush)

    def push(self) -> bool:
        """Do as `flush`, which follows soon: the system may wait for it with small packets."""
        return self._hand_over(BufferedSocket.push)

    def _hand_over(self, how: Callable[[BufferedSocket], bool]) -> bool:
        sock = self.socket
        if sock is None:
            return True
        try:
            before = sock.done
            empty = how(sock)
            if sock.done != before:
                self.last_out = self.clock()
        except OSError as exc:
            # The write that fails comes after what the peer said before it closed: a CONNACK
            # that refuses, or a DISCONNECT with the reason. That is the better error.
            self._last_words(sock)
            if self.socket is sock:
                self._link_failed(exc, sock)
            return True
        if self.outbound.unflushed:
            self.outbound.confirm_flushed(sock.done)
        return empty

    def _link_failed(self, exc: OSError | ConnectError, sock: BufferedSocket) -> None:
        # Mosquitto resets the connection over what it cannot stand, since it leaves the rest of
        # the packet unread; then a write may fail before the read does.
        error = dial_error(exc, self.where, backend=self.backend, secure=self._early_end(sock))
        if isinstance(exc, _HUNG_UP):
            self._suspect("reset the connection")
            error = self._short_life(error)
        self._lose(error)

    def _suspect(self, how: str) -> None:
        if self.usable:  # after our DISCONNECT the broker is to hang up
            self.outbound.suspect(how)
            self.requests.suspect(how)

    def _early_end(self, sock: BufferedSocket | None) -> bool | None:
        """Return whether *sock* is encrypted, or None once the broker has let us in."""
        return None if self.connected or sock is None else sock.secure

    def _last_words(self, sock: BufferedSocket) -> None:
        """Read the last packets of a peer that closed: most often they have the reason."""
        before = -1
        while self.socket is sock and self.stats.bytes_in != before:
            before = self.stats.bytes_in
            self.feed()

    def tick(self) -> float | None:
        """Do what is due; return seconds until the next call, or None when nothing will be."""
        keepalive = self._keepalive
        if not self.connected or not keepalive:
            return None
        now = self.clock()
        step = self.keepalive_policy(
            Quiet(
                keepalive=keepalive,
                inbound=now - self.last_in,
                outbound=now - self.last_out,
                pinged=None if self._pinged_at is None else now - self._pinged_at,
                reading=self.reading,
            )
        )
        if step.dead:
            self._lose(
                ConnectError(
                    f"{self.where or 'the broker'} {step.dead}",
                    hint="the link or the broker is dead",
                    backend=self.backend,
                )
            )
            return None
        if step.ping:
            self._pinged_at = now
            self.requests.send_ping(discard)
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
        logger.info("no MQTT %d with %s, trying level %d", 5, self.where, self.version)
        return True

    def first_version(self) -> None:
        """Forget a fallback that did not lead to a session."""
        if not self._proved:
            self.version = self.settings.versions[0]

    # --- sessions ---------------------------------------------------------------------

    def disconnect(self, reason: int = 0) -> None:
        """Say DISCONNECT; nothing is sent after it. The driver flushes and calls `end`."""
        if not self.usable:
            return
        self.usable = self.outbound.released = False
        if self.version == 5 and reason:
            self.write(bytes((DISCONNECT, 1, reason)))
        else:
            self.write(b"\xe0\x00")

    def _accepted(self, properties: Properties | None, *, present: bool) -> None:
        settings = self.settings

        def said(name: str, default: Any) -> Any:
            return getattr(properties, name, default) if properties is not None else default

        v5 = self.version == 5
        self._proved = True
        self._had_session = True
        if self.paho is not None and settings.expiry:
            self.paho.keep_session()
        self.client_id = str(said("AssignedClientIdentifier", self.client_id))
        window = min(settings.max_inflight, int(said("ReceiveMaximum", 65535)))
        longest = min(MAX_PACKET, int(said("MaximumPacketSize", MAX_PACKET)))
        self._keepalive = int(said("ServerKeepAlive", settings.keepalive))
        session = self.session = Session(
            version=self.version,
            present=present,
            client_id=self.client_id,
            keepalive=self._keepalive,
            window=window,
            max_packet_size=longest,
            maximum_qos=int(said("MaximumQoS", 2)),
            retain=bool(said("RetainAvailable", 1)),
            wildcards=bool(said("WildcardSubscriptionAvailable", 1)),
            shared=bool(said("SharedSubscriptionAvailable", 1)) if v5 else None,
            identifiers=v5 and bool(said("SubscriptionIdentifierAvailable", 1)),
            expiry=int(said("SessionExpiryInterval", settings.expiry)) if v5 else 0,
        )
        self.inbound.session_began(present=present)
        self.outbound.session_began(present=present, window=window, max_packet_size=longest)
        self.connected = self.usable = True
        self._accepted_at = self.clock()
        self.stats.sessions += 1
        self.on_session(session)

    def _peer_closed(self, exc: PeerClosed) -> None:
        secure = self._early_end(self.socket)
        error = ConnectError(
            f"{self.where or 'the broker'} closed the connection",
            hint="" if secure is None else early_end_hint(secure),
            backend=self.backend,
        )
        error.__cause__ = exc
        self._suspect("closed the connection")  # all that a broker of 3.1.1 can say
        self._lose(self._short_life(error))

    def _short_life(self, error: ConnectError) -> ConnectError:
        """Return *error*, which says what it looks like where sessions end soon again and again.

        Two clients with one identifier end each other's sessions without end, and each of them
        sees nothing but a broken link. A broker that crashes, or a proxy before it that cannot
        reach it, looks the same, so it is tried again: only the broker's word is final.
        """
        self.flapping = False
        if not self.connected or not self.short_life_policy():
            return error
        now = self.clock()
        if now - self._accepted_at > _SHORT_SESSION or _often(self._short_lives, now) < _TIMES:
            return error
        self.flapping = True
        error.message += (
            f", {len(self._short_lives)} times within {_WINDOW:.0f} s soon after it had accepted "
            f"client id {printable(self.client_id)!r}"
        )
        error.hint = (
            "does another client use this client_id? or the broker crashes, or a proxy before it "
            "fails; the log of the broker says more"
        )
        return error

    def _taken_over(self, error: ConnectError) -> ConnectError:
        """Return *error*, or `TakenOver` when the broker says again and again that it is that."""
        if _often(self._takeovers, self.clock()) < _TIMES:
            return error
        self._takeovers.clear()
        over = TakenOver(
            f"the session of client id {printable(self.client_id)!r} was taken over {_TIMES} times "
            f"within {_WINDOW:.0f} s",
            hint="give each client its own client_id",
            backend=self.backend,
        )
        over.__cause__ = error
        return over

    def _break(self, error: ProtocolError) -> None:
        """End the session over a protocol error of the peer; MQTT 5 can tell it the reason."""
        as_ours(error, self.backend)
        sock = self.socket
        if sock is not None and self.connected and self.version == 5:
            self.write(bytes((DISCONNECT, 1, error.reason)))
            with contextlib.suppress(OSError):  # it is ending anyway
                sock.flush()
        self._lose(error)

    def _lose(self, error: ConnectError) -> None:
        if self.socket is None:
            return
        self._close_session(error)
        self.on_lost(error)

    def _close_session(self, why: PubSubError) -> None:
        sock = self.socket
        if sock is None:
            return
        self.socket = None
        self.connected = self.usable = self.outbound.released = False
        self.inbound.session_ended()
        self.on_close(sock)
        sock.close()
        if self.paho is not None:
            self.paho.forget_socket()
        self.outbound.session_ended(sock, why)
        self.requests.session_ended(why)

    # --- packets that are no message --------------------------------------------------

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
        paho = self.paho
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
            self.requests.answered(mid, codes, properties, granted=True)

        def unsubscribed(
            client: Client,
            userdata: object,
            mid: int,
            codes: list[ReasonCode],
            properties: Properties | None,
        ) -> None:
            self.requests.answered(mid, codes, properties, granted=False)

        paho.on_subscribe = subscribed
        paho.on_unsubscribe = unsubscribed
        paho.give(head, body)

    def _other(self, head: int, kind: int, body: bytes) -> None:
        paho = self.paho
        if kind == PINGRESP and head == PINGRESP and not body:
            self.requests.pong()
            return
        if kind in (SUBACK, UNSUBACK) and head & 0x0F == 0 and paho is not None:
            paho.give(head, body)
            return
        if kind == DISCONNECT and head == DISCONNECT and self.version == 5:
            self._disconnected(body)
            return
        raise ProtocolError(f"the broker sent packet type {kind >> 4}, which only clients send")

    def _disconnected(self, body: bytes) -> None:
        reason = body[0] if body else 0
        said = reason_text(body[1:], PacketTypes.DISCONNECT) if len(body) > 1 else ""
        error = disconnect_error(reason, backend=self.backend, said=said)
        how = f"ended the session with reason 0x{reason:02X}"
        if self.usable and reason in _REFUSING:
            self.outbound.suspect(how, named=True)
        if self.usable and reason in _REFUSING_FILTERS:
            self.requests.suspect(how, named=True)
        if reason == 0x8E:
            error = self._taken_over(error)
        self._lose(error)


def _often(times: deque[float], now: float) -> int:
    """Add *now*, and return how many there are within the window."""
    times.append(now)
    while now - times[0] > _WINDOW:
        times.popleft()
    return len(times)
