"""HTTP and WebSocket on the port of an endpoint; no I/O.

A `WebPeer` takes over when the first byte of a connection is not MQTT's. It parses one HTTP
request, and either answers it or becomes a WebSocket that carries a stream of MQTT packets;
frames and packets have no relation to each other.

Sources: RFC 9112 (HTTP/1.1, by h11), RFC 6455 (WebSocket, by wsproto).
"""

from __future__ import annotations

import http
import logging
from collections.abc import Callable
from typing import Final, cast

import h11
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from pubsub_mqtt.errors import printable

from .profile import HttpRequest, HttpResponse, Profile

__all__ = ["HTTP_METHODS", "WebPeer"]

logger = logging.getLogger("pubsub_mqtt.server.endpoint")

HTTP_METHODS: Final = frozenset(b"OGHPDTC")
"""First bytes of OPTIONS, GET, HEAD, POST, PATCH, PUT, DELETE, TRACE and CONNECT."""

_MAX_HEAD: Final = 16_384
_MAX_BODY: Final = 65_536


class WebPeer:
    """One connection that began as HTTP.

    Args:
        answer: Makes the response to a request that asks for no WebSocket.
    """

    def __init__(self, profile: Profile, answer: Callable[[HttpRequest], HttpResponse]) -> None:
        self._profile = profile
        self._answer = answer
        self._http: h11.Connection | None = h11.Connection(
            h11.SERVER, max_incomplete_event_size=_MAX_HEAD
        )
        self._socket: WSConnection | None = None
        self._request: h11.Request | None = None
        self._body: list[bytes] = []
        self._body_size = 0
        self.done = False

    @property
    def is_websocket(self) -> bool:
        """Whether the upgrade was accepted."""
        return self._socket is not None

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Take what arrived; return bytes of MQTT, and what to send back.

        After `done` was set the connection is to be closed once that is sent.
        """
        if self.done:
            return b"", b""
        if self._socket is not None:
            return self._frames(data)
        return self._requests(data)

    def frame(self, data: bytes) -> bytes:
        """Return *data* as one binary frame."""
        if self._socket is None or self.done:
            return b""
        return self._socket.send(ws.BytesMessage(data=data))

    def farewell(self) -> bytes:
        """Return what to say before the connection is closed."""
        if self._socket is None or self.done:
            return b""
        self.done = True
        try:
            return self._socket.send(ws.CloseConnection(code=1000))
        except LocalProtocolError:
            return b""

    # --- HTTP ---------------------------------------------------------------------------

    def _requests(self, data: bytes) -> tuple[bytes, bytes]:
        machine = self._http
        if machine is None:
            return b"", b""
        try:
            machine.receive_data(data)
            while True:
                event = machine.next_event()
                match event:
                    case h11.Request():
                        if _wants_websocket(event):
                            rest, _ = machine.trailing_data
                            return self._upgrade(event, rest)
                        self._request = event
                    case h11.Data():
                        self._body_size += len(event.data)
                        if self._body_size > _MAX_BODY:
                            return b"", self._respond(HttpResponse(413, b"too large"))
                        self._body.append(bytes(event.data))
                    case h11.EndOfMessage():
                        return b"", self._respond(self._answer(self._as_request()))
                    case _:
                        return b"", b""  # NEED_DATA, or nothing more will come
        except h11.RemoteProtocolError as exc:
            logger.debug("a bad HTTP request: %s", printable(str(exc)))
            return b"", self._respond(HttpResponse(exc.error_status_hint, b"Bad Request"))

    def _as_request(self) -> HttpRequest:
        found = cast("h11.Request", self._request)
        path, _, query = found.target.decode("latin-1").partition("?")
        headers = {name.decode(): value.decode("latin-1") for name, value in found.headers}
        return HttpRequest(found.method.decode(), path, query, headers, b"".join(self._body))

    def _respond(self, response: HttpResponse) -> bytes:
        self.done = True
        machine = self._http
        if machine is None or machine.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return b""
        try:
            phrase = http.HTTPStatus(response.status).phrase
        except ValueError:
            phrase = ""
        headers = [
            ("Content-Type", response.content_type),
            ("Content-Length", str(len(response.body))),
            ("Connection", "close"),
        ]
        found = self._request
        # HEAD is answered like GET, with the length of a body that is not sent.
        body = b"" if found is not None and found.method == b"HEAD" else response.body
        parts = [
            machine.send(h11.Response(status_code=response.status, headers=headers, reason=phrase)),
            machine.send(h11.Data(data=body)),
            machine.send(h11.EndOfMessage()),
        ]
        return b"".join(part for part in parts if part)

    # --- WebSocket ----------------------------------------------------------------------

    def _upgrade(self, request: h11.Request, rest: bytes) -> tuple[bytes, bytes]:
        machine = WSConnection(ConnectionType.SERVER)
        try:
            machine.initiate_upgrade_connection(list(request.headers), request.target)
            event = next(machine.events())
            offered = event.subprotocols if isinstance(event, ws.Request) else []
            chosen = next((name for name in self._profile.subprotocols if name in offered), None)
            accepted = machine.send(ws.AcceptConnection(subprotocol=chosen))
        except RemoteProtocolError as exc:
            logger.debug("a bad WebSocket upgrade: %s", printable(str(exc)))
            return b"", self._respond(HttpResponse(400, b"Bad Request"))
        self._socket = machine
        self._http = None
        if not rest:
            return b"", accepted
        payload, reply = self._frames(rest)
        return payload, accepted + reply

    def _frames(self, data: bytes) -> tuple[bytes, bytes]:
        machine = cast("WSConnection", self._socket)
        payload: list[bytes] = []
        reply: list[bytes] = []
        try:
            machine.receive_data(data)
            for event in machine.events():
                match event:
                    case ws.BytesMessage():
                        payload.append(bytes(event.data))
                    case ws.TextMessage():
                        if not self._profile.text_frames:
                            self.done = True
                            reply.append(machine.send(ws.CloseConnection(code=1003)))
                            break
                        payload.append(event.data.encode())
                    case ws.Ping():
                        reply.append(machine.send(event.response()))
                    case ws.CloseConnection():
                        self.done = True
                        reply.append(machine.send(event.response()))
                        break
                    case _:
                        pass
        except (RemoteProtocolError, LocalProtocolError) as exc:
            logger.debug("a bad WebSocket frame: %s", printable(str(exc)))
            self.done = True
        return b"".join(payload), b"".join(reply)


def _wants_websocket(request: h11.Request) -> bool:
    return any(
        name == b"upgrade" and value.lower() == b"websocket" for name, value in request.headers
    )
