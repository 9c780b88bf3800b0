"""WebSocket framing of the client's side, with no socket in it. Needs wsproto.

The protocol is the same in binary frames, cut wherever the server likes.

Source: RFC 6455; nats-server takes the path ``/`` and no subprotocol.
"""

from __future__ import annotations

from wsproto import ConnectionType, WSConnection
from wsproto import events as ws
from wsproto.utilities import RemoteProtocolError

from .errors import printable
from .protocol import ProtocolError

__all__ = ["WebSocket", "WebSocketClosed", "WebSocketRejected"]


class WebSocketRejected(Exception):
    """The server answered the request for an upgrade with another HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


class WebSocketClosed(ConnectionError):
    """The server closed the WebSocket."""


class WebSocket:
    """The framing of one connection.

    Attributes:
        open: Whether the server has accepted the upgrade.
    """

    def __init__(self, host: str, path: str) -> None:
        self._machine = WSConnection(ConnectionType.CLIENT)
        self._host = host
        self._path = path or "/"
        self.open = False

    def request(self) -> bytes:
        """Return the bytes that ask for the upgrade."""
        return self._machine.send(ws.Request(host=self._host, target=self._path))

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Take what arrived; return payload, and what must be sent back.

        Raises:
            WebSocketRejected: The server refused the upgrade.
            WebSocketClosed: The server closed.
            ProtocolError: The peer broke the protocol.
        """
        payload: list[bytes] = []
        reply: list[bytes] = []
        try:
            self._machine.receive_data(data)
            for event in self._machine.events():
                match event:
                    case ws.BytesMessage():
                        payload.append(bytes(event.data))
                    case ws.Ping():
                        reply.append(self._machine.send(event.response()))
                    case ws.AcceptConnection():
                        self.open = True
                    case ws.RejectConnection():
                        raise WebSocketRejected(event.status_code)
                    case ws.TextMessage():
                        raise ProtocolError("a text frame; NATS uses binary frames")
                    case ws.CloseConnection():
                        if payload:
                            break  # what came before the end still counts
                        raise WebSocketClosed(f"the server closed with code {event.code}")
                    case _:
                        pass
        except RemoteProtocolError as error:
            raise ProtocolError(
                f"the WebSocket's protocol was broken: {printable(str(error))}"
            ) from error
        return b"".join(payload), b"".join(reply)

    def frame(self, data: bytes) -> bytes:
        """Return *data* as one binary frame."""
        return self._machine.send(ws.BytesMessage(data=data))
