"""One session with an Emitter broker: connecting, keys, and the broker's own requests.

The MQTT below is `pubsub_mqtt`'s. A request is a publish whose answer comes before its
confirmation, on the topic of the request and with its packet id; so is a refusal, on
``emitter/error/``. Both are brought to the call that waits.

The text of a key is on the wire and nowhere else: not in the topic of a message here, not
in an error, not in the log.

Sources: emitter-io/emitter, ``internal/service`` and ``internal/security/channel.go``.
"""

from __future__ import annotations

import abc
import asyncio
import logging
import re
from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any, Final, cast

import msgspec

from pubsub_core.capabilities import Cap, ConfirmedBy, Limits, Support
from pubsub_core.errors import (
    BadOption,
    ConnectError,
    InvalidFilter,
    InvalidTopic,
    NotAuthorized,
    NotConnected,
    Outcome,
    PublishFailed,
    PublishNotAuthorized,
    PubSubError,
)
from pubsub_core.events import AccessRefused
from pubsub_core.interfaces import BackendContext, SessionFacts, Sink
from pubsub_core.message import Receipt
from pubsub_emitter.errors import EmitterError, refusal
from pubsub_emitter.options import EmitterOptions, MatcherOption, read_license
from pubsub_emitter.plugin import MAX_STORED_PAYLOAD
from pubsub_emitter.protocol import (
    API,
    ERROR_TOPIC,
    SHARE,
    Fault,
    effective_keepalive,
    is_link_name,
)
from pubsub_mqtt.backend.connection_backend import ConnectionBackend
from pubsub_mqtt.connection import Connection, Outgoing, Will
from pubsub_mqtt.connection.address import broker_address
from pubsub_mqtt.connection.session_data import settings_of
from pubsub_mqtt.packets import Incoming

from .keyring import KeyRing, RingKey

__all__ = ["EmitterSession"]

logger = logging.getLogger("pubsub_emitter.backend")

_SCHEMES: Final = {
    "emitter": ("mqtt", 8080),
    "emitters": ("mqtts", 443),
    "emitter+tls": ("mqtts", 443),
    "emitter+ws": ("ws", 8080),
    "emitter+wss": ("wss", 443),
}
_LEVEL: Final = re.compile(r"[$\-.0-9:A-Za-z\[\\\]^_`]*", re.ASCII)
_PREFIX: Final = f"{API}/"

_PERMISSIONS: Final = {
    "r": "subscribe",
    "w": "publish",
    "s": "store",
    "l": "read what is stored",
    "p": "see who is there",
}


_OPERATIONS: Final = {
    "publish": "publish to",
    "subscribe": "subscribe to",
    "history": "read what is stored of",
    "presence": "see who is at",
}


class _KeyedWill(Will):
    """A will with a key in its topic, which its repr does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<a will of {len(self.payload)} bytes>"


class EmitterSession(ConnectionBackend):
    """The session of a backend for Emitter: connecting, keys, requests to the broker.

    Attributes:
        matcher: The broker's matching rule, as far as it is known.
        client_id: Our identifier in presence, in this session.
    """

    def __init__(self, context: BackendContext) -> None:
        options = context.options
        if not isinstance(options, EmitterOptions):
            raise TypeError(f"options are a {type(options).__name__}, not EmitterOptions")
        self._options = options
        self.name = context.info.name
        self._time = context.clock.time
        address = context.address
        if not address.host:
            raise BadOption(
                f"{address} names no host", hint="emitter://localhost:8080", backend=self.name
            )
        scheme, port = _SCHEMES[address.scheme]
        if address.path not in ("", "/") and scheme not in ("ws", "wss"):
            raise BadOption(
                f"the path {address.path!r} means nothing for {address.scheme}://",
                hint="leave it out; topics are arguments of publish and subscribe",
                backend=self.name,
            )
        below = replace(
            address,
            scheme=scheme,
            port=port if address.port is None else address.port,
            path=(address.path or "/") if scheme in ("ws", "wss") else "",
        )
        mqtt = options.mqtt(backend=self.name, protocol="3.1.1", will=None)
        mqtt = replace(mqtt, keepalive=effective_keepalive(mqtt.keepalive))
        license_ = options.license
        self._license = None if license_ is None else read_license(license_.reveal())
        self._master = options.master_key
        self._ring = KeyRing(
            key=options.key,
            keys=options.keys.items(),
            license=self._license,
            can_issue=self._master is not None,
            ttl=options.key_ttl,
            clock=self._time,
        )
        self._settings = settings_of(below, mqtt, backend="emitter")
        super().__init__(
            context,
            broker_address(below, mqtt, backend=self.name),
            Connection(self._settings, backend=self.name, clock=context.clock.monotonic),
        )
        self._online = False
        self._trouble: ConnectError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._asking: dict[Outgoing, asyncio.Future[Mapping[str, Any] | None]] = {}
        self._answers: dict[Outgoing, Mapping[str, Any]] = {}
        self._faults: dict[Outgoing, Fault] = {}
        self._subscribing: dict[int, Fault | None] = {}
        self._links: dict[str, tuple[str, str]] = {}
        self.matcher: MatcherOption = options.matcher
        self.client_id = ""

    # --- topics -------------------------------------------------------------------------

    def to_wire(self, topic: str) -> str:
        """Return the channel of a topic.

        Raises:
            InvalidTopic: Channels cannot hold one of its characters, or it is the broker's.
        """
        self._check(topic, InvalidTopic)
        return f"{topic}/"

    def from_wire(self, name: str) -> str:
        """Return the topic of a channel."""
        return name.removesuffix("/")

    def _check(self, name: str, kind: type[InvalidTopic]) -> None:
        levels = name.split("/")
        if levels[0] in (API, SHARE):
            raise kind(
                f"{name!r} begins with {levels[0]!r}, which is the broker's",
                topic=name,
                level=0,
                reason="reserved",
                hint="rename the first level; groups are the argument group=",
                backend=self.name,
            )
        for index, level in enumerate(levels):
            if kind is InvalidFilter and level in ("+", "#"):
                continue
            found = _LEVEL.match(level)
            end = found.end() if found is not None else 0
            if end < len(level):
                raise kind(
                    f"{name!r} has {level[end]!r} in level {index}, which Emitter cannot carry",
                    topic=name,
                    level=index,
                    character=level[end],
                    reason="forbidden_character",
                    hint="use A-Z a-z 0-9 and $ - . : [ \\ ] ^ _ `",
                    backend=self.name,
                )

    # --- sessions -----------------------------------------------------------------------

    async def open(self, sink: Sink) -> SessionFacts:
        """Make one session, and have the broker say who we are there."""
        self._trouble = None
        self.matcher = self._options.matcher
        if self._options.will is not None:
            self.connection.settings = replace(self._settings, will=self._make_will())
        try:
            await self.dial(sink)
            answer = await self.request("me", {})
            identity = answer.get("id")
            if not isinstance(identity, str) or not identity:
                raise ConnectError(
                    f"{self.context.address} is no Emitter broker", backend=self.name
                )
            self.client_id = identity
            await self._link_again()
        except (NotConnected, EmitterError) as error:
            self.abort()
            raise self._not_accepted(error) from error
        except BaseException:
            self.abort()
            raise
        self._online = True
        return SessionFacts(client_id=self.client_id, server="Emitter")

    def _not_accepted(self, error: PubSubError) -> ConnectError:
        if self._trouble is not None:
            return ConnectError(
                f"{self.context.address} ended the session at once: {self._trouble.message}",
                hint="look into the broker's log",
                backend=self.name,
            )
        return ConnectError(
            f"{self.context.address} does not answer as an Emitter broker: {error.message}",
            hint="is it a plain MQTT broker? mqtt:// is for those",
            backend=self.name,
        )

    def _make_will(self) -> Will:
        will = self._options.will
        if will is None:
            raise TypeError("there is no will")
        channel = self.to_wire(will.topic)
        key = self._ring.peek("w", channel)
        if key is None and self._license is not None:
            key = RingKey(self._license.make_key(channel, "ws"), channel, "ws", made=True)
        if key is None:
            raise ConnectError(
                f"no key is given for the will's topic {will.topic!r}",
                hint="give one in key or keys; the broker cannot make it before the connection",
                backend=self.name,
                retryable=False,
            )
        return _KeyedWill(f"{key.text}/{channel}", will.data, 0, will.retain)

    async def close(self, *, drain: float) -> None:
        """Flush, say DISCONNECT, close; see `Backend.close`."""
        await super().close(drain=drain)
        if self._tasks:  # those that were cancelled just now
            await asyncio.wait(tuple(self._tasks))

    def session_ended(self, error: ConnectError | None) -> ConnectError | None:
        """Let everything that waits for the broker fail."""
        # Until `open` returns, the end of the session is its error and nobody else's.
        told, self._online = error if self._online else None, False
        self._trouble = error or self._trouble
        asking, self._asking = self._asking, {}
        for out, waiter in asking.items():
            self.connection.abandon(out)
            if not waiter.done():
                waiter.set_exception(self._not_connected())
        self._answers.clear()
        self._faults.clear()
        self._subscribing.clear()
        for task in tuple(self._tasks):
            task.cancel()
        return told

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"pubsub emitter {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _not_connected(self) -> NotConnected:
        return NotConnected(
            f"no session with {self.context.address}",
            hint="wait until the bus is online",
            backend=self.name,
            retryable=True,
        )

    async def probe(self) -> Mapping[Cap, Support]:
        """Lower the declared capabilities to the given keys and options."""
        found: dict[Cap, Support] = {}
        no_key = "give a key with the permission {} in key or keys, or a master_key"
        if not self._ring.may("l"):
            why = "there is no key that may read what is stored (l)"
            for cap in (Cap.HISTORY, Cap.REPLAY, Cap.RETAINED):
                found[cap] = Support.none(why, no_key.format("l"))
        elif self._options.store is not None:
            found[Cap.RETAINED] = Support.none(
                "with the option store every message is stored, not only those to retain",
                "ask bus.history(topic, last=1), or leave store out",
            )
        if not self._ring.may("p"):
            why = "there is no key that may see who is there (p)"
            for cap in (Cap.PRESENCE, Cap.NOTIFICATIONS):
                found[cap] = Support.none(why, no_key.format("p"))
        return found

    @property
    def keeps_history(self) -> bool:
        """Whether every message is stored, as far as publishers have the same options."""
        return self._options.store is not None

    @property
    def limits(self) -> Limits:
        """The declared limits; what is stored must fit into history, which is base64."""
        limits = self.context.info.limits
        if self._options.store is not None:
            return replace(limits, max_payload=MAX_STORED_PAYLOAD)
        return limits

    # --- keys ---------------------------------------------------------------------------

    async def _issue(self, target: str, letters: str, ttl: int) -> str:
        if self._master is None:
            raise self._no_key(letters, target)
        return await self.keygen(target, letters, ttl=ttl)

    async def _key(self, letters: str, topic: str, *channels: str) -> RingKey:
        """Return a key for *channels*; *topic* is for the error.

        Raises:
            NotAuthorized: There is none.
        """
        try:
            key = await self._ring.obtain(self._issue, letters, *channels)
        except EmitterError as exc:
            raise NotAuthorized(
                f"no key could be made to {_PERMISSIONS[letters[0]]} {topic!r}: {exc.message}",
                hint="is master_key of this broker's license?",
                backend=self.name,
                topic=topic,
            ) from exc
        if key is None:
            raise self._no_key(letters, topic)
        return key

    def _no_key(self, letters: str, topic: str) -> NotAuthorized:
        doing = " and ".join(_PERMISSIONS[letter] for letter in letters)
        return NotAuthorized(
            f"no key is given to {doing} {topic!r}",
            hint="set key, keys or master_key; a share group needs one that covers "
            "$share/<group>/<channel>",
            backend=self.name,
            topic=topic,
        )

    def _refused(self, key: RingKey, topic: str, operation: str) -> None:
        """Tell that a key is refused which worked before, or whose time is over."""
        expired = bool(key.expires) and self._time() >= key.expires
        worked = key.worked.pop((operation, topic), False)
        self._ring.forget(key)
        # Of an expired key once, or a program that goes on publishing would flood its events.
        if self.sink is None or not (worked or (expired and not key.told)):
            return
        doing = _OPERATIONS.get(operation, operation)
        if expired:
            key.told = True
            kind, text = "key_expired", f"the key to {doing} {topic!r} has expired"
        else:
            kind = "key_refused"
            text = f"the key to {doing} {topic!r} is no longer accepted: banned or expired"
        self.sink.notice(AccessRefused(kind, text, topic, operation=operation))

    # --- requests to the broker ---------------------------------------------------------------

    async def request(self, name: str, body: Mapping[str, object]) -> Mapping[str, Any]:
        """Publish *body* as JSON to ``emitter/<name>/`` and return the broker's answer.

        Raises:
            EmitterError: The broker refused, or left its answer out.
            NotConnected: There is no session, or it ended meanwhile.
        """
        answer = await self._answer(name, body)
        if answer is None:
            raise EmitterError(
                f"the broker did not answer {name}", hint="the answer may have been too long"
            )
        status = answer.get("status")
        if isinstance(status, int) and status != 200:
            raise refusal(status, str(answer.get("message", "")), name)
        return answer

    async def _asked(
        self, name: str, body: Mapping[str, object], what: str, key: RingKey, topic: str
    ) -> Mapping[str, Any] | None:
        """Make a request that a key allows; None when the broker left its answer out."""
        answer = await self._answer(name, body)
        if answer is None:
            return None
        status = answer.get("status")
        if status == 401:
            self._refused(key, topic, name)
            raise NotAuthorized(
                f"{what} was refused: {answer.get('message', '')}",
                hint="check the channel, permissions and expiry of its key; the broker's log "
                "says more",
                backend=self.name,
                topic=topic,
            )
        if isinstance(status, int) and status != 200:
            raise refusal(status, str(answer.get("message", "")), what)
        key.accepted(name, topic)
        return answer

    async def _answer(self, name: str, body: Mapping[str, object]) -> Mapping[str, Any] | None:
        found, fault = await self._ask(f"{_PREFIX}{name}/", msgspec.json.encode(body))
        if fault is not None:
            raise refusal(fault.status, fault.message, name)
        return found

    async def _ask(
        self, topic: str, payload: bytes
    ) -> tuple[Mapping[str, Any] | None, Fault | None]:
        """Publish at QoS 1 past all others; return answer and fault, when it is confirmed."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Mapping[str, Any] | None] = loop.create_future()

        def done(out: Outgoing) -> None:
            if waiter.done():
                return
            if out.error is not None:
                waiter.set_exception(self._not_connected())
            else:
                waiter.set_result(self._answers.pop(out, None))

        try:
            out = self.connection.ask(topic, payload, done, shown="a request")
        except PublishFailed:
            raise EmitterError(
                f"a request of {len(payload)} bytes is too long", hint="shorten it"
            ) from None
        self._asking[out] = waiter
        try:
            answer = await waiter
        except asyncio.CancelledError:
            self.connection.abandon(out)
            raise
        finally:
            self._asking.pop(out, None)
            self._answers.pop(out, None)
            fault = self._faults.pop(out, None)
        return answer, fault

    async def keygen(
        self, target: str, permissions: str, *, ttl: int = 0, key: str | None = None
    ) -> str:
        """Have the broker make a key, from *key* or the option ``master_key``.

        Args:
            target: Channel with its trailing slash: ``a/b/``, or ``a/b/#/`` for those below, too.
                Reading reaches below in any case.
            permissions: Letters of ``rwslpe``.
            ttl: Seconds until it expires, 0 for never.
            key: A master key, or an extendable one, which makes a private channel.

        Raises:
            EmitterError: The broker refused.
            BadOption: *key* is empty; that is not taken for the master key.
        """
        if key is None:
            key = self._need_master()
        elif not key:
            raise BadOption("key is empty", option="key", backend=self.name)
        answer = await self.request(
            "keygen", {"key": key, "channel": target, "type": permissions, "ttl": ttl}
        )
        made = answer.get("key")
        if not isinstance(made, str):
            raise EmitterError("the broker's answer to keygen has no key")
        return made

    async def keyban(self, target: str, *, banned: bool = True) -> None:
        """Ban the key *target*, or lift its ban; needs the option ``master_key``."""
        await self.request(
            "keyban", {"secret": self._need_master(), "target": target, "banned": banned}
        )

    def _need_master(self) -> str:
        if self._master is not None:
            return self._master.reveal().strip()
        if self._license is not None:
            return self._license.make_master_key()
        raise EmitterError("no master key is given", hint="set the option master_key")

    async def me(self) -> Mapping[str, Any]:
        """Return ``id`` and ``links`` of this connection, as the broker has them."""
        return await self.request("me", {})

    async def link(
        self, name: str, topic: str, *, ttl: int | None = None, echo: bool = True
    ) -> None:
        """Give *topic* a short name on this connection, also after a reconnect.

        Args:
            name: One or two letters or digits.
            topic: The topic that it stands for.
            ttl: Seconds that messages through the link are stored for.
            echo: Whether they come back to this connection.

        Raises:
            BadOption: That cannot be the name of a link.
            NotAuthorized: No key allows to publish to *topic*.
        """
        self._check_link(name)
        pairs = [] if ttl is None else [f"ttl={ttl}"]
        pairs += [] if echo else ["me=0"]
        options = f"?{'&'.join(pairs)}" if pairs else ""
        await self._link(name, topic, options)
        self._links[name] = (topic, options)

    def _check_link(self, name: str) -> None:
        if not is_link_name(name):
            raise BadOption(
                "the name of a link is not one or two letters or digits",
                option="name",
                hint="use one like 'a0'",
                backend=self.name,
            )

    async def _link(self, name: str, topic: str, options: str) -> None:
        channel = self.to_wire(topic)
        key = await self._key("ws" if "ttl=" in options else "w", topic, channel)
        await self.request(
            "link",
            {"key": key.text, "channel": channel + options, "name": name, "subscribe": False},
        )

    async def _link_again(self) -> None:
        for name, (topic, options) in self._links.items():
            try:
                await self._link(name, topic, options)
            except (NotAuthorized, EmitterError) as error:
                logger.warning("link %r could not be made again: %s", name, error)

    async def publish_link(self, name: str, payload: bytes) -> Receipt:
        """Publish through a link; the receipt has the topic that it stands for.

        Raises:
            BadOption: That cannot be the name of a link.
            PublishFailed: The broker refused, or the session ended before it answered.
            NotConnected: There is no session; nothing was sent.
        """
        self._check_link(name)
        topic = self._links.get(name, (name, ""))[0]
        if not self.connection.connected:
            raise self._not_connected()
        try:
            _, fault = await self._ask(name, payload)
        except NotConnected:
            raise PublishFailed(
                f"the session ended before the broker confirmed a message to {topic!r}",
                outcome=Outcome.UNKNOWN,
                hint="publish again if a duplicate does no harm",
                backend=self.name,
                topic=topic,
            ) from None
        if fault is not None:
            raise self._rejected(fault, topic, None)
        return Receipt(topic, ConfirmedBy.BROKER)

    def _rejected(self, fault: Fault, topic: str, key: RingKey | None) -> PublishFailed:
        if fault.status == 401:
            if key is not None:
                self._refused(key, topic, "publish")
            return PublishNotAuthorized(
                f"the broker refused a message to {topic!r}: {fault.message}",
                reason=401,
                hint="check the channel, permissions and expiry of its key; the broker's log "
                "says more",
                backend=self.name,
                topic=topic,
            )
        failed = fault.status >= 500
        return PublishFailed(
            f"the broker refused a message to {topic!r}: {fault.message} ({fault.status})",
            outcome=Outcome.UNKNOWN if failed else Outcome.REJECTED,
            reason=fault.status,
            hint="it was delivered, and not stored" if failed else "look into the broker's log",
            backend=self.name,
            topic=topic,
            retryable=failed,
        )

    # --- receiving ----------------------------------------------------------------------------

    def received(self, message: Incoming) -> None:
        """Take a message of a channel, or an answer of the broker."""
        if message.topic.startswith(_PREFIX):
            self._from_broker(message.topic, message.payload)
        elif self.sink is not None:
            self._delivered(message, self.sink)

    @abc.abstractmethod
    def _delivered(self, message: Incoming, sink: Sink) -> None:
        """Take a message of a channel."""

    @abc.abstractmethod
    def _presence_event(self, body: Mapping[str, Any]) -> None:
        """Take a change of presence."""

    def _from_broker(self, topic: str, payload: bytes) -> None:
        """Hand an answer of the broker to its waiter.

        The same text can come from a publisher on a channel below ``emitter/``; then nothing
        waits for it, unless it guesses a packet id.
        """
        try:
            found: object = msgspec.json.decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = None
        if not isinstance(found, dict):
            logger.info("a message on %r is no answer", topic[:64])
            return
        body = cast("dict[str, Any]", found)
        req = body.get("req")
        out = self.connection.pending(req) if isinstance(req, int) else None
        if topic == ERROR_TOPIC:
            self._fault(body, req, out)
        elif out is not None and out in self._asking:
            self._answers[out] = body
        elif topic == f"{_PREFIX}presence/" and "status" not in body:
            self._presence_event(body)

    def _fault(self, body: Mapping[str, Any], req: object, out: Outgoing | None) -> None:
        status = body.get("status")
        fault = Fault(status if isinstance(status, int) else 0, str(body.get("message", ""))[:200])
        if out is not None:
            if not out.abandoned:
                self._faults[out] = fault
        elif isinstance(req, int) and req in self._subscribing:
            self._subscribing[req] = fault
        elif isinstance(req, int):
            # It was an UNSUBSCRIBE: messages of that channel go on until the session ends.
            logger.info("the broker refused a request: %s (%d)", fault.message, fault.status)
        elif req is None:
            self.notice(
                "publish_refused",
                f"the broker refused a message that was sent without confirmation: "
                f"{fault.message} ({fault.status})",
                "",
            )
