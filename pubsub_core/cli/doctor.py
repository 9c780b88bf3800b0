"""``pubsub doctor``: why a bus does not work, one step after the other.

Each step is ok, failed with a remedy, or skipped with the reason. Steps that need an earlier
one are skipped when that failed, so the first failure is the one to look at.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import socket
import ssl
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final

import typer

from pubsub_core.bus import Bus
from pubsub_core.capabilities import Cap
from pubsub_core.config import BusConfig, Config
from pubsub_core.errors import (
    AuthenticationFailed,
    NotAuthorized,
    PubSubError,
    ServerRefused,
    TLSProblem,
)
from pubsub_core.interfaces import BackendContext, Endpoint
from pubsub_core.plugins import registry

from .exits import ExitCode, exit_code, first_error
from .options import BusArgument, BusOption, JsonOption, Settings, pairs, settings
from .output import Output, escape, explain_error, mask, show_traceback
from .running import run

__all__ = ["Outcome", "Step", "doctor"]

_SKEW: Final = 5.0
"""Seconds between two clocks that are worth telling."""


class Outcome(StrEnum):
    """How a step ended."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Step:
    """One step's result.

    Attributes:
        detail: The finding, or why it was skipped.
        remedy: Advice after a failure.
        seconds: How long it took.
        code: Exit code that a failure asks for.
    """

    name: str
    outcome: Outcome
    detail: str = ""
    remedy: str = ""
    seconds: float | None = None
    code: ExitCode = ExitCode.OK


def doctor(
    context: typer.Context,
    bus: BusArgument,
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic",
            metavar="TOPIC",
            help="Topic of the round trip, where rights are limited.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", min=0.1, help="Deadline of each step."),
    ] = 10.0,
    json: JsonOption = False,
    option: BusOption = None,
) -> None:
    """Check a bus step by step: configuration, name, port, TLS, login, round trip, clock.

    The exit code is that of the first step that failed.
    """
    with Output(json=json) as output:
        code = run(_examine(output, settings(context), bus, option, topic, timeout))
        if code:
            raise typer.Exit(code)


async def _examine(
    output: Output,
    settings: Settings,
    where: str,
    option: list[str] | None,
    topic: str | None,
    timeout: float,
) -> ExitCode:
    exam = _Exam(settings, where, pairs(option, option="--option"), topic, timeout)
    failed: list[Step] = []
    async with contextlib.aclosing(exam.steps()) as steps:
        async for step in steps:
            _tell(output, step)
            if step.outcome is Outcome.FAILED:
                failed.append(step)
    output.record(
        {
            "type": "verdict",
            "bus": mask(where),
            "status": "failed" if failed else "ok",
            "failed": [step.name for step in failed],
        }
    )
    if failed:
        output.line(f"{mask(where)}: look at {failed[0].name} first")
        return failed[0].code
    output.line(f"{mask(where)}: everything works")
    return ExitCode.OK


def _tell(output: Output, step: Step) -> None:
    output.record(
        {
            "type": "step",
            "step": step.name,
            "status": step.outcome.value,
            "detail": mask(step.detail),
            "remedy": mask(step.remedy),
            "ms": None if step.seconds is None else round(step.seconds * 1000, 2),
        }
    )
    if output.json:
        return
    colour = {Outcome.OK: "\x1b[32m", Outcome.FAILED: "\x1b[1;31m", Outcome.SKIPPED: "\x1b[2m"}
    on, off = (colour[step.outcome], "\x1b[0m") if output.colours else ("", "")
    took = "" if step.seconds is None else f" ({step.seconds * 1000:.1f} ms)"
    print(
        f"{on}{step.outcome.value:<8}{off}{step.name:<12}{escape(mask(step.detail))}{took}",
        flush=True,
    )
    if step.remedy:
        print(f"{'':20}{escape(mask(step.remedy))}", flush=True)


class _Exam:
    """The steps, in order; each learns from those before."""

    def __init__(
        self,
        settings: Settings,
        where: str,
        overrides: dict[str, str],
        topic: str | None,
        timeout: float,
    ) -> None:
        self._settings = settings
        self._where = where
        self._overrides = overrides
        self._topic = topic
        self._timeout = timeout
        self._broken = ""
        self._address: Any = None

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield each step when it is done."""
        found = self._configured()
        if isinstance(found, Step):
            yield self._note(found)
            for name in (
                "backend",
                "resolve",
                "tcp",
                "tls",
                "login",
                "round_trip",
                "ping",
                "clock",
            ):
                yield self._skip(name)
            return
        config, bus = found
        yield Step("config", Outcome.OK, f"{bus.name}: {bus.address} by backend {bus.info.name}")
        endpoint = self._backend(bus)
        if isinstance(endpoint, Step):
            yield self._note(endpoint)
        else:
            yield Step("backend", Outcome.OK, bus.info.factory)
        endpoint = endpoint if isinstance(endpoint, Endpoint) else None
        yield self._note(await self._resolve(endpoint))
        yield self._note(await self._tcp(endpoint))
        async with contextlib.AsyncExitStack() as stack:
            tls, login, session = await self._login(stack, config, endpoint)
            yield self._note(tls)
            yield self._note(login)
            if session is None:
                for name in ("round_trip", "ping", "clock"):
                    yield self._skip(name)
                return
            trip, clock = await self._round_trip(session)
            yield self._note(trip)
            yield self._note(await self._ping(session))
            yield self._note(clock)

    def _note(self, step: Step) -> Step:
        if step.outcome is Outcome.FAILED and not self._broken:
            self._broken = step.name
        return step

    def _skip(self, name: str) -> Step:
        return Step(name, Outcome.SKIPPED, f"{self._broken} failed")

    def _configured(self) -> tuple[Config, BusConfig] | Step:
        try:
            config = self._settings.load()
            return config, config.bus(self._where, self._overrides)
        except (PubSubError, OSError) as exc:
            return _failed("config", exc)

    def _backend(self, bus: BusConfig) -> Endpoint | Step | None:
        try:
            factory = registry().load(bus.info)
            made = factory(BackendContext(bus.info, bus.address, bus.options, bus=bus.name))
        except Exception as exc:  # noqa: BLE001 - a backend's constructor may raise anything
            return _failed("backend", exc)
        if made.endpoint is not None:
            return made.endpoint
        if bus.address.host and bus.address.port is not None:
            return Endpoint(bus.address.host, bus.address.port)
        return None

    async def _resolve(self, endpoint: Endpoint | None) -> Step:
        if self._broken:
            return self._skip("resolve")
        if endpoint is None:
            return Step("resolve", Outcome.SKIPPED, "this backend uses no socket")
        if endpoint.port is None:
            return Step("resolve", Outcome.SKIPPED, "a local socket has no name to resolve")
        start = time.perf_counter()
        try:
            async with asyncio.timeout(self._timeout):
                found = await asyncio.get_running_loop().getaddrinfo(
                    endpoint.host, endpoint.port, type=socket.SOCK_STREAM
                )
        except (OSError, TimeoutError, UnicodeError) as exc:
            return _failed(
                "resolve",
                exc,
                f"{endpoint.host} has no address",
                "check the spelling of the host, and this machine's DNS",
            )
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        detail = f"{endpoint.host} is {', '.join(addresses)}"
        return Step("resolve", Outcome.OK, detail, seconds=time.perf_counter() - start)

    async def _tcp(self, endpoint: Endpoint | None) -> Step:
        if self._broken:
            return self._skip("tcp")
        if endpoint is None:
            return Step("tcp", Outcome.SKIPPED, "this backend uses no socket")
        start = time.perf_counter()
        place = endpoint.host if endpoint.port is None else f"{endpoint.host}:{endpoint.port}"
        try:
            async with asyncio.timeout(self._timeout):
                if endpoint.port is None:
                    _, writer = await asyncio.open_unix_connection(endpoint.host)
                else:
                    _, writer = await asyncio.open_connection(endpoint.host, endpoint.port)
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError) as exc:
            silent = isinstance(exc, TimeoutError)
            return _failed(
                "tcp",
                exc,
                f"{place} does not answer" if silent else f"{place} refuses the connection",
                "a firewall may drop packets, or the address is wrong"
                if silent
                else "start the broker, or check host and port",
            )
        return Step("tcp", Outcome.OK, place, seconds=time.perf_counter() - start)

    async def _login(
        self, stack: contextlib.AsyncExitStack, config: Config, endpoint: Endpoint | None
    ) -> tuple[Step, Step, Bus | None]:
        if self._broken:
            return self._skip("tls"), self._skip("login"), None
        encrypted = endpoint is not None and endpoint.tls
        tls = (
            # Made by the backend itself, with its own authorities and certificates.
            Step("tls", Outcome.OK, self._verified(config))
            if encrypted
            else Step("tls", Outcome.SKIPPED, "the connection is not encrypted")
        )
        start = time.perf_counter()
        try:
            given: dict[str, Any] = {"reconnect": False, "wait": True, **self._overrides}
            given.setdefault("connect_timeout", self._timeout)
            bus = Bus(self._where, config=config, options=given)
            await stack.enter_async_context(bus)
        except Exception as exc:  # noqa: BLE001 - told as the step's result
            error = first_error(exc)
            if isinstance(error, (TLSProblem, ssl.SSLError)):
                failed = _failed("tls", error)
                self._broken = "tls"
                return failed, self._skip("login"), None
            answered = isinstance(error, (AuthenticationFailed, ServerRefused))
            if encrypted and not answered:
                tls = Step("tls", Outcome.SKIPPED, "the session ended before it was certain")
            return tls, _failed("login", error), None
        took = time.perf_counter() - start
        server = getattr(bus, "server", "") or bus.info.name
        return tls, Step("login", Outcome.OK, f"accepted by {server}", seconds=took), bus

    def _verified(self, config: Config) -> str:
        options = config.bus(self._where, self._overrides).options
        names = [field.name for field in dataclasses.fields(options) if "insecure" in field.name]
        insecure = [name for name in names if getattr(options, name)]
        if insecure:
            return f"encrypted, but nothing is verified: {', '.join(insecure)} is set"
        return "certificate and host name verified"

    async def _round_trip(self, bus: Bus) -> tuple[Step, Step]:
        topic = self._topic or f"pubsub/doctor/{secrets.token_hex(6)}"
        payload = secrets.token_hex(16).encode()
        unknown = Step("clock", Outcome.SKIPPED, "round_trip failed")
        try:
            async with asyncio.timeout(self._timeout), bus.subscribe(topic) as inbox:
                sent, start = time.time(), time.perf_counter()
                receipt = await bus.publish(topic, payload)
                message = await inbox.get()
                while message.raw != payload:  # another session's
                    message = await inbox.get()
                took, received = time.perf_counter() - start, time.time()
        except NotAuthorized as exc:
            return (
                _failed(
                    "round_trip",
                    exc,
                    remedy="name a topic you may use with --topic, or ask for rights",
                ),
                unknown,
            )
        except TimeoutError as exc:
            step = _failed(
                "round_trip",
                exc,
                f"published to {topic}, and it did not come back in {self._timeout:g} s",
                "the broker may refuse without telling: check rights, or use --topic",
            )
            return step, unknown
        except PubSubError as exc:
            return _failed("round_trip", exc), unknown
        detail = f"{topic}, confirmed by {receipt.confirmed_by.value}"
        trip = Step("round_trip", Outcome.OK, detail, seconds=took)
        return trip, _clock(message.time, sent, received)

    async def _ping(self, bus: Bus) -> Step:
        support = bus.supports(Cap.PING)
        if not support:
            return Step("ping", Outcome.SKIPPED, support.why or "this backend has no ping")
        try:
            async with asyncio.timeout(self._timeout):
                seconds = await bus.ping()
        except (PubSubError, TimeoutError) as exc:
            return _failed("ping", exc)
        return Step("ping", Outcome.OK, "the broker answers", seconds=seconds)


def _clock(told: float, sent: float, received: float) -> Step:
    """Compare the time in a message with when it was on its way."""
    if sent <= told <= received:
        # The backend stamps the arrival where the broker tells no time.
        return Step("clock", Outcome.OK, "the broker's clock, if it tells one, agrees with ours")
    skew = told - (received if told > received else sent)
    ahead = "ahead of" if skew > 0 else "behind"
    detail = f"the broker's clock is {abs(skew):.1f} s {ahead} ours"
    if abs(skew) <= _SKEW:
        return Step("clock", Outcome.OK, detail)
    return Step(
        "clock",
        Outcome.FAILED,
        detail,
        "set both clocks by NTP; ttl, history and certificates depend on them",
        code=ExitCode.FAILED,
    )


def _failed(step: str, error: BaseException, what: str = "", remedy: str = "") -> Step:
    show_traceback(error)
    record = explain_error(error)
    reason = record["message"]
    detail = (
        reason if not what else what if isinstance(error, TimeoutError) else f"{what}: {reason}"
    )
    code = exit_code(error)
    if step in ("resolve", "tcp", "tls", "login"):
        code = ExitCode.CONNECT
    return Step(step, Outcome.FAILED, detail, remedy or record["hint"], code=code)
