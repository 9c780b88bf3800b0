"""``pubsub demo``: one application file, unchanged, on every broker that can be started here.

Each backend with an embedded server gets one on a free port of loopback; memory needs none.
A second session plays the rest of the world: it sends readings, receives alarms, watches who
comes and goes, and tries features that only some brokers have. Everything shown did happen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

import typer

from pubsub_core.bus import Bus, connect
from pubsub_core.capabilities import Cap, Level, Support
from pubsub_core.config import Config
from pubsub_core.errors import NotSupported, PubSubError
from pubsub_core.events import InterestEvent
from pubsub_core.interfaces import BackendInfo, DevServer
from pubsub_core.plugins import registry

from .caps import level_mark
from .exits import ExitCode
from .interest import describe_event
from .options import JsonOption
from .output import Output, escape, explain_error, mask, show_traceback, table
from .running import run
from .serve import make_server

__all__ = ["demo"]

CELSIUS: Final = (20.5, 81.5, 95.0)
"""The readings of the oven's thermometer, in order."""
_START: Final = 8.0
"""Seconds that a server may take to start."""
_STORY: Final = 8.0
"""Seconds that the application may take on one broker."""
_ALL: Final = 26.0
"""Seconds for everything; backends beyond it are shown as not run."""
_SETTLE: Final = 2.0
"""Seconds to wait for the news that the application came or went."""


def demo(
    backend: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BACKEND]...", help="Only these; all by default.", show_default=False
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Run one small application, unchanged, on every broker that can be started here.

    It takes a few seconds and needs no set-up. A broker whose server cannot start is shown
    with its reason and does no harm: the exit code is 0 when the application worked on memory
    and on all that did start, 1 when it failed on one of them.
    """
    with Output(json=json) as output:
        chosen = [registry().by_name(name) for name in backend or ()] or list(_candidates())
        tales = run(_Demo(output).run(chosen))
        _summary(output, tales)
        if any(tale.failed for tale in tales) or not any(tale.worked for tale in tales):
            raise typer.Exit(ExitCode.FAILED)


def _candidates() -> tuple[BackendInfo, ...]:
    """Return every backend that needs no broker of the user's; those without server first."""
    infos = registry().infos
    alone = [info for info in infos if info.name == "memory"]
    return (*alone, *(info for info in infos if info.dev_server and info not in alone))


@dataclass(slots=True)
class _Tale:
    """The events on one backend."""

    info: BackendInfo
    started: bool = False
    worked: bool = False
    reason: str = ""
    seconds: float = 0.0
    sent: int = 0
    received: int = 0
    server: str = ""
    found: dict[Cap, Support] = field(default_factory=dict[Cap, Support])

    @property
    def failed(self) -> bool:
        """Whether the server was there and the application did not work on it."""
        return self.started and not self.worked


class _AppLog(logging.Handler):
    """Shows the application's log."""

    def __init__(self, tell: Callable[..., None]) -> None:
        super().__init__(logging.INFO)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell("app", record.getMessage())


_STYLE: Final = {
    "server": "bold",
    "sent": "green",
    "received": "cyan",
    "app": "magenta",
    "joined": "yellow",
    "left": "yellow",
    "can": "green",
    "cannot": "dim",
    "failed": "bold red",
    "unavailable": "yellow",
}


class _Demo:
    def __init__(self, output: Output) -> None:
        self._output = output
        self._tale: _Tale | None = None

    async def run(self, infos: list[BackendInfo]) -> list[_Tale]:
        end = time.monotonic() + _ALL
        tales: list[_Tale] = []
        self._heading()
        for info in infos:
            self._tale = tale = _Tale(info)
            tales.append(tale)
            self._section(info)
            start = time.monotonic()
            left = end - start
            if left <= 1:
                tale.reason = "no time left"
                self._tell(
                    "unavailable", "no time left for it; run `pubsub demo " + info.name + "`"
                )
                continue
            try:
                await self._backend(tale, left)
            except Exception as exc:  # noqa: BLE001 - one broker's trouble must not end the tour
                show_traceback(exc)
                record = explain_error(exc)
                hint = f" ({record['hint']})" if record["hint"] else ""
                tale.reason = f"{record['message']}{hint}"
                self._tell("failed" if tale.started else "unavailable", tale.reason)
            tale.seconds = time.monotonic() - start
        return tales

    async def _backend(self, tale: _Tale, left: float) -> None:
        async with contextlib.AsyncExitStack() as stack:
            if tale.info.dev_server:
                server = make_server(tale.info, "127.0.0.1", 0)
                async with asyncio.timeout(min(_START, left)):
                    await stack.enter_async_context(_running(server))
                # A server may want credentials of its clients, or know them by their URL.
                client_url: Callable[[], str] = getattr(server, "client_url", lambda: server.url)
                url, world = client_url(), client_url()
                tale.server = str(server.describe().get("server", ""))
                self._tell("server", f"{tale.server or 'embedded server'} on {mask(server.url)}")
            else:
                world = url = f"{tale.info.schemes[0]}://pubsub-demo"
                self._tell("server", f"{mask(url)}: nothing to start")
            tale.started = True
            async with asyncio.timeout(min(_STORY, left)):
                await self._story(tale, url, world)
            tale.worked = True

    async def _story(self, tale: _Tale, url: str, outside: str) -> None:
        # Imported here, so that `python -m pubsub_core.cli.demo_app` runs it as well.
        from .demo_app import TOO_HOT, Alarm, Reading, app  # noqa: PLC0415

        config = Config(environ={})  # nobody's pubsub.toml shall change the demo
        async with contextlib.AsyncExitStack() as stack:
            world = await stack.enter_async_context(connect(outside, config=config))
            alarms = await stack.enter_async_context(world.subscribe("demo/alarm", Alarm))
            watching = _Watcher(self._tell)
            await watching.start(stack, world)
            async with app.running({"main": url}):
                await watching.wait_for("joined")
                for reading in map(Reading, CELSIUS):
                    receipt = await world.publish("demo/oven", reading)
                    tale.sent += 1
                    self._tell(
                        "sent",
                        f"demo/oven {reading}, confirmed by {receipt.confirmed_by.value}",
                        topic="demo/oven",
                        payload={"celsius": reading.celsius},
                        confirmed_by=receipt.confirmed_by.value,
                    )
                for expected in (each for each in CELSIUS if each > TOO_HOT):
                    message = await alarms.get()
                    if message.payload.celsius != expected:
                        raise AssertionError(
                            f"expected an alarm at {expected}, got {message.payload}"
                        )
                    tale.received += 1
                    self._tell(
                        "received",
                        f"demo/alarm {message.payload}",
                        topic=message.topic,
                        payload={"device": "oven", "celsius": message.payload.celsius},
                    )
            await watching.wait_for("left")
            await self._extras(world)
            tale.found = {cap: world.supports(cap) for cap in Cap}

    async def _extras(self, world: Bus) -> None:
        """Try features that only some brokers have; each either works or says why not."""

        async def retained() -> str:
            await world.publish("demo/setpoint", 75.0, retain=True)
            last = await world.last("demo/setpoint", float)
            await world.clear("demo/setpoint")
            return f"the last value of demo/setpoint is {last.payload if last else None}"

        async def history() -> str:
            old = [
                message.payload["celsius"]
                async for message in world.history("demo/oven", dict[str, float])
            ]
            told = ", ".join(f"{celsius:.1f}" for celsius in old)
            return f"demo/oven had {told or 'nothing stored'}"

        async def wildcards() -> str:
            async with world.subscribe("demo/{room}/lamp/#") as everything:
                await world.publish("demo/hall/lamp/on", b"1")
                message = await everything.get(_SETTLE)
                return (
                    f"demo/{{room}}/lamp/# received {message.topic}, room={message.params['room']}"
                )

        async def groups() -> str:
            async with (
                world.subscribe("demo/jobs", group="workers") as one,
                world.subscribe("demo/all") as end,
            ):
                await world.publish("demo/jobs", b"a job")
                await world.publish("demo/all", b"end")
                job = await one.get(_SETTLE)
                await end.get(_SETTLE)
                return f"one of the group 'workers' received {job.payload.decode()!r}"

        async def presence() -> str:
            async with world.subscribe("demo/alarm"):
                members = await world.members("demo/alarm")
                return f"{len(members)} subscribed to demo/alarm"

        async def notifications() -> str:
            async with world.notifications("demo/#"):
                return "a publisher is told who subscribes"

        trials: dict[Cap, Callable[[], Awaitable[str]]] = {
            Cap.WILDCARDS: wildcards,
            Cap.GROUPS: groups,
            Cap.RETAINED: retained,
            Cap.HISTORY: history,
            Cap.PRESENCE: presence,
            Cap.NOTIFICATIONS: notifications,
        }
        for cap, trial in trials.items():
            support = world.supports(cap)
            try:
                told = await trial()
            except NotSupported as exc:
                self._tell("cannot", f"{cap.value}: {exc.why}", capability=cap.value, why=exc.why)
                continue
            except (PubSubError, TimeoutError) as exc:
                if support.level in (Level.NATIVE, Level.EMULATED):
                    raise
                why = str(exc) or "no answer"
                self._tell("cannot", f"{cap.value}: {why}", capability=cap.value, why=why)
                continue
            how = "" if support.level is not Level.EMULATED else f" (emulated: {support.why})"
            self._tell("can", f"{cap.value}: {told}{how}", capability=cap.value, why=support.why)

    # --- showing -----------------------------------------------------------------------

    def _heading(self) -> None:
        if self._output.json:
            return
        from rich.panel import Panel  # noqa: PLC0415 - slow to import, rarely needed

        readings = ", ".join(f"{celsius:g}" for celsius in CELSIUS)
        self._output.draw(
            Panel.fit(
                "One application file, unchanged, on one broker after the other.\n"
                f"The world sends the temperatures {readings}; the application "
                "raises an alarm above 80 °C.\n"
                f"[dim]{__package__}.demo_app[/]",
                title="pubsub demo",
            )
        )

    def _section(self, info: BackendInfo) -> None:
        if self._output.json:
            return
        self._output.draw(f"\n[bold]── {info.name} ──[/] [dim]{info.about}[/]")

    def _tell(self, event: str, text: str, **fields: Any) -> None:
        tale = self._tale
        self._output.record(
            {
                "type": "demo",
                "backend": tale.info.name if tale else "",
                "event": event,
                "text": text,
                **fields,
            }
        )
        if not self._output.json:
            from rich.markup import escape as plain  # noqa: PLC0415 - slow to import

            style = _STYLE[event]
            self._output.draw(f"  [{style}]{event:>11}[/]  {plain(escape(text))}")


@contextlib.asynccontextmanager
async def _running(server: DevServer) -> AsyncGenerator[None, None]:
    try:
        await server.start()
        yield
    finally:
        await server.stop()


class _Watcher:
    """Shows who comes to and goes from the application's topic, where the broker tells."""

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._seen: dict[str, asyncio.Event] = {}

    async def start(self, stack: contextlib.AsyncExitStack, world: Bus) -> None:
        logger = logging.getLogger("demo_app")
        handler, level = _AppLog(self._tell), logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        stack.callback(logger.setLevel, level)
        stack.callback(logger.removeHandler, handler)
        # Presence where there is one, else notifications: two views of the same fact.
        for cap, view in (
            (Cap.PRESENCE, world.presence),
            (Cap.NOTIFICATIONS, world.notifications),
        ):
            if world.supports(cap):
                events = await stack.enter_async_context(view("demo/oven"))
                self._seen = {"joined": asyncio.Event(), "left": asyncio.Event()}
                task = asyncio.create_task(self._follow(events), name="pubsub-demo-presence")
                stack.push_async_callback(_end, task)
                return

    async def _follow(self, events: AsyncIterator[InterestEvent]) -> None:
        async for event in events:
            if event.kind.value in self._seen:
                self._tell(event.kind.value, describe_event(event), topic=event.topic)
                self._seen[event.kind.value].set()

    async def wait_for(self, kind: str) -> None:
        if kind in self._seen:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE):
                    await self._seen[kind].wait()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _summary(output: Output, tales: list[_Tale]) -> None:
    for tale in tales:
        output.record(
            {
                "type": "result",
                "backend": tale.info.name,
                "status": "ok" if tale.worked else "failed" if tale.started else "unavailable",
                "server": tale.server,
                "reason": tale.reason,
                "sent": tale.sent,
                "received": tale.received,
                "seconds": round(tale.seconds, 3),
                "capabilities": {cap.value: each.level.value for cap, each in tale.found.items()},
                "why_not": {cap.value: each.why for cap, each in tale.found.items() if not each},
            }
        )
    if output.json:
        return
    from rich.markup import escape as plain  # noqa: PLC0415 - slow to import, rarely needed

    told = [tale for tale in tales if tale.found]
    drawn = table("", ["capability", *(tale.info.name for tale in told)])
    for cap in Cap:
        drawn.add_row(cap.value, *(level_mark(tale.found[cap]) for tale in told))
    output.draw("\n[bold]── summary ──[/]", drawn)
    missing = table("why not", ["backend", "capability", "reason"])
    for tale in told:
        for cap, support in tale.found.items():
            if not support:
                missing.add_row(tale.info.name, cap.value, plain(support.why))
    output.draw(missing)
    for tale in tales:
        if tale.worked:
            output.draw(
                f"  [green]✓[/] {tale.info.name}: {tale.sent} readings sent, "
                f"{tale.received} alarms received, {tale.seconds:.1f} s"
            )
        else:
            mark = "[red]✗[/]" if tale.failed else "[yellow]-[/]"
            output.draw(f"  {mark} {tale.info.name}: {plain(escape(tale.reason))}")
    output.draw(
        "[dim]`pubsub serve NAME` starts one of these brokers; `pubsub caps` has the table.[/]"
    )
