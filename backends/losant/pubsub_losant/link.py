"""The MQTT connection with the keepalive of a device, and dialling without a thread.

A device must be able to dial inside ``loop(timeout)`` without staying there longer, and
``close()`` of another thread must end it. So the dial is a generator: it says what it waits
for, and whoever drives it does the waiting.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import time
from collections.abc import Generator
from typing import Final, NamedTuple

from pubsub_mqtt.connection import Connection, SessionSettings
from pubsub_mqtt.keepalive import KeepaliveStep, Quiet
from pubsub_mqtt.transport import BufferedSocket, Endpoint

__all__ = ["Wait", "device_connection", "device_keepalive", "dial_steps", "limit_unacknowledged"]

_IN_PROGRESS: Final = (errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EALREADY)


def device_connection(settings: SessionSettings) -> Connection:
    """Return a connection that keeps alive as a device does; see `device_keepalive`."""
    connection = Connection(settings, backend="losant")
    connection.keepalive_policy = device_keepalive
    # The platform ends sessions over forbidden publishes, too: that one ended early says
    # nothing about who else uses the device id.
    connection.short_life_policy = lambda: False
    return connection


def device_keepalive(quiet: Quiet) -> KeepaliveStep:
    """Ping after one interval without sending; wait another one for any answer.

    A device that only sends never needs to ping: what was sent and is never acknowledged by
    the peer's system ends the connection by itself; see `limit_unacknowledged`.
    """
    if quiet.pinged is not None and quiet.unanswered:
        if quiet.pinged >= quiet.keepalive:
            return KeepaliveStep(0.0, dead=f"did not answer for {quiet.pinged:.1f} s")
        return KeepaliveStep(quiet.keepalive - quiet.pinged)
    if quiet.outbound < quiet.keepalive:
        return KeepaliveStep(quiet.keepalive - quiet.outbound)
    return KeepaliveStep(quiet.keepalive, ping=True)


def limit_unacknowledged(descriptor: int, seconds: float) -> None:
    """Let the system end a TCP connection whose peer is silent for so long about what was sent.

    A device that only sends never needs to ping, so it would notice a dead link after the
    system's own patience of a quarter of an hour. Does nothing where that cannot be set.
    """
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is None:
        return
    # The option belongs to the connection, not to the descriptor.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as same:
        same.setsockopt(socket.IPPROTO_TCP, option, int(seconds * 1000))


class Wait(NamedTuple):
    """What a dial waits for."""

    descriptor: int
    write: bool
    until: float
    """Of `time.monotonic`; then throw `TimeoutError` into it."""


def dial_steps(
    endpoint: Endpoint, context: ssl.SSLContext | None, timeout: float
) -> Generator[Wait, None, BufferedSocket]:
    """Connect step by step; closing the generator closes what was opened.

    Resolving the name is the one step that blocks: the system offers nothing else.

    Raises:
        OSError: As the operating system says, `ssl.SSLError` among them.
        ConnectError: The WebSocket was refused.
    """
    deadline = time.monotonic() + timeout
    sock = yield from _connect(endpoint, deadline)
    try:
        endpoint.prepare(sock)
        if context is not None:
            sock = context.wrap_socket(
                sock, server_hostname=endpoint.host, do_handshake_on_connect=False
            )
            yield from _handshake(sock, deadline)
        if endpoint.websocket is None:
            return BufferedSocket(sock, corks=endpoint.corks)
        framing = endpoint.frame_with()
        plain = BufferedSocket(sock)
        plain.write(framing.request())
        while not plain.flush():
            yield Wait(sock.fileno(), write=True, until=deadline)
        early = b""
        while not framing.open:
            yield Wait(sock.fileno(), write=False, until=deadline)
            if chunk := plain.fill():
                early, _ = framing.receive(chunk)
        return BufferedSocket(sock, framing=framing, early=early)
    except BaseException:
        sock.close()
        raise


def _connect(endpoint: Endpoint, deadline: float) -> Generator[Wait, None, socket.socket]:
    found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
    failure: OSError | None = None
    for at, (family, _, _, _, address) in enumerate(found):
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            code = sock.connect_ex(address)
            if code in _IN_PROGRESS:
                now = time.monotonic()
                share = (deadline - now) / (len(found) - at)
                yield Wait(sock.fileno(), write=True, until=now + share)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))  # becomes ConnectionRefusedError …
        except OSError as exc:
            sock.close()
            failure = failure or exc
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise failure or OSError(f"{endpoint.host} has no address")


def _handshake(sock: ssl.SSLSocket, deadline: float) -> Generator[Wait, None, None]:
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            yield Wait(sock.fileno(), write=False, until=deadline)
        except ssl.SSLWantWriteError:
            yield Wait(sock.fileno(), write=True, until=deadline)
        else:
            return
