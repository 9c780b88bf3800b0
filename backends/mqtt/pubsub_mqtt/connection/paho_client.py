"""paho-mqtt's client with its socket, its reading and writing, and its store replaced.

Whatever of paho-mqtt is private and used nevertheless is used here; a test fails when paho
changes it. `pubsub_mqtt.connection` says what is paho's work and what is ours.

Source: paho-mqtt 2.1 and 2.2, ``client.py``.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from typing import Any, Protocol

import paho.mqtt.properties
from paho.mqtt.client import Client, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties

from pubsub_mqtt.errors import printable
from pubsub_mqtt.packets import malformed

from .session_data import Version
from .transport import BufferedSocket

__all__ = ["PahoClient", "paho_properties", "reason_text"]

# paho-mqtt 2.1 defines it in that module, 2.2 imports it there.
_MQTT_EXCEPTION: type[Exception] = vars(paho.mqtt.properties)["MQTTException"]

PAHO_ERRORS = (_MQTT_EXCEPTION, struct.error, IndexError, KeyError, ValueError)
"""What paho-mqtt raises over a packet it cannot read, depending on its version."""


def paho_properties(packet_type: int) -> Properties:
    """Return paho's properties for a packet, empty."""
    return Properties(packet_type)  # type: ignore[no-untyped-call] # paho has no types there


def reason_text(body: bytes, packet_type: int) -> str:
    """Return the reason string among the properties in *body*, or ``""``.

    Raises:
        ProtocolError: They cannot be read.
    """
    if not body:
        return ""
    properties = paho_properties(packet_type)
    try:
        properties.unpack(body)  # type: ignore[no-untyped-call] # paho has no types there
    except PAHO_ERRORS:
        raise malformed("its properties") from None
    return str(getattr(properties, "ReasonString", ""))


class _Owner(Protocol):
    """What the client asks of the connection it belongs to."""

    @property
    def connected(self) -> bool: ...

    @property
    def connecting(self) -> bool: ...

    @property
    def wants_write(self) -> bool: ...

    def next_socket(self) -> BufferedSocket: ...

    def write(self, data: bytes) -> None: ...

    def feed(self) -> None: ...

    def flush(self) -> bool: ...

    def tick(self) -> float | None: ...

    def next_id(self) -> int: ...


class PahoClient(Client):
    """Paho's client with its socket, its reading and writing, and its store replaced.

    Every method here overrides a private one of paho; a test fails when paho renames one.
    Its public methods stay usable, and so do its blocking loops.
    """

    def __init__(self, owner: _Owner, *, client_id: str, version: Version) -> None:
        clean: dict[str, Any] = {} if version == 5 else {"clean_session": True}
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            protocol=MQTTv5 if version == 5 else MQTTv311,
            manual_ack=True,
            **clean,
        )
        self._owner = owner

    def _create_socket(self) -> Any:  # the one place where our socket comes in
        return self._owner.next_socket()

    def _packet_queue(
        self, command: int, packet: bytes | bytearray, mid: int, qos: int, info: Any = None
    ) -> MQTTErrorCode:
        self._owner.write(bytes(packet))
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _packet_read(self) -> MQTTErrorCode:
        self._owner.feed()
        if self._owner.connected or self._owner.connecting:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        return MQTTErrorCode.MQTT_ERR_CONN_LOST

    def _packet_write(self) -> MQTTErrorCode:
        self._owner.flush()
        if self._owner.connected or self._owner.connecting:
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        return MQTTErrorCode.MQTT_ERR_CONN_LOST

    def want_write(self) -> bool:
        """Return whether bytes wait for the socket."""
        return self._owner.wants_write

    def _mid_generate(self) -> int:
        return self._owner.next_id()

    def start(self, keepalive: int, *, clean: bool, properties: Properties | None = None) -> None:
        """Take the prepared socket and send CONNECT."""
        # The address is not used: the socket is there already.
        if self.protocol == MQTTv5:
            self.connect("broker", 1, keepalive, clean_start=clean, properties=properties)
        else:
            self._clean_session = clean  # paho takes it from its constructor only
            self.connect("broker", 1, keepalive)

    def keep_session(self) -> None:
        """Continue the session when paho's own loop reconnects (MQTT 5)."""
        self._clean_start = False

    def forget_socket(self) -> None:
        """Let go of a socket that is closed already."""
        self._sock = None

    def wake(self) -> None:
        """Make paho's own loop look at the buffer, if one is running."""
        waker = self._sockpairW
        if waker is not None:
            with contextlib.suppress(OSError):  # it is full, or another thread has closed it
                waker.send(b"0")

    def loop_stop(self) -> MQTTErrorCode:
        """Stop the loop's thread; paho's own notices after a second, and leaks what woke it."""
        thread = self._thread
        if thread is None:
            return super().loop_stop()
        self._thread_terminate = True
        self.wake()
        result = super().loop_stop()
        if thread is not threading.current_thread():
            self.rest()
        return result

    def rest(self) -> None:
        """Close what paho's `loop` keeps to be woken; its `loop_start` would leak it."""
        self._reset_sockets(sockpair_only=True)

    def _messages_reconnect_reset(self) -> None:
        """Do nothing: no message is ever in paho's store."""

    def _check_keepalive(self) -> None:
        self._owner.tick()

    def give(self, command: int, body: bytes) -> MQTTErrorCode:
        """Let paho handle a packet that was read here.

        Raises:
            ProtocolError: paho finds it malformed.
        """
        self._in_packet = {
            "command": command,
            "have_remaining": 1,
            "remaining_count": [],
            "remaining_mult": 1,
            "remaining_length": len(body),
            "packet": bytearray(body),
            "to_process": 0,
            "pos": 0,
        }
        try:
            rc = self._packet_handle()
        except PAHO_ERRORS as exc:
            raise malformed(printable(str(exc))) from exc
        if rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN):
            raise malformed(f"paho's error {int(rc)}")
        return rc
