"""What a subscription is in stream mode: a consumer of the stream, and how it is kept alive.

`PushConsumer` is for plain subscriptions: the server sends on its own, with flow control, and
nothing is acknowledged. It is a thing of the moment, in the memory of one node: when its node
dies it is silent, and only a missing heartbeat tells. Then, and after a lost session, another one
goes on behind the last message that arrived.

`PullConsumer` is for messages that are acknowledged, whose state the servers keep: we ask for as
many as fit our window, so whoever does not ask holds the server back.
"""

from __future__ import annotations

import abc
import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pubsub_core.interfaces import WireSub
from pubsub_core.message import Verdict
from pubsub_nats.headers import parse_block
from pubsub_nats.jetstream import ApiError, Position, ack_payload
from pubsub_nats.protocol import Msg, encode_pub

from .connection import Connection, Denied, Lost
from .requests import Requests

__all__ = ["Consumer", "Host", "PullConsumer", "PushConsumer", "Tag"]

logger = logging.getLogger("pubsub_nats")

HEARTBEAT = 5.0
"""Seconds between the signs of life of a consumer that has nothing to deliver."""

WINDOW = 256
"""Messages that one `PullConsumer` has asked for or that wait for their acknowledgement."""

_SECOND = 1_000_000_000
_EXPIRES = 30.0
_IDLE = 30.0
_MANUAL_IDLE = 300.0
_GONE = frozenset({10014, 10149})
_EXISTS = frozenset({10012, 10013, 10148})


class Tag(NamedTuple):
    """What settles one delivery.

    Attributes:
        reply: Where the consumer wants to hear of it.
        sequence: Number of the message.
        session: In which it came; one of an earlier session comes again.
    """

    consumer: PullConsumer
    reply: bytes
    sequence: int
    session: int


class Host(Protocol):
    """What a consumer needs of the backend."""

    @property
    def requests(self) -> Requests:
        """The inbox."""
        ...

    @property
    def connection(self) -> Connection | None:
        """The session at hand."""
        ...

    @property
    def stream(self) -> str:
        """Name of the stream."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether several nodes have the stream, and some may lag behind."""
        ...

    @property
    def paused(self) -> bool:
        """Whether nothing more is wanted for now."""
        ...

    def deliver(
        self, message: Msg, position: Position, want: WireSub, *, replay: bool, tag: Tag | None
    ) -> bool:
        """Hand a message over; return False where it is for nobody."""
        ...

    def unique(self) -> str:
        """Return a name that nobody else has."""
        ...

    def spawn(self, work: Any, name: str) -> asyncio.Task[Any]:
        """Run *work* in a task that ends with the session."""
        ...


class Consumer(abc.ABC):
    """One consumer of the stream, for one subscription.

    Attributes:
        last: Number of the last message that arrived, or that was there before.
    """

    def __init__(self, host: Host, want: WireSub, subjects: Sequence[str]) -> None:
        self._host = host
        self.want = want
        self._subjects = tuple(subjects)
        self._sid = 0
        self._heard = 0.0
        self._working: asyncio.Task[Any] | None = None
        self.last = 0
        self.ended = False

    # --- life ----------------------------------------------------------------------------------

    @abc.abstractmethod
    async def start(self) -> bool:
        """Make it; return False where the server does not know several filters in one."""

    @abc.abstractmethod
    async def resume(self, until: int = 0) -> bool:
        """Go on where it stood; return whether that was possible.

        Args:
            until: Number of the last message that was published while there was no session.
        """

    @abc.abstractmethod
    def take(self, message: Msg, position: Position | None) -> None:
        """Take what came for it."""

    @abc.abstractmethod
    def stop(self, *, leave: bool) -> None:
        """End it; with *leave* the server keeps what others or a later process need."""

    @abc.abstractmethod
    def resumed_flow(self) -> None:
        """Go on after a pause."""

    def look(self, now: float) -> None:
        """Make it again where its heartbeat is missing."""
        if not self.ended and self._waiting() and now - self._heard > 2.2 * HEARTBEAT:
            self._heard = now
            self.again("no heartbeat")

    def _waiting(self) -> bool:
        return True

    def mute(self) -> None:
        """Take nothing more for now: `last` is the last message, until `again`."""
        self._host.requests.drop(self._sid)

    def again(self, why: str) -> None:
        """Make it again, beside, where it stood."""
        if self.ended or self._host.connection is None:
            return
        if self._working is None or self._working.done():
            logger.info("consumer for %r: %s; making it again", self.want.filter, why)
            self._working = self._host.spawn(self._remade(), "consumer")

    async def _revive(self) -> None:
        await self.resume()

    async def _remade(self) -> None:
        try:
            await self._revive()
        except (ApiError, Denied) as error:
            # The next missing heartbeat tries again.
            logger.warning("no consumer for %r: %s", self.want.filter, error)
        except Lost:
            return

    # --- the server's ---------------------------------------------------------------------------

    def _filters(self) -> dict[str, object]:
        if len(self._subjects) == 1:
            return {"filter_subject": self._subjects[0]}
        return {"filter_subjects": list(self._subjects)}

    async def _create(
        self, name: str, config: Mapping[str, object]
    ) -> tuple[Mapping[str, Any], bool]:
        """Return what the server made, and whether it took every filter."""
        stream = self._host.stream
        subject = f"CONSUMER.CREATE.{stream}.{name}"
        if len(self._subjects) == 1:
            # Only with the filter in the subject can the server's permissions refuse it.
            subject += f".{self._subjects[0]}"
        body = {"stream_name": stream, "config": {"name": name, **self._filters(), **config}}
        made = await self._host.requests.api(subject, body)
        return made, len(self._subjects) == 1 or bool(made["config"].get("filter_subjects"))

    def _delete(self, name: str) -> None:
        self._host.requests.tell(f"CONSUMER.DELETE.{self._host.stream}.{name}")


def _from_sequence(sequence: int) -> dict[str, object]:
    return {"deliver_policy": "by_start_sequence", "opt_start_seq": max(sequence, 1)}


class PushConsumer(Consumer):
    """A plain subscription's."""

    def __init__(self, host: Host, want: WireSub, subjects: Sequence[str]) -> None:
        super().__init__(host, want, subjects)
        self._name = ""
        self._next = 1
        self._until = 0
        self._withheld: list[bytes] = []

    async def start(self) -> bool:
        """Make it for what is published from now on."""
        return await self._make({"deliver_policy": "new"})

    async def start_from(self, sequence: int) -> bool:
        """Make it for what was published from that message on."""
        self.last = sequence - 1
        return await self._make(_from_sequence(sequence))

    async def _make(self, start: Mapping[str, object]) -> bool:
        old, self._name = self._name, self._host.unique()
        self._next = 1
        self._withheld.clear()
        requests = self._host.requests
        requests.drop(self._sid)
        subject, self._sid = requests.receive(self.take)
        self._heard = asyncio.get_running_loop().time()
        config = {
            **start,
            "deliver_subject": subject.decode(),
            "ack_policy": "none",
            "max_deliver": 1,
            "flow_control": True,
            "idle_heartbeat": round(HEARTBEAT * _SECOND),
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": round(_IDLE * _SECOND),
        }
        try:
            made, complete = await self._create(self._name, config)
        except BaseException:
            requests.drop(self._sid)
            self._delete(self._name)
            raise
        if old:
            self._delete(old)
        if not complete:
            self.stop(leave=False)
            return False
        if "opt_start_seq" not in start:
            self.last = max(self.last, int(made.get("delivered", {}).get("stream_seq", 0)))
        return True

    async def resume(self, until: int = 0) -> bool:
        """Go on behind the last message that arrived; what was missed counts as replayed."""
        if self.ended:
            return True
        self._until = until
        return await self._make(_from_sequence(self.last + 1))

    def take(self, message: Msg, position: Position | None) -> None:
        """Take a message, or a word of the consumer itself."""
        self._heard = asyncio.get_running_loop().time()
        if position is None:
            self._control(message)
            return
        if position.consumer != self._next:
            self.mute()
            self.again(f"a hole before message {position.stream}")
            return
        self._next += 1
        replay = position.stream <= self._until
        self.last = position.stream
        self._host.deliver(message, position, self.want, replay=replay, tag=None)

    def _control(self, message: Msg) -> None:
        if not message.header:
            return
        block = parse_block(message.header)
        if block.status != 100:
            if block.status >= 400:
                self.again(block.text or str(block.status))
            return
        # A request to confirm what was read so far, or the word that one is still wanted.
        wanted = message.reply or (block.get("Nats-Consumer-Stalled") or "").encode()
        if wanted:
            self._withheld.append(wanted)
            if not self._host.paused:
                self.resumed_flow()
        told = block.get("Nats-Last-Consumer")
        if not message.reply and told is not None and told.isdigit() and int(told) >= self._next:
            self.again("a message is missing")

    def resumed_flow(self) -> None:
        """Give the answers that were withheld."""
        connection = self._host.connection
        if connection is not None:
            for wanted in dict.fromkeys(self._withheld):
                connection.write(encode_pub(wanted, b""))
        self._withheld.clear()

    def stop(self, *, leave: bool) -> None:
        """End it."""
        self.ended = True
        self._host.requests.drop(self._sid)
        self._delete(self._name)


class PullConsumer(Consumer):
    """Of a subscription that acknowledges: its own, a group's, or a persistent session's.

    Args:
        name: Under which others, or a later process, find it; empty for one of our own.
        ack_wait: Seconds to wait for an acknowledgement.
        max_deliver: How often to deliver at most; 0 for as often as it takes.
        idle: Seconds without a reader after which the server drops it.
    """

    def __init__(
        self,
        host: Host,
        want: WireSub,
        subjects: Sequence[str],
        *,
        name: str,
        ack_wait: float,
        max_deliver: int,
        idle: float,
    ) -> None:
        super().__init__(host, want, subjects)
        self.shared = bool(name)
        self.name = name or host.unique()
        self._ack_wait = ack_wait
        self._max_deliver = max_deliver
        self._idle = idle if name else _MANUAL_IDLE
        self._reply = b""
        self._asked = 0
        self._session = 1
        # By number, oldest delivery first: where to settle it, and when that is too late.
        self._unsettled: dict[int, tuple[bytes, float]] = {}

    async def start(self) -> bool:
        """Make it, or find it."""
        return await self._start({"deliver_policy": "new"})

    async def start_from(self, sequence: int) -> bool:
        """Make it for what was published from that message on."""
        return await self._start(_from_sequence(sequence))

    def _listen(self) -> None:
        requests = self._host.requests
        requests.drop(self._sid)
        self._reply, self._sid = requests.receive(self.take)
        self._asked = 0
        self._heard = asyncio.get_running_loop().time()

    async def _start(self, start: Mapping[str, object]) -> bool:
        self._listen()
        config = {
            **start,
            "ack_wait": round(self._ack_wait * _SECOND),
            "max_deliver": self._max_deliver or -1,
            "ack_policy": "explicit",
            "max_ack_pending": -1,
            "inactive_threshold": round(self._idle * _SECOND),
        }
        if self.shared:
            config["durable_name"] = self.name
        try:
            made, complete = await self._create(self.name, config)
        except ApiError as error:
            if error.number not in _EXISTS:
                self._host.requests.drop(self._sid)
                raise
            # Somebody made it first, in another way; it is the same one by its name.
            stream = self._host.stream
            made = await self._host.requests.api(f"CONSUMER.INFO.{stream}.{self.name}")
            complete = True
        except BaseException:
            self._host.requests.drop(self._sid)
            raise
        if not complete:
            self.stop(leave=False)
            return False
        self.last = max(self.last, int(made.get("delivered", {}).get("stream_seq", 0)))
        self._ask()
        return True

    async def resume(self, until: int = 0) -> bool:
        """Go on, with what an earlier session left unsettled before the rest."""
        if self.ended:
            return True
        returned, self._unsettled = self._unsettled, {}
        self._session += 1
        if not await self._exists():
            return await self.start_from(min([*returned, self.last + 1]))
        self._listen()
        connection = self._host.connection
        if connection is not None:
            for reply, _ in returned.values():
                connection.write(encode_pub(reply, ack_payload(Verdict.NACK)))
        self._ask()
        return True

    async def _revive(self) -> None:
        """Ask anew in the same session, where a request may have died with its node."""
        if await self._exists():
            self._asked = 0
            self._ask()
            return
        first = min([*self._unsettled, self.last + 1])
        # What is not settled comes again, from another one.
        self._unsettled.clear()
        self._session += 1
        await self.start_from(first)

    async def _exists(self) -> bool:
        try:
            await self._host.requests.api(f"CONSUMER.INFO.{self._host.stream}.{self.name}")
        except ApiError as error:
            if error.number not in _GONE and error.code != 404:
                raise
            return False
        return True

    # --- asking --------------------------------------------------------------------------------

    def _waiting(self) -> bool:
        return self._asked > 0

    def _ask(self) -> None:
        """Ask for as many as the window has room for, once it is half empty."""
        connection = self._host.connection
        if connection is None or self.ended or self._host.paused or self._asked > WINDOW // 4:
            return
        now = asyncio.get_running_loop().time()
        if len(self._unsettled) > WINDOW // 2:
            self._forget_late(now)
        free = WINDOW - self._asked - len(self._unsettled)
        if free <= 0:
            return
        self._asked += free
        self._heard = now
        body = json.dumps(
            {
                "batch": free,
                "expires": round(_EXPIRES * _SECOND),
                "idle_heartbeat": round(HEARTBEAT * _SECOND),
            }
        )
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._host.stream}.{self.name}"
        connection.write(encode_pub(subject.encode(), body.encode(), reply=self._reply))

    def _forget_late(self, now: float) -> None:
        """Make room for what nobody settled in time: it comes again, here or elsewhere."""
        for sequence, (_, until) in tuple(self._unsettled.items()):
            if until > now:
                break
            del self._unsettled[sequence]

    def look(self, now: float) -> None:
        """Ask again where the window is full of what was forgotten, too."""
        super().look(now)
        if not self.ended:
            self._ask()

    def resumed_flow(self) -> None:
        """Ask again."""
        self._ask()

    def take(self, message: Msg, position: Position | None) -> None:
        """Take a message, or why there is none."""
        self._heard = asyncio.get_running_loop().time()
        if position is None:
            self._status(message)
            return
        self._asked = max(self._asked - 1, 0)
        self.last = max(self.last, position.stream)
        # Delivered again, it counts once, and as the newest.
        self._unsettled.pop(position.stream, None)
        self._unsettled[position.stream] = (message.reply, self._heard + self._ack_wait)
        tag = Tag(self, message.reply, position.stream, self._session)
        if not self._host.deliver(message, position, self.want, replay=False, tag=tag):
            self.settle(tag, ack_payload(Verdict.ACK))
        self._ask()

    def _status(self, message: Msg) -> None:
        block = parse_block(message.header)
        if block.status in (0, 100):
            return
        if block.status == 503 or (block.status == 409 and "deleted" in block.text.lower()):
            self._asked = 0
            self.again(block.text or "the consumer is gone")
            return
        # The request has expired, or its server goes: what it still wanted is told.
        left = block.get("Nats-Pending-Messages")
        self._asked -= int(left) if left is not None and left.isdigit() else self._asked
        self._asked = max(self._asked, 0)
        if block.status == 409:
            asyncio.get_running_loop().call_later(0.25, self._ask)
        else:
            self._ask()

    # --- settling --------------------------------------------------------------------------------

    def settle(self, tag: Tag, payload: bytes) -> None:
        """Say what became of a message; one of an earlier session comes again anyway."""
        connection = self._host.connection
        if connection is None or tag.session != self._session:
            return
        self._unsettled.pop(tag.sequence, None)
        connection.write(encode_pub(tag.reply, payload))
        self._ask()

    def working(self, tag: Tag) -> None:
        """Let the time for acknowledging a message start over."""
        connection = self._host.connection
        if connection is None or tag.sequence not in self._unsettled:
            return
        del self._unsettled[tag.sequence]
        until = asyncio.get_running_loop().time() + self._ack_wait
        self._unsettled[tag.sequence] = (tag.reply, until)
        connection.write(encode_pub(tag.reply, ack_payload(Verdict.ACK, working=True)))

    def give_back(self) -> None:
        """Let others have at once what was not settled here."""
        connection = self._host.connection
        if connection is not None:
            for reply, _ in self._unsettled.values():
                connection.write(encode_pub(reply, ack_payload(Verdict.NACK)))
        self._unsettled.clear()
        self._session += 1

    def stop(self, *, leave: bool) -> None:
        """End it; a group's stays for its other members."""
        self.ended = True
        self._host.requests.drop(self._sid)
        if self.shared:
            self.give_back()
        if not leave:
            self._delete(self.name)
