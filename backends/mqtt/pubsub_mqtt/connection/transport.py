"""Where the bytes go: WebSocket framing, and a socket that buffers both ways.

paho-mqtt reads a packet byte by byte and writes packet by packet, a system call each. A
`BufferedSocket` takes all of that in memory and touches the operating system once per
turn of whatever loop drives it. Nothing here knows MQTT, and nothing waits.

Sources: RFC 6455 (WebSocket), MQTT 5.0 section 6 (MQTT over WebSocket).
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Mapping

from pubsub_core.errors import (
    AuthenticationFailed,
    ConnectError,
    MissingDependency,
    ServerRefused,
)
from pubsub_mqtt.errors import printable

__all__ = ["BufferedSocket", "PeerClosed", "WebSocket"]

_READ = 65536
_JOIN_LIMIT = 262_144
_TLS_READS = 16
_MORE: int = getattr(socket, "MSG_MORE", 0)


class PeerClosed(ConnectionError):  # an event more than an error
    """The peer ended the stream in good order."""


class WebSocket:
    """WebSocket framing of the client's side, with no socket in it.

    paho-mqtt has its own, but masks in a Python loop byte by byte (seconds for a payload of
    16 MiB), answers a ping unmasked, and its handshake blocks.
    """

    def __init__(
        self, path: str, headers: Mapping[str, str], host: str, port: int, *, secure: bool
    ) -> None:
        try:
            from wsproto import ConnectionType, WSConnection  # noqa: PLC0415 # only then
        except ImportError as exc:
            raise MissingDependency(
                f"MQTT over WebSocket cannot import {exc.name or 'wsproto'!r}",
                hint="pip install 'wsproto>=1.2'",
            ) from exc

        self._path = path
        self._headers = headers
        shown = f"[{host}]" if ":" in host else host
        self._host = shown if port == (443 if secure else 80) else f"{shown}:{port}"
        self._machine = WSConnection(ConnectionType.CLIENT)
        self.open = False
        self._failure: ConnectError | PeerClosed | None = None

    def request(self) -> bytes:
        """Return the bytes that ask for the upgrade."""
        from wsproto.events import Request  # noqa: PLC0415

        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        return self._machine.send(
            Request(
                host=self._host,
                target=self._path,
                subprotocols=["mqtt"],
                extra_headers=headers,
            )
        )

    def receive(self, data: bytes | None) -> tuple[bytes, bytes]:
        """Take what arrived (None: end of stream); return payload, and what to send back.

        Raises:
            ConnectError: The upgrade was refused, or the peer broke the protocol.
            PeerClosed: The peer closed the WebSocket.
        """
        from wsproto import events  # noqa: PLC0415
        from wsproto.utilities import RemoteProtocolError  # noqa: PLC0415

        if self._failure is not None:
            raise self._failure
        payload: list[bytes] = []
        reply: list[bytes] = []
        try:
            self._machine.receive_data(data)
            for event in self._machine.events():
                match event:
                    case events.BytesMessage():
                        payload.append(bytes(event.data))
                    case events.Ping():
                        reply.append(self._machine.send(event.response()))
                    case events.AcceptConnection():
                        if event.subprotocol not in (None, "mqtt"):
                            raise self._broken(f"subprotocol {printable(event.subprotocol)}")
                        self.open = True
                    case events.RejectConnection():
                        raise self._rejected(event.status_code)
                    case events.TextMessage():
                        raise self._broken("a text frame; MQTT uses binary frames")
                    case events.CloseConnection():
                        raise PeerClosed(f"closed the WebSocket with code {event.code}")
                    case _:
                        pass
        except RemoteProtocolError as exc:
            self._failure = self._broken(printable(str(exc)))
            self._failure.__cause__ = exc
        except (ConnectError, PeerClosed) as exc:
            self._failure = exc
        # What came before the end still counts.
        if self._failure is not None and not payload:
            raise self._failure
        return b"".join(payload), b"".join(reply)

    @property
    def ended(self) -> bool:
        """Whether `receive` will raise whatever it is given."""
        return self._failure is not None

    def frame(self, data: bytes) -> bytes:
        """Return *data* as one binary frame."""
        from wsproto.events import BytesMessage  # noqa: PLC0415

        return self._machine.send(BytesMessage(data=data))

    @staticmethod
    def _broken(what: str) -> ConnectError:
        return ConnectError(
            f"the peer broke the WebSocket protocol: {what}",
            hint="check that the address leads to MQTT over WebSocket",
        )

    def _rejected(self, status: int) -> ConnectError:
        text = f"the server refused the WebSocket {self._path!r} with HTTP status {status}"
        if status in (401, 403):
            return AuthenticationFailed(text, hint="check ws_headers and credentials")
        return ServerRefused(
            text,
            reason=status,
            hint="check ws_path",
            retryable=status >= 500 or status == 429,
        )


class BufferedSocket:
    """A connected, non-blocking stream socket that reads and writes in large pieces.

    `write` only stores; `flush` hands everything to the operating system at once; `fill`
    returns everything that arrived. `push` hands over as well, but asks the system (Linux) to
    wait for the next `flush` before it makes packets of it: a program that publishes in a loop
    knows that each message left this process, and the broker is not woken for each of them.
    What became of each byte written is known from `written`, `begun` and `done`, three
    counters that only grow.

    Attributes:
        written: Bytes given to `write` so far.
        begun: Bytes that were offered to the operating system; beyond it nothing left us.
        done: Bytes that the operating system accepted.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        framing: WebSocket | None = None,
        early: bytes = b"",
        corks: bool = False,
    ) -> None:
        """Wrap *sock*, which is connected and has any TLS and WebSocket handshake behind it.

        *early* is payload that arrived together with the end of the handshake. *corks* lets
        `push` hold packets back; it needs TCP with ``TCP_NODELAY``.
        """
        sock.setblocking(False)
        self._sock = sock
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._framing = framing
        self._early = early
        self._out: deque[bytes | memoryview] = deque()
        self._control: list[bytes] = []
        self._frame: memoryview | None = None
        self._frame_payload = 0
        self._more = False
        self._corks = _MORE if corks and not self._tls and framing is None else 0
        self._corked = False
        self.written = 0
        self.begun = 0
        self.done = 0

    @property
    def secure(self) -> bool:
        """Whether the stream is encrypted."""
        return self._tls

    # --- reading -----------------------------------------------------------------------

    def fill(self) -> bytes:
        """Return the bytes that arrived, or ``b""`` when none did.

        Raises:
            PeerClosed: The stream ended.
            OSError: The link broke.
            ConnectError: The framing was broken.
        """
        if self._early:
            data, self._early = self._early, b""
            return data
        framing = self._framing
        if framing is not None and framing.ended:
            framing.receive(b"")
        raw = self._read()
        if framing is None or not raw:
            return raw
        payload, reply = framing.receive(raw)
        if reply:
            self._control.append(reply)
        return payload

    def _read(self) -> bytes:
        if not self._tls:
            try:
                data = self._sock.recv(_READ)
            except (BlockingIOError, InterruptedError):
                return b""
            if not data:
                raise PeerClosed("the peer closed the connection")
            return data
        # A TLS record that is already decrypted does not wake the selector again.
        parts: list[bytes] = []
        self._more = False
        for _ in range(_TLS_READS):
            try:
                data = self._sock.recv(_READ)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
            except ssl.SSLEOFError as exc:
                raise PeerClosed("the peer closed the connection") from exc
            if not data:
                if parts:
                    break  # the end comes again with the next read
                raise PeerClosed("the peer closed the connection")
            parts.append(data)
        else:
            self._more = True
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pending(self) -> int:
        """Return how many bytes can be read although the selector does not say so."""
        if self._early:
            return len(self._early)
        return 1 if self._more or (self._framing is not None and self._framing.ended) else 0

    # --- writing -----------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Store *data* for the next `flush`."""
        self._out.append(data)
        self.written += len(data)

    @property
    def unsent(self) -> int:
        """How many bytes wait here."""
        return self.written - self.done

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be sent."""
        return self.written == self.done and self._frame is None and not self._control

    def flush(self) -> bool:
        """Hand over all that waits; return whether all of it went.

        Raises:
            OSError: The link broke.
        """
        if self._framing is not None:
            return self._flush_frames(self._framing)
        empty = self._flush_plain(0)
        if self._corked:
            # A last send without MSG_MORE would do as well; often there is none.
            self._corked = False
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return empty

    def push(self) -> bool:
        """Hand over all that waits, as `flush`, which must follow in the same turn of the loop."""
        if not self._corks:
            return self.flush()
        self._corked = True
        return self._flush_plain(self._corks)

    def _flush_plain(self, flags: int) -> bool:
        out = self._out
        while out:
            if len(out) > 1:
                self._join()
            chunk = out[0]
            size = len(chunk)
            sent = self._send(chunk, flags)
            self.begun = max(self.begun, self.done + (size if self._tls else sent))
            self.done += sent
            if sent == size:
                out.popleft()
                continue
            if sent:
                out[0] = memoryview(chunk)[sent:]
            else:
                return False
        return True

    def _join(self) -> None:
        """Make one chunk of the small ones at the head; leave large payloads uncopied."""
        out = self._out
        total = 0
        count = 0
        for chunk in out:
            if total + len(chunk) > _JOIN_LIMIT:
                break
            total += len(chunk)
            count += 1
        if count > 1:
            if count == len(out):
                joined = b"".join(out)
                out.clear()
            else:
                joined = b"".join([out.popleft() for _ in range(count)])
            out.appendleft(joined)

    def _flush_frames(self, framing: WebSocket) -> bool:
        while True:
            if self._frame is None:
                if self._control:
                    data, self._frame_payload = b"".join(self._control), 0
                    self._control.clear()
                elif self._out:
                    joined = b"".join(self._out)
                    self._out.clear()
                    data, self._frame_payload = framing.frame(joined), len(joined)
                else:
                    return True
                self._frame = memoryview(data)
            self.begun = max(self.begun, self.done + self._frame_payload)
            sent = self._send(self._frame)
            if sent < len(self._frame):
                self._frame = self._frame[sent:]
                if not sent:
                    return False
                continue
            self._frame = None
            self.done += self._frame_payload

    def _send(self, data: bytes | memoryview, flags: int = 0) -> int:
        try:
            return self._sock.send(data, flags)
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    # --- the rest of what a socket does ------------------------------------------------

    def fileno(self) -> int:
        """Return the descriptor, for selectors."""
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        """Do nothing: the socket never blocks. paho-mqtt calls this."""

    def finish(self) -> None:
        """End the stream to the peer; its own can still be read."""
        with contextlib.suppress(OSError):  # the link may be dead already
            socket.socket.shutdown(self._sock, socket.SHUT_WR)

    def ended(self) -> bool:
        """Discard input; return whether the peer has ended its stream as well."""
        try:
            while self._sock.recv(_READ):
                pass
        except (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Close at once; unsent bytes are lost. Idempotent."""
        self._sock.close()
