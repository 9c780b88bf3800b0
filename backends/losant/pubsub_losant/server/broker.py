"""The rules of the platform: connecting, state intake, commands, bans, the connection log.

`LosantDialect` is the service behind `pubsub_losant.server.LosantServer`; the sockets are the
endpoint's of `pubsub_mqtt`. It behaves as the platform does as far as that is known, and every
check comes before any change: a CONNECT that is refused disturbs nobody.

What no documentation says is decided here, and can be seen in `LosantDialect.rejections` and
`LosantDialect.errors`: return codes of refusals, the wording of most reasons, how values are
converted, and that a device is not told why its state was left out.

Beside devices there is the *operator*: a client of this machine that signs in with the name
``operator`` and the broker's own secret. It publishes commands and anything else, and subscribes
to anything, with any MQTT client; the platform has its web interface for that.

Sources: Losant's documentation of the MQTT broker, access keys, device state, commands,
throttling and the connection log; public reports about forbidden publishes.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, cast

from pubsub_core.errors import OperationTimeout
from pubsub_core.trie import HandlerTrie
from pubsub_losant.commands import ABSENT, BadCommand, encode_command, parse_command
from pubsub_losant.times import epoch_ms, format_date, from_epoch_ms, resolve_time
from pubsub_losant.topics import MAX_PAYLOAD, command_topic, split_topic
from pubsub_mqtt.errors import printable
from pubsub_mqtt.server.endpoint import Client, Dialect, Ending, Profile
from pubsub_mqtt.server.endpoint.packets import (
    REFUSED,
    Connect,
    Publish,
    Subscribe,
    Unsubscribe,
    encode_publish,
)

from .access import AccessKey, Registry
from .state_intake import read_states
from .storage import State, Storage
from .throttle import Meter, Throttle

__all__ = [
    "OPERATOR",
    "IntakeError",
    "LosantDialect",
    "Rejection",
    "StateHook",
]

logger = logging.getLogger("pubsub_losant.broker")

StateHook = Callable[[str, State], None]
"""Called with a device id and a state that was stored."""

OPERATOR: Final = "operator"
"""User name of the operator."""

_ACCEPTED: Final = 0
_NO_ID: Final = 2
_UNAVAILABLE: Final = 3
_NOT_AUTHORIZED: Final = 5

_KEPT: Final = 1000
_MAX_FILTERS: Final = 1000
_MAX_LEVELS: Final = 128
_HEADER: Final = 65_535 + 4

_PROFILE: Final = Profile(
    levels=frozenset({("MQTT", 4)}),
    answer_other_names=True,
    max_packet=MAX_PAYLOAD + _HEADER,
    max_queue=4 * 1_048_576,
    slow_reader="drop",
    max_filters=100,
    subprotocols=("mqtt", "mqttv3.1"),
)


@dataclass(frozen=True, slots=True)
class Rejection:
    """A connection that came to nothing.

    Attributes:
        time: Unix seconds.
        client_id: As the client gave it, escaped; ``""`` when there was no CONNECT.
        code: Return code of the CONNACK, or None when none was sent.
    """

    time: float
    client_id: str
    address: str
    code: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class IntakeError:
    """A state, or a part of one, that was not kept.

    Attributes:
        time: Unix seconds.
        device_id: Who sent it.
    """

    time: float
    device_id: str
    topic: str
    reason: str


@dataclass(slots=True)
class _Peer:
    """One accepted connection.

    Attributes:
        key: None for the operator.
        received: PUBLISH packets from it.
        sent: PUBLISH packets to it.
        reason: Why we close it, for the connection log.
        ended: It is in the log as gone.
    """

    device_id: str
    key: AccessKey | None
    meter: Meter | None
    filters: set[str] = field(default_factory=set[str])
    received: int = 0
    sent: int = 0
    reason: str = ""
    ended: bool = False


class LosantDialect(Dialect):
    """One application: its devices and keys, their connections, states and commands.

    Args:
        registry: Devices and access keys; may be changed while it runs.
        storage: States and histories; its owner opens and closes it.
        strict: Whether QoS 2, RETAIN, sessions that persist and payloads over the limit are
            refused, as the platform does.
        throttle: Limits and bans; None for none.
        one_connection: Whether a device that connects again ends its earlier connection.
        operator_secret: Password of the operator; empty lets none in.
        clock: Unix seconds.

    Attributes:
        rejections: The newest connections that came to nothing.
        errors: The newest states, or parts of them, that were not kept.
        throttled: Messages to devices that were dropped because of their limits.
        stopping: Set before the connections are ended, for the log.
    """

    profile = _PROFILE

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        *,
        strict: bool = True,
        throttle: Throttle | None = None,
        one_connection: bool = True,
        operator_secret: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry
        self.storage = storage
        self.strict = strict
        self.throttle = throttle
        self.one_connection = one_connection
        self.rejections: deque[Rejection] = deque(maxlen=_KEPT)
        self.errors: deque[IntakeError] = deque(maxlen=_KEPT)
        self.throttled = 0
        self.stopping = False
        self.on_state: list[StateHook] = []
        self._operator_secret = operator_secret.encode()
        self._clock = clock
        self._subscribers: HandlerTrie[Client] = HandlerTrie()
        self._connected: dict[str, dict[Client, None]] = {}
        self._refuse: deque[int] = deque()
        self._waiting: set[asyncio.Future[None]] = set()

    # --- connecting ---------------------------------------------------------------------

    def connect(self, client: Client, packet: Connect) -> int:
        """Check everything, and only then take a connection, or take one over."""
        code, reason, key = self._judge(client, packet)
        if code != _ACCEPTED:
            self._reject(client, packet.client_id, code, reason)
            # `rejected` is called for every connection that was not accepted; a state tells it
            # that this one is recorded.
            client.state = reason
            return code
        device_id = packet.client_id
        meter = self.throttle.meter() if self.throttle is not None and key is not None else None
        client.state = _Peer(device_id, key, meter)
        if key is None:
            return _ACCEPTED
        if self.one_connection:
            # Left at once, so that its log entry and its will come before the new connection's:
            # the endpoint reports the end of a connection only when its socket is closed.
            for other in list(self._connected.get(device_id, ())):
                self._leave(other, "Duplicate connection")
                other.close("the device connected again")
        self._connected.setdefault(device_id, {})[client] = None
        self.storage.add_connection(
            device_id,
            {
                "connected": 1,
                "time": self._date(),
                "method": "mqtt",
                "ipAddress": _address(client),
            },
        )
        self._changed()
        return _ACCEPTED

    def _judge(self, client: Client, packet: Connect) -> tuple[int, str, AccessKey | None]:
        """Return code, reason, and the key of a device; changes nothing but counters.

        The limits come last. A CONNECT counts only if it would be accepted otherwise: without a
        valid secret nobody can use up the connections of an application.
        """
        if self._refuse:
            return self._refuse.popleft(), "the next CONNECT was to be refused", None
        if not packet.client_id:
            return _NO_ID, "no client id", None
        if self.strict and not packet.clean_session:
            return _NOT_AUTHORIZED, "clean session 0", None
        if packet.username == OPERATOR:
            reason = self._judge_operator(client, packet)
            return (_NOT_AUTHORIZED if reason else _ACCEPTED), reason, None
        key = self.registry.authenticate(packet.username, packet.password)
        if key is None:
            return _NOT_AUTHORIZED, "unknown or inactive key, or a wrong secret", None
        device_id = packet.client_id
        if not self.registry.may_connect(device_id, key):
            return _NOT_AUTHORIZED, self._why_not(device_id), None
        will = packet.will
        if will is not None and (
            will.qos == 2
            or will.retain
            or not self.registry.may_publish(device_id, key, will.topic)
        ):
            return _NOT_AUTHORIZED, "a will that it may not publish", None
        if self.throttle is not None:
            now = self._clock()
            left = self.throttle.banned(device_id, now)
            if left:
                return _UNAVAILABLE, f"banned for {left:.1f} more seconds", None
            if not self.throttle.connect(now):
                return _UNAVAILABLE, "too many new connections", None
        return _ACCEPTED, "", key

    def _judge_operator(self, client: Client, packet: Connect) -> str:
        secret = packet.password or b""
        # Compared in any case, so that the time of an answer does not tell whether one is set.
        if not (
            hmac.compare_digest(secret, self._operator_secret or b"none is set")
            and self._operator_secret
        ):
            return "a wrong operator secret"
        if not _is_local(client):
            return "the operator is not on this machine"
        return ""

    def _why_not(self, device_id: str) -> str:
        device = self.registry.devices.get(device_id)
        if device is None:
            return "no such device"
        if device.cls in ("peripheral", "floating", "system"):
            return f"a device of class {device.cls} does not connect"
        return "the key is not for this device"

    def _reject(self, client: Client, client_id: str, code: int | None, reason: str) -> None:
        shown = printable(client_id)
        self.rejections.append(Rejection(self._clock(), shown, _address(client), code, reason))
        logger.info("rejected %r from %s: %s", shown, client.name, reason)
        self._changed()

    def rejected(self, client: Client) -> None:
        """Keep a record of a connection without a CONNECT that could be judged."""
        if client.state is None:
            code = 1 if client.ending is Ending.REFUSED else None
            self._reject(client, "", code, client.reason)

    # --- the end of a connection ----------------------------------------------------------

    def disconnected(self, client: Client, *, clean: bool) -> None:
        """Log the end with its reason, and publish the will where that is due."""
        peer: _Peer = client.state
        reason = "Connection Lost"
        match client.ending:
            case Ending.DISCONNECT:
                reason = "Client Disconnected"
            case Ending.SILENT:
                reason = "Keepalive timeout"
            case Ending.PROTOCOL:
                reason = "Protocol Error"
            case Ending.TOO_LARGE:
                reason = "Publish Error - Payload too large"
            case _:
                if peer.reason:
                    reason = peer.reason
                elif self.stopping:
                    reason = "Broker stopped"
        self._leave(client, reason)

    def _leave(self, client: Client, reason: str) -> None:
        peer: _Peer = client.state
        if peer.ended:  # taken over before; this is the end of its socket
            return
        peer.ended = True
        for text in peer.filters:
            self._subscribers.remove(text, client)
        if peer.key is None:
            return
        device_id = peer.device_id
        others = self._connected.get(device_id)
        if others is not None:
            others.pop(client, None)
            if not others:
                del self._connected[device_id]
        self.storage.add_connection(
            device_id,
            {
                "connected": 0,
                "time": self._date(),
                "disconnectReason": reason,
                "messagesFromClient": peer.received,
                "messagesToClient": peer.sent,
            },
        )
        logger.info("%s is gone: %s", printable(device_id), reason)
        will = client.packet.will if client.packet is not None else None
        if (
            will is not None
            and reason != "Client Disconnected"
            and self.registry.may_publish(device_id, peer.key, will.topic)
        ):
            self._process(device_id, will.topic, will.payload)
        self._changed()

    def _end(self, client: Client, reason: str) -> bool:
        """Close a connection for a reason that the log is to have.

        The first reason stays: packets that were read together with the forbidden one may break
        other rules before the connection is closed.
        """
        peer: _Peer = client.state
        peer.reason = peer.reason or reason
        client.close(reason)
        return True

    # --- publishing ---------------------------------------------------------------------

    def publish(self, client: Client, packet: Publish) -> bool:
        """Take a message, or close the connection where it is forbidden."""
        peer: _Peer = client.state
        peer.received += 1
        topic, payload = packet.topic, packet.payload
        if self.strict:
            if packet.qos == 2:
                return self._end(client, "Publish Error - QoS 2 not supported")
            if packet.retain:
                return self._end(client, "Publish Error - Retain not supported")
            if len(payload) > MAX_PAYLOAD:
                return self._end(client, "Publish Error - Payload too large")
        # Before the right is checked: forbidden messages count as well.
        if peer.meter is not None and not peer.meter.incoming(topic, self._clock()):
            return self._punish(client, topic)
        if peer.key is None:
            if not self._operate(client, topic, payload):
                return True
        elif self.registry.may_publish(peer.device_id, peer.key, topic):
            self._process(peer.device_id, topic, payload)
        else:
            return self._forbid(client, topic)
        if not packet.packet_id:
            return True

        # A device forgets a state once it is acknowledged, so PUBACK waits for the disk, and where
        # the disk fails the connection ends: the device sends the state again.
        def stored(error: BaseException | None) -> None:
            if error is None:
                client.acknowledge(packet)
            else:
                client.close("the message could not be stored")

        return self.storage.settled(stored)

    def _forbid(self, client: Client, topic: str) -> bool:
        return self._end(client, f"Publish Error - Not allowed to publish to {printable(topic)}")

    def _punish(self, client: Client, topic: str) -> bool:
        peer: _Peer = client.state
        if self.throttle is not None:
            seconds = self.throttle.violate(peer.device_id, self._clock())
            logger.warning("%s is banned for %g s", printable(peer.device_id), seconds)
        return self._end(client, f"Throttled - {printable(topic)}")

    def _process(self, device_id: str, topic: str, payload: bytes) -> None:
        """Store a state and deliver it; other messages are only delivered."""
        found = split_topic(topic)
        if found is None or found[1] != "state":
            self.deliver(topic, payload)
            return
        target = found[0]
        device = self.registry.devices.get(target)
        now = int(self._clock() * 1000)
        states, reasons = read_states(
            payload, now, device.attributes if device is not None else None
        )
        for reason in reasons:
            self._error(device_id, topic, reason)
        if not states:
            return
        size = len(payload) // len(states)  # near enough for the storage's bound
        stored: list[State] = []
        for state in states:
            if state.dropped:
                names = ", ".join(state.dropped[:10])
                self._error(device_id, topic, f"attributes not kept: {printable(names)}")
            if state.data:
                stored.append(
                    self.storage.add_state(
                        target,
                        state.ms,
                        state.data,
                        meta=state.meta,
                        flow_version=state.flow_version,
                        received_ms=now,
                        size=size,
                    )
                )
        # The bytes of the device, with the attributes that were not kept.
        self.deliver(topic, payload)
        for hook in self.on_state:
            for each in stored:
                try:
                    hook(target, each)
                except Exception:
                    logger.exception("a hook for states failed")
        if self._waiting:
            self._changed()

    def _error(self, device_id: str, topic: str, reason: str) -> None:
        shown = printable(topic)
        self.errors.append(IntakeError(self._clock(), device_id, shown, reason))
        logger.info("a state of %s on %s: %s", printable(device_id), shown, reason)

    def deliver(self, topic: str, payload: bytes) -> int:
        """Send a message to its subscribers; return how many connections took it."""
        receivers = self._subscribers.match(topic)
        if not receivers:
            return 0
        data = encode_publish(topic, payload)
        count = 0
        for client in dict.fromkeys(receivers):
            peer: _Peer = client.state
            if peer.meter is not None and not peer.meter.outgoing(topic, self._clock()):
                # Dropped, without a ban: the device did not cause it.
                self.throttled += 1
            elif client.send(data):
                peer.sent += 1
                count += 1
        return count

    # --- subscribing --------------------------------------------------------------------

    def subscribe(self, client: Client, packet: Subscribe) -> Sequence[int]:
        """Subscribe to each filter that is allowed; everything is delivered at QoS 0."""
        return [self._subscribe(client, text) for text, _ in packet.filters]

    def _subscribe(self, client: Client, text: str) -> int:
        peer: _Peer = client.state
        if peer.key is None:
            allowed = not text.startswith("$")
        else:
            allowed = self.registry.may_subscribe(peer.device_id, peer.key, text)
        new = text not in peer.filters
        if not allowed or (
            new and (len(peer.filters) >= _MAX_FILTERS or text.count("/") >= _MAX_LEVELS)
        ):
            logger.info("%s may not subscribe to %s", client.name, printable(text))
            return REFUSED
        if new:
            peer.filters.add(text)
            self._subscribers.add(text, client)
            self._changed()
        return 0

    def unsubscribe(self, client: Client, packet: Unsubscribe) -> None:
        """Drop subscriptions, by their text."""
        peer: _Peer = client.state
        for text in packet.filters:
            if text in peer.filters:
                peer.filters.discard(text)
                self._subscribers.remove(text, client)

    # --- commands -----------------------------------------------------------------------

    def send_command(
        self,
        device_id: str,
        name: str,
        payload: Any = ABSENT,
        time: datetime | float | None = None,
    ) -> int:
        """Send a command, and keep it in the history; return how many connections got it.

        A device that is not connected never gets it. A peripheral's goes to the subscribers of
        its topic, as a rule its gateway.

        Args:
            device_id: Whom it is for.
            name: 1 to 255 characters.
            payload: Any JSON value, datetimes included; `ABSENT` sends none.
            time: A datetime or Unix seconds; None for now.

        Raises:
            ValueError: There is no such device, the name is too short or too long, or the
                command as a whole is too long.
        """
        if time is None or not isinstance(time, datetime):
            ms = int((self._clock() if time is None else time) * 1000)
        else:
            ms = epoch_ms(time)
        return self._send_command(device_id, name, payload, ms)

    def _send_command(self, device_id: str, name: str, payload: Any, ms: int) -> int:
        if device_id not in self.registry.devices:
            raise ValueError(f"no device {device_id!r}")
        body = encode_command(name, payload, from_epoch_ms(ms))
        if len(body) > MAX_PAYLOAD:
            raise ValueError(f"a command of {len(body)} bytes; {MAX_PAYLOAD} are allowed")
        count = self.deliver(command_topic(device_id), body)
        self.storage.add_command(device_id, ms, body, count)
        return count

    def _operate(self, client: Client, topic: str, payload: bytes) -> bool:
        """Handle a message of the operator; False when it was refused."""
        found = split_topic(topic)
        if topic.startswith("$"):
            self._forbid(client, topic)
            return False
        if found is None or found[1] not in ("command", "state"):
            self.deliver(topic, payload)
            return True
        device_id, kind = found
        try:
            if device_id not in self.registry.devices:
                raise ValueError("there is no such device")
            if kind == "state":
                self._process(device_id, topic, payload)
            else:
                self._command_of_operator(device_id, payload)
        except (ValueError, TypeError, OverflowError) as exc:
            logger.warning("refused a message of the operator to %s: %s", printable(topic), exc)
            self._end(client, f"Publish Error - {printable(topic)}: {exc}")
            return False
        return True

    def _command_of_operator(self, device_id: str, payload: bytes) -> None:
        try:
            command = parse_command(payload)
        except BadCommand as exc:
            raise ValueError(f"a command is a JSON object with a name: {exc}") from None
        unknown = command.keys() - {"name", "payload", "time"}
        name = command.get("name")
        if unknown or not isinstance(name, str):
            raise ValueError("a command has name, and maybe payload and time, nothing else")
        when = command.get("time")
        now = int(self._clock() * 1000)
        ms = epoch_ms(when) if isinstance(when, datetime) else resolve_time(when, now)
        self._send_command(device_id, name, command.get("payload", ABSENT), ms)

    # --- for tests ----------------------------------------------------------------------

    def is_connected(self, device_id: str) -> bool:
        """Whether a device is connected."""
        return device_id in self._connected

    def clients(self, device_id: str) -> list[Client]:
        """Return the connections of a device."""
        return list(self._connected.get(device_id, ()))

    def is_subscribed(self, device_id: str, filter: str) -> bool:
        """Whether a connection of a device has a filter, by its text."""
        peers = [cast("_Peer", each.state) for each in self._connected.get(device_id, ())]
        return any(filter in peer.filters for peer in peers)

    def refuse_next(self, code: int = _UNAVAILABLE) -> None:
        """Answer the next CONNECT with that return code."""
        self._refuse.append(code)

    def operator_disconnects(self, client: Client, reason: str) -> None:
        """Close a device's connection; the log has the reason."""
        self._end(client, reason)

    async def until(self, condition: Callable[[], object], timeout: float, what: str) -> None:
        """Return once *condition* holds; it is looked at after every change.

        Raises:
            OperationTimeout: It did not within *timeout* seconds.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    change: asyncio.Future[None] = loop.create_future()
                    self._waiting.add(change)
                    try:
                        await change
                    finally:
                        self._waiting.discard(change)
        except TimeoutError:
            raise OperationTimeout(f"not within {timeout:g} s: {what}", backend="losant") from None

    def _changed(self) -> None:
        for each in self._waiting:
            if not each.done():
                each.set_result(None)

    def _date(self) -> str:
        return format_date(from_epoch_ms(int(self._clock() * 1000)))


def _address(client: Client) -> str:
    """Return the address of a peer, without its port."""
    host, _, port = client.name.rpartition(":")
    return host.strip("[]") if port.isdecimal() else ""


def _is_local(client: Client) -> bool:
    try:
        return ipaddress.ip_address(_address(client)).is_loopback
    except ValueError:
        return False
