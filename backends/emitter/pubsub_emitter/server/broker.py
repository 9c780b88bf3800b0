"""The rules of an Emitter broker: keys, channels, delivery, storage, requests.

`EmitterDialect` is the service behind `pubsub_emitter.server.EmitterServer`; the sockets are
the endpoint's of `pubsub_mqtt`. It copies what a client can observe of the Go broker and might
rely on, and differs where that is a defect or a hole:

* Subscriptions are kept by their text. Go counts them by the XOR of hashes, so that on one
  connection ``m/n/`` hides ``n/m/``.
* ``K/a/#`` can be unsubscribed as it was subscribed. ``#`` under the default matching rule
  delivers nothing live, here as there; the log says so.
* A ban and its end take effect at once, and the secret of a ban is checked like any master key.
* A link made with an extendable key does not subscribe to the public channel.
* Times to live beyond 32 bits are capped, not cut. Replay is strictly oldest first.
* There is no statistics channel.

A refusal gets the generic answer of the protocol; its reason is in the log of
``pubsub_emitter.broker``, without keys.

Sources: emitter-io/emitter, ``internal/service``, ``internal/broker`` and ``internal/message``.
"""

from __future__ import annotations

import base64
import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Literal

import msgspec

from pubsub_core.keyed import BoundedCache
from pubsub_core.trie import HandlerTrie, Rule
from pubsub_emitter import protocol
from pubsub_emitter.keys import InvalidKey, InvalidTarget, Key, License, Permission
from pubsub_emitter.keys import is_useless_target as useless
from pubsub_emitter.protocol import (
    API,
    BAD_REQUEST,
    ERROR_TOPIC,
    FORBIDDEN,
    LINK_INVALID,
    MAX_PACKET,
    MAX_TTL,
    NOT_FOUND,
    RETAINED_TTL,
    SERVER_ERROR,
    UNAUTHORIZED,
    UNAUTHORIZED_EXTEND,
    BadRequest,
    Channel,
    Fault,
    InvalidChannel,
    answer,
    is_link_name,
    normalize_subscription,
    parse_channel,
    split_share,
)
from pubsub_mqtt.server.endpoint import (
    Client,
    Dialect,
    HttpRequest,
    HttpResponse,
    Leniency,
    Profile,
)
from pubsub_mqtt.server.endpoint.packets import (
    REFUSED,
    Connect,
    Publish,
    Subscribe,
    Unsubscribe,
    encode_publish,
)

from .key_page import page, read_form
from .refusals import RefusalLog, Refused, named, target_refused
from .storage import Storage, StorageFull

__all__ = ["EmitterDialect", "Matcher"]

logger = logging.getLogger("pubsub_emitter.broker")

Matcher = Literal["emitter", "mqtt"]

_IDLE: Final = 120.0
_BAN: Final = "keyban"
_KEPT: Final = 4096
_KEPT_LENGTH: Final = 512

# Limits of this broker, where Go's only limit is the packet.
_MAX_LEVELS: Final = 128
_MAX_LINK: Final = 4096

_PROFILE: Final = Profile(
    # Go checks neither name nor level. Packets of MQTT 5 have another layout.
    levels=frozenset({("MQTT", 4), ("MQTT", 3), ("MQIsdp", 3), ("MQIsdp", 4)}),
    max_packet=MAX_PACKET,
    max_early_packet=MAX_PACKET,
    idle=_IDLE,
    slow_reader="close",
    subprotocols=("mqttv3.1", "mqttv3", "mqtt"),
    text_frames=True,
    leniency=Leniency(subscribe_flags=True, names=True),
)


@dataclass(slots=True)
class _Peer:
    """One connection.

    Attributes:
        id: Shown to others in presence; private channels contain it.
        links: Channels by their short names.
        channels: Subscriptions by the text of their channel: share group and inner channel.
        listening: Channels whose presence changes it wants.
    """

    id: str
    username: str
    links: dict[str, Channel] = field(default_factory=dict[str, Channel])
    channels: dict[str, tuple[str | None, str]] = field(
        default_factory=dict[str, "tuple[str | None, str]"]
    )
    listening: set[str] = field(default_factory=set[str])

    def who(self) -> dict[str, str]:
        """Return how presence shows it."""
        if self.username:
            return {"id": self.id, "username": self.username}
        return {"id": self.id}


class EmitterDialect(Dialect):
    """One broker: its license, who is subscribed, and what is stored.

    Args:
        matcher: ``emitter``, where a subscription also gets everything below its channel, or
            ``mqtt``.
        will_on_disconnect: Whether a will is published after a DISCONNECT, too, as the Go
            broker does; MQTT says that it is not.
        clock: Unix seconds.
    """

    profile = _PROFILE

    def __init__(
        self,
        license: License,
        storage: Storage,
        *,
        matcher: Matcher = "emitter",
        will_on_disconnect: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.license = license
        self.storage = storage
        self.matcher: Matcher = matcher
        self.will_on_disconnect = will_on_disconnect
        self._clock = clock
        rule: Rule = "emitter-mqtt" if matcher == "mqtt" else "emitter"
        self._subscribers: HandlerTrie[Client] = HandlerTrie(rule)
        self._members: HandlerTrie[tuple[str, Client]] = HandlerTrie(rule)
        self._listeners: HandlerTrie[Client] = HandlerTrie(rule)
        self._parsed = BoundedCache[str, Channel](_KEPT)
        self._keys = BoundedCache[str, Key | None](_KEPT)
        self._log = RefusalLog()
        self._requests: Mapping[str, Callable[[Client, bytes, int], bytes]] = {
            "keygen": self._keygen,
            _BAN: self._keyban,
            "link": self._link,
            "me": self._me,
            "presence": self._presence,
            "history": self._history,
        }

    # --- connections --------------------------------------------------------------------

    def connect(self, client: Client, packet: Connect) -> int:
        """Accept every client: keys decide about each operation."""
        identifier = base64.b32encode(secrets.token_bytes(16)).rstrip(b"=").decode()
        client.state = _Peer(identifier, packet.username or "")
        return 0

    def disconnected(self, client: Client, *, clean: bool) -> None:
        """Unsubscribe, tell who listens, and publish the will."""
        peer: _Peer = client.state
        # In Go's order: listeners see the client leave its channels, then the will arrives, and
        # not at the client itself.
        for name in peer.listening:
            self._listeners.remove(name, client)
        for name in list(peer.channels):  # _leave removes from it
            self._leave(client, name)
        will = client.packet.will if client.packet is not None else None
        if will is None or (clean and not self.will_on_disconnect):
            return
        try:
            channel = self._parse(will.topic)
            if not channel.is_static:
                raise Refused(FORBIDDEN, "its channel has a wildcard")
            key = self._authorize(channel, Permission.WRITE)
        except Refused as exc:
            self._log.refused("will", client, exc.why)
            return
        self._deliver(channel.name, will.payload)
        if will.retain and key.permissions & Permission.STORE:
            self._store(client, channel.name, will.payload, RETAINED_TTL)

    # --- publishing ---------------------------------------------------------------------

    def publish(self, client: Client, packet: Publish) -> bool:
        """Deliver and store a message, use a link, or answer a request."""
        try:
            topic = packet.topic
            if len(topic) <= 2:  # the name of a link; a channel has a key of 32 before it
                channel = self._linked(client, topic)
            else:
                channel = self._parse(topic)
            if not channel.is_static:
                raise Refused(FORBIDDEN, "a message to a channel with a wildcard")
            if channel.key == API:
                return self._request(client, channel, packet)
            key = self._authorize(channel, Permission.WRITE)
        except Refused as exc:
            self._log.refused("publish", client, exc.why)
            self._error(client, exc.fault, packet.packet_id)
            return True
        options = channel.options
        excluded = client if options and channel.excludes_publisher else None
        # Delivery comes first and waits for no disk. Subscribers get a message that cannot be
        # stored, too; its publisher is told so by a 500.
        self._deliver(channel.name, packet.payload, excluded=excluded)
        ttl = (channel.ttl or 0) if options else 0
        if ttl <= 0 and packet.retain:
            ttl = RETAINED_TTL
        if ttl <= 0 or not key.permissions & Permission.STORE:
            return True
        if not self._store(client, channel.name, packet.payload, ttl, packet):
            return True
        if not packet.packet_id:
            return True

        # PUBACK means that the message is stored, so it comes when the disk has it. Waiting here
        # would stop all other clients; False tells the endpoint that `acknowledge` follows.
        def stored(error: BaseException | None) -> None:
            if error is not None:
                self._error(client, SERVER_ERROR, packet.packet_id)
            client.acknowledge(packet)

        return self.storage.settled(stored)

    def _linked(self, client: Client, name: str) -> Channel:
        peer: _Peer = client.state
        channel = peer.links.get(name)
        if channel is None:
            raise Refused(BAD_REQUEST, f"no link {named(name)!r} on this connection")
        return channel

    def _store(
        self, client: Client, channel: str, payload: bytes, ttl: int, packet: Publish | None = None
    ) -> bool:
        try:
            self.storage.store(self.license.contract, channel, payload, min(ttl, MAX_TTL))
        except StorageFull as exc:
            logger.warning("a message to %s was not stored: %s", named(channel), exc)
            if packet is not None:
                self._error(client, SERVER_ERROR, packet.packet_id)
            return False
        return True

    def _deliver(self, channel: str, payload: bytes, *, excluded: Client | None = None) -> None:
        receivers: Sequence[Client] = self._subscribers.match(channel)
        if len(receivers) > 1:
            # A client with overlapping channels gets one copy. A dictionary keeps the order of
            # the subscriptions; a set would deliver in another order in each process.
            receivers = tuple(dict.fromkeys(receivers))
        members = self._members.match(channel)
        if members:
            receivers = self._with_members(receivers, members, excluded)
        if not receivers:
            return
        if 2 + len(channel) + len(payload) > MAX_PACKET:
            logger.warning("a message to %s is too long to be delivered", named(channel))
            return
        data = encode_publish(channel, payload)  # once: the packet is the same for all
        for client in receivers:
            if client is not excluded:
                client.send(data)

    @staticmethod
    def _with_members(
        receivers: Sequence[Client],
        members: Sequence[tuple[str, Client]],
        excluded: Client | None,
    ) -> Sequence[Client]:
        """Add one member of each group, chosen at random for every message, as Go does."""
        groups: dict[str, dict[Client, None]] = {}
        for group, client in members:
            # Excluded before the choice: with me=0 another member gets the message.
            if client is not excluded:
                groups.setdefault(group, {})[client] = None
        found = dict.fromkeys(receivers)
        for candidates in groups.values():
            found[random.choice(list(candidates))] = None  # noqa: S311  no secret
        return tuple(found)

    # --- subscribing --------------------------------------------------------------------

    def subscribe(self, client: Client, packet: Subscribe) -> Sequence[int]:
        """Subscribe to each channel whose key allows it; replay what is stored."""
        codes: list[int] = []
        for topic, qos in packet.filters:
            try:
                channel = self._parse(normalize_subscription(topic))
                key = self._authorize(channel, Permission.READ)
            except Refused as exc:
                self._log.refused("subscribe", client, exc.why)
                self._error(client, exc.fault, packet.packet_id)
                codes.append(REFUSED)
                continue
            self._join(client, channel.name)
            if key.permissions & Permission.LOAD:
                self._replay(client, channel)
            codes.append(qos)
        return codes

    def unsubscribe(self, client: Client, packet: Unsubscribe) -> None:
        """Unsubscribe from each channel whose key allows it."""
        for topic in packet.filters:
            try:
                channel = self._parse(normalize_subscription(topic))
                self._authorize(channel, Permission.READ)
            except Refused as exc:
                self._log.refused("unsubscribe", client, exc.why)
                self._error(client, exc.fault, packet.packet_id)
                continue
            self._leave(client, channel.name)

    def _join(self, client: Client, channel: str) -> None:
        peer: _Peer = client.state
        if channel in peer.channels:
            return  # once for the trie, and listeners see no second joining
        if self.matcher == "emitter" and "#" in channel.split("/"):
            logger.warning(
                "%s subscribed to %s, where '#' matches nothing live: with this matching rule "
                "the channel before it gets everything below, too",
                client.name,
                named(channel),
            )
        group, inner = peer.channels[channel] = split_share(channel)
        self._subscribers.add(channel, client)
        if group is not None:
            self._members.add(inner, (group, client))
        self._tell_listeners("subscribe", channel, peer)

    def _leave(self, client: Client, channel: str) -> None:
        peer: _Peer = client.state
        found = peer.channels.pop(channel, None)
        if found is None:
            return
        group, inner = found
        self._subscribers.remove(channel, client)
        if group is not None:
            self._members.remove(inner, (group, client))
        self._tell_listeners("unsubscribe", channel, peer)

    def _replay(self, client: Client, channel: Channel) -> None:
        for message in self.storage.query(
            self.license.contract,
            channel.name,
            last=1 if channel.last is None else channel.last,
            since=channel.since,
            until=channel.until,
        ):
            client.send(encode_publish(message.channel, message.payload))

    # --- rights -------------------------------------------------------------------------

    def _parse(self, topic: str) -> Channel:
        found = self._parsed.get(topic)
        if found is not None:
            return found
        try:
            found = parse_channel(topic)
        except InvalidChannel as exc:
            raise Refused(BAD_REQUEST, str(exc)) from None
        if found.name.count("/") > _MAX_LEVELS:
            raise Refused(BAD_REQUEST, f"a channel of more than {_MAX_LEVELS} segments")
        # Programs publish to few topics. Long texts are not kept: 4,096 of 64 KB would take a
        # quarter of a gigabyte.
        return self._parsed.keep(topic, found) if len(topic) <= _KEPT_LENGTH else found

    def _decrypt(self, text: str) -> Key:
        # Salsa20 in Python takes hundreds of microseconds, more than all the rest of a publish.
        # Texts that are no keys are kept as None, so that repeating one costs a client no less.
        found = self._keys.get(text, ...)
        if found is ...:
            try:
                found = self.license.decrypt(text)
            except InvalidKey:
                found = None
            if len(text) <= _KEPT_LENGTH:
                self._keys.keep(text, found)
        if found is None:
            raise Refused(UNAUTHORIZED, "the key has not the form of one")
        return found

    def _authorize(self, channel: Channel, needed: Permission, *, extend: bool = False) -> Key:
        """Return the key of *channel* if it allows the operation.

        The order of the checks is Go's. Nothing but the decrypted key is cached, so that a ban,
        an expiry and another license take effect with the next packet.

        With *extend* it must be an extendable key, without it must not be one.
        """
        text = channel.key
        if self.storage.is_banned(text):
            raise Refused(UNAUTHORIZED, "the key is banned")
        key = self._decrypt(text)
        self._check_owner(key)
        bits = key.permissions
        if bits & needed != needed:
            raise Refused(UNAUTHORIZED, f"the key has no {(needed & ~bits).letters} permission")
        if not key.allows(channel.name):
            where = named(channel.name)
            raise Refused(UNAUTHORIZED, f"the key's target does not cover {where}")
        if bits & Permission.EXTEND and not extend:
            raise Refused(UNAUTHORIZED_EXTEND, "the key can only make private channels")
        return key

    def _check_owner(self, key: Key) -> None:
        if key.is_expired(self._clock()):
            when = datetime.fromtimestamp(key.expires, UTC)
            raise Refused(UNAUTHORIZED, f"the key expired {when:%Y-%m-%d %H:%M:%S}")
        if key.contract != self.license.contract:
            raise Refused(UNAUTHORIZED, "the key is of another contract")
        if not self.license.owns(key):
            raise Refused(UNAUTHORIZED, "the key's signature differs from the license's")

    # --- requests -----------------------------------------------------------------------

    def _request(self, client: Client, channel: Channel, packet: Publish) -> bool:
        """Answer on the topic of the request, errors included.

        A ban is answered once the disk has it: whoever was told of it may rely on it after a
        crash. The other requests change nothing that is stored.
        """
        topic = f"{API}/{channel.name}{channel.query}"
        req = packet.packet_id
        name = channel.name[:-1]
        handler = self._requests.get(name)
        try:
            if handler is None:
                raise Refused(NOT_FOUND, f"no request {named(name)!r}")
            body = handler(client, packet.payload, req)
            if name == _BAN and not self.storage.settled(
                partial(self._banned, client, topic, body, packet)
            ):
                return False
        except BadRequest as exc:
            self._log.refused(name, client, str(exc))
            body = BAD_REQUEST.body(req)
        except Refused as exc:
            self._log.refused(name, client, exc.why)
            body = exc.fault.body(req)
        self._answer(client, topic, body)
        return True

    def _banned(
        self,
        client: Client,
        topic: str,
        body: bytes,
        packet: Publish,
        error: BaseException | None,
    ) -> None:
        if error is not None:
            body = SERVER_ERROR.body(packet.packet_id)
        self._answer(client, topic, body)
        client.acknowledge(packet)

    def _answer(self, client: Client, topic: str, body: bytes) -> None:
        if 2 + len(topic) + len(body) > MAX_PACKET:
            logger.warning("an answer of %d bytes to %s is too long", len(body), client.name)
            return
        client.send(encode_publish(topic, body))

    def _error(self, client: Client, fault: Fault, req: int) -> None:
        client.send(encode_publish(ERROR_TOPIC, fault.body(req)))

    def _keygen(self, client: Client, payload: bytes, req: int) -> bytes:
        request = protocol.KeygenRequest.decode(payload)
        key = self._decrypt(request.key)
        if key.is_expired(self._clock()):
            raise Refused(UNAUTHORIZED, "the key has expired")
        if key.is_master:
            made, channel = self._make_key(key, request)
        elif key.permissions & Permission.EXTEND:
            made, channel = self._extend(client, key, request)
        else:
            raise Refused(UNAUTHORIZED, "the key is neither a master key nor extendable")
        return answer({"status": 200, "key": made, "channel": channel}, req)

    def _make_key(self, master: Key, request: protocol.KeygenRequest) -> tuple[str, str]:
        if master.contract != self.license.contract:
            raise Refused(NOT_FOUND, "the master key is of another contract")
        self._check_owner(master)
        try:
            made = self.license.make_key(
                request.channel, request.type, ttl=request.ttl, now=self._clock()
            )
        except InvalidTarget as exc:
            raise target_refused(exc) from None
        if useless(request.channel):
            logger.warning(
                "a key for %s allows nothing: no channel fits a target that ends with '+'",
                named(request.channel),
            )
        return made, request.channel

    def _extend(self, client: Client, key: Key, request: protocol.KeygenRequest) -> tuple[str, str]:
        """Make the key of a private channel: one with the connection's id in it."""
        below = request.channel.endswith("#/")
        name = request.channel.removesuffix("#/") if below else request.channel
        parent = self._parse(f"{request.key}/{name}")
        if not parent.is_static:
            raise Refused(BAD_REQUEST, "a private channel with a wildcard")
        self._authorize(parent, Permission.EXTEND, extend=True)
        peer: _Peer = client.state
        channel = f"{parent.name}{peer.id}/{'#/' if below else ''}"
        try:
            made = key.extended(channel, request.type, request.ttl, self._clock())
        except InvalidTarget as exc:
            raise target_refused(exc) from None
        return self.license.encrypt(made), channel

    def _keyban(self, client: Client, payload: bytes, req: int) -> bytes:
        request = protocol.KeybanRequest.decode(payload)
        secret = self._decrypt(request.secret)
        self._check_owner(secret)
        if not secret.is_master:
            raise Refused(UNAUTHORIZED, "the secret is no master key")
        target = self._decrypt(request.target)
        if not self.license.owns(target):
            raise Refused(UNAUTHORIZED, "the key to ban is none of this license")
        self.storage.ban(request.target, banned=request.banned)
        return answer({"status": 200, "banned": request.banned}, req)

    def _link(self, client: Client, payload: bytes, req: int) -> bytes:
        request = protocol.LinkRequest.decode(payload)
        if not is_link_name(request.name):
            raise Refused(LINK_INVALID, "the name of the link is not one or two letters or digits")
        if len(request.key) + len(request.channel) > _MAX_LINK:
            raise Refused(BAD_REQUEST, f"a link of more than {_MAX_LINK} characters")
        channel = self._parse(f"{request.key}/{request.channel}")
        peer: _Peer = client.state
        peer.links[request.name] = channel
        if request.subscribe:
            # Without the right the link is made all the same, and the client is not told, as in Go.
            try:
                self._authorize(channel, Permission.READ)
            except Refused as exc:
                self._log.refused("subscribe through a link", client, exc.why)
            else:
                self._join(client, channel.name)
        shown = channel.name + channel.query
        return answer({"status": 200, "name": request.name, "channel": shown}, req)

    def _me(self, client: Client, payload: bytes, req: int) -> bytes:
        peer: _Peer = client.state
        body: dict[str, Any] = {"status": 200, "id": peer.id}
        if peer.links:
            body["links"] = {
                name: channel.name + channel.query for name, channel in peer.links.items()
            }
        return answer(body, req)

    def _presence(self, client: Client, payload: bytes, req: int) -> bytes:
        request = protocol.PresenceRequest.decode(payload)
        channel = self._presence_channel(request)
        peer: _Peer = client.state
        if request.changes is True:
            peer.listening.add(channel.name)
            self._listeners.add(channel.name, client)
        elif request.changes is False:
            peer.listening.discard(channel.name)
            self._listeners.remove(channel.name, client)
        if not request.status:
            # All other fields have Go's zero value.
            zero = {"time": 0, "event": "", "channel": "", "who": None}
            return answer({"status": 200, **zero}, req)
        return answer({"status": 200, **self._status(channel.name)}, req)

    def _presence_channel(self, request: protocol.PresenceRequest) -> Channel:
        channel = self._parse(f"{request.key}/{request.channel}")
        try:
            self._authorize(channel, Permission.PRESENCE)
        except Refused as exc:
            raise Refused(UNAUTHORIZED, exc.why) from None
        return channel

    def _status(self, channel: str) -> dict[str, Any]:
        receivers: Sequence[Client] = tuple(dict.fromkeys(self._subscribers.match(channel)))
        members = self._members.match(channel)
        if members:
            receivers = self._with_members(receivers, members, None)
        return {
            "time": int(self._clock()),
            "event": "status",
            "channel": channel,
            "who": [client.state.who() for client in receivers],
        }

    def _tell_listeners(self, event: str, channel: str, peer: _Peer) -> None:
        listeners = self._listeners.match(channel)
        if not listeners:
            return
        body = answer(
            {"time": int(self._clock()), "event": event, "channel": channel, "who": peer.who()}
        )
        data = encode_publish(f"{API}/presence/", body)
        for client in dict.fromkeys(listeners):
            client.send(data)

    def _history(self, client: Client, payload: bytes, req: int) -> bytes:
        request = protocol.HistoryRequest.decode(payload)
        channel = self._parse(request.topic)
        self._authorize(channel, Permission.LOAD, extend=True)
        contract, process = self.license.contract, self.storage.process
        found = self.storage.query(
            contract,
            channel.name,
            last=1 if channel.last is None else channel.last,
            since=channel.since,
            until=channel.until,
            before=request.before,
        )
        messages = [
            {
                "id": str(each.id(contract, process)),
                "channel": each.channel,
                "payload": base64.b64encode(each.payload).decode(),
            }
            for each in found
        ]
        return answer({"messages": messages}, req)

    # --- HTTP ---------------------------------------------------------------------------

    def http(self, request: HttpRequest) -> HttpResponse:
        """Answer ``/health``, ``/keygen`` and ``/presence``."""
        match request.method, request.path:
            case "GET", "/health":
                return HttpResponse(200)
            case "GET", "/keygen":
                return page("")
            case "POST", "/keygen":
                return page(self._keygen_form(request.body))
            case _, "/keygen":
                return HttpResponse(405)
            case "POST", "/presence":
                return self._presence_over_http(request.body)
            case _, "/presence":
                return HttpResponse(404)
            case _:
                return HttpResponse(400, b"Bad Request")

    def _keygen_form(self, body: bytes) -> str:
        request = read_form(body)
        if isinstance(request, str):
            return request
        try:
            key = self._decrypt(request.key)
            if not key.is_master:
                raise Refused(UNAUTHORIZED, "the key is no master key")
            self._check_owner(key)
            made, channel = self._make_key(key, request)
        except Refused as exc:
            logger.info("refused a key over HTTP: %s", exc.why)
            return exc.fault.message
        return f"channel: {channel}\nkey    : {made}"

    def _presence_over_http(self, body: bytes) -> HttpResponse:
        try:
            channel = self._presence_channel(protocol.PresenceRequest.decode(body))
        except BadRequest:
            return HttpResponse(400, b"Bad Request")
        except Refused as exc:
            logger.info("refused presence over HTTP: %s", exc.why)
            return HttpResponse(exc.fault.status, exc.fault.message.encode())
        status = msgspec.json.encode(self._status(channel.name))
        return HttpResponse(200, status, "application/json")
