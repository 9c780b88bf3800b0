"""A device of Losant as the core sees it: the one place where core words become Losant's.

``state`` and ``command`` are the device's own topics, ``<id>/state`` and ``<id>/command`` those
of the peripherals that the options name, ``losant/<id>/…`` those of other devices; everything
else is a topic of the user's own. States and commands are translated by `payloads`.

The platform tells no reasons. It ends the connection over a message that it does not take, and
does not let in whom it banned; what is told here is what is most likely.

Sources: Losant's documentation of the MQTT broker, of its limits and of access keys; public
reports of what it does to forbidden publishes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, Literal

from pubsub_core.capabilities import Cap, Limits
from pubsub_core.errors import (
    BadOption,
    ConnectError,
    InvalidFilter,
    InvalidTopic,
    NotSupported,
    Outcome,
    PayloadTooLarge,
    PublishFailed,
    PublishNotAuthorized,
    PubSubError,
    ServerRefused,
    SubscribeNotAuthorized,
)
from pubsub_core.interfaces import Address, BackendContext, SessionFacts, Sink, WireSub
from pubsub_core.keyed import BoundedCache
from pubsub_core.message import InFrame, OutFrame, Receipt
from pubsub_losant.errors import LosantThrottled
from pubsub_losant.options import LosantOptions, Transport, bad_option
from pubsub_losant.pacing_rules import (
    BAN,
    MARGIN,
    RATE,
    RATE_PER_TOPIC,
    is_suspect,
    own_windows,
)
from pubsub_losant.topics import (
    MAX_PAYLOAD,
    check_device_id,
    command_topic,
    is_platform_topic,
    split_topic,
    state_topic,
)
from pubsub_mqtt.backend.connection_backend import ConnectionBackend
from pubsub_mqtt.connection import Connection, Subscribe
from pubsub_mqtt.connection.address import broker_address
from pubsub_mqtt.connection.session_data import settings_of
from pubsub_mqtt.connection.transport import PeerClosed
from pubsub_mqtt.errors import CredentialsRefused
from pubsub_mqtt.options import WillOptions
from pubsub_mqtt.packets import Incoming

from .payloads import BadState, Received, read_command, read_states, write_states, write_will

__all__ = ["LosantBackend"]

Kind = Literal["state", "command", "own"]

_TRANSPORTS: Final[dict[str, Transport]] = {"losant": "tcp", "losant+ws": "websockets"}
_BELOW: Final = {
    ("tcp", True): ("mqtts", 8883),
    ("tcp", False): ("mqtt", 1883),
    ("websockets", True): ("wss", 443),
    ("websockets", False): ("ws", 80),
}
_KEPT: Final = 4096
_BLAME: Final = 2.0
"""Seconds within which a publish is held to be the reason that the connection ended."""

_LONGEST_BAN: Final = 3600.0
_GOOD_CONDUCT: Final = 900.0


class LosantBackend(ConnectionBackend):
    """One session of a device, or of a gateway with its peripherals.

    `Bus.native` is this object: `device_id`, and `driver` and `connection` for MQTT's
    own words.

    Attributes:
        device_id: The device.
    """

    def __init__(self, context: BackendContext) -> None:
        options = context.options
        if not isinstance(options, LosantOptions):
            raise TypeError(f"options are a {type(options).__name__}, not LosantOptions")
        self.name = context.info.name
        self.device_id = _device_of(context.address)
        self._options = options
        self._clock = context.clock
        self._peripherals = frozenset(options.peripherals) - {self.device_id}
        self._wire = BoundedCache[str, str](_KEPT)
        self._incoming = BoundedCache[str, tuple[str, Kind]](_KEPT)
        self._guards = options.guards
        self._windows = own_windows()
        # Topic of the newest publish, resends included, and when it was.
        self._published: tuple[str, float] = ("", -math.inf)
        self._ban = BAN
        self._banned_at = self._banned_until = -math.inf
        below = _below(context.address, options)
        mqtt = options.mqtt(
            backend=self.name,
            client_id=self.device_id,
            protocol="3.1.1",
            will=None if options.will is None else self._make_will(options.will),
            **_credentials(context.address, options),
        )
        super().__init__(
            context,
            broker_address(below, mqtt, backend=self.name),
            Connection(
                settings_of(below, mqtt, backend=self.name),
                backend=self.name,
                clock=context.clock.monotonic,
            ),
        )
        self.connection.on_resend = self._sent_again
        # A forbidden publish ends sessions as early as another client with our id does.
        self.connection.short_life_policy = lambda: not self._blamed

    def _make_will(self, will: WillOptions) -> WillOptions:
        topic = self.to_wire(will.topic)
        if _kind(topic) != "state":
            return replace(will, topic=topic)
        try:
            return replace(will, topic=topic, payload=write_will(will.data))
        except BadState as exc:
            raise bad_option(
                "will", f"the will is no state: {exc}", 'give JSON such as {"online": false}'
            ) from None

    # --- topics -------------------------------------------------------------------------

    def to_wire(self, topic: str) -> str:
        """Return the platform's name of a topic.

        Raises:
            InvalidTopic: It has another name here, or the platform has no such topic.
        """
        return self._translate(topic, InvalidTopic)

    def from_wire(self, name: str) -> str:
        """Return the topic that the platform calls *name*."""
        found = split_topic(name)
        if found is not None and found[1] in ("state", "command"):
            device_id, rest = found
            if device_id == self.device_id:
                return rest
            if device_id in self._peripherals:
                return f"{device_id}/{rest}"
        return name

    def _translate(self, name: str, kind: type[InvalidTopic]) -> str:
        if name == "state":
            return state_topic(self.device_id)
        if name == "command":
            return command_topic(self.device_id)
        first, _, rest = name.partition("/")
        if first in self._peripherals and rest in ("state", "command"):
            return f"losant/{name}"
        if name.startswith("$"):
            raise self._no_topic(name, kind, "the platform has no topics that begin with '$'")
        if is_platform_topic(name):
            self._check_platform_topic(name, kind)
        return name

    def _check_platform_topic(self, name: str, kind: type[InvalidTopic]) -> None:
        found = split_topic(name)
        if found is not None:
            device_id, rest = found
            if rest in ("state", "command"):
                here = self.from_wire(name)
                if here == name:
                    return
                raise kind(
                    f"{name!r} is called {here!r} on this bus",
                    topic=name,
                    reason="alias",
                    hint=f"use {here!r}",
                    backend=self.name,
                )
            if device_id == self.device_id and rest.startswith(("fromAgent/", "toAgent/")):
                return
        raise self._no_topic(
            name, kind, "names that begin with 'losant' are the platform's, which has no such"
        )

    def _no_topic(self, name: str, kind: type[InvalidTopic], why: str) -> InvalidTopic:
        return kind(
            f"{name[:200]!r} cannot be used: {why}",
            topic=name,
            level=0,
            reason="reserved",
            hint="use state, command, losant/<device id>/state, or a name that begins otherwise",
            backend=self.name,
        )

    # --- sessions -----------------------------------------------------------------------

    async def open(self, sink: Sink) -> SessionFacts:
        """Make one session; not while a ban lasts that is known of."""
        left = self._banned_until - self._clock.monotonic()
        if left > 0:
            raise LosantThrottled(
                f"device {self.device_id} is most likely banned for another {left:.0f} s",
                retry_after=left,
                hint="it is tried again after that; publish less often",
            )
        try:
            await self.dial(sink)
        except ConnectError as error:
            found = self._refusal(error)
            if found is error:
                raise
            raise found from error
        return SessionFacts(client_id=self.device_id, server="Losant")

    def _refusal(self, error: ConnectError) -> ConnectError:
        """Return the error for an attempt that failed."""
        if isinstance(error, CredentialsRefused):
            error.hint = (
                "check device id, access key and secret, and whether the key is for this device"
            )
        elif isinstance(error, ServerRefused) and error.reason == 2:
            error.hint = "check the device id"
        elif isinstance(error, ServerRefused) and error.reason == 3:
            return LosantThrottled(
                f"the platform does not let device {self.device_id} in now (return code 3): it "
                "is banned for exceeding a limit, or too many devices connect",
                retry_after=self._ban,
                reason=3,
                hint=f"try again in {self._ban:.0f} s; publish less often",
            )
        elif "://" in error.hint:  # in MQTT's words
            error.hint = (
                "check the port, whether it wants TLS (option secure), and that it speaks MQTT"
            )
        return error

    def session_ended(self, error: ConnectError | None) -> ConnectError | None:
        """Return the error for the most likely cause of the end."""
        return None if error is None else self._cause(error)

    @property
    def _blamed(self) -> str:
        """Topic of a publish that may have ended the connection just now, or ``""``."""
        topic, at = self._published
        return topic if self._clock.monotonic() - at < _BLAME else ""

    def _cause(self, error: ConnectError) -> ConnectError:
        """Return the error for a session that ended, with the most likely cause.

        The platform closes the connection without a word, so the cause is a guess: a limit,
        where one may be exceeded; else a message that went out just before.
        """
        if not isinstance(error.__cause__, (PeerClosed, ConnectionResetError)):
            return error
        now = self._clock.monotonic()
        if self._guards and is_suspect(self._windows, now):
            again = now - self._banned_at < _GOOD_CONDUCT
            self._ban = min(self._ban * 2, _LONGEST_BAN) if again else BAN
            self._banned_at, self._banned_until = now, now + self._ban
            throttled = LosantThrottled(
                f"the platform ended the connection of device {self.device_id}, most likely "
                f"because of its limit: {RATE_PER_TOPIC[0]} messages to a topic and {RATE[0]} "
                f"in all in {RATE[1]:g} s",
                retry_after=self._ban,
                hint=f"it is tried again after {self._ban:.0f} s; publish less often",
            )
            throttled.__cause__ = error
            return throttled
        if topic := self._blamed:
            error.message += f" right after a message to {topic!r}"
            error.hint = (
                "the platform does that when the device may not publish there, sends too much, or "
                "connects a second time; its connection log has the reason"
            )
        elif self.connection.flapping:
            error.hint = (
                "does the same device connect elsewhere? each connection ends the one before; its "
                "connection log has the reason"
            )
        return error

    @property
    def limits(self) -> Limits:
        """The platform's, with a margin in its rates; without rates where they are not kept."""
        declared = self.context.info.limits
        if not self._guards:
            return replace(declared, rate=None, rate_per_topic=None)
        return replace(
            declared,
            rate=(RATE[0], RATE[1] + MARGIN),
            rate_per_topic=(RATE_PER_TOPIC[0], RATE_PER_TOPIC[1] + MARGIN),
        )

    # --- publishing -------------------------------------------------------------------

    def _prepare(self, out: OutFrame) -> tuple[str, bytes]:
        """Return topic and payload as they go on the wire."""
        wire = self._wire.get(out.topic)
        if wire is None:
            wire = self.to_wire(out.topic)
            if _kind(wire) == "command" or "/toAgent/" in wire:
                raise PublishNotAuthorized(
                    f"{out.topic!r} is for the platform to publish",
                    outcome=Outcome.NOT_SENT,
                    hint="a workflow or the REST API sends commands; with `pubsub serve losant` "
                    "its operator_url does",
                    backend=self.name,
                    topic=out.topic,
                )
            self._wire.keep(out.topic, wire)
        if _kind(wire) != "state":
            return wire, out.payload
        try:
            payload = write_states(out.payload, int(self._clock.time() * 1000))
        except BadState as exc:
            raise PublishFailed(
                f"that is no state for {out.topic!r}: {exc}",
                outcome=Outcome.NOT_SENT,
                hint="publish attributes such as {'temperature': 21.5} as JSON, or a DeviceState",
                backend=self.name,
                topic=out.topic,
                retryable=False,
            ) from None
        if len(payload) > MAX_PAYLOAD:
            raise PayloadTooLarge(
                size=len(payload),
                limit=MAX_PAYLOAD,
                hint="the platform takes no more; publish fewer states or attributes at once",
                backend=self.name,
                topic=out.topic,
            )
        return wire, payload

    def _note(self, topic: str) -> None:
        """Count one message on its way, for when the platform ends the connection."""
        now = self._clock.monotonic()
        self._published = topic, now
        if self._guards:
            self._windows.note(topic, now)

    def _sent_again(self, topic: str) -> None:
        self._note(topic)
        if self.sink is not None:
            self.sink.sent_again(topic)

    def try_publish(self, out: OutFrame) -> Receipt | None:
        """Hand a QoS 0 message to the operating system without waiting, if that is possible."""
        if out.qos or self._guards:
            return None
        wire, payload = self._prepare(out)
        receipt = self.send_now(out, wire, payload)
        if receipt is not None:
            self._note(out.topic)
        return receipt

    async def publish(self, out: OutFrame) -> Receipt:
        """Publish; at QoS 1 a lost session does not end the wait, closing does."""
        self.check_qos(out, "the platform ends the connection over quality of service 2")
        wire, payload = self._prepare(out)
        sent = self.submit(out, wire, payload)
        self._note(out.topic)
        try:
            return await self.receipt(sent)
        except PublishFailed as error:
            # One hang-up is suspicious only; the message was given up after the second.
            if not sent.refusals or error.retryable is not False:
                raise
            raise PublishNotAuthorized(
                f"the platform ended the connection each time a message to {out.topic!r} was sent",
                hint="does the access key allow that topic? the device's connection log says more",
                backend=self.name,
                topic=out.topic,
            ) from error

    # --- subscribing ------------------------------------------------------------------

    async def subscribe(self, want: WireSub) -> int:
        """Subscribe; everything is delivered at QoS 0.

        Raises:
            NotSupported: A wildcard where the platform takes none.
            SubscribeNotAuthorized: The platform refused.
        """
        wire = self._wire_filter(want.filter)
        async with self.turns.of(wire):
            try:
                request = await self.driver.subscribe(Subscribe(wire, 0))
            except PubSubError as error:
                self.as_ours(error, want.filter)
                raise
        refused = self.connection.refusal(request)
        if refused is not None:
            raise SubscribeNotAuthorized(
                f"the platform refused the subscription to {want.filter!r}",
                reason=refused.reason,
                hint="does the access key allow that topic, or that device?",
                backend=self.name,
                topic=want.filter,
            ) from refused
        return 0

    async def unsubscribe(self, want: WireSub) -> None:
        """Drop a subscription; see `Backend.unsubscribe`."""
        wire = self._wire_filter(want.filter)
        async with self.turns.of(wire):
            try:
                await self.driver.unsubscribe(wire)
            except PubSubError as error:
                self.as_ours(error, want.filter)
                raise

    def _wire_filter(self, filter: str) -> str:
        levels = filter.split("/")
        if levels[0] in ("+", "#") or (
            levels[0] == "losant" and not {"+", "#"}.isdisjoint(levels[1:2])
        ):
            raise NotSupported(
                Cap.WILDCARDS,
                why=f"the platform refuses {filter!r}, which matches topics of other devices",
                hint="name the first level, and devices by their id",
                backend=self.name,
                topic=filter,
            )
        return self._translate(filter, InvalidFilter)

    # --- receiving --------------------------------------------------------------------

    def received(self, message: Incoming) -> None:
        """Translate a message and deliver it."""
        if message.serial:
            self.connection.settle(message.serial)
        sink = self.sink
        if sink is None:
            return
        known = self._incoming.get(message.topic)
        if known is None:
            known = self.from_wire(message.topic), _kind(message.topic)
            self._incoming.keep(message.topic, known)
        topic, kind = known
        now = self._clock.time()
        if kind == "own":
            sink.deliver(InFrame(topic=topic, payload=message.payload, time=now, native=message))
            return
        found: tuple[Received, ...]
        if kind == "state":
            found = tuple(read_states(message.payload, int(now * 1000)))
        else:
            found = (read_command(message.payload),)
        for payload, ms in found:
            sent = now if ms is None or kind == "state" else ms / 1000
            sink.deliver(InFrame(topic=topic, payload=payload, time=sent, native=message))


def _kind(wire: str) -> Kind:
    found = split_topic(wire)
    if found is not None and found[1] in ("state", "command"):
        return "state" if found[1] == "state" else "command"
    return "own"


def _device_of(address: Address) -> str:
    try:
        return check_device_id(address.host)
    except ValueError as exc:
        raise BadOption(
            f"{address.scheme}:// without the id of a device: {exc}",
            hint="losant://DEVICE_ID; the host of the broker is the option endpoint",
            backend="losant",
        ) from None


def _below(address: Address, options: LosantOptions) -> Address:
    """Return where the MQTT connection goes."""
    transport = options.transport or _TRANSPORTS[address.scheme]
    if address.scheme != "losant" and transport != _TRANSPORTS[address.scheme]:
        raise bad_option(
            "transport",
            f"transport={transport} contradicts {address.scheme}://",
            "leave one of them out",
        )
    scheme, port = _BELOW[transport, options.secure]
    if transport == "tcp" and address.path not in ("", "/"):
        raise BadOption(
            f"the path {address.path!r} means nothing for {address.scheme}://",
            hint="leave it out; topics are arguments of publish and subscribe",
            backend="losant",
        )
    return Address(
        scheme=scheme,
        host=options.endpoint,
        port=port if address.port is None else address.port,
        path=address.path.rstrip("/"),
    )


def _credentials(address: Address, options: LosantOptions) -> dict[str, object]:
    key = options.access_key.reveal() if options.access_key is not None else address.username
    secret = options.access_secret if options.access_secret is not None else address.password
    if key and secret:
        return {"username": key, "password": secret}
    if not key and not secret and (options.cert_file or options.ssl_context is not None):
        return {}  # a certificate in place of both
    missing = "access_secret" if key else "access_key"
    raise bad_option(
        missing,
        f"device {address.host} has no {missing}",
        "losant://KEY:SECRET@DEVICE_ID, or the options access_key and access_secret",
    )
