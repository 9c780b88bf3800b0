"""The native client: the API of PyPI ``emitter-io`` 2.3.0, with its defects repaired.

A program written for that SDK runs with its import line changed:

    from pubsub_emitter import Client

Everything has its names, arguments and defaults. New are:

* Every call that asks the broker something returns a `Reply`: ``client.keygen(…).result()``, or
  ``await client.keygen(…)``. The packet id of a request ties the broker's answer to it, so a
  refusal is an exception of the call that caused it, beside `Client.on_error`.
* A subscription comes back after a reconnect, and so do links and presence changes.
* An exception of a handler is logged and harms nothing.

Handlers are called in the thread that runs the loop (`loop_start`, `loop_forever`, `loop`).
They may call everything here, but cannot wait for a `Reply`: the answer would have to come
through the very thread that waits, so that raises at once.

Source: emitter-io 2.3.0, ``emitter/emitter.py``: its public names and its packets.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar, cast

import msgspec

from pubsub_core.errors import BadOption, ConnectError, NotConnected, PayloadTooLarge, PubSubError
from pubsub_core.keyed import BoundedCache
from pubsub_core.secrets import Secret
from pubsub_emitter.errors import EmitterError, refusal
from pubsub_emitter.history_pages import LARGEST_PAGE, HistoryPages
from pubsub_emitter.protocol import MAX_PACKET, build_topic, effective_keepalive, parse_channel
from pubsub_mqtt.connection import Outgoing, Request, Session, SessionSettings, Subscribe, Will
from pubsub_mqtt.connection.address import TLSSettings
from pubsub_mqtt.connection.blocking_driver import BlockingDriver
from pubsub_mqtt.packets import Incoming

from .arguments import (
    Options,
    Payload,
    Seconds,
    Subscription,
    checked_channel,
    checked_group,
    checked_key,
    checked_link,
    endpoint_of,
    payload_bytes,
    split_options,
    subscription_topic,
    unix_seconds,
)
from .handlers import Handler, Handlers, canonical
from .message import EmitterMessage
from .reply import Reply

__all__ = ["Client", "HistoryMessage", "Options", "Reply"]

logger = logging.getLogger("pubsub_emitter")

T = TypeVar("T")

_TIMEOUT: Final = 5.0
_SPECIAL: Final = frozenset({"keygen", "keyban", "me", "presence", "link", "history", "error"})
_REPLAY: Final = frozenset({"last", "from", "until"})
_TOPICS_KEPT: Final = 1024
_SURELY_FITS: Final = MAX_PACKET // 8
_NO_FLAGS: Final = frozenset[str]()


@dataclass(frozen=True, slots=True)
class HistoryMessage:
    """One stored message.

    Attributes:
        id: Give that of the oldest one to `Client.history` for the messages before it.
    """

    id: str
    channel: str
    payload: bytes


class _Pending:
    """A request that was sent."""

    __slots__ = ("finish", "out", "reply", "topic")

    def __init__(
        self, topic: str, reply: Reply[Any], finish: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.topic = topic
        self.reply = reply
        self.finish = finish
        self.out: Outgoing | None = None


class Client:
    """A connection to an Emitter broker, with the names of ``emitter-io``.

    Args:
        timeout: Seconds that a `Reply` is waited for by default.
        restore: Whether subscriptions, links and presence changes come back after a
            reconnect. Stored messages are not replayed again then.
    """

    RETAIN = "+r"
    QOS0 = "+0"
    QOS1 = "+1"

    def __init__(self, *, timeout: float = _TIMEOUT, restore: bool = True) -> None:
        self.timeout = timeout
        self.restore = restore
        self._on: dict[str, Callable[..., Any] | None] = {}
        self._driver: BlockingDriver | None = None
        self._lock = threading.RLock()
        self._messages: Handlers[EmitterMessage] = Handlers()
        self._presence: Handlers[dict[str, Any]] = Handlers()
        self._pending: list[_Pending] = []
        # Errors that came before the acknowledgement they belong to, by packet id.
        self._errors: dict[int, dict[str, Any]] = {}
        self._subscriptions: dict[tuple[str, str], Subscription] = {}
        self._links: dict[str, dict[str, Any]] = {}
        self._watched: dict[str, str] = {}
        # Topics without options by key and channel, since most programs publish to a few.
        self._topics = BoundedCache[tuple[str, str], str](_TOPICS_KEPT)
        self._sessions = 0
        self._connected = False
        self._wants_thread = False
        self._looping = False
        self._calling: set[int] = set()

    # --- handlers -----------------------------------------------------------------------

    @property
    def on_connect(self) -> Callable[[], Any] | None:
        """Called without arguments when the broker has accepted the connection."""
        return self._on.get("connect")

    @on_connect.setter
    def on_connect(self, func: Callable[[], Any] | None) -> None:
        self._on["connect"] = func

    @property
    def on_disconnect(self) -> Callable[[], Any] | None:
        """Called without arguments when the connection has ended."""
        return self._on.get("disconnect")

    @on_disconnect.setter
    def on_disconnect(self, func: Callable[[], Any] | None) -> None:
        self._on["disconnect"] = func

    @property
    def on_message(self) -> Callable[[EmitterMessage], Any] | None:
        """Called with each `EmitterMessage` that no handler of a channel takes."""
        return self._on.get("message")

    @on_message.setter
    def on_message(self, func: Callable[[EmitterMessage], Any] | None) -> None:
        self._on["message"] = func

    @property
    def on_error(self) -> Callable[[dict[str, Any]], Any] | None:
        """Called with the object of everything the broker refuses."""
        return self._on.get("error")

    @on_error.setter
    def on_error(self, func: Callable[[dict[str, Any]], Any] | None) -> None:
        self._on["error"] = func

    @property
    def on_presence(self) -> Callable[[dict[str, Any]], Any] | None:
        """Called with presence answers and events that no handler of a channel takes."""
        return self._on.get("presence")

    @on_presence.setter
    def on_presence(self, func: Callable[[dict[str, Any]], Any] | None) -> None:
        self._on["presence"] = func

    @property
    def on_keygen(self) -> Callable[[dict[str, Any]], Any] | None:
        """Called with ``{"status", "key", "channel"}``, or with an error's object."""
        return self._on.get("keygen")

    @on_keygen.setter
    def on_keygen(self, func: Callable[[dict[str, Any]], Any] | None) -> None:
        self._on["keygen"] = func

    @property
    def on_keyban(self) -> Callable[[dict[str, Any]], Any] | None:
        """Called with ``{"status", "banned"}``, or with an error's object."""
        return self._on.get("keyban")

    @on_keyban.setter
    def on_keyban(self, func: Callable[[dict[str, Any]], Any] | None) -> None:
        self._on["keyban"] = func

    @property
    def on_me(self) -> Callable[[dict[str, Any]], Any] | None:
        """Called with ``{"status", "id", "links"}``, or with an error's object."""
        return self._on.get("me")

    @on_me.setter
    def on_me(self, func: Callable[[dict[str, Any]], Any] | None) -> None:
        self._on["me"] = func

    @property
    def on_link(self) -> Callable[[dict[str, Any]], Any] | None:
        """Called with ``{"status", "name", "channel"}``, or with an error's object."""
        return self._on.get("link")

    @on_link.setter
    def on_link(self, func: Callable[[dict[str, Any]], Any] | None) -> None:
        self._on["link"] = func

    def remove_handler(
        self, channel: str, handler: Callable[[EmitterMessage], Any] | None = None
    ) -> int:
        """Remove one handler of a channel, or all; the subscription stays."""
        return self._messages.remove(channel, handler)

    def remove_presence_handler(
        self, channel: str, handler: Callable[[dict[str, Any]], Any] | None = None
    ) -> int:
        """Remove one presence handler of a channel, or all; events go on."""
        return self._presence.remove(channel, handler)

    # --- connection ---------------------------------------------------------------------

    def connect(
        self,
        host: str = "api.emitter.io",
        port: int = 443,
        secure: bool = True,
        keepalive: int = 30,
        username: str | None = None,
        *,
        password: str | None = None,
        client_id: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        insecure_skip_verify: bool = False,
        websocket: bool = False,
        will: Will | None = None,
    ) -> None:
        """Connect, and return when the broker has accepted; run a loop afterwards.

        `on_connect` is called by the loop, so it may be set after this.

        *host* is a name or address, ``host:port``, or a URL with ``mqtt``, ``mqtts``, ``tcp``,
        ``ws`` or ``wss``, which then says whether TLS and WebSocket are used. The default is
        the SDK's; that service was shut down in 2019. *username* is shown in presence. The topic
        of a *will* is ``key/channel/``; the broker publishes it when the connection ends, for any
        reason. A *keepalive* of 0 or of more than 90 seconds is 90: brokers close links that
        were silent for 120.

        Raises:
            BadOption: *keepalive* is negative, or *host* is none.
            ConnectError: Typed by what went wrong; nothing is left open.
        """
        if keepalive < 0:
            raise BadOption(
                f"keepalive={keepalive} does not fit",
                option="keepalive",
                hint="use seconds, 0 or more",
                backend="emitter",
            )
        endpoint = endpoint_of(
            host,
            port,
            secure=secure,
            websocket=websocket,
            tls=TLSSettings(
                ca_file=ca_file,
                cert_file=cert_file,
                key_file=key_file,
                insecure_skip_verify=insecure_skip_verify,
            ),
        )
        settings = SessionSettings(
            client_id=client_id,
            username=username,
            password=None if password is None else Secret(password),
            keepalive=effective_keepalive(keepalive),
            versions=(4,),
            will=will,
        )
        self._drop_driver()
        driver = BlockingDriver(settings, endpoint, backend="emitter")
        driver.on_session = self._on_session
        driver.on_message = self._on_incoming
        driver.on_lost = self._on_lost
        self._driver = driver
        self._sessions = 0
        try:
            driver.connect()
        except BaseException:
            self._driver = None
            raise
        driver.connection.events.append(partial(self._call, "connect"))
        if self._wants_thread:
            self._start(driver)

    def disconnect(self) -> None:
        """Say DISCONNECT and end the connection; the loops return. Legal in any state."""
        driver = self._driver
        if driver is None:
            return
        was_connected = self._connected
        driver.disconnect()
        self._forget(NotConnected("the client was disconnected", backend="emitter"))
        self._rest()
        if was_connected:
            self._call("disconnect")

    def _drop_driver(self) -> None:
        """End an earlier connection, so that nothing of it is left."""
        driver, self._driver = self._driver, None
        if driver is None:
            return
        driver.disconnect()
        if self._looping:
            driver.loop_stop()
            self._looping = False
        driver.paho.rest()
        self._forget(NotConnected("the client connected again", backend="emitter"))

    def _rest(self) -> None:
        """Close paho's wake-up sockets, once nothing runs any more."""
        if self._driver is not None and not self._looping and not self._connected:
            self._driver.paho.rest()

    def loop(self, timeout: float = 1.0) -> None:
        """Do what is due, waiting up to *timeout* seconds for it."""
        driver = self._required()
        driver.connection.dispatch()
        driver.loop(timeout)

    def loop_forever(self) -> None:
        """Run until `disconnect` is called, reconnecting when the connection is lost."""
        driver = self._required()
        self._looping = True
        try:
            driver.connection.dispatch()
            driver.loop_forever()
        finally:
            self._looping = False

    def loop_start(self) -> None:
        """Run the loop in a thread; may be called before `connect`."""
        self._wants_thread = True
        if self._driver is not None and not self._looping:
            self._start(self._driver)

    def _start(self, driver: BlockingDriver) -> None:
        driver.loop_start()
        driver.paho.wake()  # to have what connect() left told at once
        self._looping = True

    def loop_stop(self) -> None:
        """Stop that thread; the connection stays."""
        self._wants_thread = False
        if self._driver is not None and self._looping:
            self._driver.loop_stop()
        self._looping = False
        self._rest()

    def _required(self) -> BlockingDriver:
        if self._driver is None:
            raise NotConnected("call connect() first", backend="emitter")
        return self._driver

    @property
    def connected(self) -> bool:
        """Whether the broker has accepted the connection and it has not ended."""
        return self._connected

    # --- publishing ---------------------------------------------------------------------

    def publish(
        self, key: str, channel: str, message: Payload, options: Options = None
    ) -> Reply[None]:
        """Publish to a channel; options are those of the ``with_…`` helpers.

        The reply is there when the broker has confirmed (`with_at_least_once`), else as soon
        as the message is sent.

        Raises:
            BadOption: As from every call here: a key, channel, share group, link name or option
                is empty, or would be taken for another. Nothing was sent.
        """
        if options:
            header, query = split_options(options)
            topic = build_topic(checked_key(key), checked_channel(channel), query)
        else:
            header = _NO_FLAGS
            topic = self._topics.get((key, channel), "") or self._new_topic(key, channel)
        return self._publish(topic, message, header, channel)

    def _new_topic(self, key: str, channel: str) -> str:
        topic = build_topic(checked_key(key), checked_channel(channel))
        return self._topics.keep((key, channel), topic)

    def publish_with_link(
        self, link: str, message: Payload, options: Options = None
    ) -> Reply[None]:
        """Publish through a link; only retain and the quality of service have an effect here."""
        header, _ = split_options(options)
        return self._publish(checked_link(link), message, header, f"link {link}")

    def _publish(
        self, topic: str, message: Payload, header: frozenset[str], shown: str
    ) -> Reply[None]:
        reply: Reply[None] = Reply(self, "a message to " + shown)
        payload = payload_bytes(message)
        if len(topic) + len(payload) > _SURELY_FITS:
            error = _too_large(topic, payload)
            if error is not None:
                logger.warning("%s was not sent: %s", reply.what, error)
                reply.fail(error)
                return reply
        try:
            self._required().publish(
                topic,
                payload,
                qos=1 if self.QOS1 in header else 0,
                retain=self.RETAIN in header,
                on_done=partial(self._published, reply),
            )
        except PubSubError as exc:
            reply.fail(_without_key(exc, reply.what))
        return reply

    def _published(self, reply: Reply[None], out: Outgoing) -> None:
        if out.error is not None:
            reply.fail(_without_key(out.error, reply.what))
            return
        if out.packet_id:
            with self._lock:
                body = self._errors.pop(out.packet_id, None)
            if body is not None:
                reply.fail(_refusal(body, reply.what))
                return
        reply.resolve(None)

    # --- subscribing --------------------------------------------------------------------

    def subscribe(
        self,
        key: str,
        channel: str,
        optional_handler: Callable[[EmitterMessage], Any] | None = None,
        options: Options = None,
    ) -> Reply[None]:
        """Subscribe to a channel, and with the broker's default rule to all below it.

        A handler is called for this channel and those below it; several may stand under one
        channel, each of them once, however often it is given. It goes again if the broker
        refuses. Messages without any handler go to `on_message`.

        Raises:
            ValueError: ``#`` with options, which no MQTT client can send.
        """
        return self._subscribe(key, channel, "", optional_handler, options)

    def subscribe_with_group(
        self,
        key: str,
        channel: str,
        share_group: str,
        optional_handler: Callable[[EmitterMessage], Any] | None = None,
        options: Options = None,
    ) -> Reply[None]:
        """Subscribe as a member of a share group: each message goes to one of its members.

        The key's target must cover ``$share/<group>/<channel>/``, for example ``$share/#/``.
        """
        group = checked_group(share_group)
        return self._subscribe(key, channel, group, optional_handler, options)

    def _subscribe(
        self,
        key: str,
        channel: str,
        group: str,
        call: Callable[[EmitterMessage], Any] | None,
        options: Options,
    ) -> Reply[None]:
        _, query = split_options(options)
        wanted = Subscription(checked_key(key), checked_channel(channel), group, tuple(query))
        topic = subscription_topic(wanted)
        handler = None if call is None else self._messages.add(channel, call, wanted.group)
        place = (canonical(channel), wanted.group)
        reply: Reply[None] = Reply(self, f"a subscription to {channel}")

        def accepted() -> None:
            self._subscriptions[place] = wanted

        def refused() -> None:
            if handler is not None:
                self._messages.discard(handler)

        self._send_subscribe(topic, reply, accepted, refused)
        return reply

    def _send_subscribe(
        self,
        topic: str,
        reply: Reply[None],
        accepted: Callable[[], None],
        refused: Callable[[], None],
    ) -> None:
        def done(request: Request) -> None:
            with self._lock:
                body = self._errors.pop(request.packet_id, None)
            if request.error is not None:
                refused()
                reply.fail(_without_key(request.error, reply.what))
            elif any(code >= 0x80 for code in request.codes):
                refused()
                reply.fail(_refusal(body or {}, reply.what))
            else:
                accepted()
                reply.resolve(None)

        try:
            self._required().subscribe(Subscribe(topic, 0), on_done=done)
        except PubSubError as exc:
            refused()
            reply.fail(_without_key(exc, reply.what))

    def unsubscribe(self, key: str, channel: str) -> Reply[None]:
        """Unsubscribe from a channel and remove its handlers; those of share groups stay."""
        return self._unsubscribe(key, channel, "")

    def unsubscribe_with_group(self, key: str, channel: str, share_group: str) -> Reply[None]:
        """Leave a share group; handlers of an ordinary subscription to the channel stay."""
        return self._unsubscribe(key, channel, checked_group(share_group))

    def _unsubscribe(self, key: str, channel: str, group: str) -> Reply[None]:
        reply: Reply[None] = Reply(self, f"unsubscribing from {channel}")
        topic = subscription_topic(
            Subscription(checked_key(key), checked_channel(channel), group, ())
        )
        place = (canonical(channel), group)
        # Those of a subscription that follows at once stay.
        claimed = self._messages.claimed(channel, group)

        def done(request: Request) -> None:
            with self._lock:
                body = self._errors.pop(request.packet_id, None)
            if request.error is not None:
                reply.fail(_without_key(request.error, reply.what))
            elif body is not None:
                reply.fail(_refusal(body, reply.what))
            else:
                self._subscriptions.pop(place, None)
                self._unsubscribe_links(place)
                for handler, claims in claimed:
                    self._messages.discard(handler, claims)
                reply.resolve(None)

        try:
            self._required().unsubscribe(topic, on_done=done)
        except PubSubError as exc:
            reply.fail(_without_key(exc, reply.what))
        return reply

    def _unsubscribe_links(self, place: tuple[str, str]) -> None:
        """Have the links to a channel restored without the subscription they came with."""
        for name, body in list(self._links.items()):
            channel = body["channel"].partition("?")[0]
            if body["subscribe"] and (canonical(channel), "") == place:
                self._links[name] = body | {"subscribe": False}

    # --- requests -----------------------------------------------------------------------

    def keygen(self, key: str, channel: str, permissions: str, ttl: int = 0) -> Reply[str]:
        """Have a key made; the reply is the key.

        Args:
            key: A master key. An extendable one makes a private channel instead; see
                `on_keygen` for its name.
            channel: Must end with ``/``: ``a/b/`` for that channel, ``a/b/#/`` for those below,
                too. Reading reaches below in any case; the README says how far.
            permissions: Letters: ``r`` subscribe, ``w`` publish, ``s`` store, ``l`` load,
                ``p`` presence, ``e`` extend.
            ttl: Seconds until it expires; 0 for never.
        """
        body = {"key": checked_key(key), "channel": channel, "type": permissions, "ttl": ttl}
        return self._request("keygen", body, f"a key for {channel}", lambda got: str(got["key"]))

    def keyban(self, master_key: str, target_key: str, ban: bool) -> Reply[bool]:
        """Ban a key or lift its ban; the reply is whether it is banned now."""
        body = {
            "secret": checked_key(master_key, "master_key"),
            "target": checked_key(target_key, "target_key"),
            "banned": ban,
        }
        return self._request("keyban", body, "a ban", lambda got: bool(got["banned"]))

    def link(
        self,
        key: str,
        channel: str,
        name: str,
        subscribe: bool,
        options: Options = None,
    ) -> Reply[dict[str, Any]]:
        """Give a channel a name of one or two letters for `publish_with_link`.

        Messages through it have the options given here, and a topic of two bytes instead of
        the key. With *subscribe* the channel is subscribed to as well, where the key may.
        """
        _, query = split_options(options)
        body = {
            "key": checked_key(key),
            "channel": build_topic("", checked_channel(channel), query),
            "name": checked_link(name),
            "subscribe": subscribe,
        }

        def made(got: dict[str, Any]) -> dict[str, Any]:
            self._links[name] = body
            return got

        return self._request("link", body, f"link {name}", made)

    def me(self) -> Reply[dict[str, Any]]:
        """Ask for the id of this connection and its links."""
        return self._request("me", None, "me", lambda got: got)

    def presence(
        self,
        key: str,
        channel: str,
        status: bool = False,
        changes: bool | None = None,
        optional_handler: Callable[[dict[str, Any]], Any] | None = None,
    ) -> Reply[dict[str, Any]]:
        """Ask who is subscribed to a channel (*status*), or for changes of that from now on.

        *changes* True starts events, False stops them, None leaves them as they are (the SDK's
        default of False stopped them). Answers and events of the channel and those below it go
        to *optional_handler*, else to `on_presence`.
        """
        body: dict[str, Any] = {
            "key": checked_key(key),
            "channel": checked_channel(channel),
            "status": status,
        }
        handler = None
        if optional_handler is not None:
            handler = self._presence.add(channel, optional_handler)
        if changes is not None:
            body["changes"] = changes

        def answered(got: dict[str, Any]) -> dict[str, Any]:
            if changes:
                self._watched[canonical(channel)] = key
            elif changes is False:
                self._watched.pop(canonical(channel), None)
            return got

        reply = self._request("presence", body, f"presence of {channel}", answered)
        if handler is not None:
            self._undo(reply, handler)
        return reply

    def _undo(self, reply: Reply[Any], handler: Handler[dict[str, Any]]) -> None:
        def done(_: Reply[Any]) -> None:
            if isinstance(reply.exception(), EmitterError):
                self._presence.discard(handler)

        reply.add_done_callback(done)

    def history(
        self, key: str, channel: str, options: Options = None, *, before: str = ""
    ) -> Reply[list[HistoryMessage]]:
        """Ask for stored messages, oldest first: one, unless `with_last` says more.

        With *before*, the id of the oldest message known already, those before it come. What does
        not fit into one answer of the broker is asked for in several.
        """
        _, query = split_options(options)
        key, channel = checked_key(key), checked_channel(channel)
        last = parse_channel(build_topic("k", "c", query)).last
        wanted = 1 if last is None else last
        window = [pair for pair in query if pair[0] != "last"]
        pages = HistoryPages(key, channel, window, min(wanted, LARGEST_PAGE), before)
        reply: Reply[list[HistoryMessage]] = Reply(self, f"history of {channel}")
        self._next_page(pages, wanted, [], reply)
        return reply

    def _next_page(
        self,
        pages: HistoryPages,
        wanted: int,
        found: list[HistoryMessage],
        reply: Reply[list[HistoryMessage]],
    ) -> None:
        """Ask for a page; its answer asks for the next, in the thread that reads."""

        def arrived(answered: Reply[dict[str, Any] | None]) -> None:
            error = answered.exception()
            if error is not None:
                reply.fail(error)
                return
            found[:0] = [
                HistoryMessage(each.text, each.channel, each.payload)
                for each in pages.take(answered.result())
            ]
            missing = wanted - len(found)
            if missing > 0 and not pages.ended:
                pages.size = min(pages.size, missing)
                self._next_page(pages, wanted, found, reply)
            elif pages.too_long and not found:
                reply.fail(
                    EmitterError(
                        f"a stored message of {reply.what} is too long for an answer",
                        hint="neither it nor older ones can be read; name its time with "
                        "with_until to get those before it",
                        retryable=False,
                    )
                )
            else:
                reply.resolve(found[max(-missing, 0) :])

        page: Reply[dict[str, Any] | None] = self._request(
            "history", pages.body(), reply.what, lambda got: got, lambda: None
        )
        page.add_done_callback(arrived)

    def _request(
        self,
        name: str,
        body: dict[str, Any] | None,
        what: str,
        finish: Callable[[dict[str, Any]], T],
        unanswered: Callable[[], T] | None = None,
    ) -> Reply[T]:
        """Publish a request at QoS 1: the answer names its packet id.

        Where the broker confirms without an answer, *unanswered* gives it, if there is one.
        """
        reply: Reply[T] = Reply(self, what)
        topic = f"emitter/{name}/"
        pending = _Pending(topic, reply, finish)
        payload = b"" if body is None else msgspec.json.encode(body)
        if (error := _too_large(topic, payload)) is not None:
            reply.fail(error)
            return reply

        def done(out: Outgoing) -> None:
            with self._lock:
                if pending in self._pending:
                    self._pending.remove(pending)
            if out.error is not None:
                reply.fail(_without_key(out.error, what))
            elif unanswered is not None:
                reply.resolve(unanswered())
            else:  # the answer comes before the acknowledgement, or not at all
                reply.fail(EmitterError(f"the broker did not answer {what}", retryable=True))

        # The answer may be there before publish() returns here.
        with self._lock:
            self._pending.append(pending)
            try:
                pending.out = self._required().publish(topic, payload, qos=1, on_done=done)
            except PubSubError as exc:
                self._pending.remove(pending)
                reply.fail(_without_key(exc, what))
        return reply

    # --- options ------------------------------------------------------------------------

    @staticmethod
    def with_ttl(ttl: int) -> str:
        """Store the message for *ttl* seconds; needs a key with ``s``."""
        return f"ttl={ttl}"

    @staticmethod
    def with_last(last: int) -> str:
        """Replay up to *last* stored messages on subscribing; needs a key with ``l``."""
        return f"last={last}"

    @staticmethod
    def with_from(since: Seconds) -> str:
        """Replay messages from then on; unix seconds or a datetime (naive ones are UTC).

        Combine it with `with_last`: without, one message is replayed.

        Raises:
            ValueError: Before 2018 or after 2066, which brokers ignore without a word.
        """
        return f"from={unix_seconds(since)}"

    @staticmethod
    def with_until(until: Seconds) -> str:
        """Replay messages up to then, inclusive; as `with_from`."""
        return f"until={unix_seconds(until)}"

    @staticmethod
    def without_echo() -> str:
        """Do not deliver the message to this connection."""
        return "me=0"

    @staticmethod
    def with_retain() -> str:
        """Store the message for 30 days. It replaces nothing: this is not MQTT's retain."""
        return Client.RETAIN

    @staticmethod
    def with_at_most_once() -> str:
        """Send without confirmation."""
        return Client.QOS0

    @staticmethod
    def with_at_least_once() -> str:
        """Have the broker confirm that it has taken the message."""
        return Client.QOS1

    # --- what arrives -------------------------------------------------------------------

    def pump(self, reply: Reply[Any], timeout: float) -> None:
        """Make sure that somebody reads: raise in a handler, run the loop where none does.

        For `Reply.result`.
        """
        if reply.done():
            return
        if threading.get_ident() in self._calling:
            raise RuntimeError(
                "a handler cannot wait for the broker: its thread reads the broker's answers; "
                "use add_done_callback, or a thread of your own"
            )
        if self._looping or self._driver is None:
            return
        deadline = time.monotonic() + timeout
        self._driver.connection.dispatch()
        while not reply.done() and time.monotonic() < deadline:
            if self._driver.loop(0.05):
                return

    def _call(self, event: str, *arguments: Any) -> None:
        handler = self._on.get(event)
        if handler is not None:
            self._run(handler, *arguments)

    def _run(self, handler: Callable[..., Any], *arguments: Any) -> None:
        """Call a handler; its exception is logged and ends nothing."""
        ident = threading.get_ident()
        outer = ident in self._calling
        self._calling.add(ident)
        try:
            handler(*arguments)
        except Exception:
            logger.exception("a handler failed")
        finally:
            if not outer:
                self._calling.discard(ident)

    def _on_session(self, session: Session) -> None:
        self._connected = True
        self._sessions += 1
        if self._sessions == 1:
            return  # connect() has its event told by the loop
        if self.restore:
            self._restore()
        self._call("connect")

    def _restore(self) -> None:
        """Restore subscriptions, links and presence changes; the broker keeps nothing."""
        for wanted in list(self._subscriptions.values()):
            kept = tuple(pair for pair in wanted.options if pair[0] not in _REPLAY)
            if "#" not in wanted.channel.split("/"):
                kept += (("last", "0"),)
            topic = subscription_topic(Subscription(wanted.key, wanted.channel, wanted.group, kept))
            reply: Reply[None] = Reply(self, f"a subscription to {wanted.channel}")
            place = (canonical(wanted.channel), wanted.group)

            def refused(place: tuple[str, str] = place) -> None:
                if self._connected:
                    self._subscriptions.pop(place, None)

            self._send_subscribe(topic, reply, lambda: None, refused)
        for name, body in list(self._links.items()):
            self._request("link", body, f"link {name}", lambda got: got)
        for channel, key in list(self._watched.items()):
            body = {"key": key, "channel": channel, "status": False, "changes": True}
            self._request("presence", body, f"presence of {channel}", lambda got: got)

    def _on_lost(self, error: ConnectError) -> None:
        was_connected, self._connected = self._connected, False
        logger.warning("the connection was lost: %s", error)
        lost = NotConnected("the connection ended before the answer", backend="emitter")
        with self._lock:
            pending, self._pending = self._pending, []
            self._errors.clear()
        for each in pending:
            each.reply.fail(lost)
        if was_connected:
            self._call("disconnect")

    def _forget(self, error: PubSubError) -> None:
        self._connected = False
        with self._lock:
            pending, self._pending = self._pending, []
            self._errors.clear()
            self._subscriptions.clear()
            self._links.clear()
            self._watched.clear()
        for each in pending:
            each.reply.fail(error)

    def _on_incoming(self, message: Incoming) -> None:
        name = _api(message.topic)
        if name is None:
            arrived = EmitterMessage(message.topic, message.payload)
            handlers = self._messages.find(message.topic)
            for handler in handlers:
                self._run(handler, arrived)
            if not handlers:
                self._call("message", arrived)
            return
        try:
            found: object = msgspec.json.decode(message.payload)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            found = None
        if not isinstance(found, dict):
            logger.warning("an answer on emitter/%s/ is no JSON object", name)
            return
        body = cast("dict[str, Any]", found)
        status = body.get("status")
        failed = isinstance(status, int) and status >= 400
        self._answer(message.topic, body, failed=failed, of_packet=name == "error")
        if name == "error":
            self._call("error", body)
            return
        shown = {field: value for field, value in body.items() if field != "req"}
        if name == "presence":
            if not failed:
                self._tell_presence(shown)
        elif name != "history":
            self._call(name, shown)
        if failed:
            self._call("error", body)

    def _answer(self, topic: str, body: dict[str, Any], *, failed: bool, of_packet: bool) -> None:
        """Give an answer to the request, or an error to the packet, that it is about."""
        req = body.get("req")
        if not isinstance(req, int) or not req:
            return
        with self._lock:
            pending = next(
                (
                    each
                    for each in self._pending
                    if each.out is not None and each.out.packet_id == req and each.topic == topic
                ),
                None,
            )
            if pending is not None:
                self._pending.remove(pending)
            elif failed and of_packet:
                self._errors[req] = body
        if pending is None:
            return
        if failed:
            pending.reply.fail(_refusal(body, pending.reply.what))
            return
        shown = {field: value for field, value in body.items() if field != "req"}
        try:
            pending.reply.resolve(pending.finish(shown))
        except (KeyError, TypeError, ValueError) as exc:
            error = EmitterError(f"the answer to {pending.reply.what} cannot be read")
            error.__cause__ = exc
            pending.reply.fail(error)

    def _tell_presence(self, body: dict[str, Any]) -> None:
        channel = body.get("channel")
        if not isinstance(channel, str) or not body.get("event"):
            return  # the answer to a request without status says nothing
        handlers = self._presence.find(channel)
        for handler in handlers:
            self._run(handler, body)
        if not handlers:
            self._call("presence", body)

    # Name of emitter-io 1.x.
    def publishWithLink(self, link: str, message: Payload) -> Reply[None]:  # noqa: N802
        """Do as `publish_with_link`."""
        return self.publish_with_link(link, message)

    def __repr__(self) -> str:
        return f"<pubsub_emitter.Client {'connected' if self._connected else 'not connected'}>"


def _api(topic: str) -> str | None:
    """Return which request a topic answers; None for a user's channel."""
    if not topic.startswith("emitter/"):
        return None
    name, _, rest = topic[8:].partition("/")
    return name if name in _SPECIAL and (not rest or rest.startswith("?")) else None


def _too_large(topic: str, payload: bytes) -> PayloadTooLarge | None:
    """Return an error for a packet that no broker takes: it would close the connection.

    The client would then send it again after every reconnect.
    """
    limit = MAX_PACKET - len(topic.encode()) - 4  # the topic's length, and a packet id
    if len(payload) <= limit:
        return None
    return PayloadTooLarge(size=len(payload), limit=limit, backend="emitter")


def _refusal(body: Mapping[str, Any], what: str) -> EmitterError:
    status = body.get("status")
    message = body.get("message")
    return refusal(
        status if isinstance(status, int) else 0,
        message if isinstance(message, str) else "the broker gave no reason",
        what,
    )


def _without_key(error: PubSubError, what: str) -> PubSubError:
    """Return an error like *error* whose text and cause hold no topic, and so no key."""
    if isinstance(error, NotConnected):
        return NotConnected(
            f"there is no connection for {what}",
            hint="call connect(), or wait for on_connect",
            backend="emitter",
        )
    return EmitterError(f"{what} failed: {error.code}", retryable=error.retryable)
