"""The part of a device that is the same with threads and with asyncio.

`DeviceCore` holds the constructor, the observers and the rules: which topics are subscribed after
each CONNACK, when ``connect`` is reported, which messages may be sent or are kept meanwhile, which
loss is worth another attempt. It never waits, and knows neither threads nor an event loop;
`device` and `async_device` bring those.

Sources: Losant's documentation of the MQTT broker, losant-mqtt 1.2.1 (``device.py``) for the
names and behaviour that users rely on, losant-mqtt-js for gateways.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final, Literal, get_args

from pubsub_core.errors import ConnectError, NotConnected, ServerRefused, TLSProblem
from pubsub_core.secrets import Secret
from pubsub_losant.commands import BadCommand, parse_command
from pubsub_losant.errors import (
    LosantAuthError,
    LosantConnectError,
    LosantError,
    LosantProtocolError,
    LosantTLSError,
)
from pubsub_losant.pacing_rules import (
    BAN,
    PLATFORM,
    Backoff,
    RateGuard,
    is_platform,
    is_suspect,
    own_windows,
)
from pubsub_losant.states import encode_state, join_states
from pubsub_losant.topics import (
    MAX_PAYLOAD,
    check_custom_topic,
    check_device_id,
    check_publish_topic,
    command_topic,
    hello_topic,
    is_platform_topic,
    split_topic,
    state_topic,
)
from pubsub_mqtt.connection import Request, Session, SessionSettings, Subscribe
from pubsub_mqtt.connection.address import BrokerAddress, TLSSettings, WebSocketTarget
from pubsub_mqtt.connection.transport import PeerClosed
from pubsub_mqtt.errors import CredentialsRefused, ProtocolError, dial_error
from pubsub_mqtt.packets import Incoming

from .link import device_connection
from .observers import Observer, Observers
from .tls import TLSOptions

__all__ = ["DeviceCore", "Transport"]

logger = logging.getLogger("pubsub_losant")

Transport = Literal["tcp", "websockets"]
_PORTS: Final = {
    ("tcp", True): 8883,
    ("tcp", False): 1883,
    ("websockets", True): 443,
    ("websockets", False): 80,
}
_FOR_ALL: Final = frozenset({"connect", "reconnect", "close"})

_SUBACK_PATIENCE: Final = 5.0
_BATCH: Final = 100
_FILTERS_AT_ONCE: Final = 100
_MOST_UNSENT: Final = 4_194_304
_MOST_UNCONFIRMED: Final = 10_000
_BLAME: Final = 2.0


def now_ms() -> int:
    """Return the time of the clock on the wall, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class DeviceCore:
    """A device as the platform knows it; see `Device` and `AsyncDevice`.

    Attributes:
        mqtt_endpoint: Host of the broker when *host* is not given. A dedicated installation
            sets it on the class. While it is the platform's, the environment variable
            ``LOSANT_MQTT_ENDPOINT`` comes before it.
        stats: Counters that only grow, by name.
    """

    mqtt_endpoint: ClassVar[str] = PLATFORM

    def __init__(
        self,
        device_id: str,
        key: str | None,
        secret: str | None,
        secure: bool = True,
        transport: Transport = "tcp",
        *,
        host: str | None = None,
        port: int | None = None,
        ws_path: str = "/mqtt",
        cafile: str | None = None,
        capath: str | None = None,
        cadata: str | bytes | None = None,
        certfile: str | None = None,
        keyfile: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        qos: Literal[0, 1] = 0,
        keep_alive: int = 15,
        connect_timeout: float = 10.0,
        reconnect_min: float = 1.0,
        reconnect_max: float = 30.0,
        retry_first: bool = False,
        buffer_offline: int = 0,
        rate_guard: RateGuard | None = None,
        strict: bool = False,
        raise_observer_errors: bool = False,
    ) -> None:
        """Describe the device; nothing is dialled.

        Args:
            device_id: Its id; 24 hexadecimal digits on the platform.
            key: Access key of the application; None with a client certificate.
            secret: Access secret that belongs to it.
            secure: Whether TLS is used.
            transport: ``"tcp"`` (ports 8883 and 1883) or ``"websockets"`` (443 and 80).
            host: Of the broker, for this device only.
            port: Another than the transport's.
            ws_path: Path of the WebSocket.
            cafile: Trust these authorities only, instead of the system's.
            capath: A folder of them, as OpenSSL wants it.
            cadata: The certificates themselves.
            certfile: Certificate of the device, in place of key and secret.
            keyfile: Private key that belongs to it.
            ssl_context: Used as it is, instead of everything above about certificates.
            qos: Of states and custom messages; commands always come at 0.
            keep_alive: Seconds without sending after which the broker is asked for a sign
                of life, and seconds it may take.
            connect_timeout: Seconds for a dial, and again for the broker's answer.
            reconnect_min: Seconds before the first new attempt after a loss.
            reconnect_max: Most seconds between attempts.
            retry_first: Go on trying when the very first dial fails, instead of raising.
            buffer_offline: Keep that many of the newest states while the link is down.
            rate_guard: The fate of messages over the platform's limits: ``"drop"``, ``"wait"`` or
                ``"off"``; None is ``"drop"`` for the platform itself, else ``"off"``.
            strict: Refuse to observe an event that does not exist.
            raise_observer_errors: Raise an observer's exception, after all were called.

        Raises:
            ValueError: An argument has a value that cannot be.
        """
        self._device_id = check_device_id(device_id)
        tls = TLSOptions(cafile, capath, cadata, certfile, keyfile, ssl_context)
        if not (key and secret) and not (tls.certificate and key is None and secret is None):
            raise ValueError("a device needs an access key and its secret, or a certificate")
        if (transport, bool(secure)) not in _PORTS:
            raise ValueError(f"no transport {transport!r}; there are 'tcp' and 'websockets'")
        if tls.given and not secure:
            raise ValueError("certificates are used with secure=True only")
        if tls.details and ssl_context is not None:
            raise ValueError("give an ssl_context, or files for one, not both")
        if qos not in (0, 1):
            raise ValueError(f"the platform has QoS 0 and 1, not {qos}")
        if rate_guard is not None and rate_guard not in get_args(RateGuard):
            raise ValueError(f"rate_guard is 'drop', 'wait' or 'off', not {rate_guard!r}")
        if keep_alive < 1 or buffer_offline < 0 or not 0 < reconnect_min <= reconnect_max:
            raise ValueError("keep_alive, buffer_offline or reconnect_min is out of range")
        self._key = key
        self._secret = None if secret is None else Secret(secret)
        self._secure = bool(secure)
        self._transport: Transport = transport
        self._host = host
        self._port = port
        self._ws_path = ws_path
        self._tls = tls
        self._qos = qos
        self._keep_alive = keep_alive
        self._connect_timeout = connect_timeout
        self._reconnect = (reconnect_min, reconnect_max)
        self._retry_first = retry_first
        self._rate_guard: RateGuard | None = rate_guard
        self._strict = strict
        self._raise_observer_errors = raise_observer_errors

        self._topic = state_topic(self._device_id)
        self._windows = own_windows()
        self._keeps = buffer_offline
        self._backlog: deque[tuple[str, str]] = deque(maxlen=buffer_offline)
        self._backlog_at: float | None = None
        self._observers = Observers(strict=strict)
        self._subjects: dict[str, tuple[Any, Observers]] = {
            self._device_id: (self, self._observers)
        }
        self._routes: dict[str, str] = {command_topic(self._device_id): self._device_id}
        self._custom: dict[str, None] = {}
        self._events: deque[tuple[str, str, tuple[Any, ...]]] = deque()
        self._observer_error: Exception | None = None
        self.stats: Counter[str] = Counter(bad_commands=0)

        self._endpoint = BrokerAddress()
        self._guard: RateGuard = "off"
        self._connection = device_connection(self._settings())
        self._backoff = Backoff(*self._reconnect)
        self._active = False
        self._online = False
        self._announced = False
        self._fatal: LosantError | None = None
        self._retry_at: float | None = None
        self._session_at = 0.0
        self._answers = 0
        self._answers_by: float | None = None
        self._last_sent: tuple[str, float] = ("", 0.0)
        self._prepare()

    def _prepare(self) -> None:
        """Finish the constructor; subclasses add their attributes here and keep its signature."""

    # --- for users ----------------------------------------------------------------------

    @property
    def device_id(self) -> str:
        """The id of the device."""
        return self._device_id

    def is_connected(self) -> bool:
        """Whether there is a session: the broker accepted, and nothing ended it since."""
        return self._online

    def add_event_observer(self, event_name: str, observer: Observer) -> None:
        """Have *observer* called at each event of that name, after those added before.

        The first argument is always this device:

        * ``connect``, ``reconnect``, ``close``: nothing more. ``connect`` comes once per
          ``connect()``, ``reconnect`` for each later session, ``close`` after ``close()``
          and never after a loss.
        * ``command``: the command, a dictionary.
        * ``disconnect``: why the connection was lost, as text.
        * ``error``: an exception: the end of all attempts, a refused subscription, or what
          another observer raised.
        * ``throttled``: seconds until the platform's limits allow the next message.
        * ``message``: topic and payload of a message from `subscribe`.
        """
        self._observers.add(event_name, observer)

    def remove_event_observer(self, event_name: str, observer: Observer) -> None:
        """Remove an observer; ValueError if it is not there, nothing for an unknown event."""
        self._observers.remove(event_name, observer)

    def __repr__(self) -> str:
        state = "connected" if self._online else "connecting" if self._active else "closed"
        return f"<{type(self).__module__}.{type(self).__name__} {self._device_id} {state}>"

    # --- where to ------------------------------------------------------------------------

    def _settings(self) -> SessionSettings:
        return SessionSettings(
            client_id=self._device_id,
            username=self._key,
            password=self._secret,
            keepalive=self._keep_alive,
            versions=(4,),
        )

    def _target(self) -> BrokerAddress:
        """Return where to dial now; class attribute and environment may change any time."""
        host = self._host
        if host is None:
            host = self.mqtt_endpoint
            if host == PLATFORM:
                host = os.environ.get("LOSANT_MQTT_ENDPOINT") or host
        return BrokerAddress(
            host=host,
            port=self._port or _PORTS[self._transport, self._secure],
            tls=TLSSettings() if self._secure else None,
            websocket=WebSocketTarget(self._ws_path) if self._transport == "websockets" else None,
        )

    def _secure_with(self, context: ssl.SSLContext | None) -> None:
        """Use that context for every dial of this ``connect()``."""
        if context is not None:
            self._endpoint = replace(self._endpoint, tls=TLSSettings(context=context))

    def _open(self) -> None:
        """Begin a ``connect()``: everything of the last one is over."""
        endpoint = self._endpoint = self._target()
        default: RateGuard = "drop" if is_platform(endpoint.host) else "off"
        self._guard = self._rate_guard or default
        connection = self._connection = device_connection(self._settings())
        connection.on_message = self._received
        self._backoff = Backoff(*self._reconnect)
        self._active = True
        self._online = self._announced = False
        self._fatal = None
        self._retry_at = None
        self._events.clear()

    def _over(self) -> None:
        """Forget the connection: closed, or given up."""
        self._active = self._online = False
        self._retry_at = self._answers_by = self._backlog_at = None

    # --- sessions ------------------------------------------------------------------------

    def _emit(self, name: str, *args: Any, device_id: str = "") -> None:
        self._events.append((name, device_id or self._device_id, args))

    def _began(self, _: Session | None = None) -> None:
        """CONNACK 0: subscribe first, then let states go; `_announce` follows the SUBACK."""
        self._online = True
        self._session_at = time.monotonic()
        self._answers = 0
        self._answers_by = self._session_at + _SUBACK_PATIENCE
        own, *others = self._routes
        filters = [*others, *self._custom]
        # The first one alone, so that it has the bytes that losant-mqtt sends.
        self._subscribe([own])
        for start in range(0, len(filters), _FILTERS_AT_ONCE):
            self._subscribe(filters[start : start + _FILTERS_AT_ONCE])
        self._connection.release()
        self._flush_backlog(self._session_at)

    def _subscribe(
        self, filters: list[str], then: Callable[[LosantError | None], None] | None = None
    ) -> None:
        """Send one SUBSCRIBE; *then* is called with its outcome."""
        self._answers += 1
        generation = self._connection.generation

        def answered(request: Request) -> None:
            error: LosantError | None = None
            if request.error is not None:
                error = LosantConnectError("the session ended before the broker answered")
            else:
                refused = [
                    name
                    for name, code in zip(request.filters, request.codes, strict=True)
                    if code >= 0x80
                ]
                if refused:
                    error = LosantError(
                        f"the platform refused the subscription to {', '.join(refused)}",
                        hint="the access key must allow it",
                        retryable=False,
                    )
                    self._emit("error", error)
            if generation == self._connection.generation and self._online:
                self._answers -= 1
                if not self._answers:
                    self._announce()
            if then is not None:
                then(error)

        self._connection.subscribe([Subscribe(name) for name in filters], answered)

    def _announce(self) -> None:
        if self._answers_by is None:
            return  # this session was announced already
        self._answers_by = None
        self._emit("reconnect" if self._announced else "connect")
        self._announced = True

    def _want(self, topic: str, then: Callable[[LosantError | None], None] | None = None) -> None:
        """Subscribe now if there is a session; `_began` does it in any later one."""
        if self._online:
            self._subscribe([topic], then)
        elif then is not None:
            then(None)

    def _drop(self, topic: str) -> None:
        if self._online:
            self._connection.unsubscribe([topic], lambda request: None)

    def _lost(self, error: ConnectError) -> None:
        """A session, or the attempt at one, ended by itself: give up, or say when to retry."""
        now = time.monotonic()
        was, self._online = self._online, False
        self._answers_by = self._backlog_at = None
        if not self._active:
            return
        if was:
            self._emit("disconnect", self._reason(error, now))
        fatal = self._hopeless(error)
        if fatal is not None:
            self._give_up(fatal)
            return
        code = error.reason if isinstance(error, ServerRefused) else 0
        if isinstance(error, ProtocolError) or 5 < (code or 0) < 256:
            self._emit("error", LosantProtocolError(str(error.args[0]), hint=error.hint))
        delay = self._backoff.next(now - self._session_at if was else 0.0)
        dropped = isinstance(error.__cause__, (PeerClosed, ConnectionResetError))
        if was and dropped and is_suspect(self._windows, now):
            delay += BAN
        self._retry_at = now + delay
        logger.info("%s: %s; next attempt in %.1f s", self._device_id, error.args[0], delay)

    def _give_up(self, error: LosantError) -> None:
        logger.error("%s: %s", self._device_id, error)
        self._fatal = error
        self._over()
        self._emit("error", error)

    def _reason(self, error: ConnectError, now: float) -> str:
        text = str(error.args[0])
        topic, at = self._last_sent
        if topic and isinstance(error.__cause__, PeerClosed) and now - at < _BLAME:
            text += (
                f" {now - at:.1f} s after a message to {topic!r}; the platform does that when the "
                "device may not publish there, sends too much, or connects twice"
            )
        return text

    def _hopeless(self, error: ConnectError) -> LosantError | None:
        """Return the error that ends all attempts, or None when the next one can succeed."""
        code = error.reason if isinstance(error, CredentialsRefused | ServerRefused) else 0
        if code in (2, 4, 5):
            return LosantAuthError(code)
        if code == 1:
            return LosantConnectError(
                "the broker does not speak MQTT 3.1.1",
                return_code=1,
                hint="check host and port",
                retryable=False,
            )
        # Without a session before, TLS itself is set up wrongly. Later only a certificate is a
        # reason to give up: a balancer in front of a broker that restarts sends alerts, too.
        unverified = isinstance(error.__cause__, ssl.SSLCertVerificationError)
        if isinstance(error, TLSProblem) and (unverified or not self._announced):
            return LosantTLSError(
                str(error.args[0]), hint="check the host name, or name the right CA with cafile"
            )
        return None

    def _dial_failure(self, exc: BaseException, *, first: bool) -> BaseException | None:
        """Note a failed dial; return the error for the caller of ``connect()``, if any."""
        error = dial_error(exc, str(self._endpoint), backend="losant")
        fatal = self._hopeless(error)
        if fatal is not None:
            fatal.__cause__ = exc
            if first:
                self._over()
            else:
                self._give_up(fatal)
            return fatal
        if first and not self._retry_first:
            self._over()
            if isinstance(exc, OSError):
                return exc
            public = LosantConnectError(str(error.args[0]), hint=error.hint)
            public.__cause__ = exc
            return public
        self._lost(error)
        return None

    def _silent(self) -> ConnectError:
        """Return the loss of a broker that took the connection and does not answer."""
        return ConnectError(
            f"{self._endpoint} did not answer CONNECT within {self._connect_timeout:g} s",
            backend="losant",
        )

    def _due(self, now: float) -> float | None:
        """Do what is due in a session; return seconds until the next such thing."""
        if self._answers_by is not None and now >= self._answers_by:
            logger.warning("%s: no answer to SUBSCRIBE", self._device_id)
            self._announce()
        if self._backlog_at is not None and now >= self._backlog_at:
            self._flush_backlog(now)
        moments = [at for at in (self._answers_by, self._backlog_at) if at is not None]
        return max(min(moments) - now, 0.0) if moments else None

    # --- receiving -----------------------------------------------------------------------

    def _received(self, message: Incoming) -> None:
        payload = message.payload
        if message.serial:  # the platform sends at QoS 0 only; a bridge may not
            self._connection.settle(message.serial)
        device_id = self._routes.get(message.topic)
        if device_id is None:
            self._emit("message", message.topic, payload)
            return
        if not payload:
            return
        try:
            command = parse_command(payload)
        except BadCommand as exc:
            self.stats["bad_commands"] += 1
            logger.warning(
                "a command on %s of %d bytes was dropped: %s", message.topic, len(payload), exc
            )
            return
        self.stats["commands"] += 1
        self._emit("command", command, device_id=device_id)

    def _fire(self, name: str, device_id: str, args: tuple[Any, ...]) -> None:
        """Call the observers of one event; nothing they raise gets out of here."""
        ids = list(self._subjects) if name in _FOR_ALL else [device_id]
        for each in ids:
            subject, observers = self._subjects.get(each, (None, None))
            if observers is None:
                continue  # a peripheral that was removed meanwhile
            for observer in observers.of(name):
                try:
                    self._run(observer, subject, *args)
                except Exception as exc:  # noqa: BLE001 # an observer's, and it is reported
                    self._failed(name, exc)

    def _run(self, observer: Observer, *args: Any) -> None:
        observer(*args)

    def _failed(self, name: str, exc: Exception) -> None:
        self.stats["observer_errors"] += 1
        logger.error("%s: an observer of %r failed", self._device_id, name, exc_info=exc)
        self._observer_error = self._observer_error or exc
        if name not in {"error", "close"}:
            self._emit("error", exc)

    # --- sending -------------------------------------------------------------------------

    def _encode(
        self,
        states: Iterable[tuple[Mapping[str, Any], Any]],
        flow_version: str | None = None,
        meta: Any = None,
    ) -> list[str]:
        now = now_ms()
        return [
            encode_state(state, time_like, now=now, flow_version=flow_version, meta=meta)
            for state, time_like in states
        ]

    @staticmethod
    def _join(texts: list[str]) -> bytes:
        payload = join_states(texts).encode()
        if not texts:
            raise ValueError("there is no state to send")
        return DeviceCore._checked(payload)

    @staticmethod
    def _checked(payload: bytes) -> bytes:
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"a payload of {len(payload)} bytes; the platform takes {MAX_PAYLOAD}")
        return payload

    def _admit(self, topic: str) -> float | None:
        """Return the seconds to wait before one message, or None when it is not to be sent."""
        now = time.monotonic()
        if self._guard == "off":
            self._windows.note(topic, now)
            return 0.0
        delay = self._windows.delay(topic, now)
        if delay:
            self.stats["throttled"] += 1
            self._emit("throttled", delay)
            if self._guard == "drop":
                return None
        self._windows.note(topic, now + delay)
        return delay

    def _keep(self, topic: str, texts: Iterable[str]) -> bool:
        """Keep states until there is a session; return whether that is wanted."""
        if not self._keeps:
            return False
        for text in texts:
            if len(self._backlog) == self._keeps:
                self.stats["dropped"] += 1
            self._backlog.append((topic, text))
        return True

    def _has_room(self, qos: int) -> bool:
        """Whether the connection can take one more message; where not, it is counted."""
        connection = self._connection
        full = connection.unsent > _MOST_UNSENT
        if full or (qos and connection.unfinished >= _MOST_UNCONFIRMED):
            self.stats["dropped"] += 1
            return False
        return True

    def _sent(self, topic: str) -> None:
        self._last_sent = (topic, time.monotonic())
        self.stats["sent"] += 1

    def _write(self, topic: str, payload: bytes, qos: int) -> bool:
        """Hand one message to the connection; return whether it took it."""
        connection = self._connection
        if not self._has_room(qos):
            return False
        try:
            if qos or not connection.publish_now(topic, payload):
                connection.publish(topic, payload, qos=qos)
        except NotConnected:
            return False
        self._sent(topic)
        return True

    def _flush_backlog(self, now: float) -> None:
        """Send the kept states as arrays, in order, as far as the platform's limits allow."""
        self._backlog_at = None
        while self._backlog:
            topic = self._backlog[0][0]
            delay = 0.0 if self._guard == "off" else self._windows.delay(topic, now)
            if delay:
                self._backlog_at = now + delay
                return
            batch, passed = self._next_batch(topic)
            text = join_states(batch)
            if len(text) > MAX_PAYLOAD:  # one state that fits by itself, and in no array
                (text,) = batch
            if not self._write(topic, text.encode(), self._qos):
                self._backlog_at = now + 1.0
                return
            self._windows.note(topic, now)
            for _ in range(len(batch) + len(passed)):
                self._backlog.popleft()
            self._backlog.extendleft(reversed(passed))

    def _next_batch(self, topic: str) -> tuple[list[str], list[tuple[str, str]]]:
        """Return the oldest states of a topic that fit in one message, and those among them.

        At least one state, so that there is always progress.
        """
        batch: list[str] = []
        passed: list[tuple[str, str]] = []
        size = 0
        for item in self._backlog:
            if item[0] != topic:
                passed.append(item)
                continue
            size += len(item[1]) + 2  # brackets, or a comma and a space
            if batch and (len(batch) == _BATCH or size > MAX_PAYLOAD):
                break
            batch.append(item[1])
        return batch, passed

    # --- topics --------------------------------------------------------------------------

    def _custom_payload(self, topic: str, payload: bytes | str, qos: int | None) -> bytes:
        """Check a message to a topic of the user's own; return its payload in bytes."""
        if qos not in (None, 0, 1):
            raise ValueError(f"the platform has QoS 0 and 1, not {qos}")
        check_publish_topic(topic)
        return self._checked(payload.encode() if isinstance(payload, str) else bytes(payload))

    def _hello_topic(self) -> str:
        return hello_topic(self._device_id)

    def _readable(self, topic: str) -> str:
        """Return *topic* if it can be subscribed to.

        Raises:
            ValueError: The platform has no such topic.
        """
        if is_platform_topic(topic):
            parts = split_topic(topic)
            if parts is None or not (
                parts[1] in {"state", "command"} or parts[1].startswith("toAgent/")
            ):
                raise ValueError(f"the platform has no topic {topic!r} to subscribe to")
            return topic
        return check_custom_topic(topic)
