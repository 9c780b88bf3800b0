"""The session engine against a backend that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pubsub_core._runtime.session import Session
from pubsub_core.config.bus_options import BusOptions
from pubsub_core.errors import (
    AuthenticationFailed,
    BusClosed,
    ConnectError,
    ConnectTimeout,
    MissingDependency,
)
from pubsub_core.events import InterestEvent, Notice, Status, StatusChanged
from pubsub_core.interfaces import (
    Address,
    AuthorizationRequest,
    Backend,
    BackendContext,
    SessionFacts,
    Sink,
    WireSub,
)
from pubsub_core.memory.options import MemoryOptions
from pubsub_core.memory.plugin import INFO
from pubsub_core.message import InFrame, OutFrame, Receipt
from pubsub_core.pacing import Backoff
from pubsub_core.testing.clock import VirtualClock


class Scripted(Backend):
    """Opens as its script says: an error is raised, a callable awaited, None succeeds."""

    def __init__(self, *script: Any) -> None:
        super().__init__(BackendContext(INFO, Address("memory"), MemoryOptions()))
        self.script = list(script)
        self.sinks: list[Sink] = []
        self.log: list[str] = []

    async def open(self, sink: Sink) -> SessionFacts:
        self.log.append("open")
        step = self.script.pop(0) if self.script else None
        if isinstance(step, BaseException):
            raise step
        if step is not None:
            await step(sink)
        self.sinks.append(sink)
        return SessionFacts()

    async def restored(self) -> None:
        self.log.append("restored")

    async def drop(self) -> None:
        self.log.append("drop")

    async def close(self, *, drain: float) -> None:
        self.log.append("close")

    async def publish(self, out: OutFrame) -> Receipt:
        raise AssertionError("not used here")

    async def subscribe(self, want: WireSub) -> int:
        return want.qos

    async def unsubscribe(self, want: WireSub) -> None:
        return None


class Owner:
    """Records what the engine asks of a bus."""

    def __init__(self, restore: Callable[[int], Any] | None = None) -> None:
        self.frames: list[str] = []
        self.events: list[StatusChanged] = []
        self.restored: list[int] = []
        self._restore = restore

    def route(self, frame: InFrame) -> None:
        self.frames.append(frame.topic)

    def interest(self, event: InterestEvent) -> None: ...

    def authorization(self, request: AuthorizationRequest) -> None: ...

    def notice(self, notice: Notice) -> None: ...

    def sent_again(self, topic: str) -> None: ...

    async def restore(self, facts: SessionFacts, generation: int) -> None:
        if self._restore is not None:
            await self._restore(generation)
        self.restored.append(generation)

    def status_changed(self, event: StatusChanged) -> None:
        self.events.append(event)

    @property
    def statuses(self) -> list[Status]:
        return [event.status for event in self.events]


def session_of(backend: Backend, owner: Owner, clock: VirtualClock, **options: Any) -> Session:
    return Session(backend, BusOptions(**options), clock, owner, "test")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0)


async def stop(session: Session) -> None:
    session.closing()
    await session.stop_trying()
    session.closed()


async def test_statuses_in_order_and_once() -> None:
    owner, backend = Owner(), Scripted()
    session = session_of(backend, owner, VirtualClock())
    await session.start()
    await stop(session)
    assert owner.statuses == [Status.CONNECTING, Status.ONLINE, Status.CLOSING, Status.CLOSED]
    assert backend.log == ["open", "restored"]


async def test_first_failure_is_raised_at_once_by_default() -> None:
    backend, owner = Scripted(ConnectError("nobody there")), Owner()
    session = session_of(backend, owner, VirtualClock())
    with pytest.raises(ConnectError, match="nobody there"):
        await session.start()
    assert backend.log == ["open"]
    assert session.status is Status.FAILED


async def test_wait_seconds_keeps_trying_until_they_are_over() -> None:
    clock = VirtualClock(auto=True)
    backend = Scripted(*[ConnectError(f"attempt {number}") for number in range(1000)])
    session = session_of(backend, Owner(), clock, wait=20.0)
    with pytest.raises(ConnectError):
        await session.start()
    assert len(backend.log) > 3
    assert clock.monotonic() <= 20.0


async def test_wait_seconds_does_not_retry_refused_credentials() -> None:
    backend = Scripted(AuthenticationFailed("wrong password"), None)
    with pytest.raises(AuthenticationFailed):
        await session_of(backend, Owner(), VirtualClock(auto=True), wait=20.0).start()
    assert backend.log == ["open"]


async def test_wait_false_starts_offline_and_comes_online_later() -> None:
    clock, owner = VirtualClock(auto=True), Owner()
    session = session_of(Scripted(ConnectError("not yet"), None), owner, clock, wait=False)
    await session.start()
    assert not session.online
    async with asyncio.timeout(5):
        await session.wait_online()
    assert owner.statuses[0] is Status.CONNECTING
    assert owner.statuses[-1] is Status.ONLINE
    await stop(session)


async def test_a_lost_session_is_renewed_and_restored_before_online() -> None:
    clock, owner, backend = VirtualClock(auto=True), Owner(), Scripted()
    session = session_of(backend, owner, clock)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError("gone"))
    await until(lambda: session.generation == 2 and session.online)
    assert owner.restored == [1, 2]
    assert owner.statuses == [
        Status.CONNECTING,
        Status.ONLINE,
        Status.RECONNECTING,
        Status.ONLINE,
    ]
    error = owner.events[2].error
    assert isinstance(error, ConnectError)
    assert isinstance(error.__cause__, ConnectionResetError)
    await stop(session)


async def test_frames_of_a_dead_session_are_not_routed() -> None:
    clock, owner, backend = VirtualClock(auto=True), Owner(), Scripted()
    session = session_of(backend, owner, clock)
    await session.start()
    old = backend.sinks[0]
    old.deliver(InFrame(topic="before", payload=b""))
    old.lost(ConnectionResetError())
    await until(lambda: session.generation == 2 and session.online)
    old.deliver(InFrame(topic="late", payload=b""))
    backend.sinks[1].deliver(InFrame(topic="new", payload=b""))
    assert owner.frames == ["before", "new"]
    await stop(session)


async def test_frames_wait_until_the_session_is_restored() -> None:
    routed_during_restore: list[list[str]] = []

    async def early(sink: Sink) -> None:
        sink.deliver(InFrame(topic="early", payload=b""))

    async def restore(generation: int) -> None:
        await asyncio.sleep(0)
        routed_during_restore.append(list(owner.frames))

    owner = Owner(restore)
    session = session_of(Scripted(early), owner, VirtualClock())
    await session.start()
    assert routed_during_restore == [[]]
    assert owner.frames == ["early"]
    await stop(session)


async def test_frames_from_another_thread_keep_their_order() -> None:
    owner, backend = Owner(), Scripted()
    session = session_of(backend, owner, VirtualClock())
    await session.start()
    sink = backend.sinks[0]

    def burst() -> None:
        for number in range(1000):
            sink.deliver(InFrame(topic=str(number), payload=b""))

    await asyncio.to_thread(burst)
    await until(lambda: len(owner.frames) == 1000)
    assert owner.frames == [str(number) for number in range(1000)]
    await stop(session)


async def test_a_session_lost_while_restoring_counts_as_failed() -> None:
    clock = VirtualClock(auto=True)
    hanging = asyncio.Event()

    async def restore(generation: int) -> None:
        if generation == 2:
            backend.sinks[1].lost(ConnectionResetError("again"))
            await hanging.wait()

    owner, backend = Owner(restore), Scripted()
    session = session_of(backend, owner, clock)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError("gone"))
    await until(lambda: session.generation == 3 and session.online)
    assert owner.statuses.count(Status.ONLINE) == 2
    assert "drop" in backend.log
    await stop(session)


async def test_permanent_refusal_after_a_loss_ends_in_failed() -> None:
    clock, owner = VirtualClock(auto=True), Owner()
    backend = Scripted(None, AuthenticationFailed("password was changed"))
    session = session_of(backend, owner, clock)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError())
    await until(lambda: session.status is Status.FAILED)
    with pytest.raises(AuthenticationFailed):
        await session.wait_online()
    await stop(session)


async def test_reconnect_false_fails_instead() -> None:
    backend = Scripted()
    session = session_of(backend, Owner(), VirtualClock(), reconnect=False)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError())
    await until(lambda: "close" in backend.log)
    assert session.status is Status.FAILED
    assert backend.log == ["open", "restored", "close"]
    await stop(session)


async def test_backoff_starts_over_only_after_a_healthy_session() -> None:
    clock, owner = VirtualClock(), Owner()
    backend = Scripted()
    session = session_of(backend, owner, clock)
    session._backoff = backoff = Backoff(1.0, 30.0, rng=lambda: 0.999)
    await session.start()
    for generation in (1, 2):
        backend.sinks[-1].lost(ConnectionResetError())
        await until(lambda: clock.sleepers == 1)
        wake = clock.next_wake
        assert wake is not None
        await clock.advance(wake)
        async with asyncio.timeout(5):
            while not (session.online and session.generation == generation + 1):
                await asyncio.sleep(0)
    assert backoff.bound(100) == 4.0
    await clock.advance(11)
    backend.sinks[-1].lost(ConnectionResetError())
    await until(lambda: clock.sleepers == 1)
    assert clock.slept[-1] < 1.0
    await stop(session)


async def test_sessions_that_end_young_are_one_outage() -> None:
    """A broker that ended each session at once was tried 54 times in 45 seconds."""
    clock, owner = VirtualClock(), Owner()
    backend = Scripted()
    session = session_of(backend, owner, clock)
    session._backoff = Backoff(0.5, 30.0, rng=lambda: 1.0)
    await session.start()
    delays: list[float] = []
    while clock.monotonic() < 200:
        backend.sinks[-1].lost(ConnectionResetError())
        await until(lambda: clock.sleepers == 1)
        wake = clock.next_wake
        assert wake is not None
        delays.append(wake)
        await clock.advance(wake)
        await until(lambda: session.generation == len(delays) + 1 and session.online)
    # Close together for the first ten seconds, then doubling up to the bound.
    assert max(delays[:7]) <= 1.5
    assert delays[-1] == 30.0
    assert len(delays) < 25
    await stop(session)


async def test_a_hanging_open_times_out() -> None:
    async def never(sink: Sink) -> None:
        await asyncio.Event().wait()

    session = session_of(Scripted(never), Owner(), VirtualClock(), connect_timeout=0.01)
    with pytest.raises(ConnectTimeout, match="within"):
        await session.start()


async def test_an_attempt_that_hangs_early_in_an_outage_is_given_up_soon() -> None:
    """Packets that vanish must not make a short outage a long one."""
    clock, owner = VirtualClock(auto=True), Owner()

    async def never(sink: Sink) -> None:
        await asyncio.Event().wait()

    backend = Scripted(None, never, None)
    session = session_of(backend, owner, clock, connect_timeout=60.0)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError())
    async with asyncio.timeout(10):
        while session.generation < 2:
            await asyncio.sleep(0.01)
    assert any(isinstance(event.error, ConnectTimeout) for event in owner.events)
    await stop(session)


async def test_a_session_that_fails_at_its_very_end_is_not_online() -> None:
    class Failing(Scripted):
        async def restored(self) -> None:
            await super().restored()
            if self.log.count("restored") == 2:
                seen.append(session.generation)
                raise ConnectError("lost while sending what waited")

    seen: list[int] = []
    clock, owner, backend = VirtualClock(auto=True), Owner(), Failing()
    session = session_of(backend, owner, clock)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError())
    await until(lambda: session.generation == 3 and session.online)
    assert seen == [2]
    assert owner.statuses.count(Status.RECONNECTING) == 2
    await stop(session)


async def test_a_library_that_is_missing_when_it_is_needed_is_named() -> None:
    """Not every import can be tried before an option asks for it."""
    missing = ModuleNotFoundError("No module named 'nobody_has'", name="nobody_has")
    session = session_of(Scripted(missing), Owner(), VirtualClock(), wait=False)
    await session.start()
    await until(lambda: session.status is Status.FAILED)
    assert isinstance(session.error, MissingDependency)
    assert "'nobody_has'" in str(session.error)
    assert session.error.hint
    assert session.error.__cause__ is missing
    await stop(session)


async def test_a_backend_that_raises_something_else_does_not_die_in_silence(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, owner = VirtualClock(auto=True), Owner()
    backend = Scripted(None, ZeroDivisionError("a defect"))
    session = session_of(backend, owner, clock)
    await session.start()
    backend.sinks[0].lost(ConnectionResetError())
    await until(lambda: session.status is Status.FAILED)
    assert isinstance(session.error, ConnectError)
    assert isinstance(session.error.__cause__, ZeroDivisionError)
    assert "failed unexpectedly" in caplog.text
    await stop(session)


async def test_waiting_for_a_session_ends_when_the_bus_is_closed() -> None:
    session = session_of(Scripted(*[ConnectError("no")] * 50), Owner(), VirtualClock(), wait=False)
    await session.start()
    waiting = asyncio.create_task(session.wait_online())
    await asyncio.sleep(0)
    await stop(session)
    with pytest.raises(BusClosed):
        async with asyncio.timeout(5):
            await waiting
