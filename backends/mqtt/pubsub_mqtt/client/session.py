"""What programs for amqtt find in ``client.session``, and what its own tests look into.

`Session` shows the client's session under the names that amqtt's has; it keeps nothing.
`Handler` and `ConnectedState` stand where amqtt's client has its insides. Programs have no
business there, but amqtt's tests end a connection through them and count what waits, so they
can judge this client as well.

Source of the names: amqtt 0.12 ``session.py``, ``client.py`` and ``mqtt/protocol/handler.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal, TypeAlias

from pubsub_mqtt.connection import Connection, Outgoing
from pubsub_mqtt.connection.address import BrokerAddress
from pubsub_mqtt.connection.state import Phase

__all__ = ["ConnectedState", "Handler", "Session", "State", "Transitions"]

State: TypeAlias = Literal["new", "connected", "disconnected"]


class Transitions:
    """Where the session is. It follows the connection, and nobody needs to move it."""

    __slots__ = ("_current",)

    def __init__(self, current: Callable[[], State]) -> None:
        self._current = current

    @property
    def state(self) -> State:
        """What amqtt calls the state."""
        return self._current()

    def is_new(self) -> bool:
        """Whether there was no connection yet."""
        return self.state == "new"

    def is_connected(self) -> bool:
        """Whether there is a connection now."""
        return self.state == "connected"

    def is_disconnected(self) -> bool:
        """Whether the connection has ended."""
        return self.state == "disconnected"

    def disconnect(self) -> None:
        """Change nothing: amqtt's state is moved by hand, this one is asked."""


class Session:
    """The session of a client, as amqtt shows it.

    Attributes:
        transitions: Whether it is connected.
    """

    def __init__(
        self,
        connection: Connection,
        broker: BrokerAddress,
        *,
        state: Callable[[], State],
        under_way: Collection[Outgoing],
        waiting: Callable[[], int],
    ) -> None:
        self.transitions = Transitions(state)
        self._connection = connection
        self._broker = broker
        self._under_way = under_way
        self._waiting = waiting

    @property
    def client_id(self) -> str:
        """Identifier at the broker."""
        return self._connection.client_id

    @property
    def username(self) -> str | None:
        """User name, or None."""
        return self._connection.settings.username

    @property
    def password(self) -> str | None:
        """The password in plain text, or None."""
        secret = self._connection.settings.password
        return None if secret is None else secret.reveal()

    @property
    def clean_session(self) -> bool:
        """Whether the broker forgets this session when it ends."""
        return self._connection.settings.clean_start

    @property
    def keep_alive(self) -> int:
        """Seconds."""
        return self._connection.settings.keepalive

    @property
    def remote_address(self) -> str:
        """Host of the broker, or the path of its socket."""
        return self._broker.unix_path or self._broker.host

    @property
    def remote_port(self) -> int:
        """Port of the broker; 0 with a Unix socket."""
        return 0 if self._broker.unix_path else self._broker.port

    @property
    def will_flag(self) -> bool:
        """Whether there is a will."""
        return self._connection.settings.will is not None

    @property
    def will_topic(self) -> str | None:
        """Topic of the will, or None."""
        will = self._connection.settings.will
        return None if will is None else will.topic

    @property
    def will_message(self) -> bytes | None:
        """Payload of the will, or None."""
        will = self._connection.settings.will
        return None if will is None else will.payload

    @property
    def will_qos(self) -> int | None:
        """Quality of service of the will, or None."""
        will = self._connection.settings.will
        return None if will is None else will.qos

    @property
    def will_retain(self) -> bool | None:
        """Whether the will is retained, or None."""
        will = self._connection.settings.will
        return None if will is None else will.retain

    @property
    def inflight_out_count(self) -> int:
        """Publishes above QoS 0 whose confirmation somebody waits for."""
        return sum(1 for out in self._under_way if out.qos)

    @property
    def inflight_in_count(self) -> int:
        """Received messages above QoS 0 that nobody took yet."""
        return self._waiting()

    def __repr__(self) -> str:
        return f"Session(clientId={self.client_id}, state={self.transitions.state})"


class ConnectedState:
    """Where amqtt's client has an event that says whether it is connected."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def is_set(self) -> bool:
        """Whether the client is connected."""
        return self._session.transitions.is_connected()

    def clear(self) -> None:
        """Change nothing: the connection says whether it is there."""


class Handler:
    """Where amqtt's client has its protocol handler.

    The mappings have an entry, by packet identifier, for each publish that somebody waits for.
    """

    def __init__(self, under_way: Collection[Outgoing], stop: Callable[[], None]) -> None:
        self._under_way = under_way
        self._stop = stop

    async def stop(self) -> None:
        """End the connection without DISCONNECT, as a crash would, and stay offline."""
        self._stop()

    @property
    def _puback_waiters(self) -> Mapping[int, Outgoing]:
        return self._in(1, Phase.SENT)

    @property
    def _pubrec_waiters(self) -> Mapping[int, Outgoing]:
        return self._in(2, Phase.SENT)

    @property
    def _pubcomp_waiters(self) -> Mapping[int, Outgoing]:
        return self._in(2, Phase.RELEASED)

    def _in(self, qos: int, phase: Phase) -> dict[int, Outgoing]:
        return {
            out.packet_id: out for out in self._under_way if out.qos == qos and out.phase is phase
        }
