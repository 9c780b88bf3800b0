"""What only a broker with everything can do; memory lives inside this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from pubsub_core.bus import Bus, connect
from pubsub_core.memory.backend import MemoryBackend
from tests.cli.conftest import DEADLINE, Invoke, records

URL = "memory://cli-tests"


@contextmanager
def in_background(
    script: Callable[[Bus, asyncio.Event], Coroutine[Any, Any, None]],
) -> Iterator[None]:
    """Keep a bus on the same space open in another thread and run *script* on it."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def work() -> None:
        stop = asyncio.Event()
        async with asyncio.timeout(DEADLINE * 2), connect(URL) as bus:
            started = asyncio.Event()
            task = asyncio.create_task(script(bus, started))
            waiting = asyncio.create_task(started.wait())
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            ready.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()
            task.cancel()
            waiting.cancel()
            results = await asyncio.gather(task, waiting, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception):
                    raise result

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(work())
        except BaseException as exc:
            failures.append(exc)
            if not ready.done():
                ready.set_exception(exc)

    thread = threading.Thread(target=run)
    thread.start()
    loop, stop = ready.result(DEADLINE)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(DEADLINE)
    assert not failures, failures


def test_history(invoke: Invoke) -> None:
    async def publish(bus: Bus, started: asyncio.Event) -> None:
        for number in range(5):
            await bus.publish("log/a", f"{number}")
        started.set()
        await asyncio.Event().wait()

    with in_background(publish):
        found = records(invoke("history", URL, "log/#", "--last", "3", "--json").stdout)
        assert [record["payload"] for record in found] == ["2", "3", "4"]
        assert {record["origin"] for record in found} == {"replay"}
        assert invoke("history", URL, "log/a", "--text").stdout == "0\n1\n2\n3\n4\n"
        assert invoke("history", URL, "log/a", "--since", "1h", "--text").stdout.count("\n") == 5
        assert invoke("history", URL, "log/a", "--until", "1h", "--text").stdout == ""
        wrong = invoke("history", URL, "log/a", "--since", "yesterday")
        assert wrong.exit_code == 2
        assert "15m" in wrong.stderr
        assert invoke("history", URL, "log/a", "--since", "1m", "--until", "1h").exit_code == 2


def test_replay_starts_in_the_past(invoke: Invoke) -> None:
    async def publish(bus: Bus, started: asyncio.Event) -> None:
        await bus.publish("log/b", "old")
        started.set()
        await asyncio.Event().wait()

    with in_background(publish):
        found = invoke("sub", URL, "log/b", "--replay", "1", "-n", "1", "--json")
        assert found.exit_code == 0
        (message,) = records(found.stdout)
        assert message["payload"] == "old"
        assert message["origin"] == "replay"


def test_presence_snapshot(invoke: Invoke) -> None:
    async def stay(bus: Bus, started: asyncio.Event) -> None:
        async with bus.subscribe("room/1"):
            started.set()
            await asyncio.Event().wait()

    with in_background(stay):
        found = records(invoke("presence", URL, "room/1", "--json").stdout)
        assert [record["type"] for record in found] == ["member", "snapshot"]
        assert found[0]["id"]
        assert found[1]["count"] == 1
        assert found[0]["id"] in invoke("presence", URL, "room/1").stdout
        empty = invoke("presence", URL, "room/2")
        assert empty.stdout == ""
        assert "nobody" in empty.stderr


async def come_and_go(bus: Bus, started: asyncio.Event) -> None:
    """Come and go some times, as soon as somebody watches."""
    space = bus.native(MemoryBackend).space
    started.set()
    async with asyncio.timeout(DEADLINE):
        while not space._watches:
            await asyncio.sleep(0.005)
        for _ in range(5):
            async with bus.subscribe("room/3"):
                pass
    await asyncio.Event().wait()


def test_presence_watch(invoke: Invoke) -> None:
    with in_background(come_and_go):
        result = invoke("presence", URL, "room/3", "--watch", "-n", "3", "--json")
        assert result.exit_code == 0
        events = [record for record in records(result.stdout) if record["type"] == "interest"]
        kinds = [event["kind"] for event in events if event["kind"] in ("joined", "left")]
        assert len(events) == 3
        assert set(kinds) == {"joined", "left"}
        assert all(event["member"]["id"] for event in events if event["kind"] in kinds)


def test_notifications(invoke: Invoke) -> None:
    with in_background(come_and_go):
        result = invoke("notifications", URL, "room/#", "-n", "4", "--json")
        assert result.exit_code == 0
        events = records(result.stdout)
        assert {"joined", "left"} <= {event["kind"] for event in events}
        assert {event["topic"] for event in events if event["kind"] == "joined"} == {"room/3"}


def test_a_silent_watch_ends_with_code_5(invoke: Invoke) -> None:
    for command in (("presence", URL, "room/9", "--watch"), ("notifications", URL, "room/9")):
        assert invoke(*command, "-n", "99", "--exit-after", "0.1").exit_code == 5
        assert invoke(*command, "--exit-after", "0.1").exit_code == 0
